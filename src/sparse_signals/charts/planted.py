"""Charts of the appendix: what is planted, and where the planted heads look."""

from math import floor
from typing import Any

import altair as alt
import pandas as pd

from sparse_signals.charts.graph import NODE
from sparse_signals.charts.style import (
    COLOURS,
    HIGHLIGHT,
    SIDE_WORDS,
    WIDTH,
    Layered,
    distinct,
    finish,
    menu,
    tooltips,
)
from sparse_signals.core.numbers import percent, rounded

PLANTED_ROLES = ("S1", "S1+1", "S2", "IO", "end")
ANSWER_ROLES = ("word", "stop", "left", "right", "flag", "S2", "end")
CHANNELS_READ = {
    "query": "into queries",
    "key": "into keys",
    "value": "into values",
    "MLP": "into MLPs",
    "direct": "into the answer",
}
INPUT_WORDS = {"embedding": "word", "position": "place"}
THIS_CIRCUIT = "datum.circuit === circuit"
HALF_X, HALF_Y, APART = 0.21, 0.15, 0.47  # size of a node, and from one node of a cell to the next
FATE_COLOURS = {  # in the order in which bars are stacked
    "found": COLOURS[0],
    "lost by the cut": HIGHLIGHT,
    "cut off by silence": COLOURS[1],
    "reader silent": "#909090",
}


def planted_circuits(
    edges: pd.DataFrame, decoys: pd.DataFrame, start: str = "inhibition"
) -> alt.TopLevelMixin:
    """The planted circuits as graphs; a menu chooses one, at first `start`.

    `edges`: circuit, upstream, role, side, reader, at. `decoys`: circuit, reader, at.
    """
    columns = {
        (name, role): n
        for name in distinct(edges["circuit"])
        for n, role in enumerate(PLANTED_ROLES)
    }
    nodes = _planted_nodes(edges, decoys, columns)
    x = alt.X("x:Q").title("token at which a component writes").axis(
        values=list(range(len(PLANTED_ROLES))), grid=False,
        labelExpr=f"{list(PLANTED_ROLES)}[datum.value]",
    ).scale(domain=[-0.5, len(PLANTED_ROLES) + 0.25], nice=False)  # fmt: skip
    y = _layer_axis(nodes)
    named = edges.replace({"side": SIDE_WORDS})
    lines = alt.Chart(_edge_points(named, nodes)).transform_filter(THIS_CIRCUIT)
    look: dict[str, Any] = {
        "title": "writes at the reader's",
        "legend": alt.Legend(orient="top", symbolSize=400),
    }
    arrows = lines.mark_line(interpolate="catmull-rom", strokeWidth=2).encode(
        x, y, alt.Detail("edge:N"), alt.Order("step:Q"), alt.Color("side:N", **look),
        alt.StrokeDash("side:N", scale=alt.Scale(range=[[1, 0], [5, 3]]), **look),
        tooltip=["writer:N", "reader:N", "side:N"],
    )  # fmt: skip
    counts = edges.groupby("circuit", sort=False).size()
    title = f"What is planted: {', '.join(f'{n} edges ({name})' for name, n in counts.items())}"
    description = (
        "A graph of a planted circuit, chosen by a menu. Columns are tokens by their role, rows "
        "are layers. Lines run up from the component that writes to the head that reads; colour "
        "and dashes tell on which side of its score. Decoys are hollow boxes without lines."
    )
    return _one_graph([arrows, *_planted_boxes(nodes, x, y)], nodes, start, title, description)


