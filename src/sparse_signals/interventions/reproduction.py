"""Every published number for GPT-2 small beside what this package computes, and whether they agree.

The facts file holds the published numbers. `catalogue` says of every leaf of it how it is computed,
how far apart the two may be and why, or why it is not computed; `measure` computes; `side_by_side`
compares. Numbers that depend on the prompts come with intervals over templates.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from sparse_signals.core.forward import logit_difference
from sparse_signals.core.model import Model
from sparse_signals.core.numbers import is_number
from sparse_signals.core.prompts import Batch, PromptError, encode
from sparse_signals.core.resume import chunked, run_key
from sparse_signals.core.run import fitting_rows, run
from sparse_signals.core.stats import auc, bootstrap
from sparse_signals.heads.spectra import coordinate_table
from sparse_signals.heads.svd import head_svd, head_table
from sparse_signals.interventions.published import sweep_facts
from sparse_signals.interventions.released import (
    GRAPH_EDGE,
    RELEASED,
    SWEPT,
    between,
    edges_on_firings,
    graph_sizes,
    released_effects,
    released_firings,
    released_graph,
    released_roles,
    released_roots,
)
from sparse_signals.signals.firings import pairs_at
from sparse_signals.signals.slices import slice_table, slices
from sparse_signals.tracing.trace import Trace, trace_prompts

PROMPTS = 256  # as published
SWEPT_PROMPTS = 32  # of which all swept edges are ablated: the dearest part by far
MOVER, READER = "9.9", "8.6"  # heads that the facts file has sections of
OFTEN = 100 / PROMPTS  # what "in at least 100 firings" is of the prompts
TIMES = 1.96 * np.sqrt(2)  # 95 % of the differences between two samples, in standard errors
TRACED = ("graph", "edges_by", "multi_edge", "single_edge", "intervention_summary")  # sections
Found = dict[str, "Estimate"]


@dataclass(frozen=True)
class Estimate:
    """What is computed of a fact, with its 95 % interval over templates where it has one."""

    value: Any
    low: float = np.nan
    high: float = np.nan


@dataclass(frozen=True)
class Tolerance:
    """How far a computed number may be from the published one, fixed before, and why that far."""

    size: float
    basis: str


@dataclass(frozen=True)
class Quantity:
    """A published fact that is computed: how, within which tolerance, and why it may differ."""

    fact: str
    published: Any
    how: str
    tolerance: Tolerance
    why: str


@dataclass(frozen=True)
class Uncomputed:
    """A published fact that is not computed, and the reason."""

    fact: str
    published: Any
    reason: str


@dataclass(frozen=True)
class Rule:
    """How the facts whose path matches a pattern are computed."""

    pattern: str
    how: str
    tolerance: Callable[[Any, Mapping[str, Any]], Tolerance]
    why: str


# --- tolerances ----------------------------------------------------------------------------------


def _equal(published: Any, facts: Mapping[str, Any]) -> Tolerance:
    return Tolerance(0.0, "equal")


def _rounded(published: Any, facts: Mapping[str, Any]) -> Tolerance:
    return Tolerance(0.005, "rounding of the published number")


def _of_weights(published: Any, facts: Mapping[str, Any]) -> Tolerance:
    return Tolerance(0.005 * abs(published), "0.5 %: rounding, float32 in the released code")


def _of_share(published: Any, facts: Mapping[str, Any]) -> Tolerance:
    n = facts["setup"]["prompts"]
    error = np.sqrt(published * (1 - published) / n)
    return Tolerance(TIMES * error, f"1.96 √2 binomial standard errors of {n} prompts")


def _of_count(published: Any, facts: Mapping[str, Any]) -> Tolerance:
    """Of something that happens at most once a prompt, or that may happen more often."""
    n = facts["setup"]["prompts"]
    if published > n:
        return _of_events(published, facts)
    tolerance = _of_share(published / n, facts)
    return replace(tolerance, size=n * tolerance.size)


def _of_events(published: Any, facts: Mapping[str, Any]) -> Tolerance:
    return Tolerance(TIMES * np.sqrt(published), "1.96 √2 Poisson standard errors")


def _of_spread(errors: float) -> Callable[[Any, Mapping[str, Any]], Tolerance]:
    """So many standard errors of a mean, by the published standard deviation."""

    def tolerance(published: Any, facts: Mapping[str, Any]) -> Tolerance:
        error = facts["logit_diff"]["sd"] / np.sqrt(facts["setup"]["prompts"])
        basis = "1.96 √2 standard errors, of normal logit differences with the published sd"
        return Tolerance(TIMES * errors * error, basis)

    return tolerance


def _of_extreme(published: Any, facts: Mapping[str, Any]) -> Tolerance:
    return Tolerance(facts["logit_diff"]["sd"], "one published sd: extremes of 256 scatter by half")


def _of_mean(published: Any, facts: Mapping[str, Any]) -> Tolerance:
    return Tolerance(0.1 * abs(published), "10 %, by convention: no spread was published")


def _of_auc(published: Any, facts: Mapping[str, Any]) -> Tolerance:
    return Tolerance(0.02, "0.02, by convention: no spread was published")


def _of_effect(published: Any, facts: Mapping[str, Any]) -> Tolerance:
    size = max(0.1, 0.2 * abs(published))
    return Tolerance(size, "20 %, at least 0.1, by convention: no spread was published")


def _of_edge_share(published: Any, facts: Mapping[str, Any]) -> Tolerance:
    n = facts["intervention_summary"]["edges"]
    error = np.sqrt(published * (1 - published) / n)
    return Tolerance(TIMES * error, f"1.96 √2 binomial standard errors of {n} edges")


def _of_fifth(published: Any, facts: Mapping[str, Any]) -> Tolerance:
    return Tolerance(0.2 * abs(published), "20 %, by convention: no spread was published")


def _of_vectors(published: Any, facts: Mapping[str, Any]) -> Tolerance:
    return Tolerance(len(published) / 4, "as many in one set alone as a quarter of those published")


# --- what is computed, and what is not -----------------------------------------------------------

OTHER_PROMPTS = (
    "the prompts are this project's sentences and names, not the paper's: the same task in other "
    "words, some of them longer"
)
OTHER_GRAPH = (
    "the graph depends on the prompts, which are not the paper's, and on their order (first_writer)"
)
WEIGHTS = "only rounding can differ, or another checkpoint; the bias row and column are part of Ω"
SAME_PROMPT = "the same prompt: only rounding can differ, or another checkpoint"
CHOSEN = "a setting"
RELEASED_GRAPH = "released_graph of a trace with released.RELEASED and released.QUIRKS"
INTERVENED = (
    f"{OTHER_PROMPTS}; where several readers are changed locally, the released code computes all "
    "their inputs from the clean run"
)
FACT_RULES = (
    Rule("setup/prompts", "len(batch.tokens)", _equal, CHOSEN),
    Rule("setup/bos", "encode(…, bos=False)", _equal, CHOSEN),
    Rule("setup/(firing|support|contribution)_.*", "released.RELEASED", _equal, CHOSEN),
    Rule("setup/root.*", "released_roots", _equal, CHOSEN),
    Rule("setup/mean_end_position", "Batch.last", _rounded, OTHER_PROMPTS),
    Rule("setup/(distinct_.*|abba|baba)", "Batch.tokens, Batch.roles", _equal, OTHER_PROMPTS),
    Rule("logit_diff/mean", "logit_difference", _of_spread(1.0), OTHER_PROMPTS),
    Rule("logit_diff/sd", "logit_difference", _of_spread(0.5**0.5), OTHER_PROMPTS),
    Rule("logit_diff/median", "logit_difference", _of_spread(1.2533), OTHER_PROMPTS),
    Rule("logit_diff/m(in|ax)", "logit_difference", _of_extreme, OTHER_PROMPTS),
    Rule("logit_diff/share_positive", "logit_difference", _of_share, OTHER_PROMPTS),
    Rule("firings_ioi/.*", "released_firings, any sign of the score", _of_events, OTHER_PROMPTS),
    Rule("support_size_mean_ioi/.*", "released_firings, signals.support", _of_mean, OTHER_PROMPTS),
    Rule("nfiring_heads/.*", "released_firings, score ≥ 0", _of_events, OTHER_PROMPTS),
    Rule("root_prompts/.*", "released_firings from end to IO", _of_count, OTHER_PROMPTS),
    Rule("head_9_9_end_to_IO/firings", "released_firings from end to IO", _of_count, OTHER_PROMPTS),
    Rule("head_9_9_end_to_IO/support_total", "signals.support, summed", _of_mean, OTHER_PROMPTS),
    Rule(
        "head_9_9_end_to_IO/vectors_in_at_least_100",
        "signals.support",
        _of_vectors,
        f"{OTHER_PROMPTS}; vectors with nearly equal σ may change places",
    ),
    Rule(
        "head_9_9_end_to_IO/name_projection_auc",
        "‖P_V x̃‖ of all tokens but the first, stats.auc",
        _of_auc,
        OTHER_PROMPTS,
    ),
    Rule(
        "head_9_9_end_to_IO/(name|other)_projection_mean",
        "‖P_V x̃‖ of all tokens but the first",
        _of_mean,
        OTHER_PROMPTS,
    ),
    Rule("slices_8_6_prompt_6/score_unscaled", "slices × √r", _of_weights, SAME_PROMPT),
    Rule(
        "slices_8_6_prompt_6/support",
        "signals.support",
        _equal,
        f"{SAME_PROMPT}; vectors with nearly equal σ may change places",
    ),
    Rule("plain_omega_singular_values/.*", "svd.head_table", _of_weights, WEIGHTS),
    Rule(
        "graph/(nodes|edges|contribution_edges|heads)",
        f"{RELEASED_GRAPH}; graph_sizes",
        _of_mean,
        OTHER_GRAPH,
    ),
    Rule("edges_by_.*/count", RELEASED_GRAPH, _of_count, OTHER_GRAPH),
    Rule("edges_by_.*/weight", RELEASED_GRAPH, _of_fifth, OTHER_GRAPH),
    Rule(
        "multi_edge_mean_change_in_logit_diff/.*/prompts", "released_effects", _of_count, INTERVENED
    ),
    Rule(
        "multi_edge_mean_change_in_logit_diff/.*(global|local)(/.)?",
        "released_effects, F_change",
        _of_effect,
        INTERVENED,
    ),
    Rule(
        "single_edge_mean_change/.*/logit_diff",
        "released_effects, F_change",
        _of_effect,
        OTHER_GRAPH,
    ),
    Rule(
        "single_edge_mean_change/.*/score",
        "released_effects, score_change",
        _of_effect,
        OTHER_GRAPH,
    ),
    Rule(
        "intervention_summary/edges", "edges of the graph in released.SWEPT", _of_mean, OTHER_GRAPH
    ),
    Rule(
        "intervention_summary/share_.*",
        f"released_effects on the first {SWEPT_PROMPTS} prompts, sweep_facts",
        _of_edge_share,
        OTHER_GRAPH,
    ),
    Rule(
        "intervention_summary/mean_abs_.*",
        f"released_effects on the first {SWEPT_PROMPTS} prompts, sweep_facts",
        _of_fifth,
        OTHER_GRAPH,
    ),
)
REASONS = {
    "about": "says what the file holds",
    "setup/model": "names the model",
    "(firings|support_size_mean)_pile/.*": "needs texts of the Pile, which this project has not",
    "slices_8_6_prompt_6/(prompt|dest|src)": "says which pair of tokens is sliced",
    "graph/warning": "a remark",
    "edges_by_.*/(upstream|downstream|role|side|(src|dest)_role)": "says which edge is counted",
    "single_edge_mean_change/.*/edge": "says which edge is ablated",
    "ioi_paper_circuit/.*": "names given to heads by hand, in another paper",
    "circuit_comparison_ioi_f1_vs_path_patching_nodes/.*": (
        "other methods on another model's circuit, in another paper"
    ),
}


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of the facts file with its path; lists of whole numbers or names are leaves.

    Items of other lists are called by the edge that they are about, or by their number.

    >>> list(leaves({"a": {"b": 1, "c": [2, 3]}, "d": [0.5, 0.25]}))
    [('a/b', 1), ('a/c', [2, 3]), ('d/0', 0.5), ('d/1', 0.25)]
    """
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list) and value and isinstance(value[0], dict | float):
        items = [(_item_name(item, number), item) for number, item in enumerate(value)]
    else:
        yield path, value
        return
    for name, item in items:
        yield from leaves(item, f"{path}/{name}" if path else name)


