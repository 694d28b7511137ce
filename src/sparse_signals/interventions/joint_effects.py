"""Chapter 5: do edges back each other up? What several do together, against each alone.

A player is a pooled edge into a root, and what it loses us is how much logit(IO) − logit(S), or the
score or attention of the root, falls when its signal is ablated. The gap is what players lose us
together beyond the sum of what each loses us alone. Part of it is the softmax of the root itself,
which the same ablations show when all that is upstream is frozen (scope "local"): only the rest can
be backup.
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
from sparse_signals.core.stats import (
    DRAWS,
    bootstrap,
    bounds,
    resample,
    sign_flip,
)
from sparse_signals.interventions.case import Case, templates_of
from sparse_signals.interventions.edge_signals import Signals, read_signals
from sparse_signals.interventions.intervene import intervene_on
from sparse_signals.tracing.circuit import KEY
from sparse_signals.tracing.trace import Trace

LOST_BY = ("F", "score", "attention")
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
class Game:
    """What ablating coalitions of players loses us, in the prompts where there is any player.

    Bit n of a coalition says whether player n is in it. `lost` is in the order of `LOST_BY`;
    `cluster` is the template of every prompt, from which intervals are drawn.
    """

    players: Players
    coalitions: Int[np.ndarray, "coalition"]
    lost: Float[np.ndarray, "measure prompt coalition"]
    cluster: Int[np.ndarray, "prompt"]

    def of(self, measure: str) -> Float[np.ndarray, "prompt coalition"]:
        """The losses of one of `LOST_BY`. Raises ValueError for another."""
        if measure not in LOST_BY:
            raise ValueError(f"measure must be one of {LOST_BY}, not {measure!r}")
        return self.lost[LOST_BY.index(measure)]

    def alone(self, measure: str) -> Float[np.ndarray, "prompt player"]:
        """What each player loses us alone."""
        return self.of(measure)[:, np.searchsorted(self.coalitions, 2 ** np.arange(self.n))]

    def together(self, measure: str) -> Float[np.ndarray, "prompt"]:
        """What all players lose us together: the largest coalition."""
        return self.of(measure)[:, -1]

    def gaps(self, measure: str) -> Float[np.ndarray, "prompt"]:
        """What all lose us together beyond the sum of what each loses us alone."""
        return self.together(measure) - self.alone(measure).sum(1)

    @property
    def n(self) -> int:
        """How many players there are."""
        return len(self.players)


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


def play(
    case: Case,
    players: Players,
    scope: str = "global",
    *,
    freeze_norms: bool = False,
    every: bool = True,
) -> Game:
    """Ablate all coalitions of players, or (not `every`) each player alone and all together.

    In the scope "local" only the query or key of the root changes and all that is upstream is
    frozen. Score and attention are those of the firing, averaged over the edges of the coalition.
    Raises ValueError for all coalitions of more than `EXACT` players: there are 2ⁿ.
    """
    n = len(players)
    if every and n > EXACT:
        raise ValueError(f"{n} players have 2^{n} coalitions: choose at most {EXACT} players")
    coalitions = np.arange(2**n) if every else np.array([*2 ** np.arange(n), 2**n - 1])
    coalitions = np.unique(coalitions)
    prompts, prompt = np.unique(players.signals.edges["prompt"], return_inverse=True)
    player = players.player.cpu().numpy()
    lost = np.zeros((len(LOST_BY), len(prompts), len(coalitions)))
    step = max(1, EDGES // len(player))
    for start in range(0, len(coalitions), step):
        chosen = coalitions[start : start + step, None] >> player & 1
        coalition, edge = chosen.nonzero()
        table = intervene_on(
            case.clean,
            players.signals[torch.tensor(edge, device=players.player.device)],
            torch.tensor(coalition * len(prompts) + prompt[edge]),
            scopes=[scope],
            modes=["ablate"],
            freeze_norms=freeze_norms,
        )
        change = table.groupby("row")[[f"{name}_change" for name in LOST_BY]].mean()
        number = change.index.to_numpy()
        place = number % len(prompts), start + number // len(prompts)
        lost[:, *place] = -change.to_numpy().T
    return Game(players, coalitions, lost, templates_of(case.traced.batch)[prompts])


def joint_effect(game: Game, measure: str = "F", draws: int = DRAWS, seed: int = 0) -> pd.Series:
    """What all players lose us together, against the sum of what each loses us alone.

    Means over prompts: summed, joint, gap (joint − summed) and ratio (joint ÷ summed), with their
    95 % bootstrap intervals over templates, *_low and *_high. The ratio is NaN unless both summed
    and joint are losses with intervals above 0. A gap above 0: together they lose us more.
    """
    sums = np.column_stack([game.alone(measure).sum(1), game.together(measure)])
    names, cluster = np.unique(game.cluster, return_inverse=True)
    times = resample(len(names), draws, seed)[:, cluster]
    summed, joint = (times @ sums / times.sum(1, keepdims=True)).T
    row: dict[str, float] = {"players": game.n, "prompts": len(sums)}

    def add(name: str, samples: Float[np.ndarray, "sample"]) -> None:
        low, high = bounds(samples[1:])
        row.update({name: samples[0], f"{name}_low": float(low), f"{name}_high": float(high)})

    for name, samples in {"summed": summed, "joint": joint, "gap": joint - summed}.items():
        add(name, samples)
    harm = row["summed_low"] > NO_LOSS * abs(row["joint"]) and row["joint_low"] > 0
    positive = np.where(summed > 0, summed, np.nan)
    add("ratio", joint / positive if harm else np.full_like(joint, np.nan))
    return pd.Series(row)


def alone_and_together(game: Game, measure: str = "F") -> pd.DataFrame:
    """What players lose us alone, in sum, and together, with 95 % intervals over templates.

    One row each: edge, kind ("alone", "sum", "together"), value, low, high.
    """
    table = pd.DataFrame(game.alone(measure), columns=game.players.names["upstream"])
    table["sum"], table["together"] = table.sum(axis=1), game.together(measure)
    found = bootstrap(table, game.cluster).rename(columns={"measure": "edge"})
    return found.assign(kind=["alone"] * game.n + ["sum", "together"])


def gap_parts(free: Game, local: Game, frozen: Game) -> pd.DataFrame:
    """Where the gap of the same players comes from, with 95 % intervals over templates.

    free: ablated globally; local: with all upstream frozen; frozen: globally, the scales of the
    normalisation frozen. One row each, value, low and high: "F" (its gap), "attention" (of the
    root), "softmax alone" (the gap of the attention with all upstream frozen), "rest" (attention
    less softmax alone, paired) and "score" (scales frozen; a score has no softmax of its own).
    """
    attention, softmax = free.gaps("attention"), local.gaps("attention")
    columns = {"F": free.gaps("F"), "attention": attention, "softmax alone": softmax}
    columns |= {"rest": attention - softmax, "score": frozen.gaps("score")}
    found = bootstrap(pd.DataFrame(columns), free.cluster)
    return found.rename(columns={"measure": "part"})


def interactions(game: Game, measure: str = "F", draws: int = DRAWS, seed: int = 0) -> pd.DataFrame:
    """Shapley interaction index of every pair of players, in units of what is lost.

    The mean over coalitions T of the others of v(T+a+b) − v(T+a) − v(T+b) + v(T), with v what
    ablating a coalition loses us: positive if together a and b lose us more, negative if each takes
    what the other takes, 0 if they add. One row a pair: first, second (upstream of either),
    value and its 95 % bootstrap interval over templates, low and high, and p, `sign_flip` of the
    means of templates. Needs a game of all coalitions.
    Source: Grabisch and Roubens 1999.
    """
    _, weights = interaction_index(game.n)
    each = pd.DataFrame(game.of(measure) @ weights)
    found = bootstrap(each, game.cluster, draws=draws, seed=seed)
    means = each.groupby(game.cluster).mean().to_numpy()
    names, (first, second) = game.players.names["upstream"].array, np.triu_indices(game.n, 1)
    pairs = pd.DataFrame({"first": names[first], "second": names[second]})
    return pairs.join(found.drop(columns="measure")).assign(p=sign_flip(means.T))


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
