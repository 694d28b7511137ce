"""Chapter 5: recompute only the part of a forward pass that an intervention can change.

Nothing before the first changed layer and token differs from the clean run, so each row starts
there, and only two logits at the last token are read. Rows of the same shape (first layer, number
of tokens) are computed together.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparse_signals.interventions import (
    MID,
    PRE,
    Changes,
    Clean,
    K,
    Layers,
    Probes,
    Q,
    V,
    rotate,
)
from sparse_signals.models import Model

TOKENS = 4096  # recomputed at once
KEYS = 32768  # keys gathered at once, counting those of earlier tokens


@dataclass(frozen=True)
class Outcome:
    """Logits of IO and S at the last token, and the score and attention weight of every probe.

    `probability` of IO is NaN unless it was asked for: it needs the whole vocabulary.
    """

    logits: Float[Tensor, "row 2"]
    probability: Float[Tensor, "row"]
    score: Float[Tensor, "probe"]
    attention: Float[Tensor, "probe"]


@torch.no_grad()
def recompute(
    layers: Layers,
    clean: Clean,
    prompt: Int[Tensor, "row"],
    stream: Changes,
    inputs: Changes,
    probes: Probes,
    *,
    freeze_norms: bool = False,
    probability: bool = False,
) -> Outcome:
    """The outcome of every row: a full forward pass with its changes, up to rounding.

    `stream` holds changes of the residual stream (sites pre, mid), `inputs` those of heads.
    `prompt` counts from the first prompt of `clean`. With `freeze_norms` every normalisation
    divides by what it divided by in the clean run. A row without changes is the clean run.
    Cost: that of the tokens from the first changed one on, in the layers from the first one on.
    Raises ValueError for a change after the last token of its prompt.
    """
    shape = _shapes(layers.model, clean, prompt, stream, inputs)
    read = torch.full((len(prompt), 3), torch.nan, dtype=torch.float64, device=prompt.device)
    scores = torch.full((len(probes.row), 2), torch.nan, dtype=torch.float64, device=prompt.device)
    for rows, (layer, site, length, dirty) in _groups(shape, clean.k.shape[3]):
        local = torch.full_like(prompt, -1)
        local[rows] = torch.arange(len(rows), device=local.device)
        mine = local[probes.row] >= 0
        chunk = _Chunk(
            layers,
            clean,
            prompt[rows],
            clean.end[prompt[rows]] - length + 1,
            length,
            _localised(stream, local),
            _localised(inputs, local),
            _localised(probes, local),
            freeze_norms,
        )
        x, *found = _run(chunk, layer, site, dirty)
        scores[mine] = torch.stack(found, dim=1)
        read[rows] = _read_out(chunk, x, probability)
    return Outcome(read[:, :2], read[:, 2], scores[:, 0], scores[:, 1])


# --- what has to be computed ---------------------------------------------------------------------


def _shapes(
    model: Model, clean: Clean, prompt: Int[Tensor, "row"], stream: Changes, inputs: Changes
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
    # in the order of computation: queries alone, other inputs, stream before, stream after
    step = layer * 4 + torch.tensor([2, 3, 0, 1, 1], device=site.device)[site]

    def over_rows(values: Tensor, how: str, start: Tensor) -> Tensor:
        return start.clone().scatter_reduce(0, row, values, how, include_self=False)

    none = torch.full_like(prompt, 4 * model.n_layers - 3)
    low, high = (over_rows(step, how, none) for how in ("amin", "amax"))
    end = clean.end[prompt]
    first, last = (over_rows(token, how, end) for how in ("amin", "amax"))
    length, start = end - first + 1, low // 4
    single = (low // 4 == high // 4) & (first == last) & ((low % 4 == 3) == (high % 4 == 3))
    narrow = single & ((start < model.n_layers - 1) | (high % 4 < 3))
    dirty = torch.where(narrow, (high % 4 >= 2).long(), length)
    kind = torch.where(single & (start < model.n_layers - 1) & (high % 4 == 0), Q, K)
    kind = torch.where(low % 4 == 3, MID, torch.where(dirty > 0, PRE, kind))
    return torch.stack([start, kind, length, dirty], dim=1)


def _groups(
    shape: Int[Tensor, "row 4"], width: int
) -> Iterator[tuple[Int[Tensor, "chunk"], list[int]]]:
    """Rows of one shape at a time, no more than fit the limits on tokens and keys."""
    shapes, of = torch.unique(shape, dim=0, return_inverse=True)
    order, counts = of.argsort(stable=True), torch.bincount(of, minlength=len(shapes))
    for rows, kind in zip(order.split(counts.tolist()), shapes.tolist(), strict=True):
        size = max(1, min(TOKENS // kind[2], KEYS // width))
        for chunk in rows.split(size):
            yield chunk, kind


def _localised(entries: Changes | Probes, local: Int[Tensor, "row"]) -> Changes | Probes:
    row = local[entries.row]
    return replace(entries[row >= 0], row=row[row >= 0])


# --- the computation -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chunk:
    """Rows that are recomputed together; `first` is where their tokens start."""

    layers: Layers
    clean: Clean
    prompt: Int[Tensor, "row"]
    first: Int[Tensor, "row"]
    length: int
    stream: Changes
    inputs: Changes
    probes: Probes
    freeze_norms: bool

    def clean_at(self, values: Float[Tensor, "prompt pos d"], tokens: slice) -> Tensor:
        """What the clean run has at some of the tokens (counted from the first) of every row."""
        return values[self.prompt[:, None], self.places(tokens)]

    def places(self, tokens: slice) -> Int[Tensor, "row token"]:
        counted = torch.arange(self.length, device=self.first.device)
        return self.first[:, None] + counted[tokens]

    def norm(
        self, module: nn.Module, x: Float[Tensor, "row token d"], clean_x: Callable[[], Tensor]
    ) -> Float[Tensor, "row token d"]:
        """The model's normalisation, or with the scale that it has in the clean run."""
        if not self.freeze_norms:
            return module(x)
        clean = clean_x()
        if not module.uses_rms_norm:
            x, clean = x - x.mean(-1, keepdim=True), clean - clean.mean(-1, keepdim=True)
        scale = (clean.square().mean(-1, keepdim=True) + self.layers.model.bridge.cfg.eps).sqrt()
        return x / scale * module.w + (0 if module.uses_rms_norm else module.b)


