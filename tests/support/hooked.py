"""The bridge with every gated input replaced through a hook of TransformerLens."""

import torch

from sparse_signals.core.checkpoints import read_checkpoint
from sparse_signals.core.forward import logit_difference


def ungrouped(directory):
    """The transformers model in float64, with keys and values of its own for each query head."""
    hf_model, _ = read_checkpoint(directory, torch.float64)
    config = hf_model.config
    shared = getattr(config, "num_key_value_heads", config.num_attention_heads)
    if shared == config.num_attention_heads:
        return hf_model
    weights = hf_model.state_dict()
    for name, weight in weights.items():
        if "k_proj" in name or "v_proj" in name:
            heads = weight.unflatten(0, (shared, -1))
            weights[name] = heads.repeat_interleave(config.num_attention_heads // shared, 0)
            weights[name] = weights[name].flatten(0, 1)
    config.num_key_value_heads = config.num_attention_heads
    model = type(hf_model)(config).double()
    model.load_state_dict(weights)
    return model


def hooked(model, batch, gates):
    """logit(IO) − logit(S) of the bridge, with every gated input replaced by one of its hooks.

    Of a model that is `ungrouped`: heads that share a key would get one input together.
    """
    bridge, wrote, hooks = model.bridge, [], []
    bridge.set_use_split_qkv_input(True)
    bridge.set_use_hook_mlp_in(True)
    bridge.set_use_attn_result(True)

    def hook(name, function):
        hooks.append((name, lambda value, hook: function(value)))

    def mixed(gate, components=None):
        now = torch.stack(wrote[:components], dim=2)
        old = gates.reference[:, : now.shape[2]][gates.place]
        shares = gate[..., : now.shape[2]][gates.row]
        return torch.einsum("pthc,ptcd->pthd", shares, now - old) + old.sum(2, keepdim=True)

    def moved(value, layer):
        biases = torch.einsum("hr,hrd->hd", model.writers.b_V[layer], model.writers.W_O[layer])
        wrote.extend((value - biases).unbind(2))
        wrote.append(model.writers.bias[layer].expand_as(wrote[0]))

    hook("hook_embed", wrote.append)
    if not model.rotary:
        hook("hook_pos_embed", lambda x: wrote.append(x.expand_as(wrote[0])))
    for layer in range(model.n_layers):
        name = f"blocks.{layer}."
        for side in "qkv":
            gate = getattr(gates, side)
            if gate is not None:
                hook(f"{name}attn.hook_{side}_input", lambda _, g=gate[:, layer]: mixed(g))
        hook(f"{name}attn.hook_result", lambda x, layer=layer: moved(x, layer))
        if gates.mlp is not None:
            gate = gates.mlp[:, layer, None]
            upstream = model.components_below(layer) if model.parallel else None
            hook(f"{name}hook_mlp_in", lambda _, g=gate, n=upstream: mixed(g, n).squeeze(2))
        hook(f"{name}hook_mlp_out", wrote.append)
    if gates.out is not None:
        hook("ln_final.hook_in", lambda _: mixed(gates.out.unsqueeze(1)).squeeze(2))
    return logit_difference(model, batch, hooks)
