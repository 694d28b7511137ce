"""Interventions the slow way: one full forward pass of the bridge for each, with hooks."""

import torch

from sparse_signals.core.model import Model
from sparse_signals.interventions.changes import MID, PRE, Changes, K, Q, V


def changes_of(rows: list[tuple], width: int) -> Changes:
    """Changes from tuples (row, layer, site, head, token, vector)."""
    row, layer, site, head, token, values = zip(*rows, strict=True) if rows else [()] * 6
    ints = [torch.tensor(x, dtype=torch.long) for x in (row, layer, site, head, token)]
    values = torch.stack(values) if rows else torch.zeros(0, width, dtype=torch.float64)
    factor = torch.ones(len(rows), dtype=torch.float64)
    return Changes(*ints, factor, torch.arange(len(rows)), values)


def full_pass(
    model: Model,
    tokens: torch.Tensor,
    changes: list[tuple],
    probe: tuple | None = None,
    freeze_norms: bool = False,
) -> tuple[torch.Tensor, float, float]:
    """All logits of one prompt; score and attention weight at the probe (layer, head, i, j).

    `changes` are (layer, site, head, token, vector).
    """
    seen, hooks = {}, []

    def hook(name: str, function) -> None:
        hooks.append((name, lambda value, hook: function(value)))

    if freeze_norms:
        _freeze(model, tokens, hook)
    for layer in {change[0] for change in changes}:
        _register(hook, seen, model, layer, [c for c in changes if c[0] == layer])
    if probe:
        layer, *place = probe
        name = f"blocks.{layer}.attn.hook_"
        hook(name + "attn_scores", lambda x: seen.update(score=x[0, *place]))
        hook(name + "pattern", lambda x: seen.update(weight=x[0, *place]))
    with torch.no_grad():
        logits = model.bridge.run_with_hooks(tokens[None], fwd_hooks=hooks)[0]
    return logits, *(float(seen.get(name, torch.nan)) for name in ("score", "weight"))


def norms_in_heads(model: Model) -> list[str]:
    """The names of the normalisations of queries and keys inside heads, if there are any."""
    layers = range(model.n_layers if model.head_gains else 0)
    return [f"blocks.{layer}.attn.{name}" for layer in layers for name in ("q_norm", "k_norm")]


def _freeze(model, tokens, hook):
    """Every normalisation divides by what it divided by without changes."""
    norms = [f"blocks.{layer}.{name}" for layer in range(model.n_layers) for name in ("ln1", "ln2")]
    names = [f"{name}.hook_scale" for name in [*norms, *norms_in_heads(model), "ln_final"]]
    with torch.no_grad():
        clean = model.bridge.run_with_cache(tokens[None], names_filter=lambda x: x in names)[1]
    for name in names:
        hook(name, lambda x, scale=clean[name]: scale)


def _register(hook, seen, model, layer, changes):
    """Hooks of one layer. A key is changed for one query head, as what it adds to scores."""
    at = {site: [c[2:] for c in changes if c[1] == site] for site in (PRE, Q, K, V, MID)}
    scaling = model.bridge.blocks[layer].attn.original_component.scaling

    def stream(x, site):
        x = x.clone()
        for _, token, vector in at[site]:
            x[0, token] += vector.to(x)
        return x

    def queries(x):
        x = x.clone()
        for head, token, vector in at[Q]:
            x[0, token, head] += vector.to(x)
        seen["q"] = x[0]
        return x

    def scores(x, q=seen):
        x = x.clone()
        for head, token, vector in at[K]:
            x[0, head, token:, token] += q["q"][token:, head] @ vector.to(x) * scaling
        return x

    def outputs(x):
        z = x.clone().view(*x.shape[:2], model.n_heads, model.d_head)
        for head, token, vector in at[V]:
            z[0, :, head] += seen["pattern"][head, :, token, None] * vector.to(x)
        return z.view(x.shape)

    name = f"blocks.{layer}."
    hook(name + "hook_resid_pre", lambda x: stream(x, PRE))
    hook(name + "hook_attn_out", lambda x: stream(x, MID))
    hook(name + ("attn.hook_rot_q" if model.rotary else "attn.hook_q"), queries)
    hook(name + "attn.hook_attn_scores", scores)
    hook(name + "attn.hook_pattern", lambda x: seen.update(pattern=x[0]))
    hook(name + "attn.hook_z", outputs)