def _run(
    chunk: _Chunk, layer: int, site: int, dirty: int
) -> tuple[Float[Tensor, "row d"], Float[Tensor, "probe"], Float[Tensor, "probe"]]:
    """The stream after the last layer at the last token, and the probes.

    x holds the tokens of a row that have changed so far: the first `dirty` ones at the start, and
    all that the last attention was asked for afterwards.
    """
    clean, model, probes = chunk.clean, chunk.layers.model, chunk.probes
    found = _clean_scores(chunk.layers, clean, chunk.prompt, probes)
    start = clean.mid if site == MID else clean.pre
    x = chunk.clean_at(start[layer], slice(0, dirty))
    for now in range(layer, model.n_layers):
        if now == layer and site == MID:
            asked = slice(0, dirty)
        else:
            asked = _asked(chunk, now, alone=now == layer and site == Q)
            x = _add_stream(chunk, x, now, PRE, slice(0, chunk.length))
            x = _attend(chunk, x, now, asked, found)
        x = _add_stream(chunk, x, now, MID, asked)
        block = model.bridge.blocks[now]
        before = partial(chunk.clean_at, clean.mid[now], asked)
        x = x + block.mlp(chunk.norm(block.ln2, x, before))
    return x[:, -1], *found


def _asked(chunk: _Chunk, layer: int, alone: bool) -> slice:
    """The tokens whose attention is computed: in the last layer, the last one and probed ones."""
    if alone:
        return slice(0, 1)
    here = chunk.probes.layer == layer
    probed = (chunk.probes.dest[here] < chunk.clean.end[chunk.prompt[chunk.probes.row[here]]]).any()
    if layer < chunk.layers.model.n_layers - 1 or probed:
        return slice(0, chunk.length)
    return slice(chunk.length - 1, chunk.length)


def _add_stream(
    chunk: _Chunk, x: Float[Tensor, "row token d"], layer: int, site: int, asked: slice
) -> Float[Tensor, "row token d"]:
    found = chunk.stream[(chunk.stream.layer == layer) & (chunk.stream.site == site)]
    place = found.token - chunk.first[found.row] - asked.start
    found, place = found[place >= 0], place[place >= 0]
    return x.index_put((found.row, place), found.added().to(x.dtype), accumulate=True)


def _attend(
    chunk: _Chunk,
    x: Float[Tensor, "row token d"],
    layer: int,
    asked: slice,
    found: tuple[Float[Tensor, "probe"], Float[Tensor, "probe"]],
) -> Float[Tensor, "row asked d"]:
    """The stream after the attention of a layer, at the tokens asked for."""
    layers, clean = chunk.layers, chunk.clean
    dirty, rest = slice(0, x.shape[1]), slice(x.shape[1], chunk.length)
    new_q, new_k, new_v = _project(chunk, x, layer)
    at = chunk.prompt[:, None], slice(None), chunk.places(rest)
    q = torch.cat([new_q, clean.q[layer][at]], dim=1)
    k, v = clean.k[layer][chunk.prompt], clean.v[layer][chunk.prompt]
    if x.shape[1]:
        row = torch.arange(len(x), device=x.device)[:, None]
        k[row, :, chunk.places(dirty)] = new_k
        v[row, :, chunk.places(dirty)] = new_v
    _change_inputs(chunk, layer, q, k, v)
    scores = q[:, asked].transpose(1, 2) @ k.mT / layers.divisor[layer]
    past = torch.arange(k.shape[2], device=k.device) <= chunk.places(asked)[..., None]
    scores = scores.masked_fill(~past[:, None], -torch.inf)
    # rotary models take the softmax in float32 whatever their dtype
    kind = torch.float32 if layers.model.rotary else scores.dtype
    pattern = scores.softmax(-1, dtype=kind).to(scores.dtype)
    _report(chunk, layer, asked, scores, pattern, found)
    z = (pattern @ v).transpose(1, 2).flatten(2)
    x = torch.cat([x, chunk.clean_at(clean.pre[layer], rest)], dim=1)[:, asked]
    return x + z @ layers.W_out[layer] + layers.b_out[layer]


