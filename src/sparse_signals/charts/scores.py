"""Charts of chapter 1: what a score does, and what it is made of."""

import altair as alt
import numpy as np
import pandas as pd

from sparse_signals.charts.attention import STEP, head_names, percent
from sparse_signals.charts.base import finish, rounded


def softmax_bars(row: pd.DataFrame, head: str) -> alt.TopLevelMixin:
    """Scores and attention of one destination token; a slider adds to the score of one source.

    `row`: label, score, one row per visible source token, in reading order.
    """
    best, second = row["score"].nlargest(2)
    weight = np.exp(row["score"] - best)
    favourite = row.loc[row["score"].idxmax(), "label"]
    token = alt.param(
        name="token", value=favourite,
        bind=alt.binding_select(options=list(row["label"]), name="Token "),
    )  # fmt: skip
    slider = alt.binding_range(min=-6, max=6, step=0.5, name="Add to its score ")
    extra = alt.param(name="extra", value=0, bind=slider)
    place = alt.Y("label:N").sort(None).title("source token")
    bars = (
        alt.Chart(rounded(row.assign(order=range(len(row)))), width=150, height=alt.Step(STEP + 3))
        .transform_calculate(changed="datum.score + (datum.label === token ? extra : 0)")
        .transform_calculate(e="exp(datum.changed)")
        .transform_joinaggregate(all="sum(e)")
        .transform_calculate(attention="datum.e / datum.all")
    )
    tips = [alt.Tooltip(n, format=".3f") for n in ("score:Q", "changed:Q", "attention:Q")]
    chosen = alt.condition("datum.label === token", alt.value(1), alt.value(0.65))
    score = bars.mark_bar(color="#0072B2").encode(
        alt.X("changed:Q").title("score (softmax units)"), place,
        opacity=chosen, tooltip=["label:N", *tips],
    )  # fmt: skip
    attention = bars.mark_bar(color="#D55E00").encode(
        alt.X("attention:Q").title("attention").axis(format="%").scale(domain=[0, 1]),
        place.axis(None), opacity=chosen, tooltip=["label:N", *tips],
    )  # fmt: skip
    title = (
        f"Head {head} gives “{favourite}” {percent(1 / weight.sum())} of its attention: its score "
        f"is {best - second:.1f} above the next"
    )
    description = (
        f"Two bar charts over the {len(row)} tokens that the last token sees, for head {head}: "
        f"scores on the left, attention on the right. {title}. A slider changes one score."
    )
    chart = alt.hconcat(score, attention, spacing=12).add_params(token, extra)
    return finish(chart, title, description)


def log_odds(points: pd.DataFrame) -> alt.TopLevelMixin:
    """Odds of attention between two sources of one row against the difference of their scores.

    `points`: layer, head, difference (a_ij − a_ij'), odds (A_ij / A_ij').
    """
    off = np.abs(np.log(points["odds"]) - points["difference"]).max()
    where = "on the line" if off < 1e-3 else f"within {off:.2g} of the line"
    title = (
        f"All {len(points):,} pairs lie {where}: one more unit of score multiplies the odds "
        "by e = 2.718…"
    )
    limit = float(np.ceil(np.abs(points["difference"]).max()))
    line = pd.DataFrame({"difference": [-limit, limit], "odds": np.exp([-limit, limit])})
    x = alt.X("difference:Q").title("difference of two scores, a(i,j) − a(i,j′)")
    y = alt.Y("odds:Q").scale(type="log").title("odds of attention, A(i,j) / A(i,j′)")
    y = y.axis(format="~g", tickCount=7)
    tips = ["name:N", *(alt.Tooltip(n, format=".3g") for n in ("difference:Q", "odds:Q"))]
    points = points.assign(name=head_names(points))[["name", "difference", "odds"]]
    dots = alt.Chart(rounded(points)).mark_point(size=28, opacity=0.7, color="#0072B2")
    rule = alt.Chart(rounded(line)).mark_line(strokeDash=[5, 4], color="#D55E00")
    layers = alt.layer(rule.encode(x, y), dots.encode(x, y, tooltip=tips))
    description = (
        "Scatter chart. Each point is two source tokens seen by one destination in one head: the "
        f"difference of their scores and the odds of their attention. {title}."
    )
    return finish(layers.properties(width=380, height=260), title, description)


PARTS = ("content", "source", "destination", "constant")


