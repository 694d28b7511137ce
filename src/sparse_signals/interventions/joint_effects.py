"""Chapter 5: do edges back each other up? What several do together, against each alone.

A player is a pooled edge into a root, and what it loses us is how much logit(IO) − logit(S), or the
score or attention of the root, falls when its signal is ablated. Where players back each other up
they lose us more together than alone; where they stand in one line they lose us less.
"""

from dataclasses import dataclass
from math import factorial

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_signals.core.prompts import Batch, token_roles
from sparse_signals.core.run import BIAS_ROW
from sparse_signals.core.stats import DRAWS, bootstrap, bounds, resample
from sparse_signals.interventions.changes import Clean, Layers
from sparse_signals.interventions.edge_signals import Signals, read_signals
from sparse_signals.interventions.intervene import intervene
from sparse_signals.tracing.contributions import Weights
from sparse_signals.tracing.trace import Trace

MEASURES = ("F", "score", "attention")
EXACT = 8  # players of whom all coalitions are tried
EDGES = 2**13  # signals that are held at once
TINY = 1e-6  # a loss alone that is this small a part of the loss together is none
PLAYER = ["upstream", "downstream", "side", "dest_role", "src_role"]


@dataclass(frozen=True)
class Players:
    """Pooled edges, one row of `names` each, and to which of them each signal belongs."""

    names: pd.DataFrame
    signals: Signals
    player: Int[Tensor, "edge"]

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Ablations:
    """How players are ablated, and what is measured: F, or the score or attention of the root."""

    measure: str = "F"
    scope: str = "global"
    freeze_norms: bool = False

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise ValueError(f"measure must be one of {MEASURES}, not {self.measure!r}")


def strongest_players(
    weights: Weights,
    batch: Batch,
    traced: Trace,
    root: str,
    side: str | None = "dest",
    n: int = EXACT,
) -> Players:
    """The n edges into the root firings of a head that carry most: largest Σ weight over prompts.

    Edges arrive at one side of the root (None: either; but what the two sides carry is multiplied,
    so each takes what the other takes). They are pooled by `PLAYER`, where the role of a token is
    its set of roles. The bias row is no player: nothing writes it. Raises ValueError where the
    trace has no such edge.
    """
    fired = traced.firings[traced.firings["root"] & (traced.firings["name"] == root)]
    into = traced.edges["firing"].isin(fired["firing"]) & (traced.edges["upstream"] != BIAS_ROW)
    edges = traced.edges[into & (side is None or traced.edges["side"] == side)]
    if edges.empty:
        raise ValueError(f"no edge leads to a root firing of {root}: is it a root of this trace?")
    roles = np.array(token_roles(batch))
    edges = edges.assign(
        dest_role=roles[edges["prompt"], edges["dest"]],
        src_role=roles[edges["prompt"], edges["src"]],
    )
    names = edges.groupby(PLAYER, sort=True).agg(
        prompts=("prompt", "nunique"), weight=("weight", "sum")
    )
    names = names.assign(weight=names["weight"] / len(batch.tokens))
    names = names.sort_values("weight", ascending=False, kind="stable").head(n).reset_index()
    number = pd.MultiIndex.from_frame(names[PLAYER])
    player = number.get_indexer(pd.MultiIndex.from_frame(edges[PLAYER]))
    signals = read_signals(weights, batch, traced, traced.edges.loc[edges.index[player >= 0]])
    kept = torch.tensor(player[player >= 0], device=signals.reader.device)
    return Players(names, signals, kept)