def _item_name(item: Any, number: int) -> str:
    if not isinstance(item, dict):
        return str(number)
    return item["edge"] if "edge" in item else edge_name(*(item[name] for name in GRAPH_EDGE))


def edge_name(upstream: str, downstream: str, role: str) -> str:
    """What the facts file calls an edge of the released graph."""
    return f"{upstream}->{downstream}@{role}"


def catalogue(facts: Mapping[str, Any]) -> list[Quantity | Uncomputed]:
    """Every leaf of the facts file, as something that is computed or as something that is not.

    Raises ValueError for a leaf that no rule says anything of, or more than one.
    """
    found = []
    for fact, published in leaves(facts):
        rules = [rule for rule in FACT_RULES if re.fullmatch(rule.pattern, fact)]
        reasons = [reason for pattern, reason in REASONS.items() if re.fullmatch(pattern, fact)]
        if len(rules) + len(reasons) != 1:
            raise ValueError(f"{len(rules) + len(reasons)} rules for the published fact {fact!r}")
        if reasons:
            found.append(Uncomputed(fact, published, reasons[0]))
        else:
            rule = rules[0]
            tolerance = rule.tolerance(published, facts)
            found.append(Quantity(fact, published, rule.how, tolerance, rule.why))
    return found


# --- what is computed, section by section --------------------------------------------------------


