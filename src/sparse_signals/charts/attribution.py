"""Charts of traces from the answer: the graph of what made it differ, and which tokens it is."""

import math
from collections.abc import Sequence

import altair as alt
import numpy as np
import pandas as pd

from sparse_signals.charts.graph import ANSWER_NODE, Kinds, Slider, draw, largest_edge, named_nodes
from sparse_signals.charts.style import distinct, tooltips
from sparse_signals.core.numbers import signed_percent

CHANNEL_KINDS = Kinds(
    "channel",
    "arrives as",
    {"query": [6, 2], "key": [2, 2], "value": [1, 0], "MLP": [8, 2, 2, 2], "direct": [12, 3]},
    ("MLP", "direct"),
    "size",
    "share of the difference",
    "Colour and dashes tell what an edge changes in its reader: the query, key or value of a head, "
    "the input of an MLP, or the answer directly. Its thickness is its share of the difference "
    "between the two answers.",
    reader="component",
)
SHARE_UNIT = "% of the difference"
SIGNED_SHARE = alt.Tooltip("share:Q", format="+.1%", title="share of the difference")
STEPS = 100  # of the slider, about
NAMED_WRITERS = 3
MOST_NODES = 40  # about as many as can be told apart


def answer_graph(edges: pd.DataFrame, order: Sequence[str] = ()) -> alt.TopLevelMixin:
    """The edges that made the answer differ, pooled over prompts: columns are token roles.

    `edges`: upstream, role, channel ("query", "key", "value", "MLP", "direct"), downstream,
    dest_role, up_layer, down_layer, prompts, of, value, share, low, high; one row per edge. Roles
    are columns in this `order`, those that it lacks first. A slider prunes edges of small |share|.
    Raises ValueError when there are no edges.
    """
    table = named_answer_edges(edges)
    found = distinct([*table["at"], *table["dest"]])
    known = [role for role in order if role in found]
    columns = [role for role in found if role not in known] + known
    tips = [
        SIGNED_SHARE,
        *tooltips("low", "high", form="+.1%"),
        *tooltips("value", form=".3g"),
        alt.Tooltip("prompts:Q"),
    ]
    of = int(edges["of"].max())
    many = f"pooled over {of} prompts" if of > 1 else "of one prompt"
    return _graph(table, columns, "role of the token", tips, many)


def answer_prompt_graph(edges: pd.DataFrame, tokens: Sequence[str]) -> alt.TopLevelMixin:
    """The edges that made the answer to one prompt differ: columns are its tokens.

    `edges`: upstream, token, channel, downstream, dest, up_layer, down_layer, value, share, of_node
    (share of all that the reader gets there); one row per edge. `tokens`: the text of each place.
    Raises ValueError when there are no edges.
    """
    table = named_answer_edges(edges, tokens)
    tips = [
        SIGNED_SHARE,
        alt.Tooltip("of_node:Q", format="+.0%", title="of what its reader gets"),
        *tooltips("value", form=".3g"),
    ]
    return _graph(table, numbered(tokens), "token", tips, "of this prompt")


def first_edges(edges: pd.DataFrame, most: int = MOST_NODES) -> pd.DataFrame:
    """The first edges of a table, of `answer_graph` or a prompt, on at most so many nodes."""
    places = ["role", "dest_role"] if "role" in edges else ["token", "dest"]
    columns = zip(("upstream", "downstream"), places, strict=True)
    nodes = pd.concat([edges[name] + " at " + edges[at].astype(str) for name, at in columns])
    row = np.tile(np.arange(len(edges)), 2)
    new = pd.Series(row).groupby(nodes.to_numpy()).min().value_counts()
    return edges[new.reindex(range(len(edges)), fill_value=0).cumsum().to_numpy() <= most]


def numbered(tokens: Sequence[str]) -> list[str]:
    """Tokens with their places, which tell those apart that are the same word."""
    return [f"{pos} {text.strip()}" for pos, text in enumerate(tokens)]


def named_answer_edges(edges: pd.DataFrame, tokens: Sequence[str] | None = None) -> pd.DataFrame:
    """Edges as the graphs draw them: pooled ones, or with tokens those of a prompt.

    See `graph.named_nodes`; size is |share|. Raises ValueError when there are no edges.
    """
    if tokens is None:
        at, dest = edges["role"], edges["dest_role"]
    else:
        names = dict(enumerate(numbered(tokens)))
        at, dest = (edges[end].map(names) for end in ("token", "dest"))
    size = edges["share"].abs()
    return named_nodes(edges.assign(size=size), at, dest, 100 * size)


def _graph(
    table: pd.DataFrame, columns: list[str], column: str, tips: list[alt.Tooltip], of: str
) -> alt.TopLevelMixin:
    into = table[table["downstream"] == ANSWER_NODE]
    best = largest_edge(table, table["size"])
    if table["share"].iloc[table["size"].argmax()] < 0:
        best = f"{best}, against the answer"
    said = f"The largest edge {of} is {best}"
    if len(into):
        by = into.groupby("upstream", sort=False)["share"].sum()
        by = by.loc[by.abs().sort_values(ascending=False, kind="stable").index]
        writers = [f"{name} ({signed_percent(x)})" for name, x in by.head(NAMED_WRITERS).items()]
        said += f"; into the answer itself write above all {', '.join(writers)}"
    return draw(table, columns, column, CHANNEL_KINDS, _slider(table["percent"]), tips, said)


def _slider(percents: pd.Series) -> Slider:
    """Steps of 1, 2 or 5 in some digit, about a hundred up to the largest edge, which stays."""
    wanted = float(percents.max()) / STEPS
    power = 10.0 ** math.floor(math.log10(max(wanted, 1e-6)))
    step = next((n * power for n in (1, 2, 5) if n * power >= wanted), 10 * power)
    step = float(f"{step:.1g}")
    return Slider(SHARE_UNIT, step, float(f"{step * math.floor(percents.max() / step):.6g}"))
