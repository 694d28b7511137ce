"""Chapter 3: what the directions that a head uses say, learned on some prompts, asked on others."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_signals.core.prompts import role_table
from sparse_signals.core.run import Run
from sparse_signals.core.stats import DRAWS, bounds, resample
from sparse_signals.heads.protagonist import template_of
from sparse_signals.heads.svd import head_svd
from sparse_signals.signals.firings import Pairs
from sparse_signals.signals.slices import coordinates, model_basis, support


@dataclass(frozen=True)
class Message:
    """Singular pairs that a head uses, and d̄, the mean destination side of the pairs they are from.

    In `dest` each coordinate has its √(σ_k/√r), as in `Coordinates`.
    """

    layer: int
    head: int
    vectors: Int[Tensor, "chosen"]
    dest: Float[Tensor, "r"]


def learn_message(run: Run, pairs: Pairs) -> Message:
    """The singular pairs most often in the support of some pairs of one head.

    As many as the median support has. Raises ValueError without pairs.
    """
    if not len(pairs):
        raise ValueError("a message is learned from at least one pair: choose a head that fires")
    coords = coordinates(run, pairs)
    chosen = support(coords.slices)
    size = max(1, int(chosen.sum(-1).double().median()))
    vectors = chosen.double().mean(0).topk(size).indices.sort().values
    return Message(int(pairs.layer[0]), int(pairs.head[0]), vectors, coords.dest.mean(0))


def names_and_words(run: Run) -> pd.DataFrame:
    """The tokens from the second on, one row each: prompt, pos, token, template, name (whether).

    A name is a token that is the IO or the S of any of the prompts.
    """
    table = role_table(run.batch).drop_duplicates(["prompt", "pos"])[["prompt", "pos", "token"]]
    table = table[table["pos"] >= 1].reset_index(drop=True)
    names = {*run.batch.table["io"], *run.batch.table["s"]}
    template = template_of(run.batch)[table["prompt"]]
    return table.assign(template=template, name=table["token"].str.strip().isin(names))


def signal_parts(
    run: Run, message: Message, words: pd.DataFrame
) -> dict[str, Float[Tensor, "word r"]]:
    """What tokens carry in every singular direction of a head, in two readings.

    length: (v_k·x̃_j)², whose sum over S is ‖P_V x̃_j‖² (the published reading). heard: d̄_k s_k,
    whose sum over S is what the typical destination hears of the token, in softmax units.
    """
    layer, head = message.layer, message.head
    prompt, pos = (torch.tensor(words[name].tolist()) for name in ("prompt", "pos"))
    keys = run.k[layer, prompt, head, pos].double()
    lengths = (keys @ head_svd(run.model).src_map[layer, head]).square()
    heard = keys @ model_basis(run.model).src[layer, head] * message.dest
    return {"length": lengths, "heard": heard}


def random_sets(rank: int, size: int, draws: int = DRAWS, seed: int = 0) -> Bool[Tensor, "draw r"]:
    """Sets of `size` of the directions of a head, each as likely as any other."""
    order = np.random.default_rng(seed).random((draws, rank)).argsort(1)
    return torch.from_numpy(order.argsort(1) < size)


def separations(
    parts: Float[Tensor, "word r"], sets: Bool[Tensor, "set r"], positive: Bool[np.ndarray, "word"]
) -> Float[np.ndarray, "set"]:
    """How well Σ_{k∈S} of what tokens carry tells the positive ones from others: AUC of each S."""
    sums = (parts @ sets.to(parts).mT).cpu().numpy()
    rank = pd.DataFrame(sums).rank().to_numpy()
    ahead = rank[positive].sum(0) - positive.sum() * (positive.sum() + 1) / 2
    return ahead / (positive.sum() * (~positive).sum())


def separation_bounds(
    values: Float[np.ndarray, "word"],
    positive: Bool[np.ndarray, "word"],
    clusters: np.ndarray,
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[float, float]:
    """The 95 % interval of the AUC of one reading, resampling whole clusters of tokens.

    Σ_ab w_a w_b W_ab / Σ_ab w_a w_b N_ab, with W_ab the wins of positive tokens of cluster a over
    others of cluster b, N_ab their number, and w how often a cluster is drawn.
    """
    names, cluster = np.unique(clusters, return_inverse=True)
    member = np.eye(len(names))[cluster]
    up, down = values[positive][:, None], values[~positive][None]
    wins = member[positive].T @ ((up > down) + 0.5 * (up == down)) @ member[~positive]
    number = member[positive].sum(0)[:, None] * member[~positive].sum(0)
    times = resample(len(names), draws, seed)[1:]
    won, of = (np.einsum("sa,ab,sb->s", times, x, times) for x in (wins, number))
    low, high = bounds(np.divide(won, of, out=np.full_like(won, np.nan), where=of > 0))
    return float(low), float(high)


def against_chance(
    run: Run, message: Message, words: pd.DataFrame, draws: int = DRAWS
) -> pd.DataFrame:
    """How well a message tells names from other words, beside other sets of as many directions.

    One row per reading ("length", "heard"): auc with its interval over templates, low and high;
    chance, chance_low and chance_high, the median and the middle 95 % of `draws` random sets of
    singular pairs of the same head; first, the AUC of the pairs of largest σ; and verdict, "above",
    "inside" or "below" the random sets.
    """
    rank, size = len(message.dest), len(message.vectors)
    ours, first = torch.zeros(2, rank, dtype=torch.bool)
    ours[message.vectors.cpu()], first[:size] = True, True
    sets = torch.cat([torch.stack([ours, first]), random_sets(rank, size, draws)])
    positive, rows = words["name"].to_numpy(), []
    for reading, parts in signal_parts(run, message, words).items():
        auc, leading, *drawn = separations(parts, sets, positive)
        values = parts[:, message.vectors].sum(-1).cpu().numpy()
        low, high = separation_bounds(values, positive, words["template"].to_numpy())
        below, middle, above = np.quantile(drawn, [0.025, 0.5, 0.975])
        place = "above" if auc > above else "below" if auc < below else "inside"
        rows.append((reading, auc, low, high, middle, below, above, leading, place))
    columns = ["reading", "auc", "low", "high", "chance", "chance_low", "chance_high"]
    return pd.DataFrame(rows, columns=[*columns, "first", "verdict"])
