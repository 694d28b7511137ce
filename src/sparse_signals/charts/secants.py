"""Charts of chapter 6: secants, methods compared, and where shares mislead."""

import altair as alt
import pandas as pd

from sparse_signals.charts.style import (
    WIDTH,
    colour_and_shape,
    distinct,
    finish,
    menu,
    tooltips,
)
from sparse_signals.core.numbers import percent, signed_percent

ENOUGH = 0.8  # faithfulness at which titles of curves count edges


def secant_picture(curve: pd.DataFrame, ends: pd.DataFrame, what: str) -> alt.TopLevelMixin:
    """A nonlinearity between two runs: its secant meets both, its derivatives meet one each.

    `curve`: z, g, line ("g", "secant", "derivative at x", "derivative at x′"). `ends`: z, g, run.
    """
    lines = distinct(curve["line"])
    base = alt.Chart(curve).mark_line().encode(
        alt.X("z:Q").title("before the nonlinearity"),
        alt.Y("g:Q").title("after it"),
        alt.Color("line:N").title(None).scale(domain=lines).legend(orient="top"),
        alt.StrokeDash("line:N").title(None).scale(domain=lines),
        tooltip=["line:N", *tooltips("z", "g")],
    )  # fmt: skip
    points = alt.Chart(ends).mark_point(filled=True, size=90).encode(
        x="z:Q", y="g:Q", shape=alt.Shape("run:N").title("run"),
        tooltip=["run:N", *tooltips("z", "g")],
    )  # fmt: skip
    (x, y), (x2, y2) = ends[["z", "g"]].to_numpy()
    misses = {}
    for line, part in curve.groupby("line"):
        if line not in ("g", "secant"):
            slope = (part["g"].iloc[-1] - part["g"].iloc[0]) / (
                part["z"].iloc[-1] - part["z"].iloc[0]
            )
            misses[line] = slope * (x - x2) / (y - y2)
    said = ", ".join(f"the {line} {signed_percent(miss)}" for line, miss in misses.items())
    return finish(
        (base + points).properties(width=WIDTH - 60, height=260),
        f"{what}: the secant gives the whole change, {said} of it",
        "Line chart of a nonlinearity with two points, one of each run, the straight line through "
        "both (the secant), and the two tangents.",
    )


def method_curves(table: pd.DataFrame) -> alt.TopLevelMixin:
    """Faithfulness of circuits of each size by method, with 95 % bands; click methods to compare.

    Columns: method, size (share of edges), f, low, high, F, P, top1.
    """
    methods = distinct(table["method"])
    pick = alt.selection_point(name="methods", fields=["method"], bind="legend")
    base = alt.Chart(table).encode(
        alt.X("size:Q").title("share of all edges").axis(format="~%").scale(type="log"),
        opacity=alt.condition(pick, alt.value(1), alt.value(0.1)),
    )  # fmt: skip
    symbol = alt.Legend(symbolType="stroke", symbolSize=300)
    line = base.mark_line(point=True, clip=True).encode(
        alt.Y("f:Q").title("faithfulness f").scale(domain=[-0.5, 1.5]),
        alt.Color("method:N").title("ranked by").scale(domain=methods).legend(symbol),
        tooltip=["method:N", alt.Tooltip("size:Q", format=".1%"),
                 *tooltips("f", "low", "high", "F", "P", "top1", form=".2f")],
        strokeDash=alt.StrokeDash("method:N").title("ranked by").scale(domain=methods).legend(
            symbol
        ),
    )  # fmt: skip
    grey = base.mark_area(color="#808080", fillOpacity=0.25, clip=True)  # coloured, two legends
    band = grey.encode(y="low:Q", y2="high:Q", detail="method:N")
    one = alt.Chart(pd.DataFrame({"one": [1.0]})).mark_rule(strokeDash=[4, 4]).encode(y="one:Q")
    enough = table[(table["f"] >= ENOUGH) & (table["size"] < 1)].groupby("method")["size"].min()
    first = enough.reindex(methods).dropna().sort_values(kind="stable")
    said = ", ".join(f"{name} with {percent(size)} of the edges" for name, size in first.items())
    never = [name for name in methods if name not in first.index]
    return finish(
        (one + band + line).add_params(pick).properties(width=WIDTH - 170, height=280),
        f"On held-out prompts circuits reach f = {ENOUGH} ranked by {said or 'nothing here'}"
        f"{'; not by ' + ', '.join(never) if never else ''}",
        "Line chart: share of edges in the circuit across (logarithmic), faithfulness upwards, one "
        "line a method, with bands. The dashed rule is the whole model. Methods are chosen in the "
        "legend.",
    )


def single_edges(table: pd.DataFrame, said: str) -> alt.TopLevelMixin:
    """What closing one edge does against its share, or the gradient's estimate: one point an edge.

    Columns: upstream, downstream, input, edges ("largest", "random"), effect, estimate, method.
    """
    pick = menu("edges", distinct(table["edges"]), "edges", radio=True)
    base = alt.Chart(table).transform_filter("datum.edges == edges")
    points = base.mark_point(size=45).encode(
        alt.X("estimate:Q").title("estimate, in units of F"),
        alt.Y("effect:Q").title("F lost when the edge alone is closed"),
        tooltip=["upstream:N", "downstream:N", "input:N", "method:N",
                 *tooltips("estimate", "effect")],
        **colour_and_shape("method:N", "estimate"),
    )  # fmt: skip
    return finish(
        points.add_params(pick).properties(width=WIDTH - 170, height=280),
        said,
        "Scatter plot, one point an edge and estimate: the estimate across, upwards what closing "
        "the edge does. Radio buttons choose the largest edges, or random ones.",
    )


def grouped_intervals(
    table: pd.DataFrame, row: str, colour: str, title: str, axis: str, what: str, at: float = 0.0
) -> alt.TopLevelMixin:
    """Dots with intervals in rows and colours. Columns: `row`, `colour`, value, low, high."""
    rows, kinds = distinct(table[row]), distinct(table[colour])
    base = alt.Chart(table).encode(
        alt.Y(f"{row}:N").title(None).sort(rows), alt.YOffset(f"{colour}:N").sort(kinds)
    )
    shade = alt.Color(f"{colour}:N").title(colour).scale(domain=kinds)
    points = base.mark_point(filled=True, size=60).encode(
        alt.X("value:Q").title(axis), shade,
        alt.Shape(f"{colour}:N").title(colour).scale(domain=kinds),
        tooltip=[f"{row}:N", f"{colour}:N", *tooltips("value", "low", "high", form=".2f")],
    )  # fmt: skip
    rules = base.mark_rule(strokeWidth=2).encode(shade, x="low:Q", x2="high:Q")
    line = alt.Chart(pd.DataFrame({"at": [at]})).mark_rule(strokeDash=[4, 4]).encode(x="at:Q")
    chart = (line + rules + points).properties(width=WIDTH - 240, height=alt.Step(13))
    return finish(chart, title, f"Dot plot with 95 % intervals: {what}.")
