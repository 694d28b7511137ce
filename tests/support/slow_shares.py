"""Exact shares the slow way: one prompt, the differences run forward, one gate for every edge.

Nothing is shared with the package but weights and rotations. Secants are mean derivatives, found by
quadrature where the package has a formula; then F(x) − F(x′) is a linear function of differences,
and the share of an edge is its derivative with respect to the gate that the edge passes.
"""

import numpy as np
import torch

from sparse_signals.core.model import Model
from sparse_signals.core.rotary import rotate, rotation

NODES, WEIGHTS = (torch.tensor(x) for x in np.polynomial.legendre.leggauss(60))
NODES, WEIGHTS = (NODES + 1) / 2, WEIGHTS / 2


def slow_shares(model: Model, tokens, counterfactual, direction) -> dict[str, torch.Tensor]:
    """Shares in `direction`·Δlogits at the last token: q, k, v [pos layer head component], …

    … mlp [pos layer component], out [component], of one prompt without padding.
    """
    runs = [plain_pass(model, x) for x in (tokens, counterfactual)]
    size, length = len(model.components) - 1, len(tokens)
    gates = dict.fromkeys("qkv", (length, model.n_layers, model.n_heads, size))
    gates |= {"mlp": (length, model.n_layers, size), "out": (size,)}
    gates = {
        name: torch.ones(shape, dtype=torch.float64, requires_grad=True)
        for name, shape in gates.items()
    }
    change = linear_pass(model, runs, gates, direction)
    found = torch.autograd.grad(change, list(gates.values()), allow_unused=True)
    assert all(x is not None for x in found)
    return dict(zip(gates, found, strict=True)) | {"change": change.detach()}


def norm(model, part, x):
    """The normalised stream, and what it was divided by."""
    y = x if model.rms else x - x.mean(-1, keepdim=True)
    scale = (y.square().mean(-1, keepdim=True) + model.bridge.cfg.eps).sqrt()
    n = part.w * y / scale
    return n if model.rms else n + part.b


def own(attn, name, head, model):
    """The weights and bias of a query head; keys and values may be shared."""
    head = head if name == "Q" else head // (model.n_heads // model.n_kv_heads)
    bias = getattr(attn, f"b_{name}")
    return getattr(attn, f"W_{name}")[head], 0 if bias is None else bias[head]


def turned(model, y):
    if not model.rotary:
        return y
    return rotate(y, *rotation(model, torch.arange(len(y))))


def in_head(model, attn, name, y):
    """Queries or keys after the normalisation inside heads, if there is one."""
    return norm(model, getattr(attn, f"{name}_norm"), y) if model.head_gains else y


def in_head_change(model, attn, name, y, other, change):
    if not model.head_gains:
        return change
    return norm_change(model, getattr(attn, f"{name}_norm"), y, other, change)


def activation(block):
    mlp = block.mlp.original_component
    return getattr(mlp, "act_fn", None) or mlp.act


@torch.no_grad()
def plain_pass(model, tokens):
    """All that one prompt computes, head by head."""
    bridge, kept = model.bridge, {}
    x = bridge.embed.W_E[tokens]
    if not model.rotary:
        x = x + bridge.pos_embed.W_pos[: len(tokens)]
    kept["embedding"] = bridge.embed.W_E[tokens]
    past = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
    for layer, block in enumerate(bridge.blocks):
        attn, kept["x", layer] = block.attn, x
        n = norm(model, block.ln1, x)
        mid = x + (0 if attn.b_O is None else attn.b_O)
        for h in range(model.n_heads):
            y = {name: n @ W + b for name in "QKV" for W, b in [own(attn, name, h, model)]}
            kept["raw", layer, h] = y
            q, k = (turned(model, in_head(model, attn, name, y[name.upper()])) for name in "qk")
            scores = q @ k.T / model.divisor[layer]
            A = scores.masked_fill(~past, -torch.inf).softmax(-1)
            kept["head", layer, h] = q, k, y["V"], A
            mid = mid + A @ y["V"] @ attn.W_O[h]
        read, mlp = x if model.parallel else mid, block.mlp
        n = norm(model, block.ln2, read)
        first = n @ mlp.W_in + (0 if mlp.b_in is None else mlp.b_in)
        pre, up = first, torch.ones_like(first)
        if mlp.W_gate is not None:
            pre, up = n @ mlp.W_gate + (0 if mlp.b_gate is None else mlp.b_gate), first
        kept["mlp", layer] = read, pre, up
        out = (activation(block)(pre) * up) @ mlp.W_out
        x = mid + out + (0 if mlp.b_out is None else mlp.b_out)
    kept["end"] = x
    return kept


