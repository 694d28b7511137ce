"""The sparse signal of a difference: why a head scores a source otherwise in x than in x′.

Δa = Σ_k (d̄_k Δs_k + s̄_k Δd_k) over the slices of chapter 3, d and s the coordinates of query and
key: the mean of one side times what differs on the other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_signals.attribution.aligned import AlignedRuns, Counterfactual
from sparse_signals.attribution.graph import TokenEdges, find_edges, first_head
from sparse_signals.attribution.inputs import INPUTS, Attending, Heads
from sparse_signals.attribution.readers import Readers
from sparse_signals.attribution.record import reading_weights
from sparse_signals.core.forward import angles
from sparse_signals.core.matmul import grouped_matmul
from sparse_signals.core.model import Model, head_name
from sparse_signals.core.objective import Objective
from sparse_signals.core.prompts import Batch
from sparse_signals.core.rotary import rotate
from sparse_signals.core.stats import participation_ratio
from sparse_signals.signals.nulls import block_rotation
from sparse_signals.signals.slices import model_basis, sparsity, support

COMPARISONS = [
    "prompt", "layer", "head", "name", "dest", "src", "attention", "other", "change", "value",
]  # fmt: skip
BLOCKS = {"all directions": None, "blocks of 8": 8, "blocks of 4": 4}  # how far rotations mix
STRONGEST_SOURCES = 3  # sources of every head and destination


@dataclass(frozen=True)
class Sides:
    """Slices as sums of products, Σ_t dest_tk · src_tk, in the singular basis of every head."""

    dest: Float[Tensor, "term row r"]
    src: Float[Tensor, "term row r"]

    @property
    def slices(self) -> Float[Tensor, "row r"]:
        """One row each, which sums to the same in any basis."""
        return (self.dest * self.src).sum(0)

    def turned(self, rotation: Float[Tensor, "r r"]) -> "Sides":
        """After a rotation of the basis, the same one in every head."""
        rotation = rotation.to(self.dest)
        return Sides(self.dest @ rotation, self.src @ rotation)


def head_sides(runs: AlignedRuns, nodes: Heads, src: Int[Tensor, "node"]) -> tuple[Sides, Sides]:
    """Of Δa of each head, destination and source (counted from the first token), and of a in x.

    Their slices sum to the difference of scores, and to the score.
    """
    basis, groups = model_basis(runs.model), runs.model.n_heads // runs.model.n_kv_heads
    dest, source = [], []
    for end in runs.ends:
        a = end.layers[nodes.layer]
        here = nodes.dest if a.q.shape[2] > 1 else torch.zeros_like(nodes.dest)
        q, k = a.q[nodes.prompt, nodes.head, here], a.k[nodes.prompt, nodes.head // groups, src]
        for side, x, maps in ((dest, q, basis.dest), (source, k, basis.src)):
            side.append(grouped_matmul(x.double(), maps[nodes.layer], nodes.head))
    (d, d2), (s, s2) = dest, source
    change = Sides(torch.stack([(d + d2) / 2, d - d2]), torch.stack([s - s2, (s + s2) / 2]))
    return change, Sides(d[None], s[None])


def compare_heads(runs: AlignedRuns, found: Readers, nodes: Sequence[Heads]) -> pd.DataFrame:
    """The sources of heads whose change of score matters most, one row each.

    Columns as `COMPARISONS`: attention in x, and the other one in x′, the change of the score, and
    its value, what F hears of it: over all sources it sums to the edges into query and key. Then
    the measures of `signals.sparsity`, and vectors, the support of the change.
    """
    if not nodes:
        return pd.DataFrame(columns=[*COMPARISONS, "vectors"])
    tables, pieces = [], []
    for part in nodes:
        some, src, columns = _strongest_sources(runs, found, part)
        pieces.append(head_sides(runs, some, src)[0].slices)
        places = {
            "prompt": some.prompt, "head": some.head, "dest": some.dest + runs.start, "src": src,
        }  # fmt: skip
        tables.append(pd.DataFrame({k: x.cpu().numpy() for k, x in (places | columns).items()}))
        tables[-1].insert(1, "layer", part.layer)
    table = pd.concat(tables, ignore_index=True)
    table["name"] = head_name(table["layer"], table["head"])
    parts = torch.cat(pieces)
    measures = sparsity(parts).rename(columns={"support": "size"})
    vectors = [row.nonzero().flatten().tolist() for row in support(parts).cpu()]
    table = table[COMPARISONS].join(measures)
    return table.assign(vectors=pd.Series(vectors, table.index, dtype=object))


def _strongest_sources(
    runs: AlignedRuns, found: Readers, nodes: Heads
) -> tuple[Heads, Int[Tensor, "row"], dict[str, Float[Tensor, "row"]]]:
    """Heads again for each of their strongest sources, the source, and columns of `COMPARISONS`."""
    layer, a, b = nodes.layer, *(end.layers[nodes.layer] for end in runs.ends)
    here = nodes.dest if a.z.shape[2] > 1 else torch.zeros_like(nodes.dest)
    z = found.layers[layer].z[nodes.prompt, nodes.head, here]
    heard = Attending.of(runs, nodes).heard(z)[0][:, 0]
    logs = [x.log_weights[nodes.prompt, nodes.head, here] for x in (a, b)]
    seen = torch.isfinite(logs[0])
    groups = runs.model.n_heads // runs.model.n_kv_heads
    divisor, scores = float(runs.model.divisor[layer]), []
    for end in (a, b):
        q = end.q[nodes.prompt, nodes.head, here].unsqueeze(1)
        k = end.k[nodes.prompt, nodes.head // groups]
        scores.append((q @ k.mT)[:, 0] / divisor)
    change = (scores[0] - scores[1]).masked_fill(~seen, 0.0)
    value = heard.masked_fill(~seen, 0.0) * change
    best = value.abs().topk(min(STRONGEST_SOURCES, value.shape[1]), dim=1).indices
    row = torch.arange(len(nodes), device=best.device).repeat_interleave(best.shape[1])
    src = best.flatten()
    used = value[row, src] != 0
    row, src = row[used], src[used]
    some = Heads(layer, nodes.prompt[row], nodes.head[row], nodes.dest[row])
    columns = {
        "attention": logs[0][row, src].exp(), "other": logs[1][row, src].exp(),
        "change": change[row, src], "value": value[row, src],
    }  # fmt: skip
    return some, src, columns


def edge_sides(runs: AlignedRuns, found: Readers, layer: int, edges: TokenEdges) -> Sides:
    """Of edges into queries and keys of one layer: their slices sum to the share of the edge.

    Into a query, Δd_k of what upstream wrote times what F hears of s̄_k over all sources; into a
    key, what F hears of d̄_k times Δs_k.
    """
    model, basis = runs.model, model_basis(runs.model)
    nodes = Heads(layer, edges.prompt, edges.down - first_head(model, layer), edges.dest)
    heads, readers = Attending.of(runs, nodes), found.layers[layer]
    here = nodes.dest if readers.z.shape[2] > 1 else torch.zeros_like(nodes.dest)
    heard = heads.heard(readers.z[nodes.prompt, nodes.head, here])[0]
    change = runs.changes[0][edges.up, edges.prompt, edges.token]
    change = heads.norm.at((edges.prompt, edges.token)).folded(change)
    W_Q, W_K, _ = reading_weights(model, layer)
    into_q = (edges.kind == INPUTS.index("q")).unsqueeze(1)
    q = grouped_matmul(change, W_Q, nodes.head)
    k = grouped_matmul(change, W_K, nodes.head // (model.n_heads // model.n_kv_heads))
    number = torch.arange(len(edges), device=change.device)
    q, k = (heads.normalised(name, number, edges.token, x) for name, x in (("q", q), ("k", k)))
    if model.rotary:
        turn = tuple(x[heads.start + edges.token] for x in angles(model))
        q, k = (rotate(x, *turn) for x in (q, k))
    at_key = heard[number, 0, heads.start + edges.token].unsqueeze(1)
    dest = torch.where(into_q, q, at_key * heads.score.q[:, 0])
    src = torch.where(into_q, (heard @ heads.score.k)[:, 0], k)
    sides = (
        grouped_matmul(x.double(), maps[layer], nodes.head)[None]
        for x, maps in ((dest, basis.dest), (src, basis.src))
    )
    return Sides(*sides)


@torch.no_grad()
def difference_sparsity(
    model: Model,
    batch: Batch,
    counterfactual: Counterfactual,
    *,
    objective: Objective | None = None,
    least: float = 0.02,
    repeats: int = 5,
) -> pd.DataFrame:
    """Participation ratios of slices in the singular basis, and those in random rotations of it.

    Of Δa and, beside it, of the score a in x: of all heads, destinations and sources whose change
    of score has at least `least` of |ΔF|. And of single edges into queries and keys with as much.
    A rotation mixes all directions of a head, or only blocks of neighbouring singular vectors: then
    it keeps the spectrum, so what is left is that single directions mean something.
    One row for each of them and of `BLOCKS`: prompt, name, of ("Δa", "a", "an edge's share"), null,
    participation, rotated (its mean over `repeats` rotations).
    """
    rank, pieces = model.d_head, []
    turns = {
        null: [block_rotation(rank, width or rank, 100 * n) for n in range(repeats)]
        for null, width in BLOCKS.items()
    }
    for rows, runs in AlignedRuns.of(model, batch, counterfactual, objective).chunks():
        found = next(runs.readers())
        edges = find_edges(runs, found, least)
        edges = edges[(edges.kind < INPUTS.index("v")) & (edges.down >= 0)]
        for layer in range(model.n_layers):
            mine = edges[(edges.down - 1) // (model.n_heads + 1) == layer]
            for of, prompt, head, sides in _of_layer(runs, found, layer, mine, least):
                names = [head_name(layer, number) for number in head.tolist()]
                each = {"prompt": prompt.cpu().numpy() + rows.start, "name": names, "of": of}
                pieces.append(_against_rotations(pd.DataFrame(each), sides, turns))
    return pd.concat(pieces, ignore_index=True)


def _of_layer(
    runs: AlignedRuns, found: Readers, layer: int, edges: TokenEdges, least: float
) -> Iterator[tuple[str, Tensor, Tensor, Sides]]:
    """Changes of scores, scores, edges into queries and keys of a layer: prompts, heads, sides."""
    some, src, columns = _strongest_sources(runs, found, _all_heads(runs, layer))
    large = columns["value"].abs() >= least * runs.difference.abs()[some.prompt]
    some, src = Heads(layer, some.prompt[large], some.head[large], some.dest[large]), src[large]
    if len(some):
        change, score = head_sides(runs, some, src)
        yield "Δa", some.prompt, some.head, change
        yield "a", some.prompt, some.head, score
    if len(edges):
        head = edges.down - first_head(runs.model, layer)
        yield "an edge's share", edges.prompt, head, edge_sides(runs, found, layer, edges)


def _against_rotations(
    table: pd.DataFrame, sides: Sides, turns: dict[str, list[Float[Tensor, "r r"]]]
) -> pd.DataFrame:
    """The table with participation ratios in the singular basis, and in rotations of it."""
    own, pieces = participation_ratio(sides.slices).cpu().numpy(), []
    for null, each in turns.items():
        found = [participation_ratio(sides.turned(turn).slices) for turn in each]
        rotated = torch.stack(found).mean(0).cpu().numpy()
        pieces.append(table.assign(participation=own, rotated=rotated, null=null))
    return pd.concat(pieces, ignore_index=True)


def _all_heads(runs: AlignedRuns, layer: int) -> Heads:
    """All heads of a layer, at all tokens that a prompt has, or in the last layer at its end."""
    seen = runs.batch.mask[:, runs.start :].to(runs.last.device)
    if layer == runs.model.n_layers - 1:
        seen = torch.zeros_like(seen).scatter(1, runs.last[:, None], True)
    heads = seen[:, None].expand(-1, runs.model.n_heads, -1)
    return Heads(layer, *heads.nonzero(as_tuple=True))
