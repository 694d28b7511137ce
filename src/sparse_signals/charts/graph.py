"""An interactive graph in Altair: nodes in columns and layers, edges that a slider prunes."""

import json
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import altair as alt
import pandas as pd

from sparse_signals.charts.style import (
    COLOURS,
    HIGHLIGHT,
    INK,
    WIDTH,
    distinct,
    finish,
    menu,
)
from sparse_signals.core.numbers import percent

EDGES_SHOWN = 40  # about as many edges as can be followed by eye
NODE = "#596270"  # white letters are legible on it, and it stands out on white and on black
FAINT = 0.12
TALL = 600
CLICK, OVER, OUT = (
    f"@nodes_marks:{event}, @labels_marks:{event}"
    for event in ("click", "pointerover", "pointerout")
)
NOTHING = (
    "view:click[!event.item || event.item.mark.marktype === 'group'], "
    "window:keydown[event.key === 'Escape']"
)
QUIET = "!(hover.node || pinned.node || chosen)"  # Vega expression: no node is active
MINUS_SAID = "⊖ marks an edge that works against the answer."
MINUS = "M-1,0A1,1,0,1,1,1,0A1,1,0,1,1,-1,0M-0.6,0L0.6,0"  # the path of that mark
ANSWER_NODE = "answer"
HOW = (
    "Edges run upwards, from the component that writes to the {} that reads. Point at a node "
    "to see its edges, click to pin it (with Shift: several), Escape unpins."
)
LETTER_KEY = (
    "E: embedding, P: position, B: bias of the row; M and B with a number: MLP and bias of a layer."
)
Axes = tuple[dict[str, Any], dict[str, Any]]
PLOT = WIDTH - 64  # what the axis of layers leaves
LETTER_WIDTH = 6.3  # mean width of a letter in the labels, in pixels
PADDING = 8  # inside a node, left and right together
BETWEEN = 5  # pixels between two nodes
NARROW = 16  # a column without nodes
HALF = 8  # half the height of a node
ROW = 19  # pixels from a row of nodes to the next one
GAP = 15  # free pixels between two bands, where edges show
MARGIN = 22  # free pixels left and right, where edges bend
NODE_WORDS = {"embedding": "embed", "position": "pos", "bias row": "bias"}
NODE_LETTERS = {"embedding": "E", "position": "P", "bias row": "B"}


@dataclass(frozen=True)
class Layout:
    """Nodes with their places in pixels, and the places of the names on both axes.

    `nodes`: node, component, column, layer, label, x, y, left, right. y grows upwards. `brief`
    tells whether labels are letters.
    """

    nodes: pd.DataFrame
    columns: dict[str, int]
    bands: dict[float, int]
    width: int
    height: int
    brief: bool


@dataclass(frozen=True)
class Kinds:
    """Kinds of edges: what tells them apart, and what the thickness of an edge means.

    `dashes`: kinds as in the column `field`, in the order of the colours. `right`: those that bend
    to the right within a column. `size`: the column of the thickness, `measure` its name. `told`
    says all this in words. `about`: what is shown at the pointer beside the kind. `reader`: what an
    edge leads to, in a word.
    """

    field: str
    title: str
    dashes: dict[str, list[int]]
    right: tuple[str, ...]
    size: str
    measure: str
    told: str
    about: tuple[alt.Tooltip, ...] = ()
    reader: str = "head"


@dataclass(frozen=True)
class Slider:
    """Prunes edges by the column percent: what it is a percentage of, and the steps up to most."""

    unit: str
    step: int | float = 1
    most: int | float = 100


def lay_out(nodes: pd.DataFrame, columns: list[str]) -> Layout:
    """Lay out `nodes` (node, component, column, layer, strength; one row per node).

    Every node gets a box that holds its label; in a cell the strongest comes first. Labels are
    words where they fit into the width of a page, and letters where there are too many columns.
    """
    nodes = nodes.sort_values(["strength", "node"], ascending=[False, True])
    words = nodes["component"].map(lambda name: short(str(name), NODE_WORDS, "MLP ", "bias "))
    letters = nodes["component"].map(lambda name: short(str(name), NODE_LETTERS, "M", "B"))
    brief = bool(_least_widths(nodes, words, columns).sum() > PLOT - 2 * MARGIN)
    labels = letters if brief else words
    least = _least_widths(nodes, labels, columns)
    free = max(0, PLOT - 2 * MARGIN - least.sum())  # goes to the columns with the fullest cells
    fullest = nodes.groupby(["column", "layer"]).size().groupby("column").max()
    need = fullest.reindex(columns).fillna(0)
    widths = least + free * need / need.sum()
    nodes = _rows(nodes.assign(label=labels, box=_box(labels)), widths)
    bands, height = _bands(nodes)
    centres = (MARGIN + widths.cumsum() - widths / 2).round().astype(int)
    x = (nodes["column"].map(centres) + nodes["offset"]).round().astype(int)
    half = (nodes["box"] / 2).round().astype(int)
    y = nodes["layer"].map(bands) + ROW * nodes["row"]
    nodes = nodes.assign(x=x, y=y, left=x - half, right=x + half).reset_index(drop=True)
    nodes = nodes[["node", "component", "column", "layer", "label", "x", "y", "left", "right"]]
    width = round(widths.sum() + 2 * MARGIN)
    return Layout(nodes, centres.to_dict(), bands, width, height, brief)


