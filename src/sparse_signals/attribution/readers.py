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
class Node:
    """Something in a model that F can be: what it writes, along a direction.

    `part` of a layer: the number of a head, "mlp", or "stream", what all components in front of the
    layer wrote together (of the layer after the last one: all there are). `place`: the token of
    every prompt, from the start of the runs.
    """

    layer: int
    part: int | str
    place: Int[Tensor, "prompt"]
    direction: Float[Tensor, "prompt d"]

    def among(self, like: Float[Tensor, "prompt dest d"]) -> Float[Tensor, "prompt dest d"]:
        """The direction at its place, and nothing elsewhere."""
        found, place = torch.zeros_like(like), self.place if like.shape[1] > 1 else 0
        found[torch.arange(len(like), device=like.device), place] = self.direction
        return found


@dataclass(frozen=True)
class LayerReaders:
    """Cotangents of what a layer reads and writes; `dest` as in `LayerRecord`.

    q, k, v: of queries and keys before heads normalise and rotate them, and values, of every query
    head; what they read went through `norm`. mlp: the reader of the MLP. z, written: of what heads
    and MLP write.
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
    asked: Float[Tensor, "prompt d"] | Node,
) -> Readers:
    """One pass backward through the secants of two runs; of a run with itself, the gradient.

    `asked`: what F is of the last normalisation, or a node that F is. Costs about a forward pass.
    """
    node = asked if isinstance(asked, Node) else None
    if isinstance(asked, Node):
        out = asked.direction if asked.layer == model.n_layers else torch.zeros_like(first.x)
    else:
        norm = norm_secant(
            model, model.bridge.ln_final, first.x, second.x, first.scale, second.scale
        )
        out = ReadOut(norm, asked).transpose(torch.ones_like(first.scale))
    written, layers = out.unsqueeze(1), []
    for layer in reversed(range(model.n_layers)):
        a, b = first.layers[layer], second.layers[layer]
        here = node if node and node.layer == layer else None
        if here and here.part == "mlp":
            written = here.among(written)
        mlp = _through_mlp(model, layer, a, b, written)
        beside = torch.zeros_like(written) if here else written  # what goes past the MLP
        middle = beside + mlp
        heard = beside if model.parallel else middle
        W_O = model.writers.W_O[layer].flatten(0, 1)
        z = (heard @ W_O.T).unflatten(-1, (model.n_heads, -1)).transpose(1, 2)
        if here and isinstance(here.part, int):
            z = torch.zeros_like(z)
            z[:, here.part] = here.among(middle) @ model.writers.W_O[layer, here.part].T
        q, k, v = _through_attention(model, layer, a, b, z, last)
        norm = norm_secant(model, model.bridge.blocks[layer].ln1, a.x, b.x, a.scale, b.scale)
        layers.append(LayerReaders(norm, q, k, v, z, mlp, written))
        W_Q, W_K, W_V = reading_weights(model, layer)
        shared = (x.unflatten(1, (model.n_kv_heads, -1)).sum(2) for x in (k, v))
        of_k, of_v = (_into_stream(x, W) for x, W in zip(shared, (W_K, W_V), strict=True))
        written = norm.folded(_plus(of_k.add_(of_v), _into_stream(q, W_Q), last))
        written = _plus(written, middle, last)
        if here and here.part == "stream":
            written = here.among(written)
    return Readers(out, tuple(reversed(layers)), written)


def norm_secant(
    model: Model, part: Any, x: Tensor, other: Tensor, scale: Tensor, other_scale: Tensor
) -> Norm:
    """The secant of a normalisation, a part of the bridge, from the streams of two runs."""
    return Norm.between(x, other, scale, other_scale, part.w, centred=not model.rms)


def _through_mlp(
    model: Model,
    layer: int,
    a: LayerRecord,
    b: LayerRecord,
    cotangent: Float[Tensor, "prompt dest d"],
) -> Float[Tensor, "prompt dest d"]:
    """The reader of an MLP, of what F hears of its output."""
    block, (norm, secant) = model.bridge.blocks[layer], mlp_secants(model, layer, a, b)
    y = secant.transpose(cotangent @ block.mlp.W_out.T)
    mlp = block.mlp
    y = y[0] @ mlp.W_gate.T + y[1] @ mlp.W_in.T if isinstance(y, tuple) else y @ mlp.W_in.T
    return norm.transpose(y)


def mlp_secants(
    model: Model, layer: int, a: LayerRecord, b: LayerRecord
) -> tuple[Norm, Pointwise | Gated]:
    """The secants of the normalisation in front of an MLP, and of what it does between weights."""
    block = model.bridge.blocks[layer]
    norm = norm_secant(model, block.ln2, a.mid, b.mid, a.mid_scale, b.mid_scale)
    secant = Pointwise.between(nonlinearity(block), a.pre, b.pre, a.post, b.post)
    if a.up is None or b.up is None:
        return norm, secant
    return norm, Gated.between(secant, a.post, b.post, a.up, b.up)


def attention_secants(
    model: Model, layer: int, a: LayerRecord, b: LayerRecord
) -> tuple[Mixing, Softmax, Score]:
    """The secants of what the heads of a layer do, keys and values repeated per query head."""
    groups = model.n_heads // model.n_kv_heads
    k, other_k, v, other_v = (
        x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (a.k, b.k, a.v, b.v)
    )
    weights, other_weights = a.log_weights.exp(), b.log_weights.exp()
    mixing = Mixing.between(weights, other_weights, v, other_v)
    score = Score.between(a.q, b.q, k, other_k, float(model.divisor[layer]))
    return mixing, Softmax.between(a.log_weights, b.log_weights), score


def head_secants(model: Model, layer: int, a: LayerRecord, b: LayerRecord) -> dict[str, Norm]:
    """The secants of the normalisations inside heads, of queries and keys from the start.

    Keys are repeated per query head. {} where heads do not normalise.
    """
    found = {}
    for name, gain in model.head_gains.items():
        raw, other, scale, other_scale = (
            y.repeat_interleave(model.n_heads // y.shape[1], dim=1)
            for y in (getattr(end, f"{name}_{what}") for what in ("raw", "scale") for end in (a, b))
        )
        found[name] = Norm.between(raw, other, scale, other_scale, gain[layer], centred=False)
    return found


def _through_attention(
    model: Model,
    layer: int,
    a: LayerRecord,
    b: LayerRecord,
    cotangent: Float[Tensor, "prompt head dest r"],
    last: Int[Tensor, "prompt"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents of queries, keys and values of every query head, of those of what heads moved."""
    mixing, softmax, score = attention_secants(model, layer, a, b)
    of_weights, of_v = mixing.transpose(cotangent)
    of_q, of_k = score.transpose(softmax.transpose(of_weights))
    of_k, of_v = (y[:, :, a.start :] for y in (of_k, of_v))  # what is in front never changes
    if model.rotary:
        of_q, of_k = (
            unrotate(y, *angles_at(model, y.shape[2], a.start, last)) for y in (of_q, of_k)
        )
    if norms := head_secants(model, layer, a, b):
        of_q, of_k = norms["q"].transpose(of_q), norms["k"].transpose(of_k)
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
