"""Charts of chapter 5: what interventions on edges do, one at a time and together."""

import altair as alt
import numpy as np
import pandas as pd

from sparse_signals.charts.style import (
    HIGHLIGHT,
    WIDTH,
    distinct,
    diverging,
    finish,
    menu,
    tooltips,
)
from sparse_signals.core.numbers import counted

CHANGES = {
    "score_change": "change of the reader's score",
    "attention_change": "change of the reader's attention",
    "F_change": "change of logit(IO) − logit(S)",
}
RATE = 0.05  # false-discovery rate below which titles count an effect
ROOT_MEASURES = {
    "score": "score of the root",
    "attention": "attention of the root",
    "F": "logit(IO) − logit(S)",
}


def together(table: pd.DataFrame) -> alt.TopLevelMixin:
    """What edges lose us one at a time, summed, and together; radio buttons for the circuit.

    Columns: circuit, edge, kind ("alone", "sum", "together"), value, low, high.
    """
    circuits, kinds = distinct(table["circuit"]), ["alone", "sum", "together"]
    pick = menu("circuit", circuits, radio=True)
    base = alt.Chart(table).transform_filter("datum.circuit == circuit").encode(
        alt.Y("edge:N").title(None).sort(distinct(table["edge"]))
    )  # fmt: skip
    colour = alt.Color("kind:N").title("ablated").scale(domain=kinds)
    points = base.mark_point(filled=True, size=90).encode(
        alt.X("value:Q").title("loss of logit(IO) − logit(S)").scale(zero=True),
        colour,
        alt.Shape("kind:N").title("ablated").scale(domain=kinds),
        tooltip=["edge:N", "kind:N", *tooltips("value", "low", "high")],
    )
    rules = base.mark_rule(strokeWidth=2).encode(colour, x="low:Q", x2="high:Q")
    chart = (line_at("x") + rules + points).add_params(pick)
    said = []
    for name in circuits:
        found = table[table["circuit"] == name].set_index("kind")["value"]
        said.append(f"{name}: {found['sum']:.2f} in sum, {found['together']:.2f} together")
    return finish(
        chart.properties(width=WIDTH - 240, height=alt.Step(26)),
        "What signals lose us one at a time and all at once. " + "; ".join(said),
        "Dot plot with 95 % intervals: the loss of the logit difference when the signal of each "
        "edge is ablated alone, the sum of these losses, and the loss when all are ablated "
        "together. Radio buttons choose the circuit.",
    )


def sweep_dots(table: pd.DataFrame) -> alt.TopLevelMixin:
    """Every pooled edge ablated alone beside its controls; menus for scope and measure.

    The table of `intervene.summary`: edge, scope, control ("signal", "random", "other prompt";
    others are left out), measure, value, low, high, q, prompts.
    """
    controls = ["signal", "random", "other prompt"]
    columns = ["edge", "scope", "control", "measure", "value", "low", "high", "q", "prompts"]
    table = table[table["control"].isin(controls) & table["measure"].isin(CHANGES)][columns]
    pick = [menu("scope", ["local", "global"]), menu("measure", CHANGES)]
    chosen = "datum.scope == scope && datum.measure == measure"
    base = alt.Chart(table).transform_filter(chosen).encode(
        alt.Y("edge:N").title(None).sort(distinct(table["edge"])),
        alt.YOffset("control:N").sort(controls),
    )  # fmt: skip
    colour = alt.Color("control:N").title("what is subtracted").scale(domain=controls)
    points = base.mark_point(filled=True, size=45).encode(
        alt.X("value:Q").title("mean change").scale(zero=True),
        colour,
        alt.Shape("control:N").title("what is subtracted").scale(domain=controls),
        tooltip=["edge:N", "control:N", *tooltips("value", "low", "high", "q"), "prompts:Q"],
    )
    rules = base.mark_rule(strokeWidth=1.5).encode(colour, x="low:Q", x2="high:Q")
    chart = (line_at("x") + rules + points).add_params(*pick)
    ours = table[(table["control"] == "signal") & (table["scope"] == "local")]
    below = {name: int(lowered(rows).sum()) for name, rows in ours.groupby("measure")}
    total = ours["edge"].nunique()
    return finish(
        chart.properties(width=WIDTH - 260, height=alt.Step(11)),
        f"Ablated in the reader's ear alone, {counted(below['score_change'], total, 'signals')} "
        f"lower the score, and {counted(below['F_change'], total)} the logit difference, at a "
        f"false-discovery rate of {100 * RATE:.0f}\xa0%",
        "Dot plot with 95 % intervals, one row an edge: the mean change when its signal is "
        "ablated, beside the same for a random signal of equal norm and for the signal of the same "
        "edge in another prompt. Menus choose scope and what is measured.",
    )


