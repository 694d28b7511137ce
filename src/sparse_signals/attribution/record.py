"""What secants are made of: the values that a forward pass computes on its way.

A `Run` keeps less. Of what comes after the last attention only the last token of a prompt matters
for the answer: so the last layer has one destination, and the others have every token.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_signals.core.forward import (
    angles,
    norm_scale,
    normalise,
    normalised_in_head,
    projections,
)
from sparse_signals.core.model import Model
from sparse_signals.core.rotary import rotate


@dataclass(frozen=True)
class LayerRecord:
    """What one layer computed. `dest` are all tokens, or the last one alone in the last layer.

    x, scale: the stream before attention, and what it is divided by; mid, mid_scale: what the MLP
    reads, after attention or, in parallel blocks, before it.
    q, k: rotated, if rotary; k, v are one for each group of heads that share them, v without bias,
    both first of the tokens in front, if there are any. log_weights: ln of attention, −∞ for later
    sources. z: what heads moved. pre, post: the MLP before and after its nonlinearity; up: what
    post is multiplied with, if gated. q_raw, k_raw: what heads that normalise queries and keys
    normalise, without the tokens in front; q_scale, k_scale: what they divide it by.
    """

    x: Float[Tensor, "prompt pos d"]
    scale: Float[Tensor, "prompt pos"]
    q: Float[Tensor, "prompt head dest r"]
    k: Float[Tensor, "prompt group src r"]
    v: Float[Tensor, "prompt group src r"]
    log_weights: Float[Tensor, "prompt head dest src"]
    z: Float[Tensor, "prompt head dest r"]
    mid: Float[Tensor, "prompt dest d"]
    mid_scale: Float[Tensor, "prompt dest"]
    pre: Float[Tensor, "prompt dest m"]
    post: Float[Tensor, "prompt dest m"]
    up: Float[Tensor, "prompt dest m"] | None
    mlp: Float[Tensor, "prompt dest d"]
    q_raw: Float[Tensor, "prompt head dest r"] | None = None
    k_raw: Float[Tensor, "prompt group pos r"] | None = None
    q_scale: Float[Tensor, "prompt head dest"] | None = None
    k_scale: Float[Tensor, "prompt group pos"] | None = None

    @property
    def start(self) -> int:
        """How many tokens are in front."""
        return self.k.shape[2] - self.x.shape[1]

    def silent(self) -> "LayerRecord":
        """The same with an MLP in which nothing is active."""
        pre, post = torch.zeros_like(self.pre), torch.zeros_like(self.post)
        return replace(self, pre=pre, post=post, up=None if self.up is None else pre)

    def rows(self, rows: slice) -> "LayerRecord":
        """The same of some of the prompts."""
        parts = vars(self).items()
        some: dict[str, Any] = {name: x if x is None else x[rows] for name, x in parts}
        return LayerRecord(**some)


@dataclass(frozen=True)
class Record:
    """What a model computed on some prompts, up to the stream x at the last token.

    `embedding` is what tokens start with, less the position, which aligned runs have in common.
    """

    embedding: Float[Tensor, "prompt pos d"]
    layers: tuple[LayerRecord, ...]
    x: Float[Tensor, "prompt d"]
    scale: Float[Tensor, "prompt"]

    def rows(self, rows: slice) -> "Record":
        """The same of some of the prompts."""
        layers = tuple(layer.rows(rows) for layer in self.layers)
        return Record(self.embedding[rows], layers, self.x[rows], self.scale[rows])


def record(
    model: Model,
    embedding: Float[Tensor, "prompt pos d"],
    last: Int[Tensor, "prompt"],
    front: Record | None = None,
) -> Record:
    """Run a model from the embeddings of tokens. `last`: which is the last one of each prompt.

    `front`: a run of the tokens in front of them, if there are any. If it has fewer prompts, it is
    repeated: their first tokens are the same.
    """
    start = 0 if front is None else front.layers[0].k.shape[2]
    number = torch.arange(len(last), device=last.device)
    src = torch.arange(start + embedding.shape[1], device=last.device)
    past = src <= src[start:, None]
    x, layers = embedding, []
    if not model.rotary:
        x = x + model.bridge.pos_embed.W_pos[start : len(src)]
    for layer, block in enumerate(model.bridge.blocks):
        scale = norm_scale(model, x)
        dest = x, scale
        if layer == model.n_layers - 1:
            dest = x[number, last].unsqueeze(1), scale[number, last].unsqueeze(1)
            past = (src <= start + last[:, None])[:, None, None]
        (q, k, v), in_heads = _attention_inputs(model, layer, (x, scale), dest, start, last)
        if front is not None:
            old, times = front.layers[layer], len(last) // len(front.x)
            k, v = (
                torch.cat([y.repeat(times, 1, 1, 1), new], dim=2)
                for y, new in ((old.k, k), (old.v, v))
            )
        grouped = q.unflatten(1, (model.n_kv_heads, -1))
        scores = grouped @ k.unsqueeze(2).mT / float(model.divisor[layer])
        log_weights = scores.flatten(1, 2).masked_fill(~past, -torch.inf).log_softmax(-1)
        weights = log_weights.exp().unflatten(1, (model.n_kv_heads, -1))
        z = (weights @ v.unsqueeze(2)).flatten(1, 2)
        W_O = model.writers.W_O[layer].flatten(0, 1)
        after = dest[0] + z.transpose(1, 2).flatten(2) @ W_O + model.writers.bias[layer]
        mid = dest[0] if model.parallel else after
        mid_scale = norm_scale(model, mid)
        pre, post, up, mlp = _mlp(block, normalise(model, block.ln2, mid, mid_scale))
        parts = (x, scale, q, k, v, log_weights, z, mid, mid_scale, pre, post, up, mlp)
        layers.append(LayerRecord(*parts, **in_heads))
        x = after + mlp
    x = x.squeeze(1)
    return Record(embedding, tuple(layers), x, norm_scale(model, x))


def reading_weights(
    model: Model, layer: int
) -> tuple[Float[Tensor, "head d r"], Float[Tensor, "group d r"], Float[Tensor, "group d r"]]:
    """What turns x / s into queries, keys and values; gain and centring are folded into it."""
    weights = projections(model)
    q, k, v = (weights[name][layer, :, :-1] for name in "qkv")
    return q, k, v


def _attention_inputs(
    model: Model,
    layer: int,
    src: tuple[Tensor, Tensor],
    dest: tuple[Tensor, Tensor],
    start: int,
    last: Int[Tensor, "prompt"],
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Queries of destinations, keys and values of all tokens; what heads normalise of them."""
    found, in_heads = [], {}
    for name, (x, scale) in zip("qkv", (dest, src, src), strict=True):
        W = projections(model)[name][layer]
        y = (x / scale.unsqueeze(-1)) @ W[:, :-1].transpose(0, 1).flatten(1)
        y = y.unflatten(-1, (len(W), -1)).transpose(1, 2) + W[:, None, -1]
        if name in model.head_gains:
            in_heads[f"{name}_raw"] = y
            y, in_heads[f"{name}_scale"] = normalised_in_head(model, layer, name, y)
        if model.rotary and name != "v":
            y = rotate(y, *angles_at(model, x.shape[1], start, last))
        found.append(y)
    return found, in_heads