def templates_of(batch: Batch) -> np.ndarray:
    """What varied independently: the template of every prompt, or the prompt where it has none."""
    if "template" in batch.table:
        return batch.table["template"].to_numpy()
    return np.arange(len(batch.tokens))


def _ratios(sums: pd.DataFrame, weights: pd.DataFrame | None, batch: Batch) -> Found:
    """Σ sums / Σ weights of every column (a fact), a row a prompt; only what is defined."""
    given = None if weights is None else weights.to_numpy(float)
    found = bootstrap(sums.astype(float), templates_of(batch), given).dropna(subset="value")
    return {row.measure: _estimate(row.value, row.low, row.high) for row in found.itertuples()}


def _estimate(value: Any, low: float, high: float) -> Estimate:
    """With the interval, if it is one: what occurs in one template alone has none."""
    return Estimate(value, low, high) if low < high else Estimate(value)


def _counts(counts: pd.DataFrame, batch: Batch) -> Found:
    """The sum of every column over as many prompts as there are."""
    n = len(batch.tokens)
    return {
        fact: Estimate(round(n * x.value), n * x.low, n * x.high)
        for fact, x in _ratios(counts, None, batch).items()
    }


def _by_prompt(rows: pd.DataFrame, fact: pd.Series, value: Any, batch: Batch) -> pd.DataFrame:
    """Σ value of the rows of every prompt (also of those without any) and fact."""
    table = pd.DataFrame({"prompt": rows["prompt"], "fact": fact, "value": value})
    sums = table.astype({"value": float}).groupby(["prompt", "fact"])["value"].sum()
    wide = sums.unstack(fill_value=0.0)
    return wide.reindex(range(len(batch.tokens)), fill_value=0.0)


