"""Charts of chapter 4: circuits as graphs of who writes what another head reads."""

from collections.abc import Sequence

import altair as alt
import pandas as pd

from sparse_signals.charts.attention import percent
from sparse_signals.charts.graph import draw

ORDER = (
    "IO-1", "IO", "IO+1", "S1-1", "S1", "S1+1", "third-1", "third", "third+1",
    "S2-1", "S2", "S2+1", "end-1", "end",
)  # fmt: skip
SIDES = {"dest": "destination", "src": "source"}
SHARE = alt.Tooltip("share:Q", format=".0%", title="share of its side of the score")


def circuit_graph(edges: pd.DataFrame, order: Sequence[str] = ORDER) -> alt.TopLevelMixin:
    """The circuit pooled over prompts: columns are token roles, rows are layers.

    `edges`: upstream, downstream, side ("dest" or "src"), dest_role, src_role, role, up_layer,
    down_layer, prompts, of, weight, low, high, share; one row per edge. Roles that `order` lacks
    come first. A slider prunes edges of few prompts; nodes are pinned by click or by menu.
    Raises ValueError when there are no edges.
    """
    table = drawn_edges(edges)
    tips = [
        alt.Tooltip("prompts:Q"),
        alt.Tooltip("percent:Q", format=".0f", title="% of prompts"),
        *(alt.Tooltip(f"{name}:Q", format=".3g") for name in ("weight", "low", "high")),
        SHARE,
    ]
    common, of = int(table["percent"].ge(50).sum()), edges["of"].max()
    title = (
        f"Of {len(table)} edges traced in {of} prompts, {common} {_are(common)} in "
        f"at least half of them; most often, {_named(table, 'percent')}"
        if of > 1
        else f"Traced in one prompt: {len(table)} edges, the largest share {_named(table, 'share')}"
    )
    return draw(table, _ordered(table, order), ("role of the token", "% of prompts"), tips, title)


def prompt_graph(edges: pd.DataFrame, tokens: Sequence[str]) -> alt.TopLevelMixin:
    """The trace of one prompt: columns are its tokens, rows are layers.

    `edges`: upstream, downstream, side, dest, src, token (the position where upstream writes),
    weight, share (of the score's side), up_layer, down_layer. `tokens`: the text of each position.
    A slider prunes edges of small share. Raises ValueError when there are no edges.
    """
    names = [f"{pos} {text.strip()}" for pos, text in enumerate(tokens)]
    at, dest, source = (edges[c].map(dict(enumerate(names))) for c in ("token", "dest", "src"))
    table = _drawn(edges, at, dest, source, 100 * edges["share"].clip(0, 1))
    tips = [alt.Tooltip("weight:Q", format=".3g"), SHARE]
    title = (
        f"The trace of this prompt has {len(table)} edges; the largest share of one side of a "
        f"score, {_named(table, 'share')}"
    )
    return draw(table, names, ("token", "% of its side of the score"), tips, title)


def drawn_edges(edges: pd.DataFrame) -> pd.DataFrame:
    """The pooled edges as `circuit_graph` draws them: writer and reader are names of nodes.

    More columns: side (in words), at, dest and source (roles of the writer, of the reader, and
    the one it attends to), percent (of the prompts), lane (numbers the edges between the same two
    nodes). Raises ValueError when there are no edges.
    """
    percents = 100 * edges["prompts"] / edges["of"]
    return _drawn(edges, edges["role"], edges["dest_role"], edges["src_role"], percents)


def _drawn(
    edges: pd.DataFrame, at: pd.Series, dest: pd.Series, source: pd.Series, percents: pd.Series
) -> pd.DataFrame:
    if not len(edges):
        raise ValueError("there are no edges to draw")
    names = {name: edges[name].astype(str) for name in ("upstream", "downstream", "side")}
    table = edges.assign(**names, at=at, dest=dest, source=source, percent=percents)
    table = table.assign(
        writer=table["upstream"] + " at " + table["at"],
        reader=table["downstream"] + " at " + table["dest"],
        side=table["side"].map(SIDES),
    )
    return table.assign(lane=table.groupby(["writer", "reader"]).cumcount()).reset_index(drop=True)


def _ordered(table: pd.DataFrame, order: Sequence[str]) -> list[str]:
    """The columns that occur: those unknown to `order` as they come, then the others in order."""
    found = list(dict.fromkeys([*table["at"], *table["dest"]]))
    known = [name for name in order if name in found]
    return [name for name in found if name not in known] + known


def _named(table: pd.DataFrame, by: str) -> str:
    """The largest edge in words, with its percentage."""
    edge = table.loc[table[by].idxmax()]
    share = edge[by] / 100 if by == "percent" else edge[by]
    return f"{edge['writer']} → {edge['reader']} ({percent(share)})"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"
