"""Every published number for GPT-2 small, computed again in the way of the released code.

`published_facts` says what is computed and compares. Averages over prompts, and counts, come with
intervals over templates.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from sparse_signals.core.forward import logit_difference
from sparse_signals.core.model import Model
from sparse_signals.core.prompts import Batch, PromptError, encode
from sparse_signals.core.resume import chunked, run_key
from sparse_signals.core.run import fitting_rows, run
from sparse_signals.core.stats import auc, bootstrap
from sparse_signals.heads.spectra import coordinate_table
from sparse_signals.heads.svd import head_svd, head_table
from sparse_signals.interventions.case import templates_of
from sparse_signals.interventions.published import sweep_facts
from sparse_signals.interventions.published_facts import Estimate, Found, edge_name
from sparse_signals.interventions.released import (
    GRAPH_EDGE,
    RELEASED,
    SWEPT,
    SWEPT_PROMPTS,
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
MOVER, READER = "9.9", "8.6"  # heads that the facts file has sections of
OFTEN = 100 / PROMPTS  # what "in at least 100 firings" is of the prompts
TRACED = ("graph", "edges_by", "multi_edge", "single_edge", "intervention_summary")  # sections


# --- what is computed, section by section --------------------------------------------------------


def _ratios(sums: pd.DataFrame, weights: pd.DataFrame | None, batch: Batch) -> Found:
    """Σ sums / Σ weights of every column (a fact), a row a prompt; only what is defined."""
    given = None if weights is None else weights.to_numpy(float)
    found = bootstrap(sums.astype(float), templates_of(batch), given).dropna(subset="value")
    return _estimates(found["measure"], found)


def _estimates(facts: pd.Series, rows: pd.DataFrame) -> Found:
    """The estimate of every row, by its fact."""
    columns = zip(facts, rows["value"], rows["low"], rows["high"], strict=True)
    return {fact: _estimate(*numbers) for fact, *numbers in columns}


def _estimate(value: Any, low: float, high: float) -> Estimate:
    """With the interval, if it is one: what occurs in one template alone has none."""
    return Estimate(value, low, high) if low < high else Estimate(value)


def _tallies(counts: pd.DataFrame, batch: Batch) -> Found:
    """The sum of every column over as many prompts as there are."""
    n = len(batch.tokens)
    return {
        fact: Estimate(round(n * x.value), n * x.low, n * x.high)
        for fact, x in _ratios(counts, None, batch).items()
    }


def _within_prompts(rows: pd.DataFrame, fact: pd.Series, value: Any, batch: Batch) -> pd.DataFrame:
    """Σ value of the rows of every prompt (also of those without any) and fact."""
    table = pd.DataFrame({"prompt": rows["prompt"], "fact": fact, "value": value})
    sums = table.astype({"value": float}).groupby(["prompt", "fact"])["value"].sum()
    wide = sums.unstack(fill_value=0)
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
        counts = _within_prompts(rows, rows["name"], 1.0, batch).reindex(columns=sorted(heads))
        found |= _tallies(counts.fillna(0.0).add_prefix(f"{section}/"), batch)
    section = "support_size_mean_ioi/"
    sums, weights = (
        _within_prompts(firings, section + firings["name"], value, batch)
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
    tables = [_within_prompts(ours, pd.Series(x, ours.index), y, batch) for x, y in columns.items()]
    found = _tallies(pd.concat(tables, axis=1).reindex(columns=list(columns)).fillna(0.0), batch)
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
        sums, weights = (
            _within_prompts(rows, kind, value, batch) for value in (rows["length"], 1.0)
        )
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
    columns = table[["largest", "smallest", "condition", "participation_ratio"]]
    return {
        f"plain_omega_singular_values/{name}/{what}": Estimate(float(value))
        for name, row in columns.to_dict("index").items()
        for what, value in row.items()
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
        sums, weights = (_within_prompts(rows, fact, x, batch) for x in (rows[column], 1.0))
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
    values = means.rename_axis(columns="measure").stack()
    table = values.rename("value").reset_index()  # pyright: ignore[reportArgumentType]
    rows = sweep_facts(table.assign(mode="ablate"))
    return found | _estimates(section + rows["fact"], rows)


def joint_facts(sets: pd.DataFrame, section: Mapping[str, Any], batch: Batch) -> Found:
    """Mean changes of F by ablating sets of edges, over the prompts where a reader fires."""
    path, found = "multi_edge_mean_change_in_logit_diff", {}
    keys = {name.split(":")[0]: name for name in section}
    ends = {"first": "{}/0", "second": "{}/1", "together": "joint_{}"}
    pattern = sets["set"].map(ends)
    ends = [x.format(scope) for x, scope in zip(pattern, sets["scope"], strict=True)]
    fact = f"{path}/" + sets["key"].map(keys) + "/" + pd.Series(ends, sets.index, dtype=str)
    sums, weights = (_within_prompts(sets, fact, value, batch) for value in (sets["F_change"], 1.0))
    found |= _ratios(sums, weights, batch)
    both = sets[(sets["set"] == "together") & (sets["scope"] == "global")]
    fact = f"{path}/" + both["key"].map(keys) + "/prompts"
    return found | _tallies(_within_prompts(both, fact, 1.0, batch), batch)


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
    notes: dict[str, str] = {}
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
