"""The experiments of Franco and Crovella 2024 as their released code does them, for comparison.

Roles, graph and interventions follow the code that was released with the paper, its quirks
included, so that what is left of a difference is not this package's own way. The edges of the
graph are told apart by upstream head, downstream head and role of the receiving token.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn.functional import pad

from sparse_signals.core.model import Model
from sparse_signals.core.prompts import OTHER, Batch, roles_of
from sparse_signals.core.run import Run, run
from sparse_signals.heads.svd import head_svd
from sparse_signals.interventions.changes import clean_run
from sparse_signals.interventions.edge_signals import (
    Signals,
    by_reader,
    column,
    random_signals,
    read_signals,
)
from sparse_signals.interventions.intervene import intervene_on
from sparse_signals.signals.firings import strongest_sources
from sparse_signals.signals.slices import slices, support
from sparse_signals.tracing.circuit import Quirks, pool
from sparse_signals.tracing.contributions import SIDES, Settings
from sparse_signals.tracing.roots import Root
from sparse_signals.tracing.trace import Trace, check_attention, check_sums, index_lists

RELEASED = replace(Settings.published(), bias_per_head=True)
QUIRKS = Quirks(double_count=True, first_writer=True, last_role=True)
GRAPH_EDGE = ["upstream", "downstream", "role"]
CHANGED = ["F_change", "score_change"]
NOWHERE = -1  # the position of a role that a prompt has not
Ends = tuple[str | None, str | None, str | None]  # upstream, downstream, role; None: any
# The published experiments with several edges: two sets each, ablated alone and together.
EXPERIMENT_SETS: dict[str, tuple[Sequence[Ends], Sequence[Ends]]] = {
    "A": ([("8.6", "9.9", "end")], [("8.6", "10.0", "end")]),
    "B": (
        [("7.9", "8.6", "end"), ("7.9", "9.9", "end")],
        [("7.3", "8.6", "end"), ("7.3", "9.9", "end")],
    ),
    "E": ([(None, "9.9", "end")], [(None, "9.9", "IO")]),
    "F": ([(None, "9.6", "end")], [(None, "9.6", "IO")]),
    "J": ([("7.9", None, None)], [("7.3", None, None)]),
    "K": ([("0.11", None, None)], [("0.9", None, None)]),
}
# The published sweep over single edges: all into these readers, and all out of one writer.
SWEPT: Sequence[Ends] = [
    *((None, head, role) for head in ("9.6", "9.9", "10.0") for role in ("end", "IO")),
    (None, "8.6", "S2"),
    (None, "8.6", "end"),
    ("0.9", None, None),
]
SWEPT_PROMPTS = 32  # of which all swept edges are ablated: the dearest part by far


# --- roles, firings, graph -----------------------------------------------------------------------


def released_roles(batch: Batch) -> Batch:
    """The prompts with the roles of the released code, in its order: the last of a token counts.

    IO, S1, S2 and the tokens beside them, end and the token before it, starts, punct (the last full
    stop, or else the last comma) and verb (the last "gave" or "give", or else the token after S2).
    """
    roles = {}
    for name in ("IO", "S1", "S2"):
        roles |= {f"{name}{step}": batch.roles[name] + int(step or 0) for step in ("", "-1", "+1")}
    stop, comma = _last_of(batch, {"."}), _last_of(batch, {","})
    verb = _last_of(batch, {" gave", " give"})
    roles |= {"end": batch.last, "end-1": batch.last - 1, "starts": torch.zeros_like(batch.last)}
    roles["punct"] = torch.where(stop == NOWHERE, comma, stop)
    roles["verb"] = torch.where(verb == NOWHERE, batch.roles["S2"] + 1, verb)
    return replace(batch, roles=roles)


def _last_of(batch: Batch, words: set[str]) -> Int[Tensor, "prompt"]:
    places = [[n for n, x in enumerate(labels) if x in words] for labels in batch.labels]
    return torch.tensor([found[-1] if found else NOWHERE for found in places])


def released_firings(ran: Run, first_prompt: int = 0) -> pd.DataFrame:
    """All pairs with attention of at least a half, j ≥ 1, as the released figures count them.

    Their scores may be negative, and then the head does not fire in the released trace. Columns:
    those of `Pairs.table`, size and vectors (of the support). Raises TraceError where the slices
    or the attention weights do not add up.
    """
    check_attention(ran)
    pairs = strongest_sources(ran)  # a token has one source with more than half of its attention
    pairs = pairs[pairs.attention >= 0.5]
    parts = slices(ran, pairs)
    error = (parts.sum(-1) - pairs.score).abs() / parts.abs().sum(-1)
    check_sums(ran.model, error, "slices")
    chosen, table = support(parts), pairs.table()
    table["prompt"] += first_prompt
    table["size"] = chosen.sum(-1).cpu().numpy()
    table["vectors"] = pd.Series(index_lists(chosen), table.index)
    return table


def released_graph(traced: Trace, clusters: ArrayLike) -> pd.DataFrame:
    """The pooled edges of a trace with `RELEASED`, on prompts with `released_roles`.

    Edges into a token without a role are left out. Columns as in `Circuit.edges`; `prompts` counts
    an edge once for every path, so that it may exceed their number.
    """
    edges = pool(traced.edges, traced.batch, QUIRKS, clusters=clusters)
    return edges[edges["role"] != OTHER].reset_index(drop=True)


def graph_sizes(graph: pd.DataFrame) -> dict[str, int]:
    """Nodes and edges as the released graph has them.

    Its nodes are heads and, for every reader, the head at a receiving token; an edge goes from each
    of the latter to its head, besides those that stand for contributions.
    """
    inputs = len(graph[["downstream", "role"]].drop_duplicates())
    heads = len({*graph["upstream"], *graph["downstream"]})
    return {
        "nodes": heads + inputs,
        "edges": len(graph) + inputs,
        "contribution_edges": len(graph),
        "heads": heads,
    }


def between(graph: pd.DataFrame, ends: Sequence[Ends]) -> pd.Series:
    """Which edges of the graph have one of these ends."""
    found = pd.Series(False, index=graph.index)
    for each in ends:
        match = ~found
        for name, value in zip(GRAPH_EDGE, each, strict=True):
            match &= (graph[name] == value) | (value is None)
        found |= match
    return found


# --- interventions -------------------------------------------------------------------------------


def edges_on_firings(graph: pd.DataFrame, firings: pd.DataFrame, batch: Batch) -> pd.DataFrame:
    """Every edge of the graph on every firing of its reader at its two roles, traced or not.

    Columns as in `Trace.edges`, and role. The weight is not known there.
    """
    found, roles = firings.rename(columns={"name": "downstream"}), roles_of(batch)
    for end in ("dest", "src"):
        names = roles.rename(columns={"pos": end, "role": f"{end}_role"})
        found = found.merge(names[names[f"{end}_role"] != OTHER], on=["prompt", end])
    ends = ["downstream", "dest_role", "src_role"]
    found = found.merge(graph[[*ends, "upstream", "side", "role"]], on=ends)
    token = found["dest"].where(found["side"] == SIDES[0], found["src"])
    columns = ["firing", "prompt", "upstream", "kind", "downstream", "layer", "head", "side",
               "dest", "src", "token", "weight", "role"]  # fmt: skip
    found = found.assign(kind="head", weight=np.nan, token=token)[columns]
    return found.sort_values(["prompt", *GRAPH_EDGE, "firing"], ignore_index=True)


def released_signals(model: Model, signals: Signals) -> Signals:
    """The signals with the δ of the released code.

    δ is the part in the residual stream of U_S U_Sᵀ [x_a ; 1] (source: V_S V_Sᵀ), so that the
    constant, which no component wrote, goes in once an edge. For models without rotation.
    """
    svd = head_svd(model)
    vectors = torch.cat([svd.U, svd.V], dim=1)
    layer = column(signals.edges, "layer", signals.reader.device)
    x = pad(signals.written.double(), (0, 1), value=1.0)
    inside = by_reader(x, vectors, layer, signals.reader) * signals.chosen
    delta = by_reader(inside, vectors.mT, layer, signals.reader)[:, :-1]
    return replace(signals, delta=delta.to(signals.written.dtype))


def released_effects(
    traced: Trace, rows: slice, alone: pd.Series, with_random: pd.Series
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What the published ablations do on some of the prompts of a trace.

    `traced` holds all firings and `edges_on_firings`. `alone`: which of these edges are ablated one
    at a time, `with_random`: which of them with as many other singular vectors beside that, not
    scaled. First table: prompt, the edge, scope, control, changes of F and of the score. Second
    one, the experiments with sets of edges: prompt, key, set ("first", "second", "together"),
    scope, F_change; prompts without an edge of the set are left out.
    """
    batch = traced.batch.rows(rows)
    here = traced.edges["prompt"].between(rows.start, rows.stop - 1)
    edges = traced.edges[here].assign(prompt=traced.edges.loc[here, "prompt"] - rows.start)
    edges = edges.reset_index(drop=True)
    clean = clean_run(traced.model, batch)
    read = read_signals(replace(traced, batch=batch), edges, run(traced.model, batch))
    signals = released_signals(traced.model, read)
    how = {"modes": ["ablate"], "patch_qkv": True}
    one, noisy = (
        torch.tensor(x[here].to_numpy(bool), device=signals.reader.device)
        for x in (alone, alone & with_random)
    )
    tables = [
        intervene_on(clean, some, **how)
        for some in (signals[one], released_signals(traced.model, random_signals(read[noisy])))
        if len(some)
    ]
    columns = ["prompt", *GRAPH_EDGE, "scope", "control", *CHANGED]
    singles = pd.concat([pd.DataFrame(columns=[*columns, "edge"]), *tables])
    singles = singles.assign(role=edges["role"].reindex(singles["edge"]).to_numpy())[columns]
    singles = singles.astype(dict.fromkeys(CHANGED, float))  # of an empty table they are objects
    members, names = _members(edges)
    which = torch.tensor(members["edge"].to_numpy("int64"), device=signals.reader.device)
    number = names.get_indexer(pd.MultiIndex.from_frame(members[names.names]))
    if len(members):
        found = intervene_on(clean, signals[which], torch.tensor(number), **how)
        found = found.drop_duplicates(["row", "scope"])[["row", "scope", "F_change"]]
    else:
        found = pd.DataFrame({"row": [], "scope": [], "F_change": []}).astype({"row": int})
    sets = names.to_frame(index=False).iloc[found["row"]].reset_index(drop=True)
    sets = sets.join(found[["scope", "F_change"]].reset_index(drop=True))
    for table in (singles, sets):
        table["prompt"] = table["prompt"].astype(int) + rows.start
    return singles.reset_index(drop=True), sets


def _members(edges: pd.DataFrame) -> tuple[pd.DataFrame, pd.MultiIndex]:
    """Which edges each experiment ablates in each prompt: key, set, prompt, edge; and the rows."""
    tables = []
    for key, (first, second) in EXPERIMENT_SETS.items():
        for name, ends in {"first": first, "second": second, "together": [*first, *second]}.items():
            own = edges.loc[between(edges, ends), ["prompt"]].rename_axis("edge").reset_index()
            tables.append(own.assign(key=key, set=name))
    members = pd.concat(tables, ignore_index=True)
    names = ["key", "set", "prompt"]
    return members, pd.MultiIndex.from_frame(members[names].drop_duplicates())


def released_roots(heads: Sequence[str]) -> list[Root]:
    """The published roots, heads that look from end to IO, by their names."""
    places = (map(int, name.split(".")) for name in heads)
    return [Root(layer, head, "end", "IO") for layer, head in places]
