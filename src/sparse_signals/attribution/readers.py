"""From the read-out down: what F hears of a change at every input, through the secants of two runs.

The reader of an input is a vector of the stream. Where heads read, it is kept as what it is made
of, one cotangent of the query, key or value for every head and token, and spelled out when needed.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_signals.attribution.record import (
    LayerRecord,
    Record,
    angles_at,
    nonlinearity,
    reading_weights,
)
from sparse_signals.attribution.secants import (
    Gated,
    Mixing,
    Norm,
    Pointwise,
    ReadOut,
    Score,
    Softmax,
)
from sparse_signals.core.model import Model
from sparse_signals.core.rotary import unrotate


@dataclass(frozen=True)
class LayerReaders:
    """Cotangents of what a layer reads and writes; `dest` as in `LayerRecord`.

    q, k, v: of queries and keys before they are rotated, and values, of every query head; what they
    read went through `norm`. mlp: the reader of the MLP. z, written: of what heads and MLP write.
    """

    norm: Norm
    q: Float[Tensor, "prompt head dest r"]
    k: Float[Tensor, "prompt head pos r"]
    v: Float[Tensor, "prompt head pos r"]
    z: Float[Tensor, "prompt head dest r"]
    mlp: Float[Tensor, "prompt dest d"]
    written: Float[Tensor, "prompt dest d"]


@dataclass(frozen=True)
class Readers:
    """Cotangents of a whole model: at the read-out, of every layer, and of the embeddings."""

    out: Float[Tensor, "prompt d"]
    layers: tuple[LayerReaders, ...]
    embedding: Float[Tensor, "prompt pos d"]


def readers(
    model: Model,
    first: Record,
    second: Record,
    last: Int[Tensor, "prompt"],
    vector: Float[Tensor, "prompt d"],
) -> Readers:
    """One pass backward through the secants of two runs; of a run with itself, the gradient.

    `vector` is what F is of the last normalisation. Costs about a forward pass.
    """
    norm = _norm(model, model.bridge.ln_final, first.x, second.x, first.scale, second.scale)
    out = ReadOut(norm, vector).transpose(torch.ones_like(first.scale))
    written, layers = out.unsqueeze(1), []
    for layer in reversed(range(model.n_layers)):
        a, b = first.layers[layer], second.layers[layer]
        mlp = _through_mlp(model, layer, a, b, written)
        middle = written + mlp
        W_O = model.writers.W_O[layer].flatten(0, 1)
        z = (middle @ W_O.T).unflatten(-1, (model.n_heads, -1)).transpose(1, 2)
        q, k, v = _through_attention(model, layer, a, b, z, last)
        norm = _norm(model, model.bridge.blocks[layer].ln1, a.x, b.x, a.scale, b.scale)
        layers.append(LayerReaders(norm, q, k, v, z, mlp, written))
        W_Q, W_K, W_V = reading_weights(model, layer)
        shared = (x.unflatten(1, (model.n_kv_heads, -1)).sum(2) for x in (k, v))
        of_k, of_v = (_into_stream(x, W) for x, W in zip(shared, (W_K, W_V), strict=True))
        written = norm.folded(_plus(of_k.add_(of_v), _into_stream(q, W_Q), last))
        written = _plus(written, middle, last)
    return Readers(out, tuple(reversed(layers)), written)


def _norm(
    model: Model, part: Any, x: Tensor, other: Tensor, scale: Tensor, other_scale: Tensor
) -> Norm:
    return Norm.between(x, other, scale, other_scale, part.w, centred=not model.rms)


def _through_mlp(
    model: Model,
    layer: int,
    a: LayerRecord,
    b: LayerRecord,
    cotangent: Float[Tensor, "prompt dest d"],
) -> Float[Tensor, "prompt dest d"]:
    """The reader of an MLP, of what F hears of its output."""
    block = model.bridge.blocks[layer]
    secant = Pointwise.between(nonlinearity(block), a.pre, b.pre, a.post, b.post)
    y = cotangent @ block.mlp.W_out.T
    if a.up is None or b.up is None:
        y = secant.transpose(y) @ block.mlp.W_in.T
    else:
        gate, up = Gated.between(secant, a.post, b.post, a.up, b.up).transpose(y)
        y = gate @ block.mlp.W_gate.T + up @ block.mlp.W_in.T
    return _norm(model, block.ln2, a.mid, b.mid, a.mid_scale, b.mid_scale).transpose(y)


def _through_attention(
    model: Model,
    layer: int,
    a: LayerRecord,
    b: LayerRecord,
    cotangent: Float[Tensor, "prompt head dest r"],
    last: Int[Tensor, "prompt"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents of queries, keys and values of every query head, of those of what heads moved."""
    groups = model.n_heads // model.n_kv_heads
    k, other_k, v, other_v = (
        x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (a.k, b.k, a.v, b.v)
    )
    weights, other_weights = a.log_weights.exp(), b.log_weights.exp()
    mixing = Mixing.between(weights, other_weights, v, other_v)
    score = Score.between(a.q, b.q, k, other_k, float(model.divisor[layer]))
    of_weights, of_v = mixing.transpose(cotangent)
    softmax = Softmax.between(a.log_weights, b.log_weights)
    of_q, of_k = score.transpose(softmax.transpose(of_weights))
    of_k, of_v = (y[:, :, a.start :] for y in (of_k, of_v))  # what is in front never changes
    if model.rotary:
        of_q, of_k = (
            unrotate(y, *angles_at(model, y.shape[2], a.start, last)) for y in (of_q, of_k)
        )
    return of_q, of_k, of_v


def _into_stream(
    y: Float[Tensor, "prompt head some r"], W: Float[Tensor, "head d r"]
) -> Float[Tensor, "prompt some d"]:
    """Σ_h W_h y_h: what heads read together."""
    return y.transpose(1, 2).flatten(2) @ W.transpose(1, 2).flatten(0, 1)


def _plus(
    total: Float[Tensor, "prompt pos d"],
    part: Float[Tensor, "prompt dest d"],
    last: Int[Tensor, "prompt"],
) -> Float[Tensor, "prompt pos d"]:
    """The sum, in the memory of the first; a part of one token belongs to the last one."""
    if part.shape[1] == total.shape[1]:
        return total.add_(part)
    total[torch.arange(len(last), device=last.device), last] += part[:, 0]
    return total