def score_parts(table: pd.DataFrame) -> alt.TopLevelMixin:
    """How much of the variation of the scores is due to each part of Ω, in every head.

    `table`: scope ("within a softmax row" or another choice), part, layer, head, share.
    """
    table = table.assign(name=head_names(table))
    scopes = list(dict.fromkeys(table["scope"]))
    scope = alt.param(
        name="scope", value=scopes[0], bind=alt.binding_select(options=scopes, name="Variation ")
    )
    chosen = alt.selection_point(name="marked", fields=["name"], on="click", empty=False)
    dots = (
        _by_layer(alt.Chart(rounded(table), width=380, height=70), table)
        .transform_filter("datum.scope === scope")
        .mark_point(color="#0072B2", filled=True)
        .encode(
            alt.Y("share:Q").title("share").axis(format="%", tickCount=4),
            size=alt.condition(chosen, alt.value(150), alt.value(28)),
            shape=alt.condition(chosen, alt.value("diamond"), alt.value("circle")),
            tooltip=["name:N", "part:N", alt.Tooltip("share:Q", format=".1%")],
        )
        .add_params(chosen)
    )
    row = alt.Row("part:N", sort=list(PARTS)).title(None)
    row = row.header(labelOrient="top", labelAnchor="start", labelFontWeight="bold")
    title = _parts_title(table[table["scope"] == scopes[0]], scopes[0])
    description = (
        "Four dot charts, one for each part of the score, with one dot for each head: the share of "
        f"the variation of the head's scores that is due to the part. {title}."
    )
    return finish(dots.facet(row=row, spacing=6).add_params(scope), title, description)


def _parts_title(table: pd.DataFrame, scope: str) -> str:
    median = table.groupby("part")["share"].median()
    size = table.groupby("part")["share"].apply(lambda share: share.abs().max())
    live = [part for part in PARTS if size[part] > 1e-9]
    found = ", ".join(f"{part} {percent(median[part])}" for part in live)
    *others, last = [part for part in PARTS if part not in live] or [""]
    dead = f"{', '.join(others)} and {last}" if others else last
    nothing = f"; {dead} exactly nothing" if dead else ""
    return f"What makes scores vary {scope} (median head): {found}{nothing}"


def pair_share(table: pd.DataFrame) -> alt.TopLevelMixin:
    """What an additive score leaves unexplained in every head, beside its controls.

    `table`: kind, layer, head, share, low, high. The first kind is the one that is claimed.
    """
    table = table.assign(name=head_names(table))
    kinds = list(dict.fromkeys(table["kind"]))
    shown = alt.selection_point(name="kinds", fields=["kind"], bind="legend")
    base = _by_layer(alt.Chart(rounded(table), width=380, height=280), table)
    legend = alt.Legend(orient="bottom", columns=1)
    colour = alt.Color("kind:N").scale(domain=kinds).title(None)
    faded = alt.condition(shown, alt.value(1), alt.value(0.08))
    rule = base.mark_rule(strokeWidth=1.5).encode(
        alt.Y("low:Q").title("share of the variation within a row").axis(format="%"),
        alt.Y2("high:Q"), color=colour.legend(None), opacity=faded,
    )  # fmt: skip
    dots = base.mark_point(filled=True, size=36).encode(
        alt.Y("share:Q"),
        color=colour.legend(legend),
        shape=alt.Shape("kind:N").scale(domain=kinds).title(None).legend(legend),
        opacity=faded,
        tooltip=["name:N", "kind:N", *(alt.Tooltip(f"{n}:Q", format=".1%") for n in
                                      ("share", "low", "high"))],
    )  # fmt: skip
    mine = table[table["kind"] == kinds[0]]
    others = "; ".join(
        f"{kind}: median {percent(table['share'][table['kind'] == kind].median())}"
        for kind in kinds[1:]
    )
    title = (
        f"The pair carries more than half of the variation in {(mine['low'] > 0.5).sum()} of "
        f"{len(mine)} heads, less than half in {(mine['high'] < 0.5).sum()} (median "
        f"{percent(mine['share'].median())}; {others})"
    )
    description = (
        "Dots with 95 % intervals for every head, layer by layer: the share of the variation of "
        f"scores within a softmax row that no additive score explains. {title}."
    )
    chart = alt.layer(rule, dots.add_params(shown)).resolve_scale(
        color="independent", shape="independent"
    )
    return finish(chart, title, description)


def _by_layer(chart: alt.Chart, table: pd.DataFrame) -> alt.Chart:
    """Heads side by side within their layer."""
    angle = 0 if table["layer"].nunique() <= 12 else -60
    return chart.encode(
        alt.X("layer:O").title("layer (its heads side by side)").axis(labelAngle=angle),
        xOffset=alt.XOffset("head:O"),
    )