def setup_facts(batch: Batch, roots: Sequence[str]) -> Found:
    """What was set, and what the prompts are like."""
    first = batch.roles["IO"] < batch.roles["S1"]
    ends = {(f"dest={x.dest}", f"src={x.src}") for x in released_roots(roots)}
    values = {
        "prompts": len(batch.tokens),
        "bos": False,
        "firing_threshold": RELEASED.level,
        "support_fraction": RELEASED.fraction,
        "contribution_fraction": RELEASED.share,
        "roots": [root.name for root in released_roots(roots)],
        "root_firing": "; ".join(map(", ".join, ends)),
        "mean_end_position": float(batch.last.double().mean()),
        "distinct_tokens": len(batch.tokens[batch.mask].unique()),
        "distinct_names": len(batch.answers("a reproduction").unique()),
        "abba": int(first.sum()),
        "baba": int((~first).sum()),
    }
    return {f"setup/{name}": Estimate(value) for name, value in values.items()}


def answer_facts(answers: pd.Series, batch: Batch) -> Found:
    """The logit difference of IO and S, one row a prompt."""
    columns = {"mean": answers, "share_positive": (answers > 0).astype(float)}
    found = _ratios(pd.DataFrame(columns), None, batch)
    for name, value in {
        "sd": answers.std(),
        "median": answers.median(),
        "min": answers.min(),
        "max": answers.max(),
    }.items():
        found[name] = Estimate(float(value))
    return {f"logit_diff/{name}": estimate for name, estimate in found.items()}