def losses(
    layers: Layers,
    clean: Clean,
    players: Players,
    coalitions: Int[np.ndarray, "coalition"],
    how: Ablations,
) -> Float[np.ndarray, "prompt coalition"]:
    """What ablating every coalition loses us, in the prompts where there is any player.

    Bit n of a coalition says whether player n is in it. Score and attention are those of the
    firing, averaged over the edges of the coalition.
    """
    prompts, prompt = np.unique(players.signals.edges["prompt"], return_inverse=True)
    player = players.player.cpu().numpy()
    lost = np.zeros((len(prompts), len(coalitions)))
    step = max(1, EDGES // len(player))
    for start in range(0, len(coalitions), step):
        chosen = coalitions[start : start + step, None] >> player & 1
        coalition, edge = chosen.nonzero()
        row = coalition * len(prompts) + prompt[edge]
        table = intervene(
            layers,
            clean,
            players.signals[torch.tensor(edge, device=players.player.device)],
            torch.tensor(row),
            scopes=[how.scope],
            modes=["ablate"],
            freeze_norms=how.freeze_norms,
        )
        change = table.groupby("row")[f"{how.measure}_change"].mean()
        number = change.index.to_numpy()
        lost[number % len(prompts), start + number // len(prompts)] = -change.to_numpy()
    return lost


def joint_effect(
    layers: Layers,
    clean: Clean,
    players: Players,
    how: Ablations | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> pd.Series:
    """What all players lose us together, over the sum of what each loses us alone.

    ratio below 1: each already takes what another takes; 1: they add; above 1: for the loss of one
    another makes up, and the joint ablation unmasks it; infinite where alone they lose us nothing,
    or the reverse.
    Means over prompts: summed, joint, ratio and gap (joint − summed), with their 95 % bootstrap
    intervals over prompts, *_low and *_high.
    """
    coalitions = 2 ** np.arange(len(players) + 1)
    coalitions[-1] -= 1
    lost = losses(layers, clean, players, coalitions, how or Ablations())
    sums = np.column_stack([lost[:, :-1].sum(1), lost[:, -1]])
    summed, joint = (resample(len(sums), draws, seed) @ sums).T / len(sums)
    alone = summed * np.sign(joint) > TINY * np.abs(joint)
    ratio = np.where(alone, joint / np.where(alone, summed, 1), np.inf)
    found = {"summed": summed, "joint": joint, "ratio": ratio, "gap": joint - summed}
    row = {"players": len(players), "prompts": len(sums)}
    for name, samples in found.items():
        low, high = bounds(samples[1:])
        row |= {name: samples[0], f"{name}_low": low, f"{name}_high": high}
    return pd.Series(row)


def interactions(
    layers: Layers,
    clean: Clean,
    players: Players,
    how: Ablations | None = None,
    permutations: int = 200,
    draws: int = DRAWS,
    seed: int = 0,
) -> pd.DataFrame:
    """Shapley interaction index of every pair of players, in units of what is lost.

    The mean over coalitions T of the others of v(T+a+b) − v(T+a) − v(T+b) + v(T), with v what
    ablating a coalition loses us: positive if a and b back each other up, negative if each takes
    what the other takes, 0 if they add. All 2ⁿ coalitions for up to `EXACT` players, otherwise
    those along random orders. One row a pair: first, second (numbers of players), value and its
    95 % bootstrap interval over prompts, low and high. Source: Grabisch and Roubens 1999.
    """
    n = len(players)
    coalitions, weights = exact_index(n) if n <= EXACT else sampled_index(n, permutations, seed)
    each = losses(layers, clean, players, coalitions, how or Ablations()) @ weights
    found = bootstrap(pd.DataFrame(each), np.arange(len(each)), draws=draws, seed=seed)
    first, second = np.triu_indices(n, 1)
    ends = pd.DataFrame({"first": first, "second": second})
    return ends.join(found.drop(columns="measure"))


def exact_index(
    n: int,
) -> tuple[Int[np.ndarray, "coalition"], Float[np.ndarray, "coalition pair"]]:
    """All coalitions, and the matrix that takes their values to the interaction of every pair.

    v(T+a+b) − v(T+a) − v(T+b) + v(T) counts with |T|! (n − |T| − 2)! / (n − 1)!.
    """
    coalitions = np.arange(2**n)
    inside = coalitions[:, None] >> np.arange(n) & 1
    first, second = np.triu_indices(n, 1)
    pair = inside[:, first] + inside[:, second]
    by_size = [factorial(s) * factorial(n - s - 2) / factorial(n - 1) for s in range(n - 1)]
    others = inside.sum(1, keepdims=True) - pair
    return coalitions, np.where(pair == 1, -1, 1) * np.array(by_size)[others]


def sampled_index(
    n: int, permutations: int, seed: int = 0
) -> tuple[Int[np.ndarray, "coalition"], Float[np.ndarray, "coalition pair"]]:
    """An unbiased estimate of `exact_index` from coalitions along random orders of the players.

    Neighbours in an order are a pair, those before them a coalition whose size is uniform. A pair
    that is never met is NaN.
    """
    order = np.random.default_rng(seed).permuted(np.tile(np.arange(n), (permutations, 1)), axis=1)
    bit = 2**order
    before = bit.cumsum(1) - bit
    a, b, base = bit[:, :-1].ravel(), bit[:, 1:].ravel(), before[:, :-1].ravel()
    met = np.concatenate([base, base + a, base + b, base + a + b])
    coalitions, place = np.unique(met, return_inverse=True)
    number = np.zeros((n, n), dtype=int)
    number[np.triu_indices(n, 1)] = np.arange(n * (n - 1) // 2)
    pair = (number + number.T)[order[:, :-1].ravel(), order[:, 1:].ravel()]
    weights = np.zeros((len(coalitions), n * (n - 1) // 2))
    np.add.at(weights, (place, np.tile(pair, 4)), np.repeat([1, -1, -1, 1], len(pair)))
    times = np.bincount(pair, minlength=weights.shape[1])
    return coalitions, weights / np.where(times > 0, times, np.nan)
