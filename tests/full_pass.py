"""Interventions the slow way: one full forward pass of the bridge for each, with hooks."""

import torch

from sparse_signals.interventions import MID, PRE, SITES, Changes, K, Q, V
from sparse_signals.models import Model


def changes_of(rows: list[tuple], width: int) -> Changes:
    """Changes from tuples (row, layer, site, head, token, vector)."""
    row, layer, site, head, token, values = zip(*rows, strict=True) if rows else [()] * 6
    ints = [torch.tensor(x, dtype=torch.long) for x in (row, layer, site, head, token)]
    values = torch.stack(values) if rows else torch.zeros(0, width, dtype=torch.float64)
    factor = torch.ones(len(rows), dtype=torch.float64)
    return Changes(*ints, factor, torch.arange(len(rows)), values)


def full_pass(
    model: Model, tokens: torch.Tensor, changes: list[tuple], probe: tuple | None = None
) -> tuple[torch.Tensor, float, float]:
    """All logits of one prompt; score and attention weight at the probe (layer, head, i, j)."""
    seen, hooks = {}, []
    rotated = "attn.hook_rot_" if model.rotary else "attn.hook_"

    def hook(layer: int, name: str):
        def register(function):
            def run(value, hook):
                return function(value)

            hooks.append((f"blocks.{layer}.{name}", run))

        return register

    for layer in {change[0] for change in changes}:
        _register(hook, rotated, seen, model, layer, [c for c in changes if c[0] == layer])
    if probe:
        layer, *place = probe
        hook(layer, "attn.hook_attn_scores")(lambda x: seen.update(score=x[0, *place]))
        hook(layer, "attn.hook_pattern")(lambda x: seen.update(weight=x[0, *place]))
    with torch.no_grad():
        logits = model.bridge.run_with_hooks(tokens[None], fwd_hooks=hooks)[0]
    return logits, *(float(seen.get(name, torch.nan)) for name in ("score", "weight"))


def _register(hook, rotated, seen, model, layer, changes):
    """Hooks of one layer. `changes` are (layer, site, head, token, vector)."""
    block = model.bridge.blocks[layer]
    at = {site: [c[2:] for c in changes if c[1] == site] for site in range(len(SITES))}

    def stream(site):
        def change(x):
            x = x.clone()
            for _, token, vector in at[site]:
                x[0, token] += vector.to(x)
            return x

        return change

    hook(layer, "hook_resid_pre")(stream(PRE))
    hook(layer, "hook_attn_out")(stream(MID))

    @hook(layer, rotated + "q")
    def _(x):
        x = x.clone()
        for head, token, vector in at[Q]:
            x[0, token, head] += vector.to(x)
        seen["q", layer] = x[0]
        return x

    @hook(layer, "attn.hook_attn_scores")
    def _(x):
        x = x.clone()
        for head, token, vector in at[K]:
            extra = seen["q", layer][token:, head] @ vector.to(x)
            x[0, head, token:, token] += extra * block.attn.original_component.scaling
        return x

    @hook(layer, "attn.hook_pattern")
    def _(x):
        seen["pattern", layer] = x[0]

    @hook(layer, "attn.hook_z")
    def _(x):
        shape = x.shape
        x = x.clone().view(*shape[:2], model.n_heads, model.d_head)
        for head, token, vector in at[V]:
            x[0, :, head] += seen["pattern", layer][head, :, token, None] * vector.to(x)
        return x.view(shape)
