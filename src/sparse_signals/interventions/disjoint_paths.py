"""Chapter 5: how many ways lead from the embeddings to a root, and how much goes through them.

In the graph of a trace an edge leads from what a component wrote at a token to one side of a
firing, and a firing is what its head wrote at the destination. Paths that share no edge can be cut
only one by one; the smallest cut says how much.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import networkx as nx
import numpy as np
import pandas as pd

from sparse_signals.core.prompts import token_roles
from sparse_signals.tracing.trace import Trace

EMBEDDINGS = ("embedding", "position")
SOURCE = "embeddings"
UNITS = 10**6  # capacities are whole numbers of these: flows of floats may not terminate
LENGTHS = 10**9  # lengths likewise: sums of floats may tell equal paths apart by their last bit
OF_ROOT = ["prompt", "name", "dest", "src"]


def flow_graph(edges: pd.DataFrame, ends: Sequence[str] | None = EMBEDDINGS) -> nx.DiGraph:
    """The graph of the edges of one prompt, from `SOURCE` to ("firing", number).

    Paths may begin at the components `ends`, or (None) wherever the trace ends: there, and at MLPs,
    biases and heads that did not fire. Edges of the trace have capacity
    (their share of the side, in `UNITS`), single (1) and edge (their label in the table). Other
    links, of a firing with its sides and with what its head wrote, have none of these: they can
    carry anything.
    """
    graph, fired = nx.DiGraph(), set(zip(edges["downstream"], edges["dest"], strict=True))
    for label, row in edges.iterrows():
        side = ("side", row["firing"], row["side"])
        written = ("written", row["upstream"], row["token"])
        share = max(1, round(row["share"] * UNITS))
        graph.add_edge(written, side, capacity=share, single=1, edge=label)
        graph.add_edge(side, ("firing", row["firing"]))
        graph.add_edge(("firing", row["firing"]), ("written", row["downstream"], row["dest"]))
        if written[1:] not in fired if ends is None else row["upstream"] in ends:
            graph.add_edge(SOURCE, written)
    return graph


def disjoint_paths(traced: Trace, ends: Sequence[str] | None = EMBEDDINGS) -> pd.DataFrame:
    """Paths from the embeddings to every root firing: how many, and how much they carry.

    One row a root firing: prompt, name, dest, src, paths (the most that share no edge, Menger),
    flow (the most that can flow if each edge carries its share, equal to the smallest cut; each
    side of the root takes at most 1) and cut (edges in that cut). `ends` as in `flow_graph`.
    """
    rows = []
    for firing, graph in _root_graphs(traced, ends):
        sink = ("firing", firing["firing"])
        paths = nx.maximum_flow_value(graph, SOURCE, sink, capacity="single")
        _, (near, _) = nx.minimum_cut(graph, SOURCE, sink)
        cut = [(a, b) for a, b in graph.edges if a in near and b not in near]
        flow = sum(graph.edges[link]["capacity"] for link in cut) / UNITS
        rows.append([*(firing[name] for name in OF_ROOT), paths, flow, len(cut)])
    return pd.DataFrame(rows, columns=[*OF_ROOT, "paths", "flow", "cut"])


def _root_graphs(
    traced: Trace, ends: Sequence[str] | None
) -> Iterator[tuple[pd.Series, nx.DiGraph]]:
    """Every root firing with the graph of its prompt, in which source and firing are nodes."""
    roots = traced.firings[traced.firings["root"]]
    graphs = {key: flow_graph(edges, ends) for key, edges in traced.edges.groupby("prompt")}
    for _, firing in roots.iterrows():
        graph = graphs.get(firing["prompt"], nx.DiGraph())
        graph.add_nodes_from([SOURCE, ("firing", firing["firing"])])
        yield firing, graph


def best_paths(
    traced: Trace, side: str | None = None, ends: Sequence[str] | None = EMBEDDINGS
) -> pd.DataFrame:
    """The path to every root firing whose shares have the largest product.

    Of paths with the same shares it is the first in the trace. With `side`, only paths that arrive
    at that side of the root; `ends` as in `flow_graph`. One row an edge: the columns of the trace,
    root (the firing), step (0 for the edge into the root, then upstream), path (in words,
    destination first) and product. Roots without a path have no row.
    """
    parts = [traced.edges.iloc[:0].assign(root=0, step=0, path="", product=0.0)]
    for firing, graph in _root_graphs(traced, ends):
        sink = ("firing", firing["firing"]) if side is None else ("side", firing["firing"], side)
        labels = _best(graph, sink)
        if labels:
            edges = traced.edges.loc[labels]
            names = [firing["name"], *edges["upstream"]]
            facts = {"root": firing["firing"], "step": range(len(edges))}
            facts |= {"path": " ← ".join(names), "product": edges["share"].prod()}
            parts.append(edges.assign(**facts))
    return pd.concat(parts, ignore_index=True)


def _best(graph: nx.DiGraph, sink: Hashable) -> list[Hashable]:
    """Labels of the edges on the best path, from the sink upstream: shortest by Σ −log share."""

    def length(a: Hashable, b: Hashable, link: dict) -> int:
        return round(-LENGTHS * np.log(link["capacity"] / UNITS)) if "capacity" in link else 0

    if sink not in graph or not nx.has_path(graph, SOURCE, sink):
        return []
    # a share may exceed 1, where others are negative: its length is then negative
    nodes = nx.bellman_ford_path(graph, SOURCE, sink, weight=length)
    links = [graph.edges[link] for link in pairwise(nodes)]
    return [link["edge"] for link in reversed(links) if "edge" in link]


def pool_trace(traced: Trace) -> Trace:
    """All prompts of a trace as one, with roles in the place of tokens.

    Firings of a head between the same roles are one. The share of an edge is its mean over the
    prompts, 0 where it is not there. A role is a token's set of roles.
    """
    roles = np.array(token_roles(traced.batch))

    def named(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
        found = {name: roles[table["prompt"], table[name]] for name in columns}
        return table.assign(**found)

    firings = named(traced.firings, "dest", "src")
    who = ["name", "dest", "src"]
    number = firings.groupby(who).ngroup()
    pooled = firings.groupby(number).agg(dict.fromkeys(who, "first") | {"root": "any"})
    pooled = pooled.rename_axis("firing").reset_index().assign(prompt=0)
    edges = named(traced.edges, "dest", "src", "token")
    edges["firing"] = edges["firing"].map(dict(zip(firings["firing"], number, strict=True)))
    names = ["firing", "upstream", "downstream", "side", "dest", "src", "token"]
    grouped = edges.groupby(names, as_index=False).agg(
        prompts=("prompt", "nunique"), share=("share", "sum"), weight=("weight", "sum")
    )
    for column in ("share", "weight"):
        grouped[column] /= len(traced.batch.tokens)
    return replace(traced, firings=pooled, edges=grouped.assign(prompt=0))