def firing_facts(firings: pd.DataFrame, heads: set[str], batch: Batch) -> Found:
    """How often heads fire, with how many slices, and on how many prompts from end to IO."""
    at_root = firings[_from_end_to_io(firings, batch)]
    kinds = {
        "firings_ioi": firings,
        "nfiring_heads": firings[firings["score"] >= 0],
        "root_prompts": at_root,
    }
    found = {}
    for section, rows in kinds.items():
        counts = _by_prompt(rows, rows["name"], 1.0, batch).reindex(columns=sorted(heads))
        found |= _counts(counts.fillna(0.0).add_prefix(f"{section}/"), batch)
    section = "support_size_mean_ioi/"
    sums, weights = (
        _by_prompt(firings, section + firings["name"], value, batch)
        for value in (firings["size"], 1.0)
    )
    return found | _ratios(sums, weights, batch)


def _from_end_to_io(firings: pd.DataFrame, batch: Batch) -> pd.Series:
    end, io = (batch.roles[role].numpy()[firings["prompt"]] for role in ("end", "IO"))
    return (firings["score"] >= 0) & (firings["dest"] == end) & (firings["src"] == io)


def mover_facts(firings: pd.DataFrame, coordinates: pd.DataFrame, batch: Batch) -> Found:
    """The name mover from end to IO, and how much of its signal names and other tokens carry.

    `coordinates`: prompt, pos, k and v of every token in this head, from `coordinate_table`.
    """
    ours = firings[_from_end_to_io(firings, batch) & (firings["name"] == MOVER)]
    columns = {"firings": 1.0, "support_total": ours["size"]}
    tables = [_by_prompt(ours, pd.Series(x, ours.index), y, batch) for x, y in columns.items()]
    found = _counts(pd.concat(tables, axis=1).reindex(columns=list(columns)).fillna(0.0), batch)
    uses = ours["vectors"].explode().value_counts()
    vectors = sorted(int(k) for k in uses.index[uses >= OFTEN * len(batch.tokens)])
    if vectors:
        found["vectors_in_at_least_100"] = Estimate(vectors)
        ids = batch.answers("a reproduction").unique()
        names = torch.isin(batch.tokens, ids).numpy()
        read = coordinates[coordinates["k"].isin(vectors) & (coordinates["pos"] >= 1)]
        length = read.groupby(["prompt", "pos"])["v"].agg(lambda v: float(np.sqrt((v**2).sum())))
        rows = length.rename("length").reset_index()
        is_name = pd.Series(names[rows["prompt"], rows["pos"]], rows.index)
        found["name_projection_auc"] = Estimate(auc(rows["length"], is_name))
        kind = is_name.map({True: "name_projection_mean", False: "other_projection_mean"})
        sums, weights = (_by_prompt(rows, kind, value, batch) for value in (rows["length"], 1.0))
        found |= _ratios(sums, weights, batch)
    return {f"head_9_9_end_to_IO/{name}": estimate for name, estimate in found.items()}


