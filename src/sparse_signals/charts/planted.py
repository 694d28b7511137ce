"""Charts of the appendix: what is planted, and where the planted heads look."""

from math import floor

import altair as alt
import pandas as pd

from sparse_signals.charts.base import COLOURS, HIGHLIGHT, WIDTH, finish, rounded
from sparse_signals.charts.graph import NODE

COLUMNS = ("S1", "S1+1", "S2", "IO", "end")
SIDES = {"dest": "destination", "src": "source"}
WORDS = {"embedding": "word", "position": "place"}
SHOWN = "datum.circuit === circuit"
HALF_X, HALF_Y, APART = 0.21, 0.15, 0.47  # size of a node, and from one node of a cell to the next


def menu(name: str, options: list[str], label: str, start: str | None = None) -> alt.Parameter:
    """A parameter that a list below the chart sets; at first `start`, or the first option."""
    binding = alt.binding_select(options=options, name=label)
    return alt.param(name=name, value=start or options[0], bind=binding)


def planted_circuits(
    edges: pd.DataFrame, decoys: pd.DataFrame, start: str = "inhibition"
) -> alt.TopLevelMixin:
    """The planted circuits as graphs; a menu chooses one, at first `start`.

    `edges`: circuit, upstream, role, side, reader, at. `decoys`: circuit, reader, at.
    """
    nodes = _nodes(edges, decoys)
    names = list(dict.fromkeys(edges["circuit"]))
    chosen = menu("circuit", names, "Circuit ", start)
    x = alt.X("x:Q").title("token at which a component writes").axis(
        values=list(range(len(COLUMNS))), labelExpr=f"{list(COLUMNS)}[datum.value]", grid=False
    ).scale(domain=[-0.5, len(COLUMNS) + 0.25], nice=False)  # fmt: skip
    top = int(nodes["y"].max())
    layers = "datum.value < 0 ? 'input' : format(datum.value, 'd')"
    y = alt.Y("y:Q").title("layer").axis(
        values=list(range(-1, top + 1)), labelExpr=layers
    ).scale(domain=[-1.4, top + 0.4], nice=False)  # fmt: skip
    width, height = WIDTH - 150, 62 * (top + 2)
    chart = alt.layer(_arrows(edges, nodes, x, y), *_boxes(nodes, x, y))
    chart = chart.add_params(chosen)
    counts = edges.groupby("circuit", sort=False).size()
    title = f"What is planted: {', '.join(f'{n} edges ({name})' for name, n in counts.items())}"
    description = (
        "A graph of a planted circuit, chosen by a menu. Columns are tokens by their role, rows "
        "are layers. Lines run up from the component that writes to the head that reads; colour "
        "and dashes tell on which side of its score. Decoys are hollow boxes without lines."
    )
    return finish(chart.properties(width=width, height=height), title, description)


def _nodes(edges: pd.DataFrame, decoys: pd.DataFrame) -> pd.DataFrame:
    """One row per box: circuit, name, role, x, y, decoy; boxes of a cell stand in a row."""
    ends = [
        edges[["circuit", "upstream", "role"]].set_axis(["circuit", "name", "role"], axis=1),
        edges[["circuit", "reader", "at"]].set_axis(["circuit", "name", "role"], axis=1),
        decoys.set_axis(["circuit", "name", "role"], axis=1).assign(decoy=True),
    ]
    nodes = pd.concat(ends).drop_duplicates().reset_index(drop=True)
    nodes["decoy"] = nodes["decoy"].eq(True)
    nodes["y"] = nodes["name"].map(lambda name: int(name[0]) if name[0].isdigit() else -1)
    order = ["circuit", "y", "role", "decoy", "name"]
    nodes = nodes.sort_values(order).reset_index(drop=True)
    offset = nodes.groupby(["circuit", "y", "role"]).cumcount()  # the first stands in its column
    nodes["x"] = nodes["role"].map(COLUMNS.index) + APART * offset
    return nodes.assign(label=nodes["name"].replace(WORDS))


