"""Charts of chapter 3: sparsity against its null models."""

import altair as alt
import pandas as pd

from sparse_signals.charts.base import WIDTH, finish

MEASURES = {
    "participation": "participation ratio of |p|",
    "ninety": "slices holding 90 % of Σ|p|",
    "settled": "slices until the sum stays within 10 %",
    "support": "published support size",
}


def measure_intervals(table: pd.DataFrame) -> alt.TopLevelMixin:
    """Sparsity in every basis with bootstrap intervals; a menu chooses the measure.

    Columns: basis, pairs, measure, value, low, high.
    """
    options = [name for name in MEASURES if name in set(table["measure"])]
    labels = [MEASURES[name] for name in options]
    menu = alt.binding_select(options=options, labels=labels, name="measure ")
    pick = alt.param(name="measure", value=options[0], bind=menu)
    rows, kinds = list(dict.fromkeys(table["basis"])), list(dict.fromkeys(table["pairs"]))
    base = alt.Chart(table).transform_filter("datum.measure == measure").encode(
        alt.Y("basis:N").title(None).sort(rows), alt.YOffset("pairs:N").sort(kinds),
        alt.Color("pairs:N").title("pairs").scale(domain=kinds),
    )  # fmt: skip
    tooltip = ["basis:N", "pairs:N", *(alt.Tooltip(f"{c}:Q", format=".2f")
                                       for c in ("value", "low", "high"))]  # fmt: skip
    points = base.mark_point(filled=True, size=80).encode(
        alt.X("value:Q").title("slices (mean over pairs, 95 % interval)").scale(zero=True),
        alt.Shape("pairs:N").title("pairs").scale(domain=kinds), tooltip=tooltip,
    )  # fmt: skip
    chart = (base.mark_rule(strokeWidth=2).encode(x="low:Q", x2="high:Q") + points).add_params(pick)
    first = table[table["measure"] == options[0]].set_index(["pairs", "basis"])["value"]
    best = first[kinds[0]].idxmin()
    return finish(
        chart.properties(width=WIDTH - 180, height=alt.Step(14)),
        f"By {MEASURES[options[0]]}, the sparsest code of {kinds[0]} pairs is: {best}",
        "Dot plot with intervals. Rows are bases and null models, colours and shapes the kind of "
        "pairs; a menu chooses one of four measures of sparsity.",
    )


def head_differences(table: pd.DataFrame, most: int = 40) -> alt.TopLevelMixin:
    """SVD minus null, head by head, with intervals; menus choose the null and the measure.

    Columns: name, pairs (count), null, measure, difference, low, high. Negative: SVD is sparser.
    """
    busiest = table.drop_duplicates("name").nlargest(most, "pairs")["name"]
    verdict = pd.Series("unclear", table.index)
    verdict = verdict.mask(table["high"] < 0, "SVD sparser").mask(table["low"] > 0, "null sparser")
    table = table.assign(verdict=verdict)
    shown = table[table["name"].isin(busiest)]
    nulls, names = (
        list(dict.fromkeys(table["null"])),
        [x for x in MEASURES if x in set(table["measure"])],
    )
    labels = [MEASURES[name] for name in names]
    picks = [
        alt.param(name="against", value=nulls[0],
                  bind=alt.binding_select(options=nulls, name="against ")),
        alt.param(name="measured", value=names[0],
                  bind=alt.binding_select(options=names, labels=labels, name="measure ")),
    ]  # fmt: skip
    kinds = ["SVD sparser", "unclear", "null sparser"]
    base = alt.Chart(shown).transform_filter("datum.null == against && datum.measure == measured")
    base = base.encode(
        alt.Y("name:N").title("head").sort(list(dict.fromkeys(shown["name"]))),
        alt.Color("verdict:N").title("95 % interval").scale(domain=kinds),
    )
    tooltip = ["name:N", "pairs:Q", *(alt.Tooltip(f"{c}:Q", format=".2f")
                                      for c in ("difference", "low", "high"))]  # fmt: skip
    points = base.mark_point(filled=True, size=60).encode(
        alt.X("difference:Q").title("SVD minus null, in slices"),
        alt.Shape("verdict:N").title("95 % interval").scale(domain=kinds), tooltip=tooltip,
    )  # fmt: skip
    rules = base.mark_rule(strokeWidth=2).encode(x="low:Q", x2="high:Q")
    zero = alt.Chart(pd.DataFrame({"zero": [0]})).mark_rule(strokeDash=[4, 4]).encode(x="zero:Q")
    first = table[(table["null"] == nulls[0]) & (table["measure"] == names[0])]
    clear = (first["verdict"] == kinds[0]).sum()
    return finish(
        (zero + rules + points)
        .add_params(*picks)
        .properties(width=WIDTH - 140, height=alt.Step(14)),
        f"Against the {nulls[0]}, the SVD basis is sparser in {clear} of {len(first)} heads",
        "Dot plot with intervals, a row per head: sparsity in the SVD basis minus that of a null. "
        "Left of zero the SVD basis is sparser. Menus choose the null and the measure.",
        subtitle=None if len(first) <= most else f"The {most} heads that fire most are drawn.",
    )


def captured(table: pd.DataFrame) -> alt.TopLevelMixin:
    """Share of the score in the n largest slices. Columns: basis, n, share, low, high."""
    names = list(dict.fromkeys(table["basis"]))
    base = alt.Chart(table).encode(
        alt.X("n:Q").title("number of slices, largest |p| first"),
        alt.Color("basis:N").title("basis").scale(domain=names),
    )
    band = base.mark_area(opacity=0.2).encode(
        alt.Y("low:Q").title("share of the score (median, middle half)"), alt.Y2("high:Q")
    )
    line = base.mark_line().encode(
        y="share:Q", strokeDash=alt.StrokeDash("basis:N").title("basis").scale(domain=names),
        tooltip=["basis:N", "n:Q", alt.Tooltip("share:Q", format=".2f")],
    )  # fmt: skip
    reach = table[table["share"] >= 0.9].groupby("basis")["n"].min()
    found = ", ".join(f"{reach.get(name, '–')} ({name})" for name in names)
    return finish(
        (band + line).properties(height=260),
        f"Slices until the median pair has reached 90 % of its score: {found}",
        "Lines of the share of the score held by the n largest slices, one line and one band (the "
        "middle half of all pairs) per basis.",
    )
