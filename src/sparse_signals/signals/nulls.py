"""Chapter 3: what the sparsity of a score must be compared with, and how sure we are.

Each null keeps the scores of the pairs and destroys one thing that could make them sparse.
"""

from collections.abc import Mapping
from functools import reduce
from operator import add

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from sparse_signals.core.numbers import interval
from sparse_signals.core.rotary import rotation
from sparse_signals.core.run import Run
from sparse_signals.core.stats import bootstrap, false_discovery, random_rotation, sign_flip
from sparse_signals.signals.firings import Pairs
from sparse_signals.signals.slices import (
    Coordinates,
    coordinates,
    head_coordinates,
    offset_coordinates,
    planes_together,
    sparsity,
)

MEASURES = ("participation", "ninety", "settled", "support")
WHOLE = "all directions"
FIRES, SILENT, DIFFERENCE = "firing", "silent", "firing − silent"


def block_rotation(rank: int, width: int, seed: int) -> Float[Tensor, "r r"]:
    """Random rotations of blocks of neighbouring directions; the last one may be narrower."""
    starts = range(0, rank, width)
    return torch.block_diag(
        *(random_rotation(min(width, rank - start), seed + start) for start in starts)
    )


def block_names(rank: int) -> dict[str, int]:
    """How far rotations mix neighbouring directions: blocks of 2, 4, 8 …, and all of them."""
    powers = range(1, (rank - 1).bit_length())
    return {f"blocks of {2**n}": 2**n for n in powers} | {WHOLE: rank}


def rotated(coords: Coordinates, rotation: Float[Tensor, "r r"]) -> Coordinates:
    """The same scores sliced in another orthonormal basis of the same space."""
    rotation = rotation.to(coords.dest)
    return Coordinates(coords.dest @ rotation, coords.src @ rotation)


def rotation_sparsity(
    coords: Coordinates, width: int | None = None, repeats: int = 32, seed: int = 0
) -> pd.DataFrame:
    """Sparsity measures of every pair, averaged over random rotations of its slices.

    Rotations mix blocks of `width` neighbouring directions, which keeps the coarse profile of the
    slices; without a width all directions.
    """
    rank = coords.dest.shape[-1]
    turns = (block_rotation(rank, width or rank, seed + 1000 * n) for n in range(repeats))
    return reduce(add, (sparsity(rotated(coords, turn).slices) for turn in turns)) / repeats


def gaussian_slices(
    pairs: Pairs,
    reference: Pairs,
    slices: Float[Tensor, "ref r"],
    total: Float[Tensor, "pair"],
    seed: int = 0,
) -> Float[Tensor, "pair r"]:
    """Slices that know nothing but their head's profile and the score they must add up to.

    Each p_k is Gaussian with the mean and variance of slice k over the head's `reference` pairs
    (those that do not fire), conditioned on Σ_k p_k = total. The hardest null: it keeps which
    directions of a head are large and forgets which tokens are there.
    """
    heads = int(torch.cat([pairs.head, reference.head]).max()) + 1
    here, there = pairs.layer * heads + pairs.head, reference.layer * heads + reference.head
    zeros = slices.new_zeros(int(torch.cat([here, there]).max()) + 1, slices.shape[-1])
    count = zeros[:, :1].index_add(0, there, torch.ones_like(slices[:, :1])).clamp_min(1)
    mean = zeros.index_add(0, there, slices) / count
    variance = (zeros.index_add(0, there, slices**2) / count - mean**2).clamp_min(0)
    noise = np.random.default_rng(seed).standard_normal((len(pairs), slices.shape[-1]))
    free = mean[here] + variance[here].sqrt() * torch.from_numpy(noise).to(slices)
    spread = variance[here].sum(-1, keepdim=True)
    share = torch.where(spread > 0, variance[here] / spread, 1 / slices.shape[-1])
    return free + share * (total - free.sum(-1))[:, None]


def gaps(
    coords: Coordinates,
    others: Mapping[str, Float[Tensor, "pair s"]] | None = None,
    repeats: int = 32,
) -> pd.DataFrame:
    """How much sparser the slices of every pair are than those of nulls: ours minus null.

    The nulls are rotations of all `block_names`, and `others`: slices of the same pairs, by name.
    Index: null and pair; a column for each of `MEASURES`, in slices, negative: ours is sparser.
    """
    ours = sparsity(coords.slices)[[*MEASURES]].astype(float)
    blocks = block_names(coords.dest.shape[-1]).items()
    nulls = {name: rotation_sparsity(coords, width, repeats) for name, width in blocks}
    nulls |= {name: sparsity(slices) for name, slices in (others or {}).items()}
    tables = {name: ours - null[[*MEASURES]] for name, null in nulls.items()}
    return pd.concat(tables, names=["null", "pair"])


