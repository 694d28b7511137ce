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

CHANGES = {
    "score_change": "change of the reader's score",
    "attention_change": "change of the reader's attention",
    "F_change": "change of logit(IO) − logit(S)",
}
FRAME = (-1.0, 3.0)  # ratios beyond are drawn at the edge
ROOT_MEASURES = {
    "score": "score of the root",
    "attention": "attention of the root",
    "F": "logit(IO) − logit(S)",
}
NOISE = 1e-9  # effects below are rounding


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
    """Every pooled edge changed alone beside its controls; menus for scope, mode and measure.

    The table of `intervene.summary`: edge, scope, mode, control ("signal", "random", "other
    prompt"; others are left out), measure, value, low, high, prompts.
    """
    controls = ["signal", "random", "other prompt"]
    columns = ["edge", "scope", "mode", "control", "measure", "value", "low", "high", "prompts"]
    table = table[table["control"].isin(controls) & table["measure"].isin(CHANGES)][columns]
    pick = [menu("scope", ["local", "global"]), menu("mode", ["ablate", "boost"]),
            menu("measure", CHANGES)]  # fmt: skip
    chosen = "datum.scope == scope && datum.mode == mode && datum.measure == measure"
    base = alt.Chart(table).transform_filter(chosen).encode(
        alt.Y("edge:N").title(None).sort(distinct(table["edge"])),
        alt.YOffset("control:N").sort(controls),
    )  # fmt: skip
    colour = alt.Color("control:N").title("what is changed").scale(domain=controls)
    points = base.mark_point(filled=True, size=45).encode(
        alt.X("value:Q").title("mean change").scale(zero=True),
        colour,
        alt.Shape("control:N").title("what is changed").scale(domain=controls),
        tooltip=["edge:N", "control:N", *tooltips("value", "low", "high"), "prompts:Q"],
    )
    rules = base.mark_rule(strokeWidth=1.5).encode(colour, x="low:Q", x2="high:Q")
    chart = (line_at("x") + rules + points).add_params(*pick)
    ours = table[(table["control"] == "signal") & (table["scope"] == "local")]
    ours = ours[ours["mode"] == "ablate"].groupby("measure")["high"]
    below = ours.apply(lambda high: int((high < 0).sum()))
    return finish(
        chart.properties(width=WIDTH - 260, height=alt.Step(11)),
        f"Ablated in the reader's ear alone, the signals of {below['score_change']} of "
        f"{ours.size()['score_change']} edges lower the score, and those of "
        f"{below['F_change']} lower the logit difference, with intervals clear of zero",
        "Dot plot with 95 % intervals, one row an edge: the mean change when its signal is ablated "
        "or boosted, beside the same for random signals of equal norm and for the signal of the "
        "same edge in another prompt. Menus choose scope, mode and what is measured.",
    )


def effects_compared(table: pd.DataFrame) -> alt.TopLevelMixin:
    """Effect on the reader against effect on the answer, local beside global, linked.

    Columns: edge, scope, trace, reader, reader_low, reader_high (change of attention), answer,
    answer_low, answer_high (change of the logit difference). Menus for trace and edge; a click
    chooses an edge too.
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
    rows = table[(table["scope"] == "global") & (table["reader_high"] < 0)]
    said = []
    for trace in distinct(table["trace"]):
        group = rows[rows["trace"] == trace]
        down, up = int((group["answer_high"] < 0).sum()), int((group["answer_low"] > 0).sum())
        said.append(
            f"{trace}: of {len(group)} edges {down} lower the logit difference, {up} raise it"
        )
    return "Edges that clearly lower attention when ablated globally. " + "; ".join(said)


def global_losses(table: pd.DataFrame) -> pd.DataFrame:
    """Different global results of which both sum and joint effect are losses: their ratio reads."""
    rows = table[table["scope"] == "global"].round(9)
    rows = rows.drop_duplicates(["first", "second", "together"])
    return rows[(rows["together"] < 0) & (rows["first"] + rows["second"] < 0)]


def ratios(table: pd.DataFrame) -> alt.TopLevelMixin:
    """Joint effect ÷ sum of single effects, here and as published; radio buttons for the scope.

    Columns: experiment, source, scope, first, second, together, ratio, low, high.
    """
    sources = distinct(table["source"])
    shown = table.assign(**{x: table[x].clip(*FRAME) for x in ("ratio", "low", "high")})
    pick = menu("scope", ["global", "local"], radio=True)
    base = alt.Chart(shown).transform_filter("datum.scope == scope").encode(
        alt.Y("experiment:N").title(None).sort(distinct(table["experiment"])),
        alt.YOffset("source:N").sort(sources),
    )  # fmt: skip
    colour = alt.Color("source:N").title(None).scale(domain=sources)
    points = base.mark_point(filled=True, size=60).encode(
        alt.X("ratio:Q").title("joint effect ÷ sum of single effects").scale(domain=FRAME),
        colour.legend(orient="bottom"),
        alt.Shape("source:N").title(None).scale(domain=sources),
        tooltip=["experiment:N", "source:N", *tooltips("ratio", "low", "high")],
    )
    rules = base.mark_rule(strokeWidth=2).encode(colour, x="low:Q", x2="high:Q")
    ours = global_losses(table[table["low"].notna()])
    below, above = int((ours["high"] < 1).sum()), int((ours["low"] > 1).sum())
    return finish(
        (line_at("x", 1.0) + rules + points)
        .add_params(pick)
        .properties(width=WIDTH - 120, height=alt.Step(14)),
        f"Together against one by one: of {len(ours)} different global losses here, the ratio is "
        f"clearly below 1 in {below} and clearly above in {above}",
        "Dot plot: joint effect over the sum of single effects for six experiments, here with 95 % "
        "intervals, and as published for GPT-2 small without. Radio buttons choose the scope.",
        "Dashed: effects that add. Ratios and intervals that reach the edge go on beyond it.",
    )


def line_at(axis: str, at: float = 0.0) -> alt.Chart:
    """A dashed line across the chart."""
    line = alt.Chart(pd.DataFrame({"line": [at]})).mark_rule(strokeDash=[4, 4], opacity=0.6)
    return line.encode(**{axis: "line:Q"})


def interaction_map(table: pd.DataFrame) -> alt.TopLevelMixin:
    """Pairwise Shapley interactions of edges; a menu chooses the root.

    Columns: root, first, second (names of edges), value, low, high.
    """
    clear = (table["low"] > NOISE) | (table["high"] < -NOISE)
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
        f"Of {len(table)} pairs of edges, {up} lose more together than in sum and {down} less, "
        "with intervals clear of zero",
        "Heat map: the Shapley interaction of every two edges into a root, in logits; the number "
        "stands in the square, and a frame marks intervals clear of zero. A menu chooses the root.",
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
        tooltip=["method:N", "size:Q", *tooltips("value", "low", "high")],
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
