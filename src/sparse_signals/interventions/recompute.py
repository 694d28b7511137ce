"""Chapter 5: recompute only the part of a forward pass that an intervention can change.

Nothing before the first changed layer and token differs from the clean run, so each row starts
there, and only two logits at the last token are read. What is done token by token is done for all
rows that have started; attention, for rows of one shape at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparse_signals.core.forward import (
    angles,
    attention_weights,
    norm_scale,
    normalise,
    normalised_in_head,
    read_out,
)
from sparse_signals.core.model import Model
from sparse_signals.core.rotary import rotate
from sparse_signals.interventions.changes import (
    MID,
    PRE,
    Changes,
    Clean,
    K,
    Probes,
    Q,
    V,
    attention_layers,
    clean_scores,
)

TOKENS = 1024  # multiplied by a weight matrix at once
WAVE = 8192  # tokens recomputed from the first layer to the last before others are
KEYS = 32768  # keys gathered at once, counting those of earlier tokens
Stream = Float[Tensor, "_ _ _"]  # row, token, d
zip_ = partial(zip, strict=True)
Entries = TypeVar("Entries", Changes, Probes)
Shape = tuple[int, int, int, int]  # first layer and site, tokens, and those of them changed


@dataclass(frozen=True)
class Outcome:
    """Logits of IO and S at the last token, and the score and attention weight of every probe."""

    logits: Float[Tensor, "row 2"]
    score: Float[Tensor, "probe"]
    attention: Float[Tensor, "probe"]


@dataclass(frozen=True)
class Rows:
    """Rows that start in the same layer, at the same site, with as many tokens.

    `first` is the place of their first token, `length` their number of tokens, of which `dirty`
    are changed at the start. Changes and probes are theirs; `which` numbers the probes among those
    of all rows. `score` and `attention` are those of the clean run until they are recomputed.
    """

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
        """The first token of every row that is computed."""
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
        if layer < self.clean.model.n_layers - 1 or probed:
            return slice(0, self.length)
        return slice(self.length - 1, self.length)

    def places(self, tokens: slice) -> Int[Tensor, "row token"]:
        """Where in their prompts some of the tokens of every row stand."""
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
        self, qkv: Float[Tensor, "row token qkv"], layer: int, freeze: bool
    ) -> Float[Tensor, "row asked z"]:
        """z of all heads at the tokens asked for, from the inputs of heads at those of x.

        Keeps the scores and attention weights that were asked for.
        """
        asked, dirty = self.asked(layer), qkv.shape[1]
        new_q, new_k, new_v = self._heads(qkv, layer, freeze)
        rest = self.prompt[:, None], slice(None), self.places(slice(dirty, self.length))
        q = torch.cat([new_q, self.clean.q[layer][rest]], dim=1)
        k, v = self.clean.k[layer][self.prompt], self.clean.v[layer][self.prompt]
        row = torch.arange(len(qkv), device=qkv.device)[:, None]
        k[row, :, self.places(slice(0, dirty))] = new_k
        v[row, :, self.places(slice(0, dirty))] = new_v
        self._change_inputs(layer, q, k, v)
        scores = q[:, asked].transpose(1, 2) @ k.mT / self.clean.model.divisor[layer].to(q)
        past = torch.arange(k.shape[2], device=k.device) <= self.places(asked)[..., None]
        pattern = attention_weights(scores, past[:, None])
        place = self.probes.dest - self.first[self.probes.row] - asked.start
        here = (self.probes.layer == layer) & (place >= 0) & (place < scores.shape[2])
        at = self.probes[here]
        for values, into in ((scores, self.score), (pattern, self.attention)):
            into[here] = values[at.row, at.head, place[here], at.src].double()
        return (pattern @ v).transpose(1, 2).flatten(2)

    def _heads(
        self, qkv: Float[Tensor, "row token qkv"], layer: int, freeze: bool
    ) -> list[Float[Tensor, "row token head r"]]:
        """Queries and keys (as they enter the score) and values, for every query head."""
        model = self.clean.model
        sizes = [model.n_heads, model.n_kv_heads, model.n_kv_heads]
        parts = list(qkv.unflatten(-1, (sum(sizes), model.d_head)).split(sizes, dim=2))
        places = self.places(slice(0, qkv.shape[1]))
        if model.head_gains:
            at = layer, self.prompt[:, None], slice(None), places
            for n, clean in enumerate((self.clean.q_scale, self.clean.k_scale)):
                scale = clean[at].transpose(1, 2) if freeze else None
                y = normalised_in_head(model, layer, "qk"[n], parts[n].transpose(1, 2), scale)[0]
                parts[n] = y.transpose(1, 2)
        if model.rotary:
            cos, sin = (table[places][:, :, None] for table in angles(model))
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


@torch.no_grad()
def recompute(
    clean: Clean,
    prompt: Int[Tensor, "row"],
    stream: Changes,
    inputs: Changes,
    probes: Probes,
    *,
    freeze_norms: bool = False,
) -> Outcome:
    """The outcome of every row: a full forward pass with its changes, up to rounding.

    `stream` holds changes of the residual stream (sites pre, mid), `inputs` those of heads.
    `prompt` counts from the first prompt of `clean`. With `freeze_norms` every normalisation
    divides by what it divided by in the clean run. A row without changes is the clean run.
    Cost: that of the tokens from the first changed one on, in the layers from the first one on.
    Raises ValueError for a change after the last token of its prompt.
    """
    shape = _shapes(clean, prompt, stream, inputs)
    read = torch.zeros((len(prompt), 2), dtype=torch.float64, device=prompt.device)
    found = torch.stack(clean_scores(clean, prompt, probes), dim=1)
    for wave in _waves(shape, clean.k.shape[3]):
        groups = []
        for rows, kind in wave:
            local = torch.full_like(prompt, -1)
            local[rows] = torch.arange(len(rows), device=local.device)
            which = (local[probes.row] >= 0).nonzero().flatten()
            parts = _localised(stream, local), _localised(inputs, local), _localised(probes, local)
            score, attention = found[which].unbind(1)
            here = clean, prompt[rows], *kind
            groups.append(Rows(*here, *parts, which, score, attention))
        x = _run_groups(groups, freeze_norms)
        of = torch.cat([rows for rows, _ in wave])
        at = prompt[of]
        scale = norm_scale(clean.model, clean.final[at]) if freeze_norms else None
        read[of] = read_out(clean.model, x, clean.answers[at], scale).double()
        for group in groups:
            found[group.which] = torch.stack([group.score, group.attention], dim=1)
    return Outcome(read, found[:, 0], found[:, 1])


# --- what has to be computed ---------------------------------------------------------------------


def _shapes(
    clean: Clean, prompt: Int[Tensor, "row"], stream: Changes, inputs: Changes
) -> Int[Tensor, "row 4"]:
    """First layer and site of every row, its number of tokens, and how many are changed there.

    One change touches one token until the next attention reads it; several are treated as if
    they touched all tokens of the row at once.
    """
    row, layer, site, token = (
        torch.cat([getattr(stream, name), getattr(inputs, name)])
        for name in ("row", "layer", "site", "token")
    )
    if (token > clean.end[prompt[row]]).any():
        raise ValueError("a change after the last token of its prompt: there is nothing to see")
    # queries alone, other inputs, stream before attention, stream after it
    rank = {Q: 0, K: 1, V: 1, PRE: 2, MID: 3}
    step = layer * 4 + torch.tensor([rank[n] for n in range(5)], device=site.device)[site]

    def over_rows(values: Tensor, how: str, start: Tensor) -> Tensor:
        return start.clone().scatter_reduce(0, row, values, how, include_self=False)

    last_layer, end = clean.model.n_layers - 1, clean.end[prompt]
    unchanged = torch.full_like(prompt, 4 * last_layer + 1)
    low, high = (over_rows(step, how, unchanged) for how in ("amin", "amax"))
    first, last = (over_rows(token, how, end) for how in ("amin", "amax"))
    start, length = low // 4, end - first + 1
    single = (start == high // 4) & (first == last) & ((low % 4 == 3) == (high % 4 == 3))
    spreads = start < last_layer  # else nothing comes after that reads the other tokens
    dirty = torch.where(single & (spreads | (high % 4 < 3)), (high % 4 >= 2).long(), length)
    site = torch.where(single & spreads & (high % 4 == 0), Q, K)
    site = torch.where(low % 4 == 3, MID, torch.where(dirty > 0, PRE, site))
    return torch.stack([start, site, length, dirty], dim=1)


def _waves(
    shape: Int[Tensor, "row 4"], width: int
) -> Iterator[list[tuple[Int[Tensor, "group"], Shape]]]:
    """Groups of rows of one shape, in the order of their first layer, `WAVE` tokens at a time."""
    shapes, of = torch.unique(shape, dim=0, return_inverse=True)
    order, counts = of.argsort(stable=True), torch.bincount(of, minlength=len(shapes))
    wave, tokens = [], 0
    for rows, kind in zip(order.split(counts.tolist()), shapes.tolist(), strict=True):
        for group in rows.split(max(1, min(TOKENS // kind[2], KEYS // width))):
            wave.append((group, tuple(kind)))
            tokens += len(group) * kind[2]
            if tokens >= WAVE:
                yield wave
                wave, tokens = [], 0
    if wave:
        yield wave


def _localised(entries: Entries, local: Int[Tensor, "row"]) -> Entries:
    row = local[entries.row]
    return replace(entries[row >= 0], row=row[row >= 0])


# --- the computation -----------------------------------------------------------------------------


def _run_groups(groups: Sequence[Rows], freeze: bool) -> Float[Tensor, "row d"]:
    """The stream after the last layer at the last token of every row, group after group.

    Groups start in their order: sites are numbered in the order of computation.
    """
    xs: list[Stream] = []
    for layer in range(groups[0].layer, groups[0].clean.model.n_layers):
        attending = [group for group in groups if group.attends(layer)]
        xs += [group.start() for group in attending[len(xs) :]]
        xs, before = _attend(attending, xs, layer, freeze)
        moving = [group for group in groups if group.layer <= layer]
        xs += [group.start() for group in moving[len(xs) :]]
        xs = _move(moving, xs, before, layer, freeze)
    return torch.cat([x[:, -1] for x in xs])


def _attend(
    groups: Sequence[Rows], xs: list[Stream], layer: int, freeze: bool
) -> tuple[list[Stream], list[Stream]]:
    """x of every group after the attention of a layer, and before it, at the tokens asked for."""
    if not groups:
        return [], []
    model, pre = groups[0].clean.model, groups[0].clean.pre[layer]
    layers, norm = attention_layers(model), model.bridge.blocks[layer].ln1
    xs = [g.add_stream(x, layer, PRE, slice(0, g.length)) for g, x in zip_(groups, xs)]
    old = [g.clean_at(pre, slice(0, x.shape[1])) for g, x in zip_(groups, xs)] if freeze else []
    W, b = layers.W_in[layer], layers.b_in[layer]
    qkv = _by_token(lambda x, *old: _normalised(model, norm, x, *old) @ W + b, xs, old)
    z = [group.attend(inputs, layer, freeze) for group, inputs in zip_(groups, qkv)]
    out = _by_token(lambda z: z @ layers.W_out[layer] + layers.b_out[layer], z)
    before = [g.at_asked(x, layer) for g, x in zip_(groups, xs)]
    return [x + more for x, more in zip_(before, out)], before


def _move(
    groups: Sequence[Rows], xs: list[Stream], before: list[Stream], layer: int, freeze: bool
) -> list[Stream]:
    """x of every group after the MLP of a layer, from x after and before its attention."""
    model, clean = groups[0].clean.model, groups[0].clean.in_mlp[layer]
    block = model.bridge.blocks[layer]
    xs = [g.add_stream(x, layer, MID, g.asked(layer)) for g, x in zip_(groups, xs)]
    old = [g.clean_at(clean, g.asked(layer)) for g in groups] if freeze else []
    if model.parallel:
        read = before + [g.clean_at(clean, g.asked(layer)) for g in groups[len(before) :]]
    else:
        read = xs
    out = _by_token(lambda x, *old: block.mlp(_normalised(model, block.ln2, x, *old)), read, old)
    return [x + more for x, more in zip_(xs, out)]


def _by_token(
    function: Callable[..., Tensor], xs: Sequence[Stream], *others: Sequence[Stream]
) -> list[Stream]:
    """A function of single tokens, on all tokens of all groups together."""
    columns = [torch.cat([x.flatten(0, 1) for x in column]) for column in (xs, *others) if column]
    slabs = zip_(*(column.split(TOKENS) for column in columns))
    flat = torch.cat([function(*(part[None] for part in slab))[0] for slab in slabs])
    sizes = [x.shape[0] * x.shape[1] for x in xs]
    parts = zip_(flat.split(sizes), xs)
    return [part.view(*x.shape[:2], flat.shape[-1]) for part, x in parts]


def _normalised(model: Model, norm: nn.Module, x: Stream, clean: Stream | None = None) -> Stream:
    """A normalisation of x, dividing by its own scale or by that of the clean stream."""
    return normalise(model, norm, x, None if clean is None else norm_scale(model, clean))
