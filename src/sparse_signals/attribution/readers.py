"""From the read-out down: what F hears of a change at every input, through the secants of two runs.

The reader of an input is a vector of the stream. Where heads read, it is kept as what it is made
of, one cotangent of the query, key or value for every head and token, and spelled out when needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    Score,
    Softmax,
)
from sparse_signals.core.model import Model
from sparse_signals.core.rotary import unrotate


@dataclass(frozen=True)
class Node:
    """What F is: what something in a model writes, along a direction.

    `part` of a layer: the number of a head, "mlp", or "stream", what all components in front of the
    layer wrote together (of the layer after the last one: all there are, and the answer is there).
    `place`: the token of every prompt, from the start of the runs.
    """

    layer: int
    part: int | str
    place: Int[Tensor, "prompt"]
    direction: Float[Tensor, "prompt d"]

    @property
    def layers(self) -> int:
        """How many layers lead to it."""
        return self.layer + (self.part != "stream")

    def among(self, like: Float[Tensor, "prompt dest d"]) -> Float[Tensor, "prompt dest d"]:
        """The direction at its place, and nothing elsewhere."""
        found, place = torch.zeros_like(like), self.place if like.shape[1] > 1 else 0
        found[torch.arange(len(like), device=like.device), place] = self.direction
        return found


@dataclass(frozen=True)
class LayerSecants:
    """The secants of a layer: of its normalisations, what its heads do, and its MLP.

    Keys and values are repeated for each query head; `middle` is the normalisation in front of the
    MLP, `mlp` what that does between its weights. `in_heads`: of queries and keys where heads
    normalise them, of both from the start.
    """

    norm: Norm
    mixing: Mixing
    softmax: Softmax
    score: Score
    middle: Norm
    mlp: Pointwise | Gated
    in_heads: dict[str, Norm]

    @property
    def start(self) -> int:
        """How many tokens are in front."""
        return self.score.k.shape[2] - self.norm.middle.shape[1]


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
    """Cotangents of a whole model: at the read-out, of every layer, and of the embeddings.

    `node`: what F is.
    """

    node: Node
    out: Float[Tensor, "prompt d"]
    layers: tuple[LayerReaders, ...]
    embedding: Float[Tensor, "prompt pos d"]


def readers(
    model: Model, secants: Sequence[LayerSecants], asked: Node, last: Int[Tensor, "prompt"]
) -> Readers:
    """One pass backward through the secants of all layers, from the node that F is.

    Costs about a forward pass.
    """
    on_top = asked.layer == model.n_layers
    out = asked.direction if on_top else torch.zeros_like(asked.direction)
    written, layers = out.unsqueeze(1), []
    for layer in reversed(range(model.n_layers)):
        part = secants[layer]
        here = asked if asked.layer == layer else None
        if here and here.part == "mlp":
            written = here.among(written)
        mlp = _through_mlp(model, layer, part, written)
        beside = torch.zeros_like(written) if here else written  # what goes past the MLP
        middle = beside + mlp
        heard = beside if model.parallel else middle
        W_O = model.writers.W_O[layer].flatten(0, 1)
        z = (heard @ W_O.T).unflatten(-1, (model.n_heads, -1)).transpose(1, 2)
        if here and isinstance(here.part, int):
            z = torch.zeros_like(z)
            z[:, here.part] = here.among(middle) @ model.writers.W_O[layer, here.part].T
        q, k, v = _through_attention(model, part, z, last)
        layers.append(LayerReaders(part.norm, q, k, v, z, mlp, written))
        W_Q, W_K, W_V = reading_weights(model, layer)
        shared = (x.unflatten(1, (model.n_kv_heads, -1)).sum(2) for x in (k, v))
        of_k, of_v = (_into_stream(x, W) for x, W in zip(shared, (W_K, W_V), strict=True))
        written = part.norm.folded(_plus(of_k.add_(of_v), _into_stream(q, W_Q), last))
        written = _plus(written, middle, last)
        if here and here.part == "stream":
            written = here.among(written)
    return Readers(asked, out, tuple(reversed(layers)), written)


def norm_secant(
    model: Model,
    part: Any,
    x: Tensor,
    other: Tensor,
    scale: Tensor,
    other_scale: Tensor,
    held: bool = False,
) -> Norm:
    """The secant of a normalisation, a part of the bridge, from the streams of two runs.

    `held`: as if what it divides by were a constant.
    """
    norm = Norm.between(x, other, scale, other_scale, part.w, centred=not model.rms)
    return replace(norm, pull=torch.zeros_like(norm.pull)) if held else norm


def layer_secants(
    model: Model, first: Record, second: Record, relevance: bool = False
) -> tuple[LayerSecants, ...]:
    """The secants of all layers; of a run with itself, derivatives.

    `relevance`: of a run with itself, the coefficients of `Rule` instead. g(z)/z and the halves of
    products are secants from where nothing is active.
    """
    found, groups = [], model.n_heads // model.n_kv_heads
    for layer, (a, b) in enumerate(zip(first.layers, second.layers, strict=True)):
        block = model.bridge.blocks[layer]
        norm = norm_secant(model, block.ln1, a.x, b.x, a.scale, b.scale, relevance)
        k, other_k, v, other_v = (
            x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (a.k, b.k, a.v, b.v)
        )
        mixing = Mixing.between(a.log_weights.exp(), b.log_weights.exp(), v, other_v)
        softmax = Softmax.between(a.log_weights, b.log_weights)
        score = Score.between(a.q, b.q, k, other_k, float(model.divisor[layer]))
        middle = norm_secant(model, block.ln2, a.mid, b.mid, a.mid_scale, b.mid_scale, relevance)
        mlp = _mlp_secant(block, a, b.silent() if relevance else b)
        in_heads = _head_secants(model, layer, a, b, relevance)
        found.append(LayerSecants(norm, mixing, softmax, score, middle, mlp, in_heads))
    return tuple(found)


def _mlp_secant(block: Any, a: LayerRecord, b: LayerRecord) -> Pointwise | Gated:
    """The secant of what an MLP does between its weights."""
    secant = Pointwise.between(nonlinearity(block), a.pre, b.pre, a.post, b.post)
    if a.up is None or b.up is None:
        return secant
    return Gated.between(secant, a.post, b.post, a.up, b.up)


def _through_mlp(
    model: Model, layer: int, part: LayerSecants, cotangent: Float[Tensor, "prompt dest d"]
) -> Float[Tensor, "prompt dest d"]:
    """The reader of an MLP, of what F hears of its output."""
    mlp = model.bridge.blocks[layer].mlp
    y = part.mlp.transpose(cotangent @ mlp.W_out.T)
    y = y[0] @ mlp.W_gate.T + y[1] @ mlp.W_in.T if isinstance(y, tuple) else y @ mlp.W_in.T
    return part.middle.transpose(y)


def _head_secants(
    model: Model, layer: int, a: LayerRecord, b: LayerRecord, held: bool
) -> dict[str, Norm]:
    """The secants of the normalisations inside heads, of queries and keys from the start.

    Keys are repeated per query head. {} where heads do not normalise. `held` as in `norm_secant`.
    """
    found = {}
    for name, gain in model.head_gains.items():
        raw, other, scale, other_scale = (
            y.repeat_interleave(model.n_heads // y.shape[1], dim=1)
            for y in (getattr(end, f"{name}_{what}") for what in ("raw", "scale") for end in (a, b))
        )
        norm = Norm.between(raw, other, scale, other_scale, gain[layer], centred=False)
        found[name] = replace(norm, pull=torch.zeros_like(norm.pull)) if held else norm
    return found


def _through_attention(
    model: Model,
    part: LayerSecants,
    cotangent: Float[Tensor, "prompt head dest r"],
    last: Int[Tensor, "prompt"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents of queries, keys and values of every query head, of those of what heads moved."""
    of_weights, of_v = part.mixing.transpose(cotangent)
    of_q, of_k = part.score.transpose(part.softmax.transpose(of_weights))
    of_k, of_v = (y[:, :, part.start :] for y in (of_k, of_v))  # what is in front never changes
    if model.rotary:
        of_q, of_k = (
            unrotate(y, *angles_at(model, y.shape[2], part.start, last)) for y in (of_q, of_k)
        )
    if norms := part.in_heads:
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
