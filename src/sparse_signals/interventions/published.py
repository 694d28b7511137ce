"""Chapter 5: the published experiments on any model, with heads and edges chosen by rules."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from sparse_signals.core.model import BIAS_ROW, Model
from sparse_signals.core.prompts import Batch, roles_of
from sparse_signals.core.stats import bootstrap, exact_share
from sparse_signals.interventions.case import Case, templates_of
from sparse_signals.interventions.edge_signals import read_signals
from sparse_signals.interventions.joint_effects import Players, joint_effect, play
from sparse_signals.interventions.knockouts import knock_out, takeover
from sparse_signals.tracing.circuit import KEY, labelled
from sparse_signals.tracing.roots import Root, strongest_roots
from sparse_signals.tracing.trace import Trace, trace_prompts

EXPERIMENTS = {
    "A": "one head, into two movers",
    "B": "two heads, into two movers each",
    "E": "into one mover, end and IO",
    "F": "into the other, end and IO",
    "J": "all out of two common heads",
    "K": "all out of two first-layer heads",
}


def find_movers(model: Model, batch: Batch, n: int = 5, least: float = 0.1) -> list[Root]:
    """Of the n heads that write most of logit(IO) − logit(S), those that look from `end` to IO.

    They fire there on at least a share `least` of the prompts. Largest attribution first.
    """
    roots = strongest_roots(model, batch, n)
    seen = trace_prompts(model, batch, roots).firings
    io = batch.roles["IO"].numpy()[seen["prompt"]]
    counts = seen.loc[seen["root"] & (seen["src"] == io), "name"].value_counts()
    needed = least * len(batch.tokens)
    movers = [root for root in roots if counts.get(root.name, 0) >= needed]
    return [Root(root.layer, root.head, "end", "IO") for root in movers]


# --- one edge at a time --------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """Edges of a trace drawn at random.

    keys: pooled edges, drawn of the `often` of all `pooled` ones that occur in enough templates;
    edges: all their occurrences; rare: occurrences drawn of the edges that occur in fewer;
    rare_keys: the pooled edges of these.
    """

    keys: pd.DataFrame
    edges: pd.DataFrame
    rare_keys: pd.DataFrame
    rare: pd.DataFrame
    often: int
    pooled: int


def sampled_edges(traced: Trace, n: int = 18, least: int = 10, seed: int = 0) -> Sample:
    """Of a trace, n pooled edges that occur in `least` templates or more, and 3 n other edges.

    Each is as likely as any other, so that rules are not tested on the strongest edges alone. The
    bias row is no edge.
    """
    edges = traced.edges[traced.edges["kind"] != BIAS_ROW]
    rows = labelled(edges.reset_index(names="label"), roles_of(traced.batch))
    rows["template"] = templates_of(traced.batch)[rows["prompt"]]
    met = rows.groupby(KEY)["template"].nunique()
    often = met[met >= least].reset_index()[KEY]
    keys = often.sample(min(n, len(often)), random_state=seed).reset_index(drop=True)
    labels, common = (set(rows.merge(x, on=KEY)["label"]) for x in (keys, often))
    others = edges.loc[~edges.index.isin(common)]
    rare = others.sample(min(3 * n, len(others)), random_state=seed).sort_index()
    rare_keys = rows[rows["label"].isin(rare.index)].drop_duplicates("label")[KEY]
    return Sample(keys, edges.loc[sorted(labels)], rare_keys, rare, len(often), len(met))


def two_effects(table: pd.DataFrame) -> pd.DataFrame:
    """Effects on the reader and on the answer side by side, from `summary`.

    Columns: edge, scope, reader, answer (changes of attention and of F), and *_low, *_high, *_q.
    """
    index, parts = ["edge", "scope"], []
    for measure, name in (("attention_change", "reader"), ("F_change", "answer")):
        rows = table[(table["measure"] == measure) & (table["control"] == "signal")]
        rows = rows[rows["mode"] == "ablate"].set_index(index)[["value", "low", "high", "q"]]
        parts.append(rows.set_axis([name, *(f"{name}_{x}" for x in ("low", "high", "q"))], axis=1))
    return parts[0].join(parts[1]).reset_index()


def sweep_facts(found: pd.DataFrame) -> pd.DataFrame:
    """The summary numbers of the published sweep, from `summary`, for ablations.

    One row a number: fact (its name in the facts file), ablation (in words), and the mean over
    pooled edges, value, with low and high: of shares the exact 95 % interval, of other means one
    that resamples edges.
    """
    rows, ablated = [], found[found["mode"] == "ablate"]
    for scope, table in ablated.groupby("scope", sort=False):
        values = table.set_index(["measure", "control"])["value"].sort_index()
        for measure, name in (("score_change", "score"), ("F_change", "logit_diff")):
            falls = (values[measure, "signal"] < 0).astype(float)
            words = f"{scope}: share of edges that lower {name}"
            rows.append((f"share_{scope}_lowers_{name}", words, falls))
        for control in sorted({"signal", "random"} & set(table["control"]), reverse=True):
            words = f"{scope}: mean |change of logit_diff|, {control}"
            rows.append((f"mean_abs_{scope}_{control}", words, values["F_size", control]))
    numbers = []
    for fact, words, x in rows:
        low, high = bootstrap(x.to_frame(), np.arange(len(x))).iloc[0, 2:]
        if fact.startswith("share"):
            low, high = exact_share(int(x.sum()), len(x))
        numbers.append([fact, words, x.mean(), float(low), float(high)])
    return pd.DataFrame(numbers, columns=["fact", "ablation", "value", "low", "high"])


# --- two sets of edges ---------------------------------------------------------------------------


def common_heads(traced: Trace, names: Sequence[str], n: int = 2) -> list[str]:
    """The n heads that all of some roots hear at `end`, by the smallest weight they have there."""
    edges = traced.edges[_into_roots(traced) & (traced.edges["side"] == "dest")]
    edges = edges[edges["downstream"].isin(names) & (edges["kind"] == "head")]
    sums = edges.groupby(["upstream", "downstream"])["weight"].sum().unstack(fill_value=0)
    least = sums.reindex(columns=list(names), fill_value=0.0).min(axis=1)
    return least.sort_values(ascending=False, kind="stable").index[:n].tolist()


def first_heads(traced: Trace, n: int = 2) -> list[str]:
    """The n heads of the lowest layer with two in the trace that write most into it."""
    edges = traced.edges[traced.edges["kind"] == "head"]
    sums = edges.groupby(["upstream", "up_layer"], as_index=False)[["weight"]].sum()
    sums = sums.sort_values("weight", ascending=False, kind="stable")
    enough = sums["up_layer"].value_counts().sort_index()
    return sums.loc[sums["up_layer"] == enough.index[enough >= n][0], "upstream"][:n].tolist()


def _into_roots(traced: Trace) -> pd.Series:
    firings = traced.firings
    return traced.edges["firing"].isin(firings.loc[firings["root"], "firing"])


def edge_sets(traced: Trace) -> dict[str, tuple[pd.Series, pd.Series]]:
    """For each experiment of `EXPERIMENTS` its two sets, as masks of the edges of the trace."""
    edges, root = traced.edges, _into_roots(traced)
    names = [x.name for x in traced.roots[:2]]
    one, other = (root & (edges["downstream"] == x) for x in (names[0], names[-1]))
    end, io = edges["side"] == "dest", edges["side"] == "src"
    common, first = common_heads(traced, names), first_heads(traced)
    u, v, e, f = (edges["upstream"] == x for x in (*common, *first))
    return {
        "A": (one & end & u, other & end & u),
        "B": ((one | other) & end & u, (one | other) & end & v),
        "E": (one & end, one & io),
        "F": (other & end, other & io),
        "J": (u, v),
        "K": (e, f),
    }


def joint_of_sets(case: Case, first: pd.Series, second: pd.Series) -> dict[str, float]:
    """Losses of F when each of two sets of edges is ablated globally, and `joint_effect` of both.

    On prompts that have edges of both; empty where there is none. Signals are summed, as published:
    what two edges out of one component share is then taken twice.
    """
    edges = case.traced.edges
    stream = edges["kind"] != BIAS_ROW
    both = set(edges.loc[first & stream, "prompt"]) & set(edges.loc[second & stream, "prompt"])
    ours = (first | second) & stream & edges["prompt"].isin(both)
    if not ours.any():
        return {}
    signals = read_signals(case.traced, edges[ours])
    player = torch.tensor(second[ours].to_numpy(int), device=signals.reader.device)
    game = play(case, Players(pd.DataFrame(index=range(2)), signals, player))
    alone = game.alone("F").mean(0)
    found = {"first": float(alone[0]), "second": float(alone[1])}
    return found | {str(name): value for name, value in joint_effect(game).items()}


def joint_experiments(case: Case) -> pd.DataFrame:
    """The counterparts of the published experiments, with signals ablated globally.

    One row per experiment: key, experiment, prompts, and losses of F: first, second, summed, joint,
    gap (joint − summed), each of the last three with *_low and *_high, and ratio with its interval
    where both are clearly losses.
    """
    rows = []
    for key, sets in edge_sets(case.traced).items():
        if found := joint_of_sets(case, *sets):
            rows.append({"key": key, "experiment": f"{key}: {EXPERIMENTS[key]}"} | found)
    return pd.DataFrame(rows).drop(columns="players")


def published_experiments(facts: dict[str, dict]) -> pd.DataFrame:
    """The published global losses: key, edges (their description), first, second, together.

    The three means are over different prompts, those that have the edges of each, so that neither
    gap nor ratio can be made of them. Source: Franco and Crovella 2024, released results.
    """
    rows = []
    for name, fact in facts.items():
        key, edges = name.split(": ", 1)
        first, second = fact["global"]
        rows.append([key, edges.replace("->", "→"), -first, -second, -fact["joint_global"]])
    return pd.DataFrame(rows, columns=["key", "edges", "first", "second", "together"])


# --- many edges ----------------------------------------------------------------------------------


def knock_outs(case: Case, root: Root, number: int = 2) -> pd.DataFrame:
    """`knock_out` with the scales of the normalisation recomputed, and frozen (column scales)."""
    tables = []
    for scales in ("recomputed", "frozen"):
        how = {"number": number, "freeze_norms": scales == "frozen"}
        rows = knock_out(case.traced.model, case.traced.batch, root, case.traced.settings, **how)
        tables.append(rows.assign(scales=scales))
    return pd.concat(tables, ignore_index=True)


def takeovers(runs: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """`takeover` of several `knock_outs`, by name: columns circuit and scales besides."""
    tables = [
        takeover(rows.drop(columns="scales")).assign(circuit=circuit, scales=scales)
        for circuit, table in runs.items()
        for scales, rows in table.groupby("scales", sort=False)
    ]
    return pd.concat(tables, ignore_index=True)
