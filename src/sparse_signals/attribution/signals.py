"""The sparse signal of a difference: why a head scores a source otherwise in x than in x′.

Δa = Σ_k (d̄_k Δs_k + s̄_k Δd_k) over the slices of chapter 3, d and s the coordinates of query and
key: the mean of one side times what differs on the other.
"""

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_signals.attribution.aligned import AlignedRuns, Counterfactual
from sparse_signals.attribution.inputs import Heads, into_heads
from sparse_signals.attribution.readers import Readers
from sparse_signals.core.matmul import grouped_matmul
from sparse_signals.core.model import Model, head_name
from sparse_signals.core.objective import Objective
from sparse_signals.core.prompts import Batch
from sparse_signals.core.stats import participation_ratio, random_rotation
from sparse_signals.signals.slices import Basis, model_basis, sparsity, support

COMPARISONS = [
    "prompt", "layer", "head", "name", "dest", "src", "attention", "other", "change", "value",
]  # fmt: skip
BLOCKS = {"all directions": None, "blocks of 8": 8, "blocks of 4": 4}  # how far rotations mix
STRONGEST_SOURCES = 3  # sources of every head and destination


def difference_slices(
    runs: AlignedRuns,
    nodes: Heads,
    src: Int[Tensor, "node"],
    basis: Basis | None = None,
) -> Float[Tensor, "node r"]:
    """The slices of Δa of each head, destination and source (counted from the start of prompts).

    In the SVD basis of the head, or another one: they sum to the difference of its scores.
    """
    return _slices(runs, nodes, src, basis or model_basis(runs.model))[0]


