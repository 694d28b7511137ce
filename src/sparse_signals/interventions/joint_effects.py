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

from sparse_signals.core.model import BIAS_ROW
from sparse_signals.core.prompts import token_roles
from sparse_signals.core.stats import DRAWS, bootstrap, bounds, resample
from sparse_signals.interventions.changes import Clean
from sparse_signals.interventions.edge_signals import Signals, read_signals
from sparse_signals.interventions.intervene import intervene_on
from sparse_signals.tracing.circuit import KEY
from sparse_signals.tracing.trace import Trace

LOSSES = ("F", "score", "attention")
EXACT = 8  # most players of whom all coalitions are tried
EDGES = 2**13  # signals that are held at once
NO_LOSS = 1e-6  # a loss alone that is this small a part of the loss together is none


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
        if self.measure not in LOSSES:
            raise ValueError(f"measure must be one of {LOSSES}, not {self.measure!r}")


def strongest_players(
    traced: Trace, root: str, side: str | None = "dest", n: int = EXACT
) -> Players:
    """The n edges into the root firings of a head that carry most: largest Σ weight over prompts.

    Edges arrive at one side of the root (None: either; but what the two sides carry is multiplied,
    so each takes what the other takes). They are pooled by `KEY`, where the role of a token is
    its set of roles. The bias row is no player: nothing writes it. Raises ValueError where the
    trace has no such edge.
    """
    fired = traced.firings[traced.firings["root"] & (traced.firings["name"] == root)]
    into = traced.edges["firing"].isin(fired["firing"]) & (traced.edges["kind"] != BIAS_ROW)
    edges = traced.edges[into & (side is None or traced.edges["side"] == side)]
    if edges.empty:
        raise ValueError(f"no edge leads to a root firing of {root}: is it a root of this trace?")
    roles = np.array(token_roles(traced.batch))
    edges = edges.assign(
        dest_role=roles[edges["prompt"], edges["dest"]],
        src_role=roles[edges["prompt"], edges["src"]],
    )
    names = edges.groupby(KEY, sort=True).agg(
        prompts=("prompt", "nunique"), weight=("weight", "sum")
    )
    names = names.assign(weight=names["weight"] / len(traced.batch.tokens))
    names = names.sort_values("weight", ascending=False, kind="stable").head(n).reset_index()
    number = pd.MultiIndex.from_frame(names[KEY])
    player = number.get_indexer(pd.MultiIndex.from_frame(edges[KEY]))
    signals = read_signals(traced, traced.edges.loc[edges.index[player >= 0]])
    kept = torch.tensor(player[player >= 0], device=signals.reader.device)
    return Players(names, signals, kept)


def losses(
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
        table = intervene_on(
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
    clean: Clean,
    players: Players,
    how: Ablations = Ablations(),
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
    lost = losses(clean, players, coalitions, how)
    sums = np.column_stack([lost[:, :-1].sum(1), lost[:, -1]])
    summed, joint = (resample(len(sums), draws, seed) @ sums).T / len(sums)
    alone = summed * np.sign(joint) > NO_LOSS * np.abs(joint)
    ratio = np.where(alone, joint / np.where(alone, summed, 1), np.inf)
    found = {"summed": summed, "joint": joint, "ratio": ratio, "gap": joint - summed}
    row = {"players": len(players), "prompts": len(sums)}
    for name, samples in found.items():
        low, high = bounds(samples[1:])
        row |= {name: samples[0], f"{name}_low": low, f"{name}_high": high}
    return pd.Series(row)


def interactions(
    clean: Clean,
    players: Players,
    how: Ablations = Ablations(),
    draws: int = DRAWS,
    seed: int = 0,
) -> pd.DataFrame:
    """Shapley interaction index of every pair of players, in units of what is lost.

    The mean over coalitions T of the others of v(T+a+b) − v(T+a) − v(T+b) + v(T), with v what
    ablating a coalition loses us: positive if a and b back each other up, negative if each takes
    what the other takes, 0 if they add. One row a pair: first, second (upstream of either),
    value and its 95 % bootstrap interval over prompts, low and high. Raises ValueError for more
    than `EXACT` players, since all 2ⁿ coalitions are tried. Source: Grabisch and Roubens 1999.
    """
    n = len(players)
    if n > EXACT:
        raise ValueError(f"{n} players have 2^{n} coalitions: choose at most {EXACT} players")
    coalitions, weights = interaction_index(n)
    each = losses(clean, players, coalitions, how) @ weights
    found = bootstrap(pd.DataFrame(each), np.arange(len(each)), draws=draws, seed=seed)
    names, (first, second) = players.names["upstream"].array, np.triu_indices(n, 1)
    pairs = pd.DataFrame({"first": names[first], "second": names[second]})
    return pairs.join(found.drop(columns="measure"))


def interaction_index(
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
