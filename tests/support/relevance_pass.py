"""Relevance patching the plain way: a pass in which autograd finds the coefficients of the rules.

Nothing is shared with the package but weights and rotations. What is to be constant is detached, as
in the code of Jafari et al. 2025; every input has a number of its own added, of which F has the
derivative.
"""

import torch

from slow_shares import activation, own, turned
from sparse_signals.core.model import Model


def held(model: Model, part, x):
    """A normalisation that divides by a constant."""
    y = x if model.rms else x - x.mean(-1, keepdim=True)
    scale = (y.square().mean(-1, keepdim=True) + model.bridge.cfg.eps).sqrt().detach()
    n = part.w * y / scale
    return n if model.rms else n + part.b


def relevance_readers(model: Model, tokens, direction) -> dict[str, torch.Tensor]:
    """What F = direction·logits hears of each input: q, k, v [layer head pos d], mlp, out [… d].

    And what components wrote, before their biases: "wrote" [component pos d].
    """
    bridge, (T, d) = model.bridge, (len(tokens), model.d_model)
    shapes = dict.fromkeys("qkv", (model.n_layers, model.n_heads, T, d))
    shapes |= {"mlp": (model.n_layers, T, d), "out": (T, d)}
    added = {name: torch.zeros(shape).double().requires_grad_() for name, shape in shapes.items()}
    x = bridge.embed.W_E[tokens].detach()
    wrote = [x]
    if not model.rotary:
        wrote.append(bridge.pos_embed.W_pos[:T].detach())
        x = x + wrote[-1]
    past = torch.ones(T, T, dtype=torch.bool).tril()
    for layer, block in enumerate(bridge.blocks):
        attn, mid = block.attn, x
        for h in range(model.n_heads):
            y = {}
            for name in "QKV":
                W, b = own(attn, name, h, model)
                y[name] = held(model, block.ln1, x + added[name.lower()][layer, h]) @ W + b
            if model.head_gains:
                y["Q"], y["K"] = held(model, attn.q_norm, y["Q"]), held(model, attn.k_norm, y["K"])
            scores = turned(model, y["Q"]) @ turned(model, y["K"]).T / model.divisor[layer]
            A = scores.masked_fill(~past, -torch.inf).softmax(-1)
            moved = A @ y["V"] @ attn.W_O[h]
            b_V = own(attn, "V", h, model)[1]
            wrote.append((moved - b_V @ attn.W_O[h] if torch.is_tensor(b_V) else moved).detach())
            mid = mid + moved
        bias = torch.zeros(T, d).double() + (0 if attn.b_O is None else attn.b_O)
        mid, mlp = mid + bias, block.mlp
        wrote.append(bias)
        n = held(model, block.ln2, (x if model.parallel else mid) + added["mlp"][layer])
        first = n @ mlp.W_in + (0 if mlp.b_in is None else mlp.b_in)
        gate = first
        if mlp.W_gate is not None:
            gate = n @ mlp.W_gate + (0 if mlp.b_gate is None else mlp.b_gate)
        active = gate * (activation(block)(gate) / gate).detach()
        if mlp.W_gate is not None:
            product = active * first
            active = product / 2 + (product / 2).detach()
        out = active @ mlp.W_out + (0 if mlp.b_out is None else mlp.b_out)
        wrote.append(out.detach())
        x = mid + out
    last = held(model, bridge.ln_final, x + added["out"])[-1]
    F = last @ bridge.unembed.W_U @ direction
    found = torch.autograd.grad(F, list(added.values()))
    return dict(zip(added, found, strict=True)) | {"wrote": torch.stack(wrote).detach()}
