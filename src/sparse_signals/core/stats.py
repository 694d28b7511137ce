"""Intervals, ranks and random matrices: the statistics that every chapter shares."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

DRAWS = 1000  # of a bootstrap


def participation_ratio(weights: Float[Tensor, "... n"]) -> Float[Tensor, "..."]:
    """(Σ|w|)² / Σw²: how many of n entries share the weight; 1 if one has all, n if all equal."""
    size = weights.abs()
    return size.sum(-1) ** 2 / (size**2).sum(-1).clamp_min(torch.finfo(size.dtype).tiny)


def tidy(values: Tensor, dims: Sequence[str], name: str) -> pd.DataFrame:
    """One row per entry of an array: its place in each dimension, and its value as `name`."""
    index = pd.MultiIndex.from_product([range(size) for size in values.shape], names=dims)
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


def bootstrap(
    table: pd.DataFrame,
    prompts: Int[np.ndarray, "row"],
    statistic: Callable[..., np.ndarray] = np.mean,
    repeats: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """A statistic of every column with its 95 % interval, resampling whole prompts.

    Pairs of one prompt are not independent, so prompts are drawn, not rows. One row per column:
    measure, value, low, high.
    """
    order = np.argsort(prompts, kind="stable")
    rows = table.to_numpy(dtype=float)[order]
    _, start, count = np.unique(np.asarray(prompts)[order], return_index=True, return_counts=True)
    rng = np.random.default_rng(seed)
    draws = []
    for pick in rng.integers(len(start), size=(repeats, len(start))):
        ends = count[pick].cumsum()
        shift = np.repeat(start[pick] - (ends - count[pick]), count[pick])
        draws.append(statistic(rows[np.arange(ends[-1]) + shift], axis=0))
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    columns = {"measure": table.columns, "value": statistic(rows, axis=0), "low": low, "high": high}
    return pd.DataFrame(columns)


def prompt_draws(prompts: int, repeats: int, seed: int) -> Float[np.ndarray, "sample prompt"]:
    """How often each prompt is drawn: once, then in every bootstrap sample."""
    drawn = np.random.default_rng(seed).multinomial(prompts, [1 / prompts] * prompts, repeats)
    return np.vstack([np.ones(prompts), drawn])


def rank_correlation(
    x: ArrayLike, y: ArrayLike, group: ArrayLike, draws: int = 2000
) -> dict[str, float]:
    """Spearman's rho, its mean over random pairings within groups (chance), and p against these.

    Heads of one layer are alike in what they can be upstream of, so with layers as groups this
    asks whether the heads of a layer are told apart, not whether layers are.
    """
    ranks = [pd.Series(np.asarray(v)).rank().to_numpy() for v in (x, y)]
    group, rng = np.asarray(group), np.random.default_rng(0)
    ours, order, chance = np.corrcoef(*ranks)[0, 1], np.argsort(group, kind="stable"), []
    for _ in range(draws):
        shuffled = ranks[1].copy()
        shuffled[order] = ranks[1][np.lexsort((rng.random(len(group)), group))]
        chance.append(np.corrcoef(ranks[0], shuffled)[0, 1])
    middle = float(np.mean(chance))
    extreme = np.abs(np.array(chance) - middle) >= abs(ours - middle) - 1e-12
    p = (1 + extreme.sum()) / (1 + draws)
    return {"rho": float(ours), "chance": middle, "p": float(p)}