def slice_facts(model: Model, section: Mapping[str, Any]) -> Found:
    """The slices of one score on one prompt of the paper, whose last word is the answer."""
    prompt = encode(model, [section["prompt"].rsplit(" ", 1)[0]], bos=False)
    layer, head = map(int, READER.split("."))
    ran = run(model, prompt)
    place = (torch.tensor([x], device=model.device) for x in (layer, 0, head))
    ends = (torch.tensor([section[x]], device=model.device) for x in ("dest", "src"))
    pair = pairs_at(ran, *place, *ends)
    table = slice_table(slices(ran, pair))
    score = float(pair.score * model.divisor[layer])
    values = {"score_unscaled": score, "support": table.loc[table["chosen"], "k"].tolist()}
    return {f"slices_8_6_prompt_6/{name}": Estimate(value) for name, value in values.items()}


def spectrum_facts(model: Model) -> Found:
    """Singular values of Ω of every head, and their participation ratio."""
    table = head_table(head_svd(model)).set_index("name")
    table = table.rename(columns={"participation": "participation_ratio"})
    columns = table[["largest", "smallest", "condition", "participation_ratio"]].stack()
    return {
        f"plain_omega_singular_values/{name}/{what}": Estimate(float(value))
        for (name, what), value in columns.items()
    }


def graph_facts(graph: pd.DataFrame) -> Found:
    """The sizes of the graph, and the count and weight of every edge."""
    found = {f"graph/{name}": Estimate(size) for name, size in graph_sizes(graph).items()}
    for edge in graph.to_dict("records"):
        name = edge_name(*(edge[x] for x in GRAPH_EDGE))
        count = _estimate(edge["prompts"], edge["prompts_low"], edge["prompts_high"])
        weight = _estimate(edge["weight"], edge["low"], edge["high"])
        for section in ("edges_by_count", "edges_by_weight_count_ge_50"):
            found |= {f"{section}/{name}/count": count, f"{section}/{name}/weight": weight}
    return found


def effect_facts(singles: pd.DataFrame, batch: Batch) -> Found:
    """Mean changes by ablating single edges, over the prompts where their reader fires."""
    rows = singles[singles["control"] == "signal"]
    section = "single_edge_mean_change/"
    edge = section + rows["upstream"] + "->" + rows["downstream"] + "@" + rows["role"]
    found = {}
    for column, name in {"F_change": "logit_diff", "score_change": "score"}.items():
        fact = edge + "/" + rows["scope"] + "/" + name
        sums, weights = (_by_prompt(rows, fact, x, batch) for x in (rows[column], 1.0))
        found |= _ratios(sums, weights, batch)
    return found


def swept_facts(singles: pd.DataFrame, graph: pd.DataFrame) -> Found:
    """The summary of the sweep over single edges; its intervals resample edges."""
    section = "intervention_summary/"
    found = {f"{section}edges": Estimate(int(between(graph, SWEPT).sum()))}
    some = singles[(singles["prompt"] < SWEPT_PROMPTS) & between(singles, SWEPT)]
    if some.empty:
        return found
    some = some.assign(F_size=some["F_change"].abs())
    columns = ["F_change", "F_size", "score_change"]
    means = some.groupby([*GRAPH_EDGE, "scope", "control"])[columns].mean()
    table = means.rename_axis(columns="measure").stack().rename("value").reset_index()
    rows = sweep_facts(table.assign(mode="ablate"))
    return found | {section + x.fact: _estimate(x.value, x.low, x.high) for x in rows.itertuples()}


