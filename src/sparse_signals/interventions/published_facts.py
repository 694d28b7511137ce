"""The published numbers for GPT-2 small: how each is computed, and how far off it may be.

The facts file holds them. `catalogue` says of every leaf of it how it is computed, how far apart
computed and published numbers may be and why, or why it is not computed; `side_by_side` compares
with what `reproduction.measure` found.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from sparse_signals.core.numbers import is_number
from sparse_signals.interventions.released import GRAPH_EDGE, SWEPT_PROMPTS

TIMES = 1.96 * np.sqrt(2)  # 95 % of the differences between two samples, in standard errors
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
class Comparison:
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
OF_WEIGHTS = (
    "only rounding can differ, or another checkpoint; Ω has its bias row and column, as in the "
    "released code"
)
PROJECTED = f"{OTHER_PROMPTS}; which tokens were averaged is not said, here it is all but the first"
SAME_PROMPT = "the same prompt: only rounding can differ, or another checkpoint"
CHOSEN = "a setting"
RELEASED_GRAPH = "released_graph of a trace with released.RELEASED and released.QUIRKS"
INTERVENED = (
    f"{OTHER_PROMPTS}; means are over prompts where a reader fires, as in the released plots; "
    "where several readers are changed locally, the released code computes all their inputs from "
    "the clean run"
)
FACT_RULES = (
    Comparison("setup/prompts", "len(batch.tokens)", _equal, CHOSEN),
    Comparison("setup/bos", "encode(…, bos=False)", _equal, CHOSEN),
    Comparison("setup/(firing|support|contribution)_.*", "released.RELEASED", _equal, CHOSEN),
    Comparison("setup/root.*", "released_roots", _equal, CHOSEN),
    Comparison("setup/mean_end_position", "Batch.last", _rounded, OTHER_PROMPTS),
    Comparison("setup/(distinct_.*|abba|baba)", "Batch.tokens, Batch.roles", _equal, OTHER_PROMPTS),
    Comparison("logit_diff/mean", "logit_difference", _of_spread(1.0), OTHER_PROMPTS),
    Comparison("logit_diff/sd", "logit_difference", _of_spread(0.5**0.5), OTHER_PROMPTS),
    Comparison("logit_diff/median", "logit_difference", _of_spread(1.2533), OTHER_PROMPTS),
    Comparison("logit_diff/m(in|ax)", "logit_difference", _of_extreme, OTHER_PROMPTS),
    Comparison("logit_diff/share_positive", "logit_difference", _of_share, OTHER_PROMPTS),
    Comparison(
        "firings_ioi/.*", "released_firings, any sign of the score", _of_events, OTHER_PROMPTS
    ),
    Comparison(
        "support_size_mean_ioi/.*", "released_firings, signals.support", _of_mean, OTHER_PROMPTS
    ),
    Comparison("nfiring_heads/.*", "released_firings, score ≥ 0", _of_events, OTHER_PROMPTS),
    Comparison("root_prompts/.*", "released_firings from end to IO", _of_count, OTHER_PROMPTS),
    Comparison(
        "head_9_9_end_to_IO/firings", "released_firings from end to IO", _of_count, OTHER_PROMPTS
    ),
    Comparison(
        "head_9_9_end_to_IO/support_total", "signals.support, summed", _of_mean, OTHER_PROMPTS
    ),
    Comparison(
        "head_9_9_end_to_IO/vectors_in_at_least_100",
        "signals.support",
        _of_vectors,
        f"{OTHER_PROMPTS}; vectors with nearly equal σ may change places",
    ),
    Comparison(
        "head_9_9_end_to_IO/name_projection_auc",
        "‖P_V x̃‖ of all tokens but the first, stats.auc",
        _of_auc,
        PROJECTED,
    ),
    Comparison(
        "head_9_9_end_to_IO/(name|other)_projection_mean",
        "‖P_V x̃‖ of all tokens but the first",
        _of_mean,
        PROJECTED,
    ),
    Comparison("slices_8_6_prompt_6/score_unscaled", "slices × √r", _of_weights, SAME_PROMPT),
    Comparison(
        "slices_8_6_prompt_6/support",
        "signals.support",
        _equal,
        f"{SAME_PROMPT}; vectors with nearly equal σ may change places",
    ),
    Comparison("plain_omega_singular_values/.*", "svd.head_table", _of_weights, OF_WEIGHTS),
    Comparison(
        "graph/(nodes|edges|contribution_edges|heads)",
        f"{RELEASED_GRAPH}; graph_sizes",
        _of_mean,
        OTHER_GRAPH,
    ),
    Comparison("edges_by_.*/count", RELEASED_GRAPH, _of_count, OTHER_GRAPH),
    Comparison("edges_by_.*/weight", RELEASED_GRAPH, _of_fifth, OTHER_GRAPH),
    Comparison(
        "multi_edge_mean_change_in_logit_diff/.*/prompts", "released_effects", _of_count, INTERVENED
    ),
    Comparison(
        "multi_edge_mean_change_in_logit_diff/.*(global|local)(/.)?",
        "released_effects, F_change",
        _of_effect,
        INTERVENED,
    ),
    Comparison(
        "single_edge_mean_change/.*/logit_diff",
        "released_effects, F_change",
        _of_effect,
        OTHER_GRAPH,
    ),
    Comparison(
        "single_edge_mean_change/.*/score",
        "released_effects, score_change",
        _of_effect,
        OTHER_GRAPH,
    ),
    Comparison(
        "intervention_summary/edges", "edges of the graph in released.SWEPT", _of_mean, OTHER_GRAPH
    ),
    Comparison(
        "intervention_summary/share_.*",
        f"released_effects on the first {SWEPT_PROMPTS} prompts, sweep_facts",
        _of_edge_share,
        OTHER_GRAPH,
    ),
    Comparison(
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