def answer_circuits(
    links: pd.DataFrame, decoys: pd.DataFrame, start: str = "carried"
) -> alt.TopLevelMixin:
    """Circuits planted for traces from the answer; a menu chooses one, at first `start`.

    `links`: circuit, upstream, role, channel, downstream, dest_role, share (of the difference),
    seen (the part of the prompts in which a score trace finds it). `decoys`: circuit, reader, at.
    """
    words = links["seen"].map(lambda part: "finds it" if part == 1 else "misses it")
    edges = links.rename(columns={"downstream": "reader", "dest_role": "at"}).assign(
        part=links["share"].map(percent), **{"score trace": words}
    )
    used = {name: {*rows["role"], *rows["at"]} for name, rows in edges.groupby("circuit")}
    columns = {
        (str(name), role): n
        for name, mine in used.items()
        for n, role in enumerate(role for role in ANSWER_ROLES if role in mine)
    }
    nodes = _planted_nodes(edges, decoys, columns)
    domain = [-0.5, float(nodes["x"].max()) + 0.4]
    x = alt.X("x:Q").title("token at which a component writes").axis(
        labels=False, ticks=False, grid=False
    ).scale(domain=domain, nice=False)  # fmt: skip
    y = _layer_axis(nodes, -1.65)
    lines = alt.Chart(_edge_points(edges, nodes)).transform_filter(THIS_CIRCUIT)
    dashes = alt.Scale(domain=["finds it", "misses it"], range=[[1, 0], [5, 3]])
    kinds = alt.Scale(domain=[name for name in CHANNELS_READ if name in set(edges["channel"])])
    arrows = lines.mark_line(interpolate="catmull-rom", strokeWidth=2).encode(
        x, y, alt.Detail("edge:N"), alt.Order("step:Q"),
        alt.Color("channel:N", scale=kinds, title="read by",
                  legend=alt.Legend(orient="top", symbolSize=400)),
        alt.StrokeDash("score trace:N", scale=dashes, title="a score trace",
                       legend=alt.Legend(orient="top", symbolSize=400)),
        tooltip=["writer:N", "reader:N", "channel:N", alt.Tooltip("part:N", title="share"),
                 "score trace:N"],
    )  # fmt: skip
    names = alt.Chart(
        pd.DataFrame([(*key, n, -1.45) for key, n in columns.items()],
                     columns=["circuit", "role", "x", "y"])
    ).transform_filter(THIS_CIRCUIT).mark_text(fill="currentColor", fontSize=11).encode(
        x, y, text="role:N"
    )  # fmt: skip
    count = int((links["seen"] == 1).sum())
    counts = links[links["seen"] < 1].groupby("channel", sort=False).size()
    title = (
        f"Of {len(links)} planted edges a score trace finds {count}; it misses "
        + ", ".join(f"{n} {CHANNELS_READ[str(name)]}" for name, n in counts.items())
    )  # fmt: skip
    description = (
        "A graph of a planted circuit, chosen by a menu. Columns are tokens by their role, rows "
        "are layers, the answer is on top. Lines run up from the component that writes to what "
        "reads it. Colour tells by what it is read; dashed lines are missed by a score trace. "
        "Decoys are hollow boxes without lines. Shares of the difference show at the pointer."
    )
    parts = [arrows, names, *_planted_boxes(nodes, x, y)]
    return _one_graph(parts, nodes, start, title, description)


def _one_graph(
    layers: list[alt.Chart], nodes: pd.DataFrame, start: str, title: str, description: str
) -> alt.TopLevelMixin:
    chosen = menu("circuit", distinct(nodes["circuit"]), "Circuit", start=start)
    chart = alt.layer(*layers).add_params(chosen)
    height = 62 * (int(nodes["y"].max()) + 2)
    return finish(chart.properties(width=WIDTH - 150, height=height), title, description)


def _layer_axis(nodes: pd.DataFrame, bottom: float = -1.4) -> alt.Y:
    top = int(nodes["y"].max())
    layers = "datum.value < 0 ? 'input' : format(datum.value, 'd')"
    axis = alt.Axis(values=list(range(-1, top + 1)), labelExpr=layers)
    scale = alt.Scale(domain=[bottom, top + 0.4], nice=False)
    return alt.Y("y:Q", title="layer", axis=axis, scale=scale)


