"""Charts of chapter 4: one firing opened up, what carries scores, and how steady a trace is."""

from collections.abc import Sequence

import altair as alt
import pandas as pd

from sparse_signals.charts.graph import (
    Kinds,
    Slider,
    draw,
    largest_edge,
    named_nodes,
    strongest_paths,
)
from sparse_signals.charts.style import (
    SIDE_WORDS,
    WIDTH,
    colour_and_dash,
    distinct,
    finish,
    menu,
    tooltips,
)
from sparse_signals.core.numbers import counted, percent

SETTINGS = {
    "level": "attention from which a head fires",
    "share": "share of a side that is kept",
    "fraction": "share f of the score in the support",
}
ORDER = (
    "IO-1", "IO", "IO+1", "S1-1", "S1", "S1+1", "third-1", "third", "third+1",
    "S2-1", "S2", "S2+1", "end-1", "end",
)  # fmt: skip
SHARE = alt.Tooltip("share:Q", format=".0%", title="share of its side of the score")
SIDE_KINDS = Kinds(
    "side",
    "writes at the",
    {"destination": [1, 0], "source": [5, 3]},
    ("source",),
    "share",
    "share of the score",
    "Colour and dashes tell on which side of the score an edge works; its thickness is its share "
    "of that side.",
    (alt.Tooltip("source:N", title="attends to"),),
)


def firing_opened(table: pd.DataFrame, what: str, most: int = 12) -> alt.TopLevelMixin:
    """Contributions to one firing, from all slices and from the support alone; a menu for the side.

    Columns: component, side, slices ("all slices", "the support"), weight, kept (bool). The `most`
    largest of each side are drawn.
    """
    size = table["weight"].abs().groupby([table["side"], table["component"]]).transform("max")
    rank = size.groupby(table["side"]).rank(method="dense", ascending=False)
    shown = _with_sides(table[rank <= most]).assign(size=size)
    shown["edge"] = shown["kept"].map({True: "yes", False: "no"})
    kinds = ["the support", "all slices"]
    pick = _side_of()
    bars = alt.Chart(shown).transform_filter(pick).mark_bar().encode(
        alt.X("weight:Q").title("contribution, softmax units"),
        alt.Y("component:N").title(None).sort(field="size", op="max", order="descending"),
        alt.YOffset("slices:N").sort(kinds),
        alt.Color("slices:N").title("counted over").scale(domain=kinds),
        alt.Opacity("edge:O").title("kept as an edge").scale(domain=["yes", "no"], range=[1, 0.4]),
        tooltip=["component:N", "slices:N", *tooltips("weight"), "edge:O"],
    )  # fmt: skip
    chart = bars.add_params(pick).properties(width=WIDTH - 180, height=alt.Step(9))
    sums = table.groupby("slices")["weight"].agg(lambda x: x.abs().sum())
    kept = table[table["kept"]].groupby("side")["component"].nunique()
    change = sums["the support"] / sums["all slices"] - 1
    said = f"{percent(abs(change))} {'more' if change > 0 else 'less'}"
    dest, src = (int(kept.get(side, 0)) for side in ("dest", "src"))
    return finish(
        chart,
        f"{what}: the trace keeps {dest} component{'s' * (dest != 1)} of the destination side and "
        f"{src} of the source side; the magnitudes of all contributions sum to {said} over the "
        "support than over all slices",
        "Bar chart: for each upstream component its contribution to the score of one firing, once "
        "from the slices in the support and once from all slices. Kept components are filled, "
        "the others pale. Radio buttons choose the side.",
    )