def short(component: str, names: dict[str, str], mlp: str, bias: str) -> str:
    """The name of a component as its node shows it."""
    if component in names:
        return names[component]
    return component.replace("MLP ", mlp).replace("bias ", bias)


def _box(labels: pd.Series) -> pd.Series:
    return labels.str.len() * LETTER_WIDTH + PADDING


def _least_widths(nodes: pd.DataFrame, labels: pd.Series, columns: list[str]) -> pd.Series:
    """The least width of each column: its widest node; columns without nodes are narrow."""
    widest = _box(labels).groupby(nodes["column"]).max() + BETWEEN
    return widest.reindex(columns).fillna(NARROW)


def _rows(nodes: pd.DataFrame, widths: pd.Series) -> pd.DataFrame:
    """Row and offset from the column's centre: boxes fill a row of their cell, then the next."""
    cells, room = [], widths.to_dict()
    for (column, _), cell in nodes.groupby(["column", "layer"], sort=False):
        row, used, rows, ends = 0, 0.0, [], []
        for box in cell["box"] + BETWEEN:
            if used and used + box > room[column]:
                row, used = row + 1, 0.0
            used += box
            rows.append(row)
            ends.append(used)
        cell = cell.assign(row=rows, end=ends)
        length = cell.groupby("row")["end"].transform("max")
        offset = cell["end"] - (cell["box"] + BETWEEN) / 2 - length / 2
        cells.append(cell.assign(offset=offset))
    return pd.concat(cells)


def _bands(nodes: pd.DataFrame) -> tuple[dict[float, int], int]:
    """Height of the lowest row of every layer above the bottom, and the height of the graph."""
    bands, bottom = {}, 0
    for layer, rows in nodes.groupby("layer")["row"].max().items():
        bands[layer] = bottom + (ROW + GAP) // 2
        bottom += ROW * (int(rows) + 1) + GAP
    return bands, bottom + ROW  # room for names at the top


def draw(
    table: pd.DataFrame,
    columns: list[str],
    column: str,
    kinds: Kinds,
    slider: Slider,
    tips: list[alt.Tooltip],
    title: str,
) -> alt.TopLevelMixin:
    """The graph of edges, its controls, title and description.

    `table` is of `named_nodes`, with the columns of `kinds` and what `tips` shows; an edge with a
    negative share is marked. `column` says what a column is.
    """
    nodes = _nodes(table)
    layout = lay_out(nodes, columns)
    about, shown = ([tip.shorthand.split(":")[0] for tip in part] for part in (kinds.about, tips))
    ends = ["writer", "reader", kinds.field, *about]
    kept = [*ends, "percent", kinds.size, "share", "lane", *shown]
    data = table[distinct(kept)]
    signed = bool((table["share"] < 0).any())
    axes = _axes(layout, column)
    bent = _bent(data, layout, kinds)
    lines = _lines(_curves(bent), axes, kinds, tips)
    signs = [_minus_signs(bent, axes, kinds)] if signed else []
    boxes = _boxes(_touched(data, layout), axes)
    chart = alt.layer(lines, *signs, *boxes, *_top_names(layout, axes))
    chart = chart.add_params(*_controls(nodes, default_prune(table["percent"], slider), slider))
    description = (
        f"A graph of {len(nodes)} nodes and {len(table)} edges. Columns: {column}; rows: layer, "
        f"the lowest first. A node is a component at a token and carries its name. {kinds.told} "
        f"A slider prunes edges by {slider.unit}, a menu chooses a node. {title}."
    )
    chart = chart.properties(width=layout.width, height=layout.height)
    how = [HOW.format(kinds.reader), *[MINUS_SAID] * signed, *[LETTER_KEY] * layout.brief]
    return finish(chart, title, description, " ".join(how))