def _planted_nodes(
    edges: pd.DataFrame, decoys: pd.DataFrame, columns: dict[tuple[str, str], int]
) -> pd.DataFrame:
    """One row per box: circuit, name, role, x, y, decoy; boxes of a cell stand in a row.

    `columns`: where the tokens of a role stand in the graph of a circuit.
    """
    ends = [
        edges[["circuit", "upstream", "role"]].set_axis(["circuit", "name", "role"], axis=1),
        edges[["circuit", "reader", "at"]].set_axis(["circuit", "name", "role"], axis=1),
        decoys.set_axis(["circuit", "name", "role"], axis=1).assign(decoy=True),
    ]
    nodes = pd.concat(ends).drop_duplicates().reset_index(drop=True)
    nodes["decoy"] = nodes["decoy"].eq(True)
    nodes["y"] = nodes["name"].map(_height)
    top = nodes.groupby("circuit")["y"].transform("max").floordiv(1) + 1
    nodes["y"] = nodes["y"].where(nodes["name"] != "answer", top)
    order = ["circuit", "y", "role", "decoy", "name"]
    nodes = nodes.sort_values(order).reset_index(drop=True)
    offset = nodes.groupby(["circuit", "y", "role"]).cumcount()  # the first stands in its column
    places = zip(nodes["circuit"], nodes["role"], strict=True)
    nodes["x"] = [columns[place] for place in places] + APART * offset
    return nodes.assign(label=nodes["name"].replace(INPUT_WORDS))


def _height(name: str) -> float:
    """A head stands at its layer, an MLP above the heads of its layer, all else below."""
    if name.startswith("MLP "):
        return int(name[4:]) + 0.5
    return float(name[0]) if name[0].isdigit() else -1.0


def _edge_points(edges: pd.DataFrame, nodes: pd.DataFrame) -> pd.DataFrame:
    """Three points of every edge, which has its number: step, writer, reader, x, y, and its own."""
    keys = nodes[["circuit", "name", "role"]].itertuples(index=False, name=None)
    places = dict(zip(keys, zip(nodes["x"], nodes["y"], strict=True), strict=True))
    ends = edges[["circuit", "upstream", "role", "reader", "at"]]
    rows = []
    for n, edge in enumerate(ends.itertuples(index=False, name=None)):
        circuit, writer, role, reader, at = edge
        x0, y0 = places[circuit, writer, role]
        x1, y1 = places[circuit, reader, at]
        bend = 0.35 if role == at and y0 >= 0 and y1 - y0 > 1 else 0.0
        points = [(x0, y0 + HALF_Y), ((x0 + x1) / 2 + bend, (y0 + y1) / 2), (x1, y1 - HALF_Y)]
        words = (f"{writer} at {role}", f"{reader} at {at}")
        rows += [(n, k, *words, *point) for k, point in enumerate(points)]
    table = pd.DataFrame(rows, columns=["edge", "step", "writer", "reader", "x", "y"])
    own = edges.drop(columns=["upstream", "role", "reader", "at"]).reset_index(drop=True)
    return table.join(own, on="edge")


def _planted_boxes(nodes: pd.DataFrame, x: alt.X, y: alt.Y) -> list[alt.Chart]:
    table = nodes.assign(
        left=nodes["x"] - HALF_X, right=nodes["x"] + HALF_X,
        low=nodes["y"] - HALF_Y, high=nodes["y"] + HALF_Y,
        part=nodes["decoy"].map({True: "a decoy", False: "of the circuit"}),
    )  # fmt: skip
    base = alt.Chart(table).transform_filter(THIS_CIRCUIT)
    looks: dict[str, dict[str, Any]] = {
        "!datum.decoy": {"fill": NODE},
        "datum.decoy": {"fill": "transparent", "strokeWidth": 1.5, "strokeDash": [3, 2]},
    }
    boxes = [
        base.transform_filter(which).mark_rect(cornerRadius=4, stroke=NODE, **look).encode(
            alt.X("left:Q"), alt.X2("right:Q"), alt.Y("low:Q"), alt.Y2("high:Q"),
            tooltip=["name:N", "role:N", "part:N"],
        )
        for which, look in looks.items()
    ]  # fmt: skip
    labels = base.mark_text(fontSize=11).encode(
        x, y, text="label:N",
        fill=alt.condition("datum.decoy", alt.value("currentColor"), alt.value("white")),
    )  # fmt: skip
    return [*boxes, labels]