def angles_at(
    model: Model, tokens: int, start: int, last: Int[Tensor, "prompt"]
) -> tuple[Float[Tensor, "... r"], Float[Tensor, "... r"]]:
    """cos and sin of the angles of the tokens from a start, or of the last one of every prompt."""
    if tokens == 1:
        cos, sin = (table[start + last, None, None] for table in angles(model))
    else:
        cos, sin = (table[start : start + tokens] for table in angles(model))
    return cos, sin


# --- MLPs ----------------------------------------------------------------------------------------


def nonlinearity(block: Any) -> Callable[[Tensor], Tensor]:
    """g of the MLP of a part of the bridge, in one step where PyTorch has one for it."""
    mlp = block.mlp.original_component
    found = getattr(mlp, "act_fn", None) or mlp.act
    if type(found).__name__ == "NewGELUActivation":
        return partial(torch.nn.functional.gelu, approximate="tanh")
    return found


def _mlp(
    block: Any, n: Float[Tensor, "prompt dest d"]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Before and after the nonlinearity, what it is multiplied with (None: nothing), the output."""
    mlp, up = block.mlp, None
    first = _linear(n, mlp.W_in, mlp.b_in)
    pre = first
    if mlp.W_gate is not None:
        pre, up = _linear(n, mlp.W_gate, mlp.b_gate), first
    post = nonlinearity(block)(pre)
    return pre, post, up, _linear(post if up is None else post * up, mlp.W_out, mlp.b_out)


def _linear(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    return x @ W if b is None else torch.addmm(b, x.flatten(0, -2), W).view(*x.shape[:-1], -1)
