"""Appendix: tracers judged by circuits whose edges are known.

A planted circuit is run once; then every method traces the same firings from the same roots, so
that they differ in nothing but the weights they give to upstream components.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import comb

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_signals.core.model import activations, head_name, logits
from sparse_signals.core.numbers import TINY
from sparse_signals.core.run import Run, run
from sparse_signals.core.stats import false_discovery, group_bootstrap, resample, tidy
from sparse_signals.planted.answers import ANSWER_EDGE, LINK, PlantedAnswer
from sparse_signals.planted.circuits import EDGE, LOUD, MUTE, Planted, planted, recovery
from sparse_signals.planted.superposition import superpose
from sparse_signals.signals.firings import Pairs, find_firings
from sparse_signals.tracing.contributions import (
    SIDES,
    Contributions,
    Settings,
    contributions,
)
from sparse_signals.tracing.trace import follow

METHODS = {
    "exact": "share of the slices in the support",
    "whole score": "share of all slices, no support",
    "random basis": "exact, in randomly turned bases",
    "exact, heads only": "exact, but no other component counts",
    "published": "√σ weights, heads only",
    "loudest": "norm of the output, heads only",
    "dice": "random numbers",
}
HEADS_ONLY = ("exact, heads only", "published", "loudest")
COUNTED = ("head edges", "all edges")
FATES = ("found", "lost by the cut", "cut off by silence", "reader silent")
FIRING = ["prompt", "layer", "head", "dest", "src"]
FOUND_SHARE = 0.05  # of the difference: what counts as found by a trace from the answer
ROLE_ORDER = ("end", "IO", "S2", "S1+1", "S1")  # the first of these that a token has names it


@dataclass(frozen=True)
class PlantedRun:
    """A planted circuit that was run: the firings, and which of them are planted roots.

    Under noise a root may fall silent: then nothing is traced from it, by any method. `accuracy`
    is the share of prompts that the model still answers.
    """

    planted: Planted
    run: Run
    pairs: Pairs
    start: Int[Tensor, "pair"]
    accuracy: float


def run_case(case: Planted) -> PlantedRun:
    """Run a planted circuit on its prompts, once for all methods."""
    ran = run(case.model, case.batch)
    pairs = find_firings(ran)
    start = torch.from_numpy(among(pairs.table(), case.roots).astype(np.int64))
    return PlantedRun(case, ran, pairs, start, answered(case))


def answered(case: Planted | PlantedAnswer) -> float:
    """The share of its prompts that a planted model answers."""
    batch = case.batch
    right = logits(case.model, batch.tokens, batch.last).argmax(-1) == batch.io
    return right.double().mean().item()


def trace_case(
    case: PlantedRun, method: str = "exact", share: float = 0.7, seed: int = 0
) -> pd.DataFrame:
    """The edges that a method finds, as in `tracing.Trace`; `seed` draws what is random in it.

    A side keeps its largest contributions until they exceed `share` of their sum.
    Raises ValueError for a method that is not in `METHODS`.
    """
    return _follow(case, shares(case, method, seed), share)


def _follow(case: PlantedRun, parts: Contributions, share: float) -> pd.DataFrame:
    return follow(case.run, case.pairs, parts.__getitem__, case.start, Settings(share=share))[1]


def shares(case: PlantedRun, method: str, seed: int = 0) -> Contributions:
    """What every component contributes to every firing, as a method sees it."""
    if method not in METHODS:
        raise ValueError(f"no method called {method!r}: choose among {', '.join(METHODS)}")
    if method == "whole score":
        return contributions(case.run, case.pairs)
    weighting = {"published": "published", "loudest": "norm"}.get(method, "exact")
    turn = seed if method == "random basis" else None
    parts = contributions(
        case.run, case.pairs, Settings(fraction=1.0, weighting=weighting, turn=turn)
    )
    if method == "exact, heads only":
        return replace(parts, values=parts.values * case.run.model.is_head)
    if method == "dice":
        thrown = np.random.default_rng(seed).random(tuple(parts.values.shape))
        return replace(parts, values=torch.from_numpy(thrown) * _upstream(case)[:, None])
    return parts


def _upstream(case: PlantedRun) -> Bool[Tensor, "pair component"]:
    layer = torch.tensor(case.run.model.components["layer"].tolist())
    return layer < case.pairs.layer[:, None]


def among(table: pd.DataFrame, known: pd.DataFrame, key: Sequence[str] = FIRING) -> np.ndarray:
    """Which rows of a table are in another one, by the columns of `key`."""
    return _tuples(table, key).isin(set(_tuples(known, key))).to_numpy()


def _tuples(table: pd.DataFrame, key: Sequence[str]) -> pd.Series:
    rows = list(table[list(key)].itertuples(index=False, name=None))
    return pd.Series(rows, dtype=object)


# --- how well a method does ----------------------------------------------------------------------


def compare(case: PlantedRun, found: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Edges that methods found, against the truth: method, edges, precision, recall, counts.

    "head edges" lead from a head to a head, the only ones that every method can find; "all edges"
    include those from embeddings and positions. Methods that see heads only get no such row.
    """
    rows = []
    for method, table in found.items():
        for kind in COUNTED[: 1 if method in HEADS_ONLY else 2]:
            result = recovery(of_kind(table, kind), of_kind(case.planted.truth, kind))
            rows.append({"method": method, "edges": kind} | result.to_dict())
    return pd.DataFrame(rows).assign(circuit=case.planted.name)