def joint_facts(sets: pd.DataFrame, section: Mapping[str, Any], batch: Batch) -> Found:
    """Mean changes of F by ablating sets of edges, over the prompts where a reader fires."""
    path, found = "multi_edge_mean_change_in_logit_diff", {}
    keys = {name.split(":")[0]: name for name in section}
    ends = {"first": "{}/0", "second": "{}/1", "together": "joint_{}"}
    pattern = sets["set"].map(ends)
    ends = [x.format(scope) for x, scope in zip(pattern, sets["scope"], strict=True)]
    fact = f"{path}/" + sets["key"].map(keys) + "/" + pd.Series(ends, sets.index, dtype=str)
    sums, weights = (_by_prompt(sets, fact, value, batch) for value in (sets["F_change"], 1.0))
    found |= _ratios(sums, weights, batch)
    both = sets[(sets["set"] == "together") & (sets["scope"] == "global")]
    fact = f"{path}/" + both["key"].map(keys) + "/prompts"
    return found | _counts(_by_prompt(both, fact, 1.0, batch), batch)


# --- all of it -----------------------------------------------------------------------------------


def measure(
    model: Model,
    batch: Batch,
    facts: Mapping[str, Any],
    *,
    folder: Path | None = None,
    say: Callable[[str], None] | None = None,
) -> tuple[Found, dict[str, str]]:
    """All that can be computed of the facts, and why the rest of a section has no value.

    With a folder, finished chunks of prompts are kept there, and a run that was cut off goes on
    after them. `say` is told what begins, and then there are progress bars. Raises TraceError where
    slices, contributions or attention weights do not add up, ValueError for rotary positions.
    """
    if model.rotary:
        raise ValueError(f"{model.name} has rotary positions: the published numbers are of GPT-2")
    batch, say, progress = released_roles(batch), say or (lambda _: None), say is not None
    chunks, roots = fitting_rows(model, batch), facts["setup"]["roots"]
    if folder:
        content = json.dumps([facts, templates_of(batch).tolist()])
        folder = folder / run_key(model, batch, (RELEASED, SWEPT_PROMPTS, chunks, content))
    heads = set(model.components.loc[model.components["kind"] == "head", "component"])

    def fire(rows: slice) -> dict[str, pd.DataFrame]:
        part = batch.rows(rows)
        ran, answers = run(model, part), logit_difference(model, part).cpu().numpy()
        tables = {"answers": pd.DataFrame({"difference": answers})}
        tables["firings"] = released_firings(ran, rows.start)
        if MOVER in heads:
            read = coordinate_table(ran, *map(int, MOVER.split(".")))
            tables["coordinates"] = read.assign(prompt=read["prompt"] + rows.start)
        return tables

    say("answers, firings and their slices")
    pieces = list(chunked(chunks, fire, folder=folder and folder / "firings", progress=progress))
    tables = {x: pd.concat([p[x] for p in pieces], ignore_index=True) for x in pieces[0]}
    firings = tables["firings"].rename_axis("firing").reset_index()
    found = setup_facts(batch, roots) | answer_facts(tables["answers"]["difference"], batch)
    found |= firing_facts(firings, heads, batch) | spectrum_facts(model)
    notes = {}
    if MOVER in heads:
        found |= mover_facts(firings, tables["coordinates"], batch)
    if READER in heads:
        try:
            found |= slice_facts(model, facts["slices_8_6_prompt_6"])
        except PromptError as error:
            notes["slices_8_6_prompt_6"] = str(error)
    fired = set(firings.loc[_from_end_to_io(firings, batch), "name"])
    firing_roots = released_roots([head for head in roots if head in fired])
    if not firing_roots:
        nothing = f"nothing to trace: none of {', '.join(roots)} fires from end to IO"
        return found, notes | dict.fromkeys(TRACED, nothing)
    say("the trace")
    place = folder and folder / "trace"
    traced = trace_prompts(model, batch, firing_roots, RELEASED, folder=place, progress=progress)
    graph = released_graph(traced, templates_of(batch))
    found |= graph_facts(graph)
    edges = edges_on_firings(graph, firings[firings["score"] >= 0], batch)
    everything = replace(traced, firings=firings, edges=edges)
    say("interventions")
    singles, sets = _effects(everything, facts, chunks, folder, progress)
    found |= effect_facts(singles, batch) | swept_facts(singles, graph)
    return found | joint_facts(sets, facts["multi_edge_mean_change_in_logit_diff"], batch), notes


