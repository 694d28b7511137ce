"""Chapter 5: the path from the embeddings to a root whose shares have the largest product.

In the graph of a trace an edge leads from what a component wrote at a token to one side of a
firing, and a firing is what its head wrote at the destination. Shares of scores are not conserved
on the way through a head, so the product orders paths, and says no more.
"""

from collections.abc import Hashable, Iterator, Sequence
from itertools import pairwise

import networkx as nx
import numpy as np
import pandas as pd

from sparse_signals.tracing.trace import Trace

EMBEDDINGS = ("embedding", "position")
SOURCE = "embeddings"
UNITS = 10**6  # shares are whole numbers of these, at least one
LENGTHS = 10**9  # whole numbers too: sums of floats may differ between equal paths


def path_graph(edges: pd.DataFrame, ends: Sequence[str] | None = EMBEDDINGS) -> nx.DiGraph:
    """The graph of the edges of one prompt, from `SOURCE` to ("firing", number).

    Paths may begin at the components `ends`, or (None) wherever the trace ends: there, and at MLPs,
    biases and heads that did not fire. Edges of the trace have share (in `UNITS`) and edge (their
    label in the table). Other links, of a firing with its sides and with what its head wrote, have
    neither.
    """
    graph, fired = nx.DiGraph(), set(zip(edges["downstream"], edges["dest"], strict=True))
    for label, row in edges.iterrows():
        side = ("side", row["firing"], row["side"])
        written = ("written", row["upstream"], row["token"])
        share = max(1, round(row["share"] * UNITS))
        graph.add_edge(written, side, share=share, edge=label)
        graph.add_edge(side, ("firing", row["firing"]))
        graph.add_edge(("firing", row["firing"]), ("written", row["downstream"], row["dest"]))
        if written[1:] not in fired if ends is None else row["upstream"] in ends:
            graph.add_edge(SOURCE, written)
    return graph


def _root_graphs(
    traced: Trace, ends: Sequence[str] | None
) -> Iterator[tuple[pd.Series, nx.DiGraph]]:
    """Every root firing with the graph of its prompt, in which source and firing are nodes."""
    roots = traced.firings[traced.firings["root"]]
    graphs = {key: path_graph(edges, ends) for key, edges in traced.edges.groupby("prompt")}
    for _, firing in roots.iterrows():
        graph = graphs.get(firing["prompt"], nx.DiGraph())
        graph.add_nodes_from([SOURCE, ("firing", firing["firing"])])
        yield firing, graph


def best_paths(
    traced: Trace, side: str | None = None, ends: Sequence[str] | None = EMBEDDINGS
) -> pd.DataFrame:
    """The path to every root firing whose shares have the largest product.

    Of paths with the same shares it is the first in the trace. With `side`, only paths that arrive
    at that side of the root; `ends` as in `path_graph`. One row an edge: the columns of the trace,
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
        return round(-LENGTHS * np.log(link["share"] / UNITS)) if "share" in link else 0

    if sink not in graph or not nx.has_path(graph, SOURCE, sink):
        return []
    # a share may exceed 1, where others are negative: its length is then negative
    nodes = nx.bellman_ford_path(graph, SOURCE, sink, weight=length)
    links = [graph.edges[link] for link in pairwise(nodes)]
    return [link["edge"] for link in reversed(links) if "edge" in link]
