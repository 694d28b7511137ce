"""Chapter 5: rows of one shape, whose attention is recomputed together. Used by `suffix`.

The tokens of a row are counted from its first changed one. x holds those that have changed so far:
a few at the start, and all that the last attention was asked for afterwards.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_signals.interventions import (
    MID,
    Changes,
    Clean,
    K,
    Layers,
    Probes,
    Q,
    V,
    rotate,
)


@dataclass(frozen=True)
class Rows:
    """Rows that start in the same layer, at the same site, with as many tokens.

    `first` is the place of their first token, `length` their number of tokens, of which `dirty`
    are changed at the start. Changes and probes are theirs; `which` numbers the probes among those
    of all rows. `score` and `attention` are those of the clean run until they are recomputed.
    """

    layers: Layers
    clean: Clean
    prompt: Int[Tensor, "row"]
    layer: int
    site: int
    length: int
    dirty: int
    stream: Changes
    inputs: Changes
    probes: Probes
    which: Int[Tensor, "probe"]
    score: Float[Tensor, "probe"]
    attention: Float[Tensor, "probe"]

    @cached_property
    def first(self) -> Int[Tensor, "row"]:
        return self.clean.end[self.prompt] - self.length + 1

    @cached_property
    def changed(self) -> set[tuple[int, int]]:
        """The layers and sites of all changes."""
        places = [(x.layer.tolist(), x.site.tolist()) for x in (self.stream, self.inputs)]
        return {place for layer, site in places for place in zip(layer, site, strict=True)}

    def attends(self, layer: int) -> bool:
        """Whether a layer's attention changes: not before the start, nor where it starts after."""
        return self.layer < layer or (self.layer == layer and self.site != MID)

    def asked(self, layer: int) -> slice:
        """The tokens that can change in a layer; in the last one, only those that are read."""
        if self.layer == layer and self.site == MID:
            return slice(0, self.dirty)
        if self.layer == layer and self.site == Q:
            return slice(0, 1)
        here = self.probes[self.probes.layer == layer]
        probed = (here.dest < self.clean.end[self.prompt[here.row]]).any()
        if layer < self.layers.model.n_layers - 1 or probed:
            return slice(0, self.length)
        return slice(self.length - 1, self.length)

    def places(self, tokens: slice) -> Int[Tensor, "row token"]:
        counted = torch.arange(self.length, device=self.prompt.device)
        return self.first[:, None] + counted[tokens]

    def clean_at(
        self, stream: Float[Tensor, "prompt pos d"], tokens: slice
    ) -> Float[Tensor, "row token d"]:
        """What the clean run has at some of the tokens of every row."""
        return stream[self.prompt[:, None], self.places(tokens)]

    def start(self) -> Float[Tensor, "row token d"]:
        """x before anything is changed."""
        stream = self.clean.mid if self.site == MID else self.clean.pre
        return self.clean_at(stream[self.layer], slice(0, self.dirty))

    def add_stream(
        self, x: Float[Tensor, "row token d"], layer: int, site: int, asked: slice
    ) -> Float[Tensor, "row token d"]:
        """x with the changes of the stream before (PRE) or after (MID) the attention of a layer."""
        if (layer, site) not in self.changed:
            return x
        found = self.stream[(self.stream.layer == layer) & (self.stream.site == site)]
        place = found.token - self.first[found.row] - asked.start
        found, place = found[place >= 0], place[place >= 0]
        return x.index_put((found.row, place), found.added().to(x.dtype), accumulate=True)

    def at_asked(self, x: Float[Tensor, "row token d"], layer: int) -> Float[Tensor, "row asked d"]:
        """x before a layer at the tokens that are asked for."""
        rest = self.clean_at(self.clean.pre[layer], slice(x.shape[1], self.length))
        return torch.cat([x, rest], dim=1)[:, self.asked(layer)]

    def attend(
        self, qkv: Float[Tensor, "row token qkv"], layer: int
    ) -> Float[Tensor, "row asked z"]:
        """z of all heads at the tokens asked for, from the inputs of heads at those of x."""
        asked, dirty = self.asked(layer), qkv.shape[1]
        new_q, new_k, new_v = self._heads(qkv)
        rest = self.prompt[:, None], slice(None), self.places(slice(dirty, self.length))
        q = torch.cat([new_q, self.clean.q[layer][rest]], dim=1)
        k, v = self.clean.k[layer][self.prompt], self.clean.v[layer][self.prompt]
        row = torch.arange(len(qkv), device=qkv.device)[:, None]
        k[row, :, self.places(slice(0, dirty))] = new_k
        v[row, :, self.places(slice(0, dirty))] = new_v
        self._change_inputs(layer, q, k, v)
        scores = q[:, asked].transpose(1, 2) @ k.mT / self.layers.divisor[layer]
        past = torch.arange(k.shape[2], device=k.device) <= self.places(asked)[..., None]
        scores = scores.masked_fill(~past[:, None], -torch.inf)
        # rotary models take the softmax in float32 whatever their dtype
        kind = torch.float32 if self.layers.model.rotary else scores.dtype
        pattern = scores.softmax(-1, dtype=kind).to(scores.dtype)
        self._report(layer, asked, scores, pattern)
        return (pattern @ v).transpose(1, 2).flatten(2)

    def _heads(
        self, qkv: Float[Tensor, "row token qkv"]
    ) -> list[Float[Tensor, "row token head r"]]:
        """Queries and keys (turned, if rotary) and values, for every query head."""
        model, angles = self.layers.model, self.layers.angles
        sizes = [model.n_heads, model.n_kv_heads, model.n_kv_heads]
        parts = list(qkv.unflatten(-1, (sum(sizes), model.d_head)).split(sizes, dim=2))
        if angles:
            places = self.places(slice(0, qkv.shape[1]))
            cos, sin = (table[places][:, :, None] for table in angles)
            parts[:2] = [rotate(part, cos, sin) for part in parts[:2]]
        groups = model.n_heads // model.n_kv_heads
        return [parts[0], *(part.repeat_interleave(groups, dim=2) for part in parts[1:])]

    def _change_inputs(
        self,
        layer: int,
        q: Float[Tensor, "row token head r"],
        k: Float[Tensor, "row head pos r"],
        v: Float[Tensor, "row head pos r"],
    ) -> None:
        for site, values in ((Q, q), (K, k), (V, v)):
            if (layer, site) not in self.changed:
                continue
            found = self.inputs[(self.inputs.layer == layer) & (self.inputs.site == site)]
            place = (found.row, found.head, found.token)
            if site == Q:
                place = (found.row, found.token - self.first[found.row], found.head)
            values.index_put_(place, found.added().to(values.dtype), accumulate=True)

    def _report(
        self,
        layer: int,
        asked: slice,
        scores: Float[Tensor, "row head asked pos"],
        pattern: Float[Tensor, "row head asked pos"],
    ) -> None:
        place = self.probes.dest - self.first[self.probes.row] - asked.start
        here = (self.probes.layer == layer) & (place >= 0) & (place < scores.shape[2])
        at = self.probes[here]
        for values, into in ((scores, self.score), (pattern, self.attention)):
            into[here] = values[at.row, at.head, place[here], at.src].double()