def of_kind(table: pd.DataFrame, kind: str) -> pd.DataFrame:
    """The edges of a kind, one of `COUNTED`."""
    return table[table["kind"] == "head"] if kind == "head edges" else table


def sweep_noise(
    names: Sequence[str], levels: Sequence[float], seeds: int, methods: Collection[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All methods on noisy circuits: rows of `compare`, and how many edges met which fate.

    Both tables have columns circuit, noise and seed. The second is about the method "exact"; it
    also has accuracy, and of the planted pairs of tokens silent ones (attention below 0.5) and
    quiet ones (below 0.1).
    """
    judged = [
        judge(planted(name, noise, seed), methods, seed, noise=noise)
        for name in names
        for noise in levels
        for seed in range(seeds)
    ]
    return _both_tables(judged)


def sweep_superposition(
    names: Sequence[str], levels: Sequence[int], seeds: int, methods: Collection[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The tables of `sweep_noise` for features in superposition: fewer instead of noise.

    `fewer` is by how many dimensions there are fewer than features, as in `superpose`.
    """
    judged = []
    for name in names:
        for seed in range(seeds):
            case = planted(name, seed=seed)
            for fewer in levels:
                crowded = superpose(case, fewer, seed)
                judged.append(judge(crowded, methods, seed, fewer=fewer))
    return _both_tables(judged)


def _both_tables(judged: Sequence[tuple[pd.DataFrame, dict]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    scores, ends = zip(*judged, strict=True)
    return pd.concat(scores, ignore_index=True), pd.DataFrame(ends)


def judge(
    planting: Planted, methods: Collection[str], seed: int, **level: int | float
) -> tuple[pd.DataFrame, dict]:
    """One planted circuit: the rows of `compare`, and the row of fates that `sweep_noise` has.

    `level` names what was done to the model, and how much of it.
    """
    case = run_case(planting)
    where = {"circuit": planting.name, **level, "seed": seed}
    found = {method: trace_case(case, method, seed=seed) for method in methods}
    fate = fates(case, found["exact"]).value_counts().reindex(FATES, fill_value=0)
    weight = planted_attention(case)
    attends = {"silent": (weight < 0.5).sum(), "quiet": (weight < 0.1).sum()}
    row = where | {"accuracy": case.accuracy} | attends | fate.to_dict()
    return compare(case, found).assign(**where), row


def pooled(scores: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Precision and recall of all runs together, with 95 % intervals over seeds.

    |found ∩ truth| and its like are summed before they are divided, for each value of the columns
    `by`; the bootstrap draws whole seeds. What is 0 / 0 is NaN.
    """
    groups = scores.groupby(list(by), sort=False)
    table = groups[["correct", "spurious", "missing"]].sum()
    names, seed = np.unique(scores["seed"], return_inverse=True)
    group, times = groups.ngroup().to_numpy(), resample(len(names))
    correct = scores["correct"].to_numpy(float)
    for rate, wrong in (("precision", "spurious"), ("recall", "missing")):
        whole = correct + scores[wrong].to_numpy(float)
        found = group_bootstrap(correct, group, seed, times, len(table), whole)
        table[rate], table[f"{rate}_low"], table[f"{rate}_high"] = found
    return table.reset_index()


def duels(scores: pd.DataFrame, rate: str = "precision", against: str = "exact") -> pd.DataFrame:
    """Every method against one of them, seed by seed: edges, method, higher, lower, p, q.

    A seed's rate is that of all its rows of `scores`. `higher` counts the seeds in which it is
    above that of `against`, `lower` those in which it is below; p is that of `sign_test`, and q
    corrects for the number of rows (Benjamini and Hochberg).
    """
    seeds = pooled(scores, ["edges", "method", "seed"])
    table = seeds.pivot(index=["edges", "method"], columns="seed", values=rate)
    rows = []
    for edges, method in seeds[["edges", "method"]].drop_duplicates().to_numpy():
        gap = (table.loc[(edges, method)] - table.loc[(edges, against)]).to_numpy()
        higher, lower = int((gap > TINY).sum()), int((gap < -TINY).sum())
        p = sign_test(higher, lower)
        rows.append({"edges": edges, "method": method, "higher": higher, "lower": lower, "p": p})
    found = pd.DataFrame(rows).query("method != @against").reset_index(drop=True)
    return found.assign(q=false_discovery(found["p"].to_numpy()))


def sign_test(higher: int, lower: int) -> float:
    """The exact p, two-sided, of so many signs if either were as likely; ties are left out.

    p = 2 Σ_{k ≥ max(higher, lower)} C(n, k) / 2^n, n = higher + lower, at most 1.
    Source: Arbuthnot 1710; Fisher 1925.

    >>> sign_test(4, 0), sign_test(5, 5)
    (0.125, 1.0)
    """
    n = higher + lower
    return min(1.0, 2 * sum(comb(n, k) for k in range(max(higher, lower), n + 1)) / 2**n)


def fate_shares(ends: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """The second table of `sweep_noise`, in shares of edges: `by`, fate, share, accuracy."""
    groups = ends.groupby(list(by), sort=False)
    counts = groups[list(FATES)].sum()
    table = counts.div(counts.sum(axis=1), axis=0).assign(accuracy=groups["accuracy"].mean())
    table = table.reset_index()
    return table.melt([*by, "accuracy"], list(FATES), var_name="fate", value_name="share")


def with_all(table: pd.DataFrame, name: str = "all four") -> pd.DataFrame:
    """The table with every row once more, as one of a circuit called `name`, which comes first."""
    return pd.concat([table.assign(circuit=name), table], ignore_index=True)


def fates(case: PlantedRun, found: pd.DataFrame) -> pd.Series:
    """What became of every planted edge, one of `FATES`.

    A reader is silent where it does not fire at its place. An edge is cut off by silence where its
    reader fires, but every planted path from the roots to it passes a silent one. What is neither,
    and not found, was lost by the tracer: by the cut, here or on the way.
    """
    fires, reachable = _alive(case)
    fate = pd.Series("lost by the cut", case.planted.truth.index)
    fate[~reachable] = "cut off by silence"
    fate[~fires] = "reader silent"
    fate[among(case.planted.truth, found, EDGE)] = "found"
    return fate


def _alive(case: PlantedRun) -> tuple[np.ndarray, np.ndarray]:
    """Planted edges whose reader fires, and those that planted paths of firings reach."""
    truth = case.planted.truth
    token = truth["dest"].where(truth["side"] == "dest", truth["src"])
    reader = head_name(truth["layer"], truth["head"])
    ends = pd.DataFrame({"prompt": truth["prompt"], "head": reader, "at": truth["dest"]})
    leads = ends.assign(head=truth["upstream"], at=token)
    fires = among(truth, case.pairs.table())
    reachable = fires & among(truth, case.planted.roots)
    for _ in range(case.planted.model.n_layers):
        reachable |= fires & among(ends, leads[reachable], ["prompt", "head", "at"])
    return fires, reachable


def planted_attention(case: PlantedRun) -> pd.Series:
    """The attention of every planted pair of tokens, whether it fires or not."""
    pairs = case.planted.truth[FIRING].drop_duplicates(ignore_index=True)
    at = (torch.tensor(pairs[name].tolist()) for name in ("layer", "prompt", "head", "dest", "src"))
    return pd.Series(case.run.pattern[tuple(at)].tolist())


def cuts(case: PlantedRun, levels: Sequence[float], methods: Collection[str]) -> pd.DataFrame:
    """Rows of `compare` for every share at which a side may be cut, with a column share."""
    parts = {method: shares(case, method) for method in methods}
    tables = []
    for share in levels:
        found = {method: _follow(case, parts[method], share) for method in methods}
        tables.append(compare(case, found).assign(share=share))
    return pd.concat(tables, ignore_index=True)


def strays(case: PlantedRun, found: pd.DataFrame) -> pd.DataFrame:
    """Edges that are found and not planted: sender (kind of component), share, whole.

    `share` is the share of its side as the tracer saw it, `whole` its share of the whole score,
    which depends on no basis and no support.
    """
    stray = found[~among(found, case.planted.truth, EDGE)]
    table = case.run.model.components.set_index("component")
    firings, readers = (pd.Index(_tuples(x, FIRING)) for x in (case.pairs.table(), stray))
    side = stray["side"].map(SIDES.index).to_numpy(dtype=np.int64)
    values = contributions(case.run, case.pairs).values
    values = (values / values.sum(-1, keepdim=True)).numpy()
    writers = table.index.get_indexer(pd.Index(stray["upstream"]))
    whole = values[firings.get_indexer(readers), side, writers]
    sender = stray["upstream"].map(table["kind"])
    return stray.assign(sender=sender, whole=whole)[["sender", "share", "whole"]]


def drawn_edges(case: Planted) -> pd.DataFrame:
    """The planted edges by the roles of their tokens: circuit, upstream, role, side, reader, dest.

    One row per edge, whatever the prompt; `role` is where upstream writes.
    """
    reader = head_name(case.truth["layer"], case.truth["head"])
    edges = case.truth.assign(reader=reader, circuit=case.name)
    writes = edges["dest"].where(edges["side"] == "dest", edges["src"])
    edges["role"], edges["at"] = (
        _role_names(case, edges, writes),
        _role_names(case, edges, edges["dest"]),
    )
    columns = ["circuit", "upstream", "role", "side", "reader", "at"]
    return edges[columns].drop_duplicates(ignore_index=True)


def drawn_decoys(case: PlantedRun) -> pd.DataFrame:
    """The decoys of a circuit, and at which token they fire: circuit, reader, at."""
    fired = case.pairs.table()
    if case.planted.name == "decoys":
        fired = fired[fired["name"].isin(MUTE + LOUD)]
    else:
        fired = fired.iloc[:0]
    at = _role_names(case.planted, fired, fired["dest"])
    return pd.DataFrame({"circuit": case.planted.name, "reader": fired["name"], "at": at})


def drawn_attention(case: PlantedRun) -> pd.DataFrame:
    """Attention of the heads of a circuit on its first prompt: one row per head and visible pair.

    Columns: head ("inhibition 0.0"), dest, src, target, source (words), attention, planted
    (whether the circuit needs the head to look there).
    """
    labels = [f"{pos} {word}" for pos, word in enumerate(case.planted.batch.labels[0])]
    rows = case.planted.truth[case.planted.truth["prompt"] == 0]
    parts = []
    for _, pairs in rows.groupby(["layer", "head"]):
        layer, head = pairs[["layer", "head"]].iloc[0]
        weights = case.run.pattern[layer, 0, head, : len(labels), : len(labels)]
        table = tidy(weights, ["dest", "src"], "attention")
        table["planted"] = among(table, pairs, ["dest", "src"])
        table = table[table["src"] <= table["dest"]]
        parts.append(table.assign(head=f"{case.planted.name} {layer}.{head}"))
    looks = pd.concat(parts, ignore_index=True)
    words = dict(enumerate(labels))
    return looks.assign(target=looks["dest"].map(words), source=looks["src"].map(words))


def _role_names(case: Planted, table: pd.DataFrame, token: pd.Series) -> list[str]:
    roles = {
        role: case.batch.roles[role].tolist() for role in ROLE_ORDER if role in case.batch.roles
    }
    pairs = zip(table["prompt"], token, strict=True)
    return [next(r for r in roles if roles[r][prompt] == place) for prompt, place in pairs]


# --- from the answer -----------------------------------------------------------------------------


def score_edges(case: PlantedAnswer) -> pd.DataFrame:
    """What a score trace finds of a planted answer, as edges (columns `ANSWER_EDGE`).

    It gets all the help there is: every planted head is a root where it fires, and where it writes
    to the answer that edge counts as found. A side of a score is a query or a key.
    """
    ran = run(case.model, case.batch)
    pairs, truth = find_firings(ran), case.truth
    readers = truth[["prompt", "downstream", "dest"]].set_axis(["prompt", "name", "dest"], axis=1)
    start = torch.from_numpy(among(pairs.table(), readers, list(readers.columns)).astype(np.int64))
    parts = contributions(ran, pairs, Settings())
    edges = follow(ran, pairs, parts.__getitem__, start, Settings())[1]
    edges["token"] = edges["dest"].where(edges["side"] == "dest", edges["src"])
    edges["channel"] = edges["side"].map({"dest": "query", "src": "key"})
    writers = pairs[start > 0].table()[["prompt", "name"]]
    writers = writers.set_axis(["prompt", "upstream"], axis=1)
    given = among(truth, writers, list(writers.columns)) & (truth["channel"] == "direct")
    return pd.concat([edges[ANSWER_EDGE], truth.loc[given, ANSWER_EDGE]], ignore_index=True)


def strong(edges: pd.DataFrame) -> pd.DataFrame:
    """The edges that have at least `FOUND_SHARE` of the difference, for it or against it."""
    return edges[edges["share"].abs() >= FOUND_SHARE]


def judge_answer(
    case: PlantedAnswer, edges: pd.DataFrame, pool: pd.DataFrame, **where: int | float
) -> pd.DataFrame:
    """How well a planted answer is found: kind, precision, recall, counts, answers, circuit.

    `edges` are what a trace from the answer gives to each prompt, `pool` its means over prompts.
    Kinds: "shares" counts `strong` edges, "helpers" those of them for the answer, "pooled" strong
    edges of the pool, "scores" what a score trace finds. `where` are columns to be added.
    """
    found = strong(edges)
    rates = {
        "shares": recovery(found, case.truth, ANSWER_EDGE),
        "helpers": recovery(found[found["share"] > 0], case.truth, ANSWER_EDGE),
        "pooled": recovery(strong(pool), case.links, LINK),
        "scores": recovery(score_edges(case), case.truth, ANSWER_EDGE),
    }
    table = pd.DataFrame(rates).T.rename_axis("kind").reset_index()
    return table.assign(answers=answered(case), circuit=case.name, **where)


def drawn_links(case: PlantedAnswer, found: pd.DataFrame) -> pd.DataFrame:
    """The links of a planted answer: circuit, `LINK`, share, seen.

    `share` is the mean over prompts of what `found` (columns `ANSWER_EDGE`, share) gives to the
    edge, `seen` the part of the prompts in which a score trace finds it.
    """
    table = case.truth.merge(found[[*ANSWER_EDGE, "share"]], how="left").fillna({"share": 0.0})
    table["seen"] = among(table, score_edges(case), ANSWER_EDGE)
    means = table.groupby("link")[["share", "seen"]].mean()
    return case.links.join(means).assign(circuit=case.name)[["circuit", *LINK, "share", "seen"]]


def exchange(case: PlantedAnswer, heads: Collection[str]) -> Float[np.ndarray, "prompt"]:
    """How much of F(x) − F(x′) is lost when some heads write in x what they write in x′."""
    batch, last = case.batch, case.batch.last
    other = activations(case.model, case.counterfactual.tokens, ["z"])["z"]

    def swap(value: Tensor, hook: object, layer: int, head: int) -> Tensor:
        value[:, :, head] = other[layer, :, head]
        return value

    places = [tuple(map(int, name.split("."))) for name in heads]
    hooks = [
        (f"blocks.{layer}.attn.hook_z", partial(swap, layer=layer, head=head))
        for layer, head in places
    ]
    names = batch.answers("the answer of a planted circuit")
    runs = ((batch, ()), (case.counterfactual, ()), (batch, hooks))
    values = [logits(case.model, x.tokens, last, how).gather(1, names) for x, how in runs]
    whole, theirs, changed = ((value[:, 0] - value[:, 1]).numpy() for value in values)
    return (whole - changed) / (whole - theirs)