def _effects(
    traced: Trace,
    facts: Mapping[str, Any],
    chunks: Sequence[slice],
    folder: Path | None,
    progress: bool,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`released_effects` on all prompts; the sweep, with random vectors, on the first ones."""
    edges = traced.edges
    names = edges["upstream"] + "->" + edges["downstream"] + "@" + edges["role"]
    single = names.isin([item["edge"] for item in facts["single_edge_mean_change"]])
    swept = between(edges, SWEPT) & (edges["prompt"] < SWEPT_PROMPTS)

    def work(rows: slice) -> dict[str, pd.DataFrame]:
        return dict(zip(("singles", "sets"), released_effects(traced, rows, single | swept, swept),
                        strict=True))  # fmt: skip

    place = folder and folder / "effects"
    pieces = list(chunked(chunks, work, folder=place, progress=progress))
    singles, sets = (
        pd.concat([piece[name] for piece in pieces], ignore_index=True)
        for name in ("singles", "sets")
    )
    return singles, sets


# --- side by side --------------------------------------------------------------------------------


def difference(computed: Any, published: Any) -> float:
    """Computed − published; of lists, how many items are in one of the two alone; of text, 0 or 1.

    >>> difference(3.5, 3.0), difference([1, 2], [2, 3]), difference("a", "a")
    (0.5, 2.0, 0.0)
    """
    if isinstance(published, list):
        return float(len({*computed} ^ {*published}))
    if is_number(published):
        return float(computed - published)
    return float(computed != published)


def side_by_side(facts: Mapping[str, Any], found: Found, notes: Mapping[str, str]) -> pd.DataFrame:
    """Every leaf of the facts file, one row each, in its order.

    Columns: fact, computed, low, high, published, difference, tolerance, verdict ("agrees",
    "differs", "undefined", "not computed"), note (why nothing is compared), how, basis (of the
    tolerance), why (it may differ). computed and published are JSON. Raises ValueError for a
    value that is not finite.
    """
    rows = []
    for entry in catalogue(facts):
        row = {"fact": entry.fact, "published": json.dumps(entry.published, ensure_ascii=False)}
        if isinstance(entry, Uncomputed):
            rows.append(row | {"verdict": "not computed", "note": entry.reason})
            continue
        row |= {"tolerance": entry.tolerance.size, "basis": entry.tolerance.basis}
        row |= {"how": entry.how, "why": entry.why}
        if entry.fact not in found:
            told = [note for start, note in notes.items() if entry.fact.startswith(start)]
            nothing = "no such head, firing or edge in this model on these prompts"
            rows.append(row | {"verdict": "undefined", "note": told[0] if told else nothing})
            continue
        ours = found[entry.fact]
        gap = difference(ours.value, entry.published)
        if not np.isfinite(gap):
            raise ValueError(f"{entry.fact} is {ours.value}: no result that can be compared")
        verdict = "agrees" if abs(gap) <= entry.tolerance.size + 1e-12 else "differs"
        computed = json.dumps(ours.value, ensure_ascii=False)
        row |= {"computed": computed, "low": ours.low, "high": ours.high}
        rows.append(row | {"difference": gap, "verdict": verdict})
    columns = ["fact", "computed", "low", "high", "published", "difference", "tolerance",
               "verdict", "note", "how", "basis", "why"]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)