def _with_sides(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(side=table["side"].map(SIDE_WORDS) + " side")


def _side_of() -> alt.Parameter:
    """The rows of one side, chosen by radio buttons."""
    sides = [f"{word} side" for word in SIDE_WORDS.values()]
    return alt.selection_point(
        fields=["side"], value=sides[0], empty=False, on="click",
        bind={"side": alt.binding_radio(options=sides, name="side ")},  # pyright: ignore[reportArgumentType]
    )  # fmt: skip


def kinds_of_components(table: pd.DataFrame) -> alt.TopLevelMixin:
    """What carries scores, by layer of the head; a menu for the side.

    Columns: layer, side, kind, share, low, high.
    """
    table = _with_sides(table)
    pick = _side_of()
    kinds = distinct(table["kind"])
    base = alt.Chart(table).transform_filter(pick).encode(
        alt.X("layer:Q").title("layer of the head that fires").axis(tickMinStep=1, format="d"),
    )  # fmt: skip
    colour = alt.Color("kind:N").title("written by").scale(domain=kinds)
    bars = base.mark_line(point={"size": 30}).encode(
        alt.Y("share:Q").title("mean share of the side").axis(format=".0%"),
        colour,
        alt.StrokeDash("kind:N").title("written by").scale(domain=kinds),
        tooltip=["layer:Q", "kind:N", *tooltips("share", "low", "high", form=".1%"), "firings:Q"],
    )  # fmt: skip
    rules = base.mark_rule(opacity=0.5).encode(colour, y="low:Q", y2="high:Q")
    above = table[(table["layer"] > 0) & (table["kind"] == "head")]
    shares = above.groupby("side")["share"].mean()
    said = " and ".join(
        f"{percent(shares[side])} of the {side}" for side in distinct(table["side"])
    )
    chart = (rules + bars).add_params(pick).properties(width=WIDTH - 140, height=260)
    return finish(
        chart,
        f"Above the first layer, heads carry {said}, on average over layers",
        "Lines with 95 % intervals: for heads of each layer the mean share of their scores that "
        "was written by embeddings, positions, heads, MLPs and biases. Radio buttons choose the "
        "side.",
    )


def sensitivity_curves(table: pd.DataFrame) -> alt.TopLevelMixin:
    """Overlap with the default trace as one setting changes; a menu chooses the setting.

    Columns: setting, x, value (overlap), low, high, edges (a prompt), weighting.
    """
    pick = menu("setting", SETTINGS, start="share")
    plain = alt.Chart(table).transform_filter("datum.setting == setting").encode(
        alt.X("x:Q").title("value of the setting").scale(zero=False)
    )  # fmt: skip
    band = plain.mark_area(opacity=0.2).encode(y="low:Q", y2="high:Q", color="weighting:N")
    base = plain.encode(**colour_and_dash("weighting:N", "weighting"))
    tip = ["weighting:N", "x:Q", *tooltips("value", "low", "high", form=".2f"),
           alt.Tooltip("edges:Q", format=".1f", title="edges a prompt")]  # fmt: skip
    line = base.mark_line(point=True).encode(
        alt.Y("value:Q").title("overlap with the default trace").scale(domain=[0, 1]),
        tooltip=tip,
    )
    below = base.mark_line(point=True).encode(
        alt.Y("edges:Q").title("edges a prompt").scale(zero=True),
        tooltip=tip,
    )
    chart = alt.vconcat(
        (band + line).properties(width=WIDTH - 150, height=180),
        below.properties(width=WIDTH - 150, height=110),
    )
    first = table[table["weighting"] == table["weighting"].iloc[0]]
    lowest = first.groupby("setting")["value"].min()
    worst, best = lowest.idxmin(), lowest.idxmax()
    return finish(
        chart.add_params(pick),
        f"Within the ranges shown, a trace depends most on the {SETTINGS[worst]} (overlap down to "
        f"{lowest[worst]:.2f}), least on the {SETTINGS[best]} (down to {lowest[best]:.2f})",
        "Two line charts over the values of one setting: above, the overlap of the edges with the "
        "default trace, with a 95 % band; below, the number of edges a prompt. A menu chooses "
        "the setting; colours and dashes are the two weightings.",
    )


def dots(table: pd.DataFrame, row: str, what: str, title: str, axis: str) -> alt.TopLevelMixin:
    """A dot with its interval for each row. Columns: `row`, value, low, high."""
    rows = distinct(table[row])
    base = alt.Chart(table).encode(alt.Y(f"{row}:N").title(None).sort(rows))
    points = base.mark_point(filled=True, size=70).encode(
        alt.X("value:Q").title(axis).scale(zero=True),
        tooltip=[f"{row}:N", *tooltips("value", "low", "high", form=".3g")],
    )
    rules = base.mark_rule(strokeWidth=2).encode(x="low:Q", x2="high:Q")
    chart = (rules + points).properties(width=WIDTH - 240, height=alt.Step(24))
    return finish(chart, title, f"Dot plot with 95 % intervals: {what}.")


def reasons(
    table: pd.DataFrame, head: str, first: Sequence[str], most: int = 12
) -> alt.TopLevelMixin:
    """Why a score is high, and why it is higher than another; a menu for the slices counted.

    Columns: component, question, slices, value (mean contribution), low, high. The chart opens on
    the first of the slices; `first` says who contributes most there, question by question. The
    `most` largest components are drawn.
    """
    size = table["value"].abs().groupby(table["component"]).transform("max")
    largest = size.groupby(table["component"]).first().nlargest(most)
    shown = table.assign(size=size)[table["component"].isin(largest.index)]
    questions, slices = (distinct(table[c]) for c in ("question", "slices"))
    pick = menu("slices", slices, "counted over", radio=True)
    base = alt.Chart(shown).transform_filter("datum.slices == slices").encode(
        alt.Y("component:N").title(None).sort(field="size", op="max", order="descending"),
        alt.YOffset("question:N").sort(questions),
    )  # fmt: skip
    colour = alt.Color("question:N").title("question").scale(domain=questions)
    rules = base.mark_rule(strokeWidth=2).encode(colour, x="low:Q", x2="high:Q")
    points = base.mark_point(filled=True, size=60).encode(
        colour,
        alt.X("value:Q").title("mean contribution, softmax units"),
        alt.Shape("question:N").title("question").scale(domain=questions),
        tooltip=["component:N", "question:N", *tooltips("value", "low", "high", form=".2f")],
    )  # fmt: skip
    said = "; ".join(f"{ask}: {who}" for ask, who in zip(questions, first, strict=True))
    return finish(
        (rules + points).add_params(pick).properties(width=WIDTH - 200, height=alt.Step(11)),
        f"Head {head}, destination side, {slices[0]}. {said[0].upper()}{said[1:]}",
        "Dot plot with intervals: for each upstream component its mean contribution to the score "
        "of a head at the indirect object, and to the difference to the score at the subject. "
        "Radio buttons choose which slices are counted.",
    )


def heads_compared(table: pd.DataFrame) -> alt.TopLevelMixin:
    """Trace against ablation, one point a head; a menu chooses the trace.

    Columns: name, trace, share (of prompts with the head in the trace), F, F_low, F_high, P, top1
    (effects of ablation), rho (the trace's rank correlation with |effect on F|) and clear (whether
    that is beyond what layers explain).
    """
    table = table[["name", "trace", "share", "F", "F_low", "F_high", "P", "top1", "rho", "clear"]]
    pick = menu("trace", distinct(table["trace"]))
    base = alt.Chart(table).transform_filter("datum.trace == trace").encode(
        alt.X("share:Q").title("in the trace, share of prompts").axis(format=".0%")
    )  # fmt: skip
    points = base.mark_point(filled=True, size=50).encode(
        alt.Y("F:Q").title("change of the logit difference when ablated"),
        tooltip=["name:N", alt.Tooltip("share:Q", format=".0%"),
                 *tooltips("F", "F_low", "F_high", "P", "top1", form=".2f")],
    )  # fmt: skip
    rules = base.mark_rule(opacity=0.6).encode(y="F_low:Q", y2="F_high:Q")
    sizes = table.drop_duplicates("name").set_index("name")["F"].abs().nlargest(8)
    named = table[table["name"].isin(sizes.index)]
    names = alt.Chart(named).transform_filter("datum.trace == trace")
    names = names.mark_text(align="left", dx=6, dy=-5).encode(x="share:Q", y="F:Q", text="name:N")
    zero = alt.Chart(pd.DataFrame({"zero": [0]})).mark_rule(strokeDash=[4, 4]).encode(y="zero:Q")
    facts = table.drop_duplicates("trace").set_index("trace")
    said = ", ".join(f"{name} ρ = {row['rho']:.2f}" for name, row in facts.iterrows())
    clear = counted(int(facts["clear"].sum()), len(facts), "kinds of trace")
    return finish(
        (zero + rules + points + names).add_params(pick).properties(width=WIDTH - 60, height=280),
        f"In {clear}, being in it says more about the effect of ablation than the layer does: "
        f"{said}",
        "Scatter plot, one point a head: across, the share of prompts whose trace has the head; "
        "upwards, the change of the logit difference when the head is ablated, with intervals. "
        "The eight heads with the largest effects are named. A menu chooses the trace.",
    )


def circuit_graph(
    edges: pd.DataFrame, order: Sequence[str] = ORDER, nodes: int | None = None
) -> alt.TopLevelMixin:
    """The circuit pooled over prompts: columns are token roles, rows are layers.

    `edges`: upstream, downstream, side ("dest" or "src"), dest_role, src_role, role, up_layer,
    down_layer, prompts, of, weight, low, high, share; one row per edge. Roles that `order` lacks
    come first. A slider prunes edges of few prompts; nodes are pinned by click or by menu. With
    `nodes`, only the strongest paths are drawn, which join so many nodes.
    Raises ValueError when there are no edges.
    """
    table = named_edges(edges)
    every = len(table)
    table = table if nodes is None else strongest_paths(table, nodes)
    tips = [
        alt.Tooltip("prompts:Q"),
        alt.Tooltip("percent:Q", format=".0f", title="% of prompts"),
        *tooltips("weight", "low", "high", form=".3g"),
        SHARE,
    ]
    common, of = int(table["percent"].ge(50).sum()), edges["of"].max()
    best = largest_edge(table, table["percent"] / 100 if of > 1 else table["share"])
    title = (
        f"{_of_edges(len(table), every)} traced in {of} prompts, {common} "
        f"{'is' if common == 1 else 'are'} in at least half of them; most often, {best}"
        if of > 1
        else f"Traced in one prompt: {len(table)} edges, the largest share {best}"
    )
    found = distinct([*table["at"], *table["dest"]])
    known = [name for name in order if name in found]
    columns = [name for name in found if name not in known] + known
    slider = _ending_at_largest("% of prompts", table)
    return draw(table, columns, "role of the token", SIDE_KINDS, slider, tips, title)


def _ending_at_largest(unit: str, table: pd.DataFrame) -> Slider:
    """A slider whose end leaves the largest edge."""
    return Slider(unit, most=max(1, int(table["percent"].max())))


def _of_edges(shown: int, every: int) -> str:
    return (
        f"Of {every:,} edges" if shown == every else f"Of the {shown} strongest of {every:,} edges"
    )


def prompt_graph(
    edges: pd.DataFrame, tokens: Sequence[str], nodes: int | None = None
) -> alt.TopLevelMixin:
    """The trace of one prompt: columns are its tokens, rows are layers.

    `edges`: upstream, downstream, side, dest, src, token (the position where upstream writes),
    weight, share (of the score's side), up_layer, down_layer. `tokens`: the text of each position.
    A slider prunes edges of small share. With `nodes`, only the strongest paths are drawn, which
    join so many nodes. Raises ValueError when there are no edges.
    """
    names = [f"{pos} {text.strip()}" for pos, text in enumerate(tokens)]
    at, dest, source = (edges[c].map(dict(enumerate(names))) for c in ("token", "dest", "src"))
    table = _named_ends(edges, at, dest, source, 100 * edges["share"].clip(0, 1))
    every = len(table)
    table = table if nodes is None else strongest_paths(table, nodes)
    tips = [*tooltips("weight", form=".3g"), SHARE]
    title = (
        f"{_of_edges(len(table), every)} in the trace of this prompt, the largest share of one "
        f"side of a score has {largest_edge(table, table['share'])}"
    )
    slider = _ending_at_largest("% of its side of the score", table)
    return draw(table, names, "token", SIDE_KINDS, slider, tips, title)


def named_edges(edges: pd.DataFrame) -> pd.DataFrame:
    """The pooled edges as `circuit_graph` draws them: writer and reader are names of nodes.

    More columns: side (in words), at, dest and source (roles of the writer, of the reader, and
    the one it attends to), percent (of the prompts), lane (numbers the edges between the same two
    nodes). Raises ValueError when there are no edges.
    """
    percents = 100 * edges["prompts"] / edges["of"]
    return _named_ends(edges, edges["role"], edges["dest_role"], edges["src_role"], percents)


def _named_ends(
    edges: pd.DataFrame, at: pd.Series, dest: pd.Series, source: pd.Series, percents: pd.Series
) -> pd.DataFrame:
    table = named_nodes(edges, at, dest, percents)
    return table.assign(source=source.to_numpy(), side=table["side"].astype(str).map(SIDE_WORDS))