def lowered(table: pd.DataFrame, name: str = "") -> pd.Series:
    """Whether a change is a fall that is discovered at `RATE`: columns value (or `name`) and q."""
    return (table[name or "value"] < 0) & (table[f"{name}_q" if name else "q"] < RATE)


def effects_compared(table: pd.DataFrame) -> alt.TopLevelMixin:
    """Effect on the reader against effect on the answer, local beside global, linked.

    Columns: edge, scope, trace, reader, reader_low, reader_high (change of attention), answer,
    answer_low, answer_high (change of the logit difference), and reader_q, answer_q. Menus for
    trace and edge; a click chooses an edge too.
    """
    traces = distinct(table["trace"])
    first = table["trace"] == traces[0]  # the trace that is shown comes first in the menu
    edges = distinct(pd.concat([table[first], table[~first]])["edge"])
    pick = menu("trace", traces, radio=True)
    names = alt.binding_select(
        options=[None, *edges], labels=["none", *edges], name="highlighted edge "
    )
    mark = alt.selection_point(fields=["edge"], bind=names, on="click", empty=False)
    base = alt.Chart(table).transform_filter("datum.trace == trace")
    x = alt.X("reader:Q").title(CHANGES["attention_change"])
    y = alt.Y("answer:Q").title(CHANGES["F_change"])
    pale = alt.when(mark).then(alt.value(1)).otherwise(alt.value(0.35))
    points = base.mark_point(filled=True, strokeWidth=3).encode(
        x,
        y,
        stroke=alt.when(mark).then(alt.value(HIGHLIGHT)).otherwise(alt.value(None)),
        size=alt.when(mark).then(alt.value(220)).otherwise(alt.value(60)),
        tooltip=["edge:N", *tooltips("reader", "answer", "answer_low", "answer_high")],
    )
    across = base.mark_rule().encode(x="reader_low:Q", x2="reader_high:Q", y="answer:Q",
                                     opacity=pale)  # fmt: skip
    upward = base.mark_rule().encode(x="reader:Q", y="answer_low:Q", y2="answer_high:Q",
                                     opacity=pale)  # fmt: skip
    name = base.mark_text(align="left", dx=9, dy=-9).encode(
        x="reader:Q",
        y="answer:Q",
        text=alt.when(mark).then("edge:N").otherwise(alt.value("")),
    )
    panels = []
    for n, scope in enumerate(("local", "global")):
        layers = [across, upward, points.add_params(mark) if n == 0 else points, name]
        layer = alt.layer(line_at("y"), *(part.transform_filter(f"datum.scope == '{scope}'")
                                        for part in layers))  # fmt: skip
        panels.append(layer.properties(title=scope, width=WIDTH // 2 - 60, height=240))
    return finish(
        alt.hconcat(*panels).add_params(pick),
        _task_title(table),
        "Two scatter plots, local and global ablation, one point an edge: across, the change of "
        "the attention of the head that reads it; upwards, the change of the logit difference; "
        "both with intervals. An edge chosen by click or menu stands out in both.",
    )


def _task_title(table: pd.DataFrame) -> str:
    said = []
    for trace in distinct(table["trace"]):
        down, up, total = task_counts(table[table["trace"] == trace])
        words = f"{counted(down, total)} lower the logit difference too, {up or 'none'} raise it"
        said.append(f"{trace}: {words if total else 'none'}")
    return "Edges that lower attention when ablated globally. " + "; ".join(said)


def task_counts(table: pd.DataFrame, scope: str = "global") -> tuple[int, int, int]:
    """Of the edges that lower the reader's attention: how many lower, and raise, the answer; all.

    All are discoveries at `RATE`; columns of `effects_compared`.
    """
    rows = table[(table["scope"] == scope) & lowered(table, "reader")]
    moved = rows["answer_q"] < RATE
    down, up = (moved & (rows["answer"] < 0)), (moved & (rows["answer"] > 0))
    return int(down.sum()), int(up.sum()), len(rows)


def joint_losses(table: pd.DataFrame) -> alt.TopLevelMixin:
    """What two sets of edges lose us in sum and together, and the gap between the two.

    Columns: experiment, and summed, joint and gap with *_low and *_high.
    """
    kinds = {"summed": "in sum", "joint": "together", "gap": "gap"}
    parts = [
        table[["experiment", name, f"{name}_low", f"{name}_high"]]
        .set_axis(["experiment", "value", "low", "high"], axis=1)
        .assign(loss=word)
        for name, word in kinds.items()
    ]
    shown, words = pd.concat(parts, ignore_index=True), list(kinds.values())
    base = alt.Chart(shown).encode(
        alt.Y("experiment:N").title(None).sort(distinct(table["experiment"])),
        alt.YOffset("loss:N").sort(words),
    )
    colour = alt.Color("loss:N").title(None).scale(domain=words)
    points = base.mark_point(filled=True, size=60).encode(
        alt.X("value:Q").title("loss of logit(IO) − logit(S)").scale(zero=True),
        colour.legend(orient="bottom"),
        alt.Shape("loss:N").title(None).scale(domain=words),
        tooltip=["experiment:N", "loss:N", *tooltips("value", "low", "high")],
    )
    rules = base.mark_rule(strokeWidth=2).encode(colour, x="low:Q", x2="high:Q")
    more, less = gap_counts(table)
    return finish(
        (line_at("x") + rules + points).properties(width=WIDTH - 160, height=alt.Step(14)),
        f"Of {len(table)} experiments, the loss together is clearly above the sum in "
        f"{more or 'none'} and clearly below in {less or 'none'}",
        "Dot plot with 95 % intervals, one row an experiment: the loss of the logit difference in "
        "sum when two sets of edges are ablated one at a time, together, and the gap between them.",
    )


def gap_counts(table: pd.DataFrame) -> tuple[int, int]:
    """How many experiments have a gap clearly above zero, and how many clearly below."""
    return int((table["gap_low"] > 0).sum()), int((table["gap_high"] < 0).sum())


def line_at(axis: str, at: float = 0.0) -> alt.Chart:
    """A dashed line across the chart."""
    line = alt.Chart(pd.DataFrame({"line": [at]})).mark_rule(strokeDash=[4, 4], opacity=0.6)
    return line.encode(**{axis: "line:Q"})


def interaction_map(table: pd.DataFrame) -> alt.TopLevelMixin:
    """Pairwise Shapley interactions of edges; a menu chooses the root.

    Columns: root, first, second (names of edges), value, low, high, q.
    """
    clear = table["q"] < RATE
    table = table.assign(clear=np.where(clear, "yes", "no"))
    roots = distinct(table["root"])
    pick = menu("root", roots)
    base = alt.Chart(table).transform_filter("datum.root == root").encode(
        alt.X("second:N").title(None).sort(None).axis(labelAngle=-40),
        alt.Y("first:N").title(None).sort(None),
        tooltip=["first:N", "second:N", *tooltips("value", "low", "high")],
    )  # fmt: skip
    squares = base.mark_rect(strokeWidth=3).encode(
        alt.Color("value:Q").title("interaction").scale(diverging(table["value"])),
        alt.Stroke("clear:N")
        .title("discovered")
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
        f"Of {len(table)} pairs of edges, {up or 'none'} take more of the root's score together "
        f"than in sum and {down or 'none'} less, at a false-discovery rate of "
        f"{100 * RATE:.0f}\xa0%",
        "Heat map: the Shapley interaction of every two edges into a root, in units of its score; "
        "the number stands in the square, and a frame marks discoveries. A menu chooses the root.",
    )


def takeover_lines(table: pd.DataFrame) -> alt.TopLevelMixin:
    """What is left after each knock-out, norms frozen or not; a menu for the measure.

    Columns: circuit, scales, round, measure, value, low, high.
    """
    pick = menu("measure", ROOT_MEASURES)
    name, kinds = "scales of the normalisation", distinct(table["scales"])
    base = alt.Chart(table).transform_filter("datum.measure == measure").encode(
        alt.X("round:O").title("paths knocked out").axis(labelAngle=0),
        alt.Color("scales:N").title(name).scale(domain=kinds).legend(symbolOpacity=1),
    )  # fmt: skip
    lines = base.mark_line().encode(y="value:Q", strokeDash=alt.StrokeDash("scales:N").legend(None))
    points = base.mark_point(filled=True, size=60).encode(
        alt.Y("value:Q").title("mean").scale(zero=True),
        alt.Shape("scales:N").title(name).scale(domain=kinds).legend(symbolOpacity=1),
        tooltip=["scales:N", "round:O", *tooltips("value", "low", "high")],
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
        f"{row['circuit']} ({row['scales']}) {round(100 * row['value'])}\xa0% "
        f"[{round(100 * row['low'])}, {round(100 * row['high'])}]"
        for row in first.to_dict("records")
    ]
    return finish(
        chart,
        "Of what the first knock-out takes from the score, this returns: " + "; ".join(said),
        "Line chart with 95 % intervals, one panel a circuit: score, attention and logit "
        "difference after no, one and two paths are knocked out, with the scales of the "
        "normalisation recomputed or frozen. A menu chooses the measure.",
    )