def _slices(
    runs: AlignedRuns, nodes: Heads, src: Int[Tensor, "node"], basis: Basis
) -> tuple[Float[Tensor, "node r"], Float[Tensor, "node r"]]:
    """The slices of Δa, and those of a in x."""
    groups = runs.model.n_heads // runs.model.n_kv_heads
    dest, source = [], []
    for end in runs.ends:
        a = end.layers[nodes.layer]
        here = nodes.dest if a.q.shape[2] > 1 else torch.zeros_like(nodes.dest)
        q, k = a.q[nodes.prompt, nodes.head, here], a.k[nodes.prompt, nodes.head // groups, src]
        for side, x, maps in ((dest, q, basis.dest), (source, k, basis.src)):
            side.append(grouped_matmul(x.double(), maps[nodes.layer], nodes.head))
    (d, d2), (s, s2) = dest, source
    return ((d + d2) * (s - s2) + (s + s2) * (d - d2)) / 2, d * s


def compare_heads(runs: AlignedRuns, found: Readers, nodes: Sequence[Heads]) -> pd.DataFrame:
    """The sources of heads whose change of score matters most, one row each.

    Columns as `COMPARISONS`: attention in x, and the other one in x′, the change of the score, and
    its value, what F hears of it: over all sources it sums to the edges into query and key. Then
    the measures of `signals.sparsity`, and vectors, the support of the change.
    """
    tables, pieces = [], []
    if not nodes:
        return pd.DataFrame(columns=[*COMPARISONS, "vectors"])
    for part in nodes:
        a, b = (end.layers[part.layer] for end in runs.ends)
        here = part.dest if a.z.shape[2] > 1 else torch.zeros_like(part.dest)
        z = found.layers[part.layer].z[part.prompt, part.head, here]
        _, heard = into_heads(runs, part, z)
        logs = [x.log_weights[part.prompt, part.head, here] for x in (a, b)]
        seen = torch.isfinite(logs[0])
        groups = runs.model.n_heads // runs.model.n_kv_heads
        divisor, scores = float(runs.model.divisor[part.layer]), []
        for end in (a, b):
            q = end.q[part.prompt, part.head, here].unsqueeze(1)
            k = end.k[part.prompt, part.head // groups]
            scores.append((q @ k.mT)[:, 0] / divisor)
        change = (scores[0] - scores[1]).masked_fill(~seen, 0.0)
        value = heard.masked_fill(~seen, 0.0) * change
        best = value.abs().topk(min(STRONGEST_SOURCES, value.shape[1]), dim=1).indices
        row = torch.arange(len(part), device=best.device).repeat_interleave(best.shape[1])
        src = best.flatten()
        used = value[row, src] != 0
        row, src = row[used], src[used]
        some = Heads(part.layer, part.prompt[row], part.head[row], part.dest[row])
        pieces.append(difference_slices(runs, some, src))
        columns = {
            "prompt": some.prompt, "head": some.head, "dest": some.dest + runs.start, "src": src,
            "attention": logs[0][row, src].exp(), "other": logs[1][row, src].exp(),
            "change": change[row, src], "value": value[row, src],
        }  # fmt: skip
        tables.append(pd.DataFrame({k: x.cpu().numpy() for k, x in columns.items()}))
        tables[-1].insert(1, "layer", part.layer)
    table = pd.concat(tables, ignore_index=True)
    table["name"] = head_name(table["layer"], table["head"])
    parts = torch.cat(pieces)
    measures = sparsity(parts).rename(columns={"support": "size"})
    vectors = [row.nonzero().flatten().tolist() for row in support(parts).cpu()]
    table = table[COMPARISONS].join(measures)
    return table.assign(vectors=pd.Series(vectors, table.index, dtype=object))


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
    """Participation ratios of Δa in the singular basis, and over that in random rotations of it.

    Of all heads, destinations and sources whose change of score has at least `least` of |ΔF|. A
    rotation mixes all directions of a head, or only blocks of neighbouring singular vectors: then
    it keeps the spectrum, so what is left is that single directions mean something. The score a of
    x is measured beside. One row a pair and `BLOCKS`: prompt, name, of ("Δa", "a"), null,
    participation, rotated (its mean over `repeats` rotations).
    """
    pieces = []
    for rows, runs in AlignedRuns.of(model, batch, counterfactual, objective).chunks():
        found = next(runs.readers())
        nodes = [_all_heads(runs, layer) for layer in range(model.n_layers)]
        table = compare_heads(runs, found, nodes)
        whole = runs.difference.abs().cpu().numpy()[table["prompt"]]
        table = table[table["value"].abs() >= least * whole]
        for layer, part in table.groupby("layer"):
            columns = (part[name].to_numpy() for name in ("prompt", "head", "dest", "src"))
            prompt, head, dest, src = (torch.tensor(x, device=runs.last.device) for x in columns)
            some = Heads(int(layer), prompt, head, dest - runs.start)  # pyright: ignore
            pieces.append(_sparsity(runs, some, src, repeats, rows.start))
    return pd.concat(pieces, ignore_index=True)


def _all_heads(runs: AlignedRuns, layer: int) -> Heads:
    """All heads of a layer, at all tokens that a prompt has, or in the last layer at its end."""
    seen = runs.batch.mask[:, runs.start :].to(runs.last.device)
    if layer == runs.model.n_layers - 1:
        seen = torch.zeros_like(seen).scatter(1, runs.last[:, None], True)
    heads = seen[:, None].expand(-1, runs.model.n_heads, -1)
    return Heads(layer, *heads.nonzero(as_tuple=True))


def _sparsity(
    runs: AlignedRuns, nodes: Heads, src: Int[Tensor, "node"], repeats: int, first: int
) -> pd.DataFrame:
    basis, rank = model_basis(runs.model), runs.model.d_head

    def measured(basis: Basis) -> dict[str, Float[Tensor, "node"]]:
        change, score = _slices(runs, nodes, src, basis)
        return {"Δa": participation_ratio(change), "a": participation_ratio(score)}

    names = head_name(pd.Series([nodes.layer] * len(nodes)), pd.Series(nodes.head.cpu().numpy()))
    own, pieces = measured(basis), []
    for null, width in BLOCKS.items():
        turns = [_rotation(rank, width or rank, 100 * n) for n in range(repeats)]
        found = [measured(basis.turned(turn)) for turn in turns]
        for of, value in own.items():
            rotated = torch.stack([x[of] for x in found]).mean(0)
            table = pd.DataFrame({"prompt": nodes.prompt.cpu().numpy() + first, "name": names})
            table["participation"], table["rotated"] = value.cpu().numpy(), rotated.cpu().numpy()
            pieces.append(table.assign(of=of, null=null))
    return pd.concat(pieces, ignore_index=True)


def _rotation(rank: int, width: int, seed: int) -> Float[Tensor, "r r"]:
    """Random rotations of blocks of neighbouring directions; the last one may be narrower."""
    starts = range(0, rank, width)
    return torch.block_diag(
        *(random_rotation(min(width, rank - start), seed + start) for start in starts)
    )
