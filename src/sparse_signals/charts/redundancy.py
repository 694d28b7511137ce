"""Charts of chapter 5: edges that back each other up, what takes over, and circuits run alone."""

import altair as alt
import numpy as np
import pandas as pd

from sparse_signals.charts.base import (
    HIGHLIGHT,
    WIDTH,
    diverging,
    finish,
)
from sparse_signals.charts.paths import distinct, line_at, menu, numbers

KEPT = {
    "score": "score of the root",
    "attention": "attention of the root",
    "F": "logit(IO) − logit(S)",
}
NOISE = 1e-9  # effects below are rounding


def interaction_map(table: pd.DataFrame) -> alt.TopLevelMixin:
    """Pairwise Shapley interactions of edges; a menu chooses the root.

    Columns: root, first, second (names of edges), value, low, high.
    """
    table = table.assign(clear=np.where(_clear(table), "yes", "no"))
    roots = distinct(table["root"])
    pick = menu("root", roots)
    base = alt.Chart(table).transform_filter("datum.root == root").encode(
        alt.X("second:N").title(None).sort(None).axis(labelAngle=-40),
        alt.Y("first:N").title(None).sort(None),
        tooltip=["first:N", "second:N", *numbers("value", "low", "high")],
    )  # fmt: skip
    squares = base.mark_rect(strokeWidth=3).encode(
        alt.Color("value:Q").title("interaction").scale(diverging(table["value"])),
        alt.Stroke("clear:N")
        .title("interval clear of zero")
        .scale(domain=["yes", "no"], range=[HIGHLIGHT, "transparent"]),
    )
    dark = np.abs(table["value"]).max() / 2
    words = base.mark_text().encode(
        text=alt.Text("value:Q", format=".2f"),
        color=alt.when(f"abs(datum.value) > {dark:.4g}")
        .then(alt.value("white"))
        .otherwise(alt.value("black")),
    )
    clear = table[table["clear"] == "yes"]
    up, down = int((clear["value"] > 0).sum()), int((clear["value"] < 0).sum())
    return finish(
        (squares + words).add_params(pick).properties(width=alt.Step(64), height=alt.Step(38)),
        f"Of {len(table)} pairs of edges, {up} back each other up and {down} take what the other "
        "takes, with intervals clear of zero",
        "Heat map: the Shapley interaction of every two edges into a root, in logits; the number "
        "stands in the square, and a frame marks intervals clear of zero. A menu chooses the root.",
    )


def _clear(table: pd.DataFrame) -> pd.Series:
    return (table["low"] > NOISE) | (table["high"] < -NOISE)


def takeover_lines(table: pd.DataFrame) -> alt.TopLevelMixin:
    """What is left after each knock-out, norms frozen or not; a menu for the measure.

    Columns: circuit, scales, round, measure, value, low, high.
    """
    pick = menu("measure", list(KEPT), list(KEPT.values()))
    name, kinds = "scales of the normalisation", distinct(table["scales"])
    base = alt.Chart(table).transform_filter("datum.measure == measure").encode(
        alt.X("round:O").title("paths knocked out").axis(labelAngle=0),
        alt.Color("scales:N").title(name).scale(domain=kinds).legend(symbolOpacity=1),
    )  # fmt: skip
    lines = base.mark_line().encode(y="value:Q", strokeDash=alt.StrokeDash("scales:N").legend(None))
    points = base.mark_point(filled=True, size=60).encode(
        alt.Y("value:Q").title("mean").scale(zero=True),
        alt.Shape("scales:N").title(name).scale(domain=kinds).legend(symbolOpacity=1),
        tooltip=["scales:N", "round:O", *numbers("value", "low", "high")],
    )
    rules = base.mark_rule().encode(y="low:Q", y2="high:Q")
    chart = (
        alt.layer(rules, lines, points)
        .properties(width=WIDTH // 2 - 60, height=220)
        .facet(column=alt.Column("circuit:N").title(None).sort(distinct(table["circuit"])))
        .resolve_scale(y="independent")
        .add_params(pick)
    )
    first = table[(table["round"] == 1) & (table["measure"] == "returned")]
    said = [
        f"{row.circuit} ({row.scales}) {_whole(row.value)}\xa0% [{_whole(row.low)}, "
        f"{_whole(row.high)}]"
        for row in first.itertuples()
    ]
    return finish(
        chart,
        "Of what the first knock-out takes from the score, this returns: " + "; ".join(said),
        "Line chart with 95 % intervals, one panel a circuit: score, attention and logit "
        "difference after no, one and two paths are knocked out, with the scales of the "
        "normalisation recomputed or frozen. A menu chooses the measure.",
    )


def _whole(share: float) -> int:
    return round(100 * share)


def faithfulness_curves(table: pd.DataFrame, reached: pd.Series, level: float) -> alt.TopLevelMixin:
    """Circuits of growing size run alone; a menu for faithfulness or completeness.

    `table` is that of `faithfulness.curves`; `reached` says for each method with how many edges
    its faithfulness first is `level` (NaN: never).
    """
    names = ["faithfulness", "completeness"]
    parts = [
        table[["method", "size", name, f"{name}_low", f"{name}_high"]]
        .set_axis(["method", "size", "value", "low", "high"], axis=1)
        .assign(curve=name)
        for name in names
    ]
    shown = pd.concat(parts, ignore_index=True)
    pick, kinds = menu("curve", names, radio=True), distinct(shown["method"])
    base = alt.Chart(shown[shown["size"] > 0]).transform_filter("datum.curve == curve").encode(
        alt.X("size:Q").title("edges in the circuit").scale(type="log"),
        alt.Color("method:N").title("edges ranked by").scale(domain=kinds).legend(symbolOpacity=1),
    )  # fmt: skip
    band = base.mark_area(opacity=0.15).encode(y="low:Q", y2="high:Q")
    line = base.mark_line().encode(y="value:Q", strokeDash=alt.StrokeDash("method:N").legend(None))
    points = base.mark_point(filled=True, size=45, opacity=1).encode(
        alt.Y("value:Q").title("0: as with all edges closed, 1: the model"),
        alt.Shape("method:N").title("edges ranked by").scale(domain=kinds).legend(symbolOpacity=1),
        tooltip=["method:N", "size:Q", *numbers("value", "low", "high")],
    )
    goal = line_at("y", level) + line_at("y", 2 - level)
    return finish(
        (goal + band + line + points).add_params(pick).properties(width=WIDTH - 120, height=300),
        _reached_title(reached, level),
        "Line chart with 95 % bands over the number of edges, on a logarithmic axis: how much of "
        "the logit difference a circuit gives alone, for several rankings of the edges. Dashed: "
        "the range that counts as faithful. Radio buttons choose faithfulness or completeness.",
    )


def _reached_title(reached: pd.Series, level: float) -> str:
    found = reached.dropna().sort_values(kind="stable")
    sizes = [f"{name} {size:,.0f}" for name, size in found.items()]
    never = reached.index[reached.isna()]
    goal, those = f"{100 * level:.0f}\xa0% of the logit difference", ", ".join(sizes) or "none"
    said = f"Edges to reach {goal}: {those}"
    return said + (f"; never reached by {', '.join(never)}" if len(never) else "")