def named_nodes(
    edges: pd.DataFrame, at: pd.Series, dest: pd.Series, percents: pd.Series
) -> pd.DataFrame:
    """Edges as `draw` takes them: upstream at `at` writes to downstream at `dest`.

    More columns: at, dest, writer and reader (names of nodes), percent (what the slider prunes by),
    lane (numbers the edges between the same two nodes). Raises ValueError when there are no edges.
    """
    if not len(edges):
        raise ValueError("there are no edges to draw")
    names = {name: edges[name].astype(str) for name in ("upstream", "downstream")}
    table = edges.assign(**names, at=at, dest=dest, percent=percents)
    table = table.assign(
        writer=table["upstream"] + " at " + table["at"],
        reader=table["downstream"] + " at " + table["dest"],
    )
    return table.assign(lane=table.groupby(["writer", "reader"]).cumcount()).reset_index(drop=True)


def strongest_paths(table: pd.DataFrame, nodes: int) -> pd.DataFrame:
    """The edges of a graph that lie on its strongest paths, as many as join up to `nodes` nodes.

    Paths lead down from the nodes that write to no other; the strength of a path is the product of
    percent / 100 over its edges. `table` is of `named_nodes`; its order stays.
    """
    down = table.sort_values("down_layer", ascending=False, kind="stable")
    reached = dict.fromkeys(set(table["reader"]) - set(table["writer"]), 1.0)
    strength = {}
    ends = zip(down.index, down["reader"], down["writer"], down["percent"], strict=True)
    for edge, reader, writer, percents in ends:
        strength[edge] = reached[reader] * percents / 100
        reached[writer] = max(reached.get(writer, 0.0), strength[edge])
    ranked = pd.Series(strength).sort_values(ascending=False, kind="stable").index
    joined = table.loc[ranked, ["reader", "writer"]].to_numpy().ravel()  # edge by edge
    new = ~pd.Series(joined).duplicated().to_numpy()
    kept = ranked[new.reshape(-1, 2).sum(1).cumsum() <= nodes]
    return table[table.index.isin(kept)].reset_index(drop=True)


def largest_edge(table: pd.DataFrame, share: pd.Series) -> str:
    """The edge of the largest share in words, with this share."""
    place = share.argmax()
    edge = table.iloc[place]
    return f"{edge['writer']} → {edge['reader']} ({percent(share.iloc[place])})"


def default_prune(percents: pd.Series, slider: Slider) -> int | float:
    """The step of the slider that leaves about 40 edges; all of them when there are hardly more."""
    if len(percents) <= EDGES_SHOWN * 1.25:
        return slider.step * int(percents.min() / slider.step)  # one step more drops the weakest
    steps = [slider.step * n for n in range(round(slider.most / slider.step) + 1)]
    kept = {least: int((percents >= least).sum()) for least in steps}
    shown = [least for least in kept if kept[least]]
    return min(shown, key=lambda least: abs(kept[least] - EDGES_SHOWN))


def _nodes(table: pd.DataFrame) -> pd.DataFrame:
    """One row per node: node, component, column, layer, and the strength of its best edge."""
    names = ["node", "component", "column", "layer", "strength"]
    ends = [
        ["writer", "upstream", "at", "up_layer", "percent"],
        ["reader", "downstream", "dest", "down_layer", "percent"],
    ]
    both = pd.concat([table[end].set_axis(names, axis=1) for end in ends])
    return both.groupby(names[:-1], as_index=False)[["strength"]].max()


def _selections() -> list[alt.Parameter]:
    """Nodes that are pinned, and the node that is pointed at."""
    pick: dict[str, Any] = {"fields": ["node"], "empty": False}
    return [
        alt.selection_point(name="pinned", on=CLICK, clear=NOTHING, **pick),
        alt.selection_point(name="hover", on=OVER, clear=OUT, **pick),
    ]


def _controls(nodes: pd.DataFrame, prune: int | float, slider: Slider) -> list[alt.Parameter]:
    """The slider that prunes, and the menu of nodes for readers without a mouse."""
    names = nodes.sort_values(["layer", "component", "column"])["node"].tolist()
    name = f"Edges of at least this {slider.unit} "
    bind = alt.binding_range(min=0, max=slider.most, step=slider.step, name=name)
    return [
        alt.param(name="prune", value=prune, bind=bind),
        menu("chosen", {None: "none"} | {name: name for name in names}, "Edges of node"),
    ]


