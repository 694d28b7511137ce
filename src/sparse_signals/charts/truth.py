"""Charts of the appendix: who finds the planted edges, with and without noise."""

import altair as alt
import pandas as pd

from sparse_signals.charts.attention import percent
from sparse_signals.charts.base import COLOURS, HIGHLIGHT, WIDTH, finish, rounded
from sparse_signals.charts.planted import menu

FATES = ("found", "lost by the cut", "cut off by silence", "reader silent")
SHADES = alt.Scale(domain=FATES, range=[COLOURS[0], HIGHLIGHT, COLOURS[1], "#909090"])


def scoreboard(table: pd.DataFrame) -> alt.TopLevelMixin:
    """Precision and recall of every method on every circuit; a menu chooses the edges counted.

    `table`: method, edges, circuit, precision, recall, and both with _low and _high.
    """
    kinds, methods = (list(dict.fromkeys(table[c])) for c in ("edges", "method"))
    panels = [_board(table, rate, methods) for rate in ("precision", "recall")]
    panels[1] = panels[1].encode(alt.Y("method:N").axis(None).sort(methods))
    first = table[table["edges"] == kinds[0]].groupby("method", sort=False)
    perfect = [
        name for name, rows in first if rows[["precision", "recall"]].min(axis=None) == 1
    ]  # fmt: skip
    return finish(
        alt.hconcat(*panels, spacing=14).add_params(menu("counted", kinds, "Count ")),
        f"Without noise, found exactly in every circuit ({kinds[0]}): "
        f"{', '.join(perfect) or 'none'}",
        "Two tables side by side, precision and recall: a row per method, a column per planted "
        "circuit, each cell shaded by its value. A menu chooses which edges count.",
        "Precision and recall of all seeds together; the worst and best seed show at the pointer.",
    )


def _board(table: pd.DataFrame, rate: str, methods: list[str]) -> alt.LayerChart:
    tips = [alt.Tooltip(f"{rate}{end}:Q", format=".2f") for end in ("", "_low", "_high")]
    base = alt.Chart(rounded(table, 3)).transform_filter("datum.edges === counted").encode(
        alt.Y("method:N").title(None).sort(methods),
        alt.X("circuit:N").title(None).sort(list(dict.fromkeys(table["circuit"])))
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
    names, kinds, methods = (list(dict.fromkeys(scores[c])) for c in ("circuit", "edges", "method"))
    only = _one_of(methods)
    filtered = alt.Chart(rounded(scores, 3)).transform_filter(
        "datum.circuit === circuit && datum.edges === counted"
    )
    panels = [_rate(filtered, rate, methods, only) for rate in ("precision", "recall")]
    panels[0] = panels[0].add_params(only)
    title = _noise_title(scores, fates, names[0], kinds[0])
    description = (
        "Three linked charts over the level of noise. Above: precision and recall, a line and a "
        "band for every method. Below: bars with the share of planted edges that exact tracing "
        "found, or why it missed them, and a line with the accuracy of the model. Menus choose "
        f"circuit, edges and method. {title}."
    )
    notes = (
        "Bands: from the worst to the best seed. Bars: what became of the planted edges in exact "
        "tracing. Squares: prompts that the model answers."
    )
    chart = alt.vconcat(*panels, _fate_bars(fates), spacing=10)
    chart = chart.add_params(menu("circuit", names, "Circuit "), menu("counted", kinds, "Count "))
    chart = chart.resolve_scale(color="independent", strokeDash="independent")
    return finish(chart, title, description, notes)


def _one_of(methods: list[str]) -> alt.Parameter:
    """A method, chosen by a click on its line or by a menu; none until then."""
    labels = ["all methods", *methods]
    listed = alt.binding_select(options=[None, *methods], labels=labels, name="Show ")
    return alt.selection_point(
        name="only", fields=["method"], on="click", clear="dblclick", bind={"method": listed}
    )


def _rate(
    filtered: alt.Chart, rate: str, methods: list[str], only: alt.Parameter
) -> alt.LayerChart:
    lit = alt.condition(only, alt.value(1), alt.value(0.12))
    legend = alt.Legend(orient="top", columns=3, symbolSize=400, symbolType="stroke")
    shared = {"legend": None if rate == "recall" else legend, "title": None}
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
    tips = [alt.Tooltip(f"{rate}{end}:Q", format=".2f") for end in ("", "_low", "_high")]
    dots = base.mark_circle(size=50, cursor="pointer").encode(
        alt.Y(f"{rate}:Q"), opacity=lit, tooltip=["method:N", "noise:Q", *tips]
    )
    return alt.layer(band, line, dots).properties(width=WIDTH - 90, height=150)


def _noise_axis(title: str | None = None, labels: bool = True) -> alt.X:
    axis = alt.Axis(format="g", grid=False, labels=labels, tickCount=6)
    return alt.X("noise:Q", title=title, axis=axis, scale=alt.Scale(nice=False, padding=16))


def _fate_bars(fates: pd.DataFrame) -> alt.LayerChart:
    table = rounded(fates.assign(order=fates["fate"].map(FATES.index)), 3)
    base = alt.Chart(table).transform_filter("datum.circuit === circuit")
    base = base.encode(_noise_axis("noise, in units of the size of the weights"))
    legend = alt.Legend(orient="bottom", columns=4)
    bars = base.mark_bar(size=18).encode(
        alt.Y("share:Q").title("share").axis(format="%").scale(domain=[0, 1]),
        alt.Color("fate:N").scale(SHADES).legend(legend).title(None),
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
    names, methods = (list(dict.fromkeys(table[c])) for c in ("circuit", "method"))
    scale = {"scale": alt.Scale(domain=methods), "title": None}
    base = alt.Chart(rounded(table, 3)).transform_filter("datum.circuit === circuit").encode(
        alt.X("recall:Q").scale(zero=False, padding=12).title("recall (all edges)"),
        alt.Y("precision:Q").scale(zero=False, padding=12).title("precision (all edges)"),
        alt.Color("method:N", **scale),
    )  # fmt: skip
    line = base.mark_line().encode(
        alt.Order("share:Q"), strokeDash=alt.StrokeDash("method:N", **scale)
    )
    tips = [alt.Tooltip(f"{c}:Q", format=".2f") for c in ("share", "precision", "recall")]
    size = alt.condition(f"datum.share === {usual:g}", alt.value(170), alt.value(50))
    dots = base.mark_point(filled=True, opacity=1).encode(
        alt.Shape("method:N", **scale), size=size, tooltip=["method:N", *tips]
    )
    texts = base.mark_text(align="left", dx=8, dy=-6, fontSize=11).encode(text="share:N")
    texts = texts.transform_filter(f"datum.method === '{methods[0]}'")
    chart = alt.layer(line, dots, texts).add_params(menu("circuit", names, "Circuit "))
    return finish(
        chart.properties(width=WIDTH - 160, height=280),
        _cut_title(table[table["circuit"] == names[0]], methods[0], noise, usual),
        "Line chart of precision against recall. Each line is a method, each point a cut, from the "
        f"loosest to the strictest; the large point is the usual cut, {usual:g}. A menu chooses "
        "the circuit.",
    )


def _cut_title(table: pd.DataFrame, method: str, noise: float, usual: float) -> str:
    ours = table[table["method"] == method].set_index("share")
    ends = ours.loc[[ours.index.min(), usual, ours.index.max()]]
    path = ", ".join(
        f"{row.precision:.2f} and {row.recall:.2f} at {share:g}" for share, row in ends.iterrows()
    )
    return f"Precision and recall at noise {noise:g} by the share that a side keeps: {path}"
