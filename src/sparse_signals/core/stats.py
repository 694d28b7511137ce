"""Intervals, ranks and random matrices: the statistics that every chapter shares."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

DRAWS = 1000  # of a bootstrap
ENTRIES = 2**21  # of a matrix of samples at once


def participation_ratio(weights: Float[Tensor, "... n"]) -> Float[Tensor, "..."]:
    """(Σ|w|)² / Σw²: how many of n entries share the weight; 1 if one has all, n if all equal."""
    size = weights.abs()
    return size.sum(-1) ** 2 / (size**2).sum(-1).clamp_min(torch.finfo(size.dtype).tiny)


def tidy(values: Tensor, dims: Sequence[str], name: str) -> pd.DataFrame:
    """One row per entry of an array: its place in each dimension, and its value as `name`."""
    index = pd.MultiIndex.from_product([range(size) for size in values.shape], names=list(dims))
    column = values.detach().cpu().flatten().numpy()
    return pd.DataFrame({name: column}, index=index).reset_index()


def auc(values: np.ndarray | pd.Series, positive: np.ndarray | pd.Series) -> float:
    """Chance that a random positive has a larger value than a random negative, ties half."""
    positive = np.asarray(positive, dtype=bool)
    rank = pd.Series(np.asarray(values)).rank().to_numpy()
    ahead = rank[positive].sum() - positive.sum() * (positive.sum() + 1) / 2
    return float(ahead / (positive.sum() * (~positive).sum()))


def random_rotation(rank: int, seed: int) -> Float[Tensor, "r r"]:
    """A random orthogonal matrix, uniform over rotations and reflections."""
    gaussian = np.random.default_rng(seed).standard_normal((rank, rank))
    Q, R = torch.linalg.qr(torch.from_numpy(gaussian))
    return Q * R.diagonal().sign()


def resample(
    clusters: int, draws: int = DRAWS, seed: int = 0
) -> Float[np.ndarray, "sample cluster"]:
    """How often each cluster is drawn: each once (row 0: the data itself), then in every draw."""
    picked = np.random.default_rng(seed).integers(clusters, size=(draws, clusters))
    place = picked + clusters * np.arange(draws)[:, None]
    drawn = np.bincount(place.ravel(), minlength=draws * clusters).reshape(draws, clusters)
    return np.vstack([np.ones(clusters), drawn])


def bounds(samples: ArrayLike, axis: int = 0) -> tuple[np.ndarray | np.float64, ...]:
    """The 95 % interval of bootstrap samples, low and high: the samples nearest these quantiles.

    Samples are draws alone, without the data itself. NaN is left out. No two samples are averaged,
    so some may be infinite. Of one row of samples they are numbers, as any other mean is.
    """
    ordered = np.sort(np.asarray(samples, dtype=float), axis)  # NaN last
    last = (~np.isnan(ordered)).sum(axis, keepdims=True) - 1
    cut = np.rint(0.025 * last).astype(int)
    low, high = (np.take_along_axis(ordered, place, axis) for place in (cut, last - cut))
    return low.squeeze(axis)[()], high.squeeze(axis)[()]  # numbers, where nothing else is left


def bootstrap(
    table: pd.DataFrame,
    clusters: ArrayLike,
    weights: ArrayLike | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> pd.DataFrame:
    """Σ values / Σ weights of every column with its 95 % interval, resampling whole clusters.

    clusters: the independent unit that each row belongs to, such as its prompt or its template.
    weights: of each row, or of each entry; without them the ratio is the mean over rows. NaN
    entries are left out; a ratio is NaN where its weights do not sum to more than 0. One row per
    column: measure, value, low, high.

    >>> table = pd.DataFrame({"effect": [1.0, 2.0, 3.0, 6.0]})
    >>> found = bootstrap(table, clusters=[0, 0, 1, 1])  # rows 0 and 1 come from one template
    >>> found["value"].item(), found["low"].item(), found["high"].item()
    (3.0, 1.5, 4.5)
    """
    values, (names, cluster) = table.to_numpy(float), np.unique(clusters, return_inverse=True)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=float)
    weights = np.broadcast_to(weights if weights.ndim == 2 else weights[:, None], values.shape)
    kept = ~np.isnan(values + weights)
    row, column = kept.nonzero()
    times = resample(len(names), draws, seed)
    value, low, high = group_bootstrap(
        values[kept], column, cluster[row], times, table.shape[1], weights[kept]
    )
    return pd.DataFrame({"measure": table.columns, "value": value, "low": low, "high": high})


def group_bootstrap(
    values: Float[np.ndarray, "row"],
    group: Int[np.ndarray, "row"],
    cluster: Int[np.ndarray, "row"],
    times: Float[np.ndarray, "sample cluster"],
    groups: int,
    weights: Float[np.ndarray, "row"] | None = None,
) -> Float[np.ndarray, "3 group"]:
    """Σ values / Σ weights over the rows of every group, or Σ values: value, low, high.

    times comes from `resample`, and is the same for all groups. A cluster need not be in a group.
    """
    found, order = np.empty((3, groups)), np.argsort(group, kind="stable")
    step = max(1, ENTRIES // max(times.shape))
    for start in range(0, groups, step):
        size = min(step, groups - start)
        rows = order[slice(*np.searchsorted(group, [start, start + size], sorter=order))]
        place = cluster[rows] * size + group[rows] - start
        samples, total = (
            times @ np.bincount(place, x[rows], times.shape[1] * size).reshape(-1, size)
            for x in (values, values if weights is None else weights)
        )
        if weights is not None:
            nothing = np.full_like(samples, np.nan)
            samples = np.divide(samples, total, out=nothing, where=total > 0)
        found[:, start : start + size] = samples[0], *bounds(samples[1:])
    return found


def sign_flip(
    values: Float[np.ndarray, "test cluster"], draws: int = 4000, seed: int = 0
) -> Float[np.ndarray, "test"]:
    """p of each row's mean, two-sided, if the sign of every cluster were a matter of chance.

    (1 + samples with a mean at least as far from 0) / (1 + draws). NaN clusters are left out; rows
    of one call share their flips. Source: Fisher 1935, chapter 3.
    """
    filled = np.nan_to_num(values)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(draws, values.shape[1]))
    sums = np.abs(filled @ signs.T)
    extreme = sums >= np.abs(filled.sum(1))[:, None] * (1 - 1e-9)
    return (1 + extreme.sum(1)) / (1 + draws)


def false_discovery(p: Float[np.ndarray, "test"]) -> Float[np.ndarray, "test"]:
    """The smallest false-discovery rate at which each of many tests is a discovery.

    q_(i) = min over j ≥ i of m p_(j) / j, p in ascending order, at most 1.
    Source: Benjamini and Hochberg 1995.
    """
    order, rank = np.argsort(p), np.arange(1, len(p) + 1)
    q = np.empty(len(p))
    q[order] = np.minimum.accumulate((p[order] * len(p) / rank)[::-1])[::-1]
    return q.clip(max=1)


def rank_correlation(
    x: ArrayLike, y: ArrayLike, group: ArrayLike, draws: int = 2000
) -> dict[str, float]:
    """Spearman's rho, its mean over random pairings within groups (chance), and p against these.

    Heads of one layer are alike in what they can be upstream of, so with layers as groups this
    asks whether the heads of a layer are told apart, not whether layers are.
    """
    ranks = [pd.Series(np.asarray(v)).rank().to_numpy() for v in (x, y)]
    group, rng = np.asarray(group), np.random.default_rng(0)
    ours, order, chance = (
        np.corrcoef(ranks[0], ranks[1])[0, 1],
        np.argsort(group, kind="stable"),
        [],
    )
    for _ in range(draws):
        shuffled = ranks[1].copy()
        shuffled[order] = ranks[1][np.lexsort((rng.random(len(group)), group))]
        chance.append(np.corrcoef(ranks[0], shuffled)[0, 1])
    middle = float(np.mean(chance))
    extreme = np.abs(np.array(chance) - middle) >= abs(ours - middle) - 1e-12
    p = (1 + extreme.sum()) / (1 + draws)
    return {"rho": float(ours), "chance": middle, "p": float(p)}