def _axes(layout: Layout, title: str) -> Axes:
    """Properties of both position channels: scales in pixels, names at the places of the layout."""
    answers = layout.nodes.loc[layout.nodes["component"] == ANSWER_NODE, "layer"].tolist()
    layers = {at: _layer_name(layer) for layer, at in layout.bands.items()}
    layers |= {layout.bands[layer]: ANSWER_NODE for layer in answers}
    columns = {at: name for name, at in layout.columns.items()}
    x = alt.Axis(values=list(columns), labelExpr=_name_at(columns), labelOverlap=False, grid=False)
    x = alt.Axis(**x.to_dict(), labelAngle=-50) if _crowded(layout) else x
    y = alt.Axis(values=list(layers), labelExpr=_name_at(layers), labelOverlap=False, grid=True)
    across, up = (alt.Scale(domain=[0, size], nice=False) for size in (layout.width, layout.height))
    return {"title": title, "axis": x, "scale": across}, {"title": "layer", "axis": y, "scale": up}


def _crowded(layout: Layout) -> bool:
    """Whether names of columns would touch when they are written side by side."""
    places = layout.columns.values()
    room = min((b - a for a, b in pairwise(places)), default=layout.width)
    return any(len(name) * LETTER_WIDTH + BETWEEN > room for name in layout.columns)


def _top_names(layout: Layout, axes: Axes) -> list[alt.Chart]:
    """The names of the columns once more at the top of a graph that is taller than a screen."""
    if layout.height <= TALL or _crowded(layout):
        return []
    names = pd.DataFrame({"name": list(layout.columns), "x": list(layout.columns.values())})
    text = alt.Chart(names).mark_text(baseline="top", aria=False)
    return [text.encode(alt.X("x:Q", **axes[0]), y=alt.value(0), text="name:N")]


def _layer_name(layer: float) -> str:
    """What stands on the axis of layers: a layer's heads, then its biases, then its MLP."""
    return (
        "input" if layer < 0 else {0.3: "bias", 0.5: "MLP"}.get(round(layer % 1, 1), f"{layer:g}")
    )


def _name_at(places: dict[int, str]) -> str:
    """Vega expression: the name that stands at a place of an axis."""
    return f"({json.dumps(places, ensure_ascii=False)})[datum.value]"


def _active(field: str) -> str:
    """Vega expression: the node in this field is pinned, pointed at or chosen."""
    lists = ("hover.node || []", "pinned.node || []", "[chosen]")
    return " || ".join(f"indexof({nodes}, datum.{field}) >= 0" for nodes in lists)


def _visible_edges(data: pd.DataFrame) -> alt.Chart:
    """The edges that the slider leaves; `lit` ones end at an active node."""
    lit = f"{_active('writer')} || {_active('reader')} ? 1 : 0"
    return alt.Chart(data).transform_filter("datum.percent >= prune").transform_calculate(lit=lit)


def _bent(data: pd.DataFrame, layout: Layout, kinds: Kinds) -> alt.Chart:
    """Both ends of each edge, and how far it bends: in a column, to the side of its kind."""
    places = alt.LookupData(
        layout.nodes[["node", "x", "y", "column"]], "node", ["x", "y", "column"]
    )
    bend = "(min(24, 8 + (datum.y1 - datum.y0) / 10) + 6 * datum.lane)"
    right = " || ".join(f"datum.{kinds.field} === '{kind}'" for kind in kinds.right)
    return (
        _visible_edges(data)
        .transform_lookup("writer", places, as_=["x0", "y0", "column0"])
        .transform_lookup("reader", places, as_=["x1", "y1", "column1"])
        .transform_calculate(
            bend=f"datum.column0 !== datum.column1 ? 6 * datum.lane : {right} ? {bend} : -{bend}"
        )
    )


def _curves(bent: alt.Chart) -> alt.Chart:
    """Four control points for each edge."""
    return bent.transform_calculate(
        i="[0, 1, 2, 3]",
        px="[datum.x0, datum.x0 + datum.bend, datum.x1 + datum.bend, datum.x1]",
        py=f"[datum.y0 + {HALF}, (3 * datum.y0 + datum.y1) / 4, "
        f"(datum.y0 + 3 * datum.y1) / 4, datum.y1 - {HALF}]",
    ).transform_flatten(["i", "px", "py"])