def norm_change(model, part, x, other, change):
    """Δn by the product rule: ΔCx at the mean of 1/s, and the mean of Cx at Δ(1/s)."""
    x, other, change = (
        y if model.rms else y - y.mean(-1, keepdim=True) for y in (x, other, change)
    )
    s, t = ((y.square().mean(-1, keepdim=True) + model.bridge.cfg.eps).sqrt() for y in (x, other))
    square = ((x + other) * change).mean(-1, keepdim=True)  # Δ(s²)
    inverse = -square / (s + t) / (s * t)
    return part.w * (change * (1 / s + 1 / t) / 2 + (x + other) / 2 * inverse)


def softmax_change(A, B, change):
    """L is the mean of A^t B^(1 − t) over t from 0 to 1."""
    L = (A[..., None] ** NODES * B[..., None] ** (1 - NODES) * WEIGHTS).sum(-1).tril()
    return L * (change - (L * change).sum(-1, keepdim=True) / L.sum(-1, keepdim=True))


def mean_slope(function, z, other):
    with torch.enable_grad():
        at = (other[..., None] + (z - other)[..., None] * NODES).requires_grad_()
        slope = torch.autograd.grad(function(at).sum(), at)[0]
    return (slope * WEIGHTS).sum(-1)


def linear_pass(model, runs, gates, direction):
    """Differences run forward through the secants of two runs; what inputs read is gated."""
    a, b = runs
    bridge, length = model.bridge, len(a["embedding"])
    nothing = torch.zeros_like(a["embedding"])
    wrote = [a["embedding"] - b["embedding"], *([] if model.rotary else [nothing])]

    def read(gate, components=None):
        return sum(g[:, None] * x for g, x in zip(gate.T, wrote[:components], strict=False))

    for layer, block in enumerate(bridge.blocks):
        heads = []
        for h in range(model.n_heads):
            y = {}
            for name in "QKV":
                change = read(gates[name.lower()][:, layer, h])
                n = norm_change(model, block.ln1, a["x", layer], b["x", layer], change)
                y[name] = n @ own(block.attn, name, h, model)[0]
            (q, k, v, A), (q2, k2, v2, A2) = a["head", layer, h], b["head", layer, h]
            dq, dk = (
                turned(
                    model,
                    in_head_change(
                        model, block.attn, name, *(x["raw", layer, h][n] for x in runs), y[n]
                    ),
                )
                for name, n in (("q", "Q"), ("k", "K"))
            )
            ds = ((q + q2) / 2 @ dk.T + dq @ ((k + k2) / 2).T) / model.divisor[layer]
            dA = softmax_change(A, A2, ds)
            heads.append(((A + A2) / 2 @ y["V"] + dA @ (v + v2) / 2) @ block.attn.W_O[h])
        wrote += [*heads, nothing]
        (x, pre, up), (x2, pre2, up2) = a["mlp", layer], b["mlp", layer]
        change = read(
            gates["mlp"][:, layer], model.components_below(layer) if model.parallel else None
        )
        n = norm_change(model, block.ln2, x, x2, change)
        g, mlp = activation(block), block.mlp
        first = n @ mlp.W_in
        slope = mean_slope(g, pre, pre2)
        if mlp.W_gate is None:
            change = slope * first
        else:
            change = slope * (n @ mlp.W_gate) * (up + up2) / 2 + (g(pre) + g(pre2)) / 2 * first
        wrote.append(change @ mlp.W_out)
    total = sum(g * x[-1] for g, x in zip(gates["out"], wrote, strict=True))
    final = norm_change(model, bridge.ln_final, a["end"][-1], b["end"][-1], total)
    assert length == len(nothing)
    return final @ (bridge.unembed.W_U @ direction)