def mean_gaps(found: Mapping[str, pd.DataFrame], clusters: ArrayLike) -> pd.DataFrame:
    """Means of `gaps` with 95 % intervals: one row per kind of pairs, null and measure.

    found: tables with the same index, by kind of pairs; clusters: of every pair. If the kinds are
    `FIRES` and `SILENT`, the difference of the two, pair by pair, is a third. Columns: kind, null,
    measure, value, low, high, verdict.
    """
    kinds = dict(found)
    if {FIRES, SILENT} <= set(kinds):
        kinds[DIFFERENCE] = kinds[FIRES] - kinds[SILENT]
    parts = {kind: x.unstack("null") for kind, x in kinds.items()}
    wide = pd.concat(parts, axis=1).swaplevel(axis=1)
    rows = bootstrap(wide, clusters)
    keys = pd.DataFrame(rows.pop("measure").tolist(), columns=["kind", "null", "measure"])
    order = {name: n for n, name in enumerate(next(iter(found.values())).index.unique("null"))}
    table = keys.join(rows).sort_values("null", key=lambda x: x.map(order), kind="stable")
    return table.assign(
        verdict=[verdict(*x) for x in zip(table["low"], table["high"], strict=True)]
    )


def basis_gaps(run: Run, pairs: Pairs) -> pd.DataFrame:
    """The same scores in other bases, as `gaps`: the sparsity of one basis minus that of another.

    Own coordinates (q_k k_k / √r) against singular vectors. With rotary positions also: own
    coordinates turned at random within their planes, against themselves; the r/2 planes against
    the sums of two neighbouring singular pairs; and `offset_coordinates` against singular vectors.
    """
    singular, own = coordinates(run, pairs).slices, head_coordinates(run, pairs)
    svd, plain = sparsity(singular), sparsity(own.slices)
    found = {"own coordinates − singular": plain - svd}
    if run.model.rotary:
        width = rotation(run.model, pairs.dest[:1])[0].shape[-1]
        planes = planes_together(own, width)
        halves = (sparsity(x.unflatten(-1, (-1, 2)).sum(-1)) for x in (planes.slices, singular))
        turned = rotation_sparsity(planes, 2)
        found["own, turned within planes − own"] = turned - plain
        found["planes − pairs of singular"] = next(halves) - next(halves)
        at_offset = sparsity(offset_coordinates(run, pairs).slices)
        found["singular at the distance − singular"] = at_offset - svd
    tables = {name: table[[*MEASURES]] for name, table in found.items()}
    return pd.concat(tables, names=["null", "pair"])


def head_gaps(
    found: pd.DataFrame, pairs: Pairs, clusters: ArrayLike, least: int = 20, rate: float = 0.05
) -> pd.DataFrame:
    """`gaps` head by head, tested over clusters, with a false-discovery rate over heads.

    found: the rows of one null. Heads with at least `least` pairs in at least six clusters (fewer
    cannot be told from chance by flipping signs). One row per head and measure: name, pairs,
    measure, value, low, high (the mean and its 95 % interval), q, and verdict: "sparser" or
    "less sparse" where q ≤ rate, else "unclear".
    """
    table = pairs.table()[["name"]].assign(cluster=np.asarray(clusters))
    groups = table.groupby("name", sort=False)["cluster"]
    size = groups.size()
    tested = size.index[(size >= least) & (groups.nunique() >= 6)]
    rows = []
    for name in tested:
        here = (table["name"] == name).to_numpy()
        part, cluster = found[here], table["cluster"][here].to_numpy()
        sums = part.groupby(cluster).sum()
        p = sign_flip(sums.to_numpy().T)
        rows.append(bootstrap(part, cluster).assign(name=name, pairs=len(part), p=p))
    columns = ["name", "pairs", "measure", "value", "low", "high", "q", "verdict"]
    if not rows:
        return pd.DataFrame(columns=columns)
    heads = pd.concat(rows, ignore_index=True)
    heads["q"] = heads.groupby("measure")["p"].transform(lambda p: false_discovery(p.to_numpy()))
    words = np.where(heads["value"] < 0, "sparser", "less sparse")
    return heads.assign(verdict=np.where(heads["q"] <= rate, words, "unclear"))[columns]


def gap_texts(table: pd.DataFrame, rows: str = "null", columns: str = "kind") -> pd.DataFrame:
    """A table for reading: value, interval and verdict of every gap, rows and columns in order."""
    found = zip(table["value"], table["low"], table["high"], table["verdict"], strict=True)
    texts = [f"{interval(*numbers)} {word}" for *numbers, word in found]
    wide = table.assign(text=texts).pivot(index=rows, columns=columns, values="text")
    return wide.loc[list(table[rows].unique()), list(table[columns].unique())]


def verdict(low: float, high: float) -> str:
    """In words, what an interval of a difference in sparsity says (negative: sparser)."""
    return "sparser" if high < 0 else "less sparse" if low > 0 else "unclear"