def _kind_colour(kinds: Kinds) -> alt.Color:
    scale = alt.Scale(domain=list(kinds.dashes), range=COLOURS[: len(kinds.dashes)])
    return alt.Color(f"{kinds.field}:N", scale=scale, title=kinds.title, legend=_legend())


def _legend() -> alt.Legend:
    return alt.Legend(orient="top", symbolType="stroke", symbolSize=400)


def _lines(curves: alt.Chart, axes: Axes, kinds: Kinds, tips: list[alt.Tooltip]) -> alt.Chart:
    """The edges: colour and dashes for the kind, thickness for the size."""
    dash = alt.Scale(domain=list(kinds.dashes), range=list(kinds.dashes.values()))
    width = alt.Scale(type="linear", domainMin=0, range=[0.6, 4])
    share = alt.Legend(**_legend().to_dict(), format=".0%", tickCount=3)
    field = f"{kinds.field}:N"
    return curves.mark_line(interpolate="basis", aria=False).encode(
        alt.X("px:Q", **axes[0]),
        alt.Y("py:Q", **axes[1]),
        alt.Order("i:Q"),
        _kind_colour(kinds),
        alt.StrokeDash(field, scale=dash, title=kinds.title, legend=_legend()),
        alt.StrokeWidth(f"{kinds.size}:Q", scale=width, title=kinds.measure, legend=share),
        detail=["writer:N", "reader:N", "lane:Q"],
        opacity=_opacity(),
        tooltip=["writer:N", "reader:N", field, *kinds.about, *tips],
    )


def _opacity() -> Any:
    return alt.condition(f"datum.lit || {QUIET}", alt.value(0.85), alt.value(FAINT))


def _minus_signs(bent: alt.Chart, axes: Axes, kinds: Kinds) -> alt.Chart:
    """A sign on the middle of each edge whose share is negative."""
    middle = bent.transform_filter("datum.share < 0").transform_calculate(
        mx="(datum.x0 + datum.x1) / 2 + 23 / 24 * datum.bend",  # of a uniform cubic B-spline
        my="(datum.y0 + datum.y1) / 2",
    )
    mark = middle.mark_point(shape=MINUS, size=50, fill="white", strokeWidth=1.5, aria=False)
    return mark.encode(
        alt.X("mx:Q", **axes[0]),
        alt.Y("my:Q", **axes[1]),
        _kind_colour(kinds),
        opacity=_opacity(),
    )


def _touched(data: pd.DataFrame, layout: Layout) -> alt.Chart:
    """The nodes that visible edges touch, in their places."""
    fields = ["label", "x", "y", "left", "right"]
    places = alt.LookupData(layout.nodes[["node", *fields]], "node", fields)
    return (
        _visible_edges(data)
        .transform_fold(["writer", "reader"], as_=["end", "node"])
        .transform_calculate(written="datum.end === 'writer' ? 1 : 0")
        .transform_aggregate(edges="count()", out="sum(written)", lit="max(lit)", groupby=["node"])
        .transform_lookup("node", places)
        .transform_calculate(top=f"datum.y + {HALF}", bottom=f"datum.y - {HALF}")
    )


def _boxes(nodes: alt.Chart, axes: Axes) -> list[alt.Chart]:
    """The nodes as boxes, and their labels."""
    shared: dict[str, Any] = {
        "key": "node:N",  # the drawn node stays the same under the pointer
        "tooltip": ["node:N", alt.Tooltip("edges:Q", title="edges shown"),
                    alt.Tooltip("out:Q", title="of these, it writes")],
    }  # fmt: skip
    clear = f"datum.lit || {QUIET}"
    boxes = nodes.mark_rect(cornerRadius=4, cursor="pointer").encode(
        alt.X("left:Q", **axes[0]), alt.X2("right:Q"),
        alt.Y("bottom:Q", **axes[1]), alt.Y2("top:Q"),
        fill=alt.condition(_active("node"), alt.value(HIGHLIGHT), alt.value(NODE)),
        fillOpacity=alt.condition(clear, alt.value(1), alt.value(FAINT)),
        description="node:N", **shared,
    )  # fmt: skip
    labels = nodes.mark_text(fontSize=11, cursor="pointer", aria=False).encode(
        alt.X("x:Q", **axes[0]), alt.Y("y:Q", **axes[1]), text="label:N",
        fill=alt.condition(clear, alt.value("white"), alt.value(INK)),
        opacity=alt.condition(clear, alt.value(1), alt.value(0.7)), **shared,
    )  # fmt: skip
    boxes = boxes.add_params(*_selections()).properties(name="nodes")
    return [boxes, labels.properties(name="labels")]