def _arrows(edges: pd.DataFrame, nodes: pd.DataFrame, x: alt.X, y: alt.Y) -> alt.Chart:
    places = nodes.set_index(["circuit", "name", "role"])[["x", "y"]]
    rows = []
    for n, edge in enumerate(edges.itertuples()):
        x0, y0 = places.loc[(edge.circuit, edge.upstream, edge.role)]
        x1, y1 = places.loc[(edge.circuit, edge.reader, edge.at)]
        passes = edge.role == edge.at and edge.upstream[0].isdigit() and y1 - y0 > 1
        bend = 0.35 if passes else 0.0
        points = [(x0, y0 + HALF_Y), ((x0 + x1) / 2 + bend, (y0 + y1) / 2), (x1, y1 - HALF_Y)]
        ends = f"{edge.upstream} at {edge.role}", f"{edge.reader} at {edge.at}", SIDES[edge.side]
        rows += [(edge.circuit, n, k, *ends, *point) for k, point in enumerate(points)]
    names = ["circuit", "edge", "step", "writer", "reader", "side", "x", "y"]
    side = {"title": "writes at the reader's", "legend": alt.Legend(orient="top", symbolSize=400)}
    table = rounded(pd.DataFrame(rows, columns=names))
    lines = alt.Chart(table).transform_filter(SHOWN)
    return lines.mark_line(interpolate="catmull-rom", strokeWidth=2).encode(
        x, y, alt.Detail("edge:N"), alt.Order("step:Q"), alt.Color("side:N", **side),
        alt.StrokeDash("side:N", scale=alt.Scale(range=[[1, 0], [5, 3]]), **side),
        tooltip=["writer:N", "reader:N", "side:N"],
    )  # fmt: skip


def _boxes(nodes: pd.DataFrame, x: alt.X, y: alt.Y) -> list[alt.Chart]:
    table = nodes.assign(
        left=nodes["x"] - HALF_X, right=nodes["x"] + HALF_X,
        low=nodes["y"] - HALF_Y, high=nodes["y"] + HALF_Y,
        part=nodes["decoy"].map({True: "a decoy", False: "of the circuit"}),
    )  # fmt: skip
    base = alt.Chart(rounded(table)).transform_filter(SHOWN)
    boxes = [
        base.transform_filter(which).mark_rect(cornerRadius=4, stroke=NODE, **look).encode(
            alt.X("left:Q"), alt.X2("right:Q"), alt.Y("low:Q"), alt.Y2("high:Q"),
            tooltip=["name:N", "role:N", "part:N"],
        )
        for which, look in (
            ("!datum.decoy", {"fill": NODE}),
            ("datum.decoy", {"fill": "transparent", "strokeWidth": 1.5, "strokeDash": [3, 2]}),
        )
    ]  # fmt: skip
    labels = base.mark_text(fontSize=11).encode(
        x, y, text="label:N",
        fill=alt.condition("datum.decoy", alt.value("currentColor"), alt.value("white")),
    )  # fmt: skip
    return [*boxes, labels]


def planted_attention(table: pd.DataFrame) -> alt.TopLevelMixin:
    """Attention of the planted heads on one prompt each; a menu chooses the head.

    `table`: head ("inhibition: 0.0"), dest, src, target (dest), source (labels), attention,
    planted (bool: the circuit needs this pair).
    """
    chosen = menu("shown", list(dict.fromkeys(table["head"])), "Head ")
    least = table.loc[table["planted"], "attention"].min()
    table = table.assign(attention=table["attention"].round(3))
    base = alt.Chart(rounded(table)).transform_filter("datum.head === shown").encode(
        alt.X("source:N").sort(alt.EncodingSortField("src", op="min")).title("source")
        .axis(labelAngle=-50),
        alt.Y("target:N").sort(alt.EncodingSortField("dest", op="min")).title("destination"),
        tooltip=["target:N", "source:N", alt.Tooltip("attention:Q", format=".1%")],
    )  # fmt: skip
    cells = base.mark_rect(color=COLOURS[0], stroke="currentColor", strokeWidth=0.15).encode(
        alt.FillOpacity("attention:Q").scale(domain=[0, 1], range=[0.03, 1])
        .title("attention").legend(format="%", tickCount=3)
    )  # fmt: skip
    rings = base.transform_filter("datum.planted").mark_point(
        shape="diamond", size=110, strokeWidth=2.5, fill="white", stroke=HIGHLIGHT
    )
    chart = alt.layer(cells, rings).add_params(chosen)
    return finish(
        chart.properties(width=alt.Step(30), height=alt.Step(24)),
        "Where a circuit needs a head to look, marked by diamonds, it puts at least "
        f"{floor(1000 * least) / 10:g}\u00a0% of its attention",
        "Attention matrix of a planted head on one prompt, chosen by a menu: rows are destination "
        "tokens, columns source tokens, and diamonds mark the pairs that the circuit needs.",
    )