def attention_squares(table: pd.DataFrame) -> alt.TopLevelMixin:
    """Attention of the planted heads on one prompt each; a menu chooses the head.

    `table`: head ("inhibition: 0.0"), dest, src, target (dest), source (labels), attention,
    planted (bool: the circuit needs this pair).
    """
    chosen = menu("shown", distinct(table["head"]), "Head")
    least = table.loc[table["planted"], "attention"].min()
    table = table.assign(attention=table["attention"].round(3))
    base = alt.Chart(table).transform_filter("datum.head === shown").encode(
        alt.X("source:N").sort(field="src", op="min").title("source")
        .axis(labelAngle=-50),
        alt.Y("target:N").sort(field="dest", op="min").title("destination"),
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


def scoreboard(table: pd.DataFrame) -> alt.TopLevelMixin:
    """Precision and recall of every method on every circuit; a menu chooses the edges counted.

    `table`: method, edges, circuit, precision, recall, and both with _low and _high.
    """
    kinds, methods = (distinct(table[c]) for c in ("edges", "method"))
    # copies: Altair would lift data that both panels share out of them
    panels = [_board(table.copy(), rate, methods) for rate in ("precision", "recall")]
    panels[1] = panels[1].encode(alt.Y("method:N").axis(None).sort(methods))
    first = table[table["edges"] == kinds[0]].groupby("method", sort=False)
    perfect = [
        name for name, rows in first if rows[["precision", "recall"]].min(axis=None) == 1
    ]  # fmt: skip
    return finish(
        alt.hconcat(*panels, spacing=14).add_params(menu("counted", kinds, "Count")),
        f"Without noise, found exactly in every circuit ({kinds[0]}): "
        f"{', '.join(perfect) or 'none'}",
        "Two tables side by side, precision and recall: a row per method, a column per planted "
        "circuit, each cell shaded by its value. A menu chooses which edges count.",
        "Precision and recall of all seeds together; 95 % intervals show at the pointer.",
        digits=3,
    )


def _board(table: pd.DataFrame, rate: str, methods: list[str]) -> Layered:
    tips = tooltips(rate, f"{rate}_low", f"{rate}_high", form=".2f")
    base = alt.Chart(table).transform_filter("datum.edges === counted").encode(
        alt.Y("method:N").title(None).sort(methods),
        alt.X("circuit:N").title(None).sort(distinct(table["circuit"]))
        .axis(labelAngle=-40, domain=False, ticks=False),
        tooltip=["method:N", "circuit:N", *tips],
    )  # fmt: skip
    cells = base.mark_rect(color=COLOURS[0], stroke="currentColor", strokeWidth=0.3).encode(
        alt.FillOpacity(f"{rate}:Q").scale(domain=[0, 1], range=[0, 0.45]).legend(None)
    )
    texts = base.mark_text().encode(text=alt.Text(f"{rate}:Q", format=".2f"))
    chart = alt.layer(cells, texts).properties(title=rate)
    return chart.properties(width=alt.Step(54), height=alt.Step(28))


def noise_curves(scores: pd.DataFrame, fates: pd.DataFrame) -> alt.TopLevelMixin:
    """Precision and recall as noise grows, and below what became of the planted edges.

    `scores`: circuit, edges, method, noise, precision, recall and both with _low and _high.
    `fates`: circuit, noise, fate, share, accuracy. Menus choose circuit and edges, a click on a
    line (or the menu) a method.
    """
    names, kinds, methods = (distinct(scores[c]) for c in ("circuit", "edges", "method"))
    only, title = _one_of(methods), _noise_title(scores, fates, names[0], kinds[0])
    scores = rounded(scores, 3)  # before Altair hashes them into the name of a view
    filtered = alt.Chart(scores).transform_filter(
        "datum.circuit === circuit && datum.edges === counted"
    )
    panels = [_rate(filtered, rate, methods, only) for rate in ("precision", "recall")]
    panels[0] = panels[0].add_params(only)
    description = (
        "Three linked charts over the level of noise. Above: precision and recall, a line and a "
        "band for every method. Below: bars with the share of planted edges that exact tracing "
        "found, or why it missed them, and a line with the accuracy of the model. Menus choose "
        f"circuit, edges and method. {title}."
    )
    notes = (
        "Bands: 95 % intervals over seeds. Bars: what became of the planted edges in exact "
        "tracing. Squares: prompts that the model answers."
    )
    chart = alt.vconcat(*panels, _fate_bars(fates), spacing=10)
    chart = chart.add_params(menu("circuit", names, "Circuit"), menu("counted", kinds, "Count"))
    chart = chart.resolve_scale(color="independent", strokeDash="independent")
    return finish(chart, title, description, notes, digits=3)


def _one_of(methods: list[str]) -> alt.Parameter:
    """A method, chosen by a click on its line or by a menu; none until then."""
    labels = ["all methods", *methods]
    listed = alt.binding_select(options=[None, *methods], labels=labels, name="Show ")
    return alt.selection_point(
        name="only", fields=["method"], on="click", clear="dblclick",
        bind={"method": listed},  # pyright: ignore[reportArgumentType]
    )  # fmt: skip


def _rate(filtered: alt.Chart, rate: str, methods: list[str], only: alt.Parameter) -> Layered:
    lit = alt.condition(only, alt.value(1), alt.value(0.12))
    legend = alt.Legend(orient="top", columns=3, symbolSize=400, symbolType="stroke")
    shared: dict[str, Any] = {"legend": None if rate == "recall" else legend, "title": None}
    scale = {"scale": alt.Scale(domain=methods), **shared}
    # lines that agree lie on each other: the first is wide, so that the others show on it
    width = alt.condition(f"datum.method === '{methods[0]}'", alt.value(6), alt.value(2.2))
    base = filtered.encode(_noise_axis(labels=False), alt.Color("method:N", **scale))
    band = base.mark_area().encode(
        alt.Y(f"{rate}_low:Q").title(rate).scale(domain=[0, 1]), alt.Y2(f"{rate}_high:Q"),
        fillOpacity=alt.condition(only, alt.value(0.08), alt.value(0.01)),
    )  # fmt: skip
    line = base.mark_line().encode(
        alt.Y(f"{rate}:Q"), alt.StrokeDash("method:N", **scale), strokeOpacity=lit,
        strokeWidth=width,
    )  # fmt: skip
    tips = tooltips(rate, f"{rate}_low", f"{rate}_high", form=".2f")
    dots = base.mark_circle(size=50, cursor="pointer").encode(
        alt.Y(f"{rate}:Q"), opacity=lit, tooltip=["method:N", "noise:Q", *tips]
    )
    return alt.layer(band, line, dots).properties(width=WIDTH - 90, height=150)


def _noise_axis(title: str | None = None, labels: bool = True) -> alt.X:
    axis = alt.Axis(format="g", grid=False, labels=labels, tickCount=6)
    return alt.X("noise:Q", title=title, axis=axis, scale=alt.Scale(nice=False, padding=16))


def _fate_bars(fates: pd.DataFrame) -> Layered:
    table = fates.assign(order=fates["fate"].map(list(FATE_COLOURS).index))
    scale = alt.Scale(domain=list(FATE_COLOURS), range=list(FATE_COLOURS.values()))
    base = alt.Chart(table).transform_filter(THIS_CIRCUIT)
    base = base.encode(_noise_axis("noise, in units of the size of the weights"))
    legend = alt.Legend(orient="bottom", columns=4)
    bars = base.mark_bar(size=18).encode(
        alt.Y("share:Q").title("share").axis(format="%").scale(domain=[0, 1]),
        alt.Color("fate:N").scale(scale).legend(legend).title(None),
        alt.Order("order:Q"), tooltip=["noise:Q", "fate:N", alt.Tooltip("share:Q", format=".0%")],
    )  # fmt: skip
    line = base.mark_line(stroke="currentColor", strokeDash=[3, 3], point={
        "fill": "currentColor", "stroke": "currentColor", "shape": "square", "size": 45,
    }).encode(
        y="accuracy:Q", tooltip=["noise:Q", alt.Tooltip("accuracy:Q", format=".0%")]
    )  # fmt: skip
    return alt.layer(bars, line).properties(width=WIDTH - 90, height=150)


def _noise_title(scores: pd.DataFrame, fates: pd.DataFrame, name: str, kind: str) -> str:
    fates = fates[fates["circuit"] == name]
    ends = fates.pivot_table(index="noise", columns="fate", values="share")
    lost = ends.index[ends["found"] < 0.5]
    at = lost[0] if len(lost) else ends.index[-1]
    rows = scores[(scores["circuit"] == name) & (scores["edges"] == kind) & (scores["noise"] == at)]
    rates = rows.set_index("method")["precision"]
    model = fates.loc[fates["noise"] == at, "accuracy"].iloc[0]
    return (
        f"{name.capitalize()}: at noise {at:g} the model answers {percent(model)} of its prompts; "
        f"of the {kind} that exact tracing still finds, {percent(rates['exact'])} are planted"
    )


def cut_curves(table: pd.DataFrame, noise: float, usual: float = 0.7) -> alt.TopLevelMixin:
    """Precision against recall for several cuts, a line per method; a menu chooses the circuit.

    `table`: circuit, method, share, precision, recall, all at one level of noise.
    """
    names, methods = (distinct(table[c]) for c in ("circuit", "method"))
    scale: dict[str, Any] = {"scale": alt.Scale(domain=methods), "title": None}
    base = alt.Chart(table).transform_filter(THIS_CIRCUIT).encode(
        alt.X("recall:Q").scale(zero=False, padding=12).title("recall (all edges)"),
        alt.Y("precision:Q").scale(zero=False, padding=12).title("precision (all edges)"),
        alt.Color("method:N", **scale),
    )  # fmt: skip
    line = base.mark_line().encode(
        alt.Order("share:Q"), strokeDash=alt.StrokeDash("method:N", **scale)
    )
    tips = tooltips("share", "precision", "recall", form=".2f")
    size = alt.condition(f"datum.share === {usual:g}", alt.value(170), alt.value(50))
    dots = base.mark_point(filled=True, opacity=1).encode(
        alt.Shape("method:N", **scale), size=size, tooltip=["method:N", *tips]
    )
    texts = base.mark_text(align="left", dx=8, dy=-6, fontSize=11).encode(text="share:N")
    texts = texts.transform_filter(f"datum.method === '{methods[0]}'")
    chart = alt.layer(line, dots, texts).add_params(menu("circuit", names, "Circuit"))
    return finish(
        chart.properties(width=WIDTH - 160, height=280),
        _cut_title(table[table["circuit"] == names[0]], methods[0], noise, usual),
        "Line chart of precision against recall. Each line is a method, each point a cut, from the "
        f"loosest to the strictest; the large point is the usual cut, {usual:g}. A menu chooses "
        "the circuit.",
        digits=3,
    )


def _cut_title(table: pd.DataFrame, method: str, noise: float, usual: float) -> str:
    ours = table[table["method"] == method].set_index("share")
    ends = ours.loc[[ours.index.min(), usual, ours.index.max()]]
    path = ", ".join(
        f"{row.precision:.2f} and {row.recall:.2f} at {share:g}" for share, row in ends.iterrows()
    )
    return f"Precision and recall at noise {noise:g} by the share that a side keeps: {path}"
