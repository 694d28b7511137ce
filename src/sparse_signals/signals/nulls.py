"""Chapter 3: what the sparsity of a score must be compared with, and how sure we are.

Each null keeps the scores of the pairs and destroys one thing that could make them sparse.
"""

from dataclasses import replace
from functools import reduce
from operator import add

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sparse_signals.core.model import Model
from sparse_signals.core.stats import bootstrap, random_rotation
from sparse_signals.heads.svd import head_svd
from sparse_signals.signals.firings import Pairs
from sparse_signals.signals.slices import Coordinates, sparsity


def rotated(coords: Coordinates, rotation: Float[Tensor, "r r"]) -> Coordinates:
    """The same scores sliced in another orthonormal basis of the same space."""
    rotation = rotation.to(coords.dest)
    return Coordinates(coords.dest @ rotation, coords.src @ rotation)


def rotation_sparsity(coords: Coordinates, repeats: int = 20, seed: int = 0) -> pd.DataFrame:
    """Sparsity measures of every pair, averaged over random rotations of its slices."""
    rank = coords.dest.shape[-1]
    turns = (random_rotation(rank, seed + n) for n in range(repeats))
    return reduce(add, (sparsity(rotated(coords, turn).slices) for turn in turns)) / repeats


def whitened(coords: Coordinates, model: Model, pairs: Pairs) -> Coordinates:
    """All of σ moved to the source side: rotating these forgets which directions are strong."""
    svd = head_svd(model)
    root = (svd.S / svd.divisor[:, None, None]).sqrt()[pairs.layer, pairs.head]
    safe = torch.where(root > 0, root, 1.0)
    return Coordinates(coords.dest / safe, coords.src * root)


def shuffled(coords: Coordinates, pairs: Pairs, seed: int = 0) -> Coordinates:
    """Destinations of firings with the sources of other firings of the same head."""
    group = (pairs.layer * (pairs.head.max() + 1) + pairs.head).cpu().numpy()
    noise = np.random.default_rng(seed).random(len(group))
    into, from_ = np.lexsort((np.arange(len(group)), group)), np.lexsort((noise, group))
    src = coords.src.clone()
    src[into] = coords.src[from_]
    return replace(coords, src=src)


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


def sparser_heads(
    ours: pd.DataFrame, null: pd.DataFrame, pairs: Pairs, least: int = 20
) -> pd.DataFrame:
    """Head by head, is `ours` sparser than `null` on the same pairs?

    One row per measure and head with at least `least` pairs: name, pairs, and the mean difference
    with its bootstrap interval. Negative means that ours is sparser.
    """
    where = pairs.table()[["name", "prompt"]]
    parts = []
    for name, group in where.groupby("name", sort=False):
        if len(group) >= least:
            rows = bootstrap((ours - null).loc[group.index], group["prompt"].to_numpy())
            parts.append(rows.assign(name=name, pairs=len(group)))
    columns = ["name", "pairs", "measure", "difference", "low", "high"]
    if not parts:
        return pd.DataFrame(columns=columns)
    return pd.concat(parts, ignore_index=True).rename(columns={"value": "difference"})[columns]


def sparsity_table(pairs: Pairs, sparse: pd.DataFrame, basis: str, kind: str) -> pd.DataFrame:
    """Sparsity measures with the head and prompt of each pair, the basis, and the kind of pairs."""
    return pairs.table()[["name", "prompt"]].join(sparse).assign(basis=basis, pairs=kind)


def intervals(codes: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Mean and 95 % interval of every sparsity measure, for each group of a `sparsity_table`."""
    groups = codes.groupby(by, sort=False)
    parts = {
        key: bootstrap(group.drop(columns=["name", "prompt", *by]), group["prompt"].to_numpy())
        for key, group in groups
    }
    return pd.concat(parts, names=by).reset_index(level=by).reset_index(drop=True)


def verdict(low: float, high: float) -> str:
    """In words, what an interval of a difference in sparsity says (negative: sparser)."""
    return "sparser" if high < 0 else "less sparse" if low > 0 else "unclear"