def _project(
    chunk: _Chunk, x: Float[Tensor, "row token d"], layer: int
) -> list[Float[Tensor, "row token head r"]]:
    """Queries, keys and values of the changed tokens, for every query head."""
    layers, model = chunk.layers, chunk.layers.model
    tokens = slice(0, x.shape[1])
    before = partial(chunk.clean_at, chunk.clean.pre[layer], tokens)
    hidden = chunk.norm(model.bridge.blocks[layer].ln1, x, before)
    sizes = [model.n_heads, model.n_kv_heads, model.n_kv_heads]
    heads = hidden @ layers.W_in[layer] + layers.b_in[layer]
    parts = list(heads.unflatten(-1, (sum(sizes), model.d_head)).split(sizes, dim=2))
    if layers.angles:
        cos, sin = (table[chunk.places(tokens)][:, :, None] for table in layers.angles)
        parts[:2] = [rotate(part, cos, sin) for part in parts[:2]]
    groups = model.n_heads // model.n_kv_heads
    return [parts[0], *(part.repeat_interleave(groups, dim=2) for part in parts[1:])]


def _change_inputs(
    chunk: _Chunk,
    layer: int,
    q: Float[Tensor, "row token head r"],
    k: Float[Tensor, "row head pos r"],
    v: Float[Tensor, "row head pos r"],
) -> None:
    """Add the changes of queries, keys and values, in place."""
    for site, values in ((Q, q), (K, k), (V, v)):
        found = chunk.inputs[(chunk.inputs.layer == layer) & (chunk.inputs.site == site)]
        place = (found.row, found.head, found.token)
        if site == Q:
            place = (found.row, found.token - chunk.first[found.row], found.head)
        values.index_put_(place, found.added().to(values.dtype), accumulate=True)


def _report(
    chunk: _Chunk,
    layer: int,
    asked: slice,
    scores: Float[Tensor, "row head asked pos"],
    pattern: Float[Tensor, "row head asked pos"],
    found: tuple[Float[Tensor, "probe"], Float[Tensor, "probe"]],
) -> None:
    probes = chunk.probes
    place = probes.dest - chunk.first[probes.row] - asked.start
    here = (probes.layer == layer) & (place >= 0) & (place < scores.shape[2])
    at = probes[here]
    for values, into in zip((scores, pattern), found, strict=True):
        into[here] = values[at.row, at.head, place[here], at.src].double()


def _clean_scores(
    layers: Layers, clean: Clean, prompt: Int[Tensor, "row"], probes: Probes
) -> tuple[Float[Tensor, "probe"], Float[Tensor, "probe"]]:
    """Score and attention weight of every probe in the clean run."""
    of = prompt[probes.row]
    divisor = torch.tensor(layers.divisor, dtype=torch.float64, device=of.device)[probes.layer]
    q = clean.q[probes.layer, of, probes.head, probes.dest].double()
    k = clean.k[probes.layer, of, probes.head].double()
    scores = (k @ q[..., None])[..., 0] / divisor[:, None]
    past = torch.arange(k.shape[1], device=k.device) <= probes.dest[:, None]
    pattern = scores.masked_fill(~past, -torch.inf).softmax(-1)
    row = torch.arange(len(of), device=of.device)
    return scores[row, probes.src], pattern[row, probes.src]


def _read_out(
    chunk: _Chunk, x: Float[Tensor, "row d"], probability: bool
) -> Float[Tensor, "row 3"]:
    """Logits of IO and S, and the probability of IO (NaN without the whole vocabulary)."""
    bridge, clean = chunk.layers.model.bridge, chunk.clean
    final = chunk.norm(bridge.ln_final, x[:, None], lambda: clean.final[chunk.prompt][:, None])
    final = final[:, 0]
    answers = clean.answers[chunk.prompt]
    W_U, b_U = bridge.unembed.W_U, bridge.unembed.b_U
    if probability:
        every = final @ W_U + b_U
        logits = every.gather(1, answers)
        chance = (logits[:, 0] - every.logsumexp(-1)).exp()
    else:
        columns = W_U.T[answers]
        logits = torch.einsum("nd,nad->na", final, columns) + b_U[answers]
        chance = torch.full_like(logits[:, 0], torch.nan)
    return torch.cat([logits, chance[:, None]], dim=1).double()
