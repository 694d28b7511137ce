"""Charts of chapter 2: the spectra of heads, beside random ones and published ones."""

import altair as alt
import numpy as np
import pandas as pd

from sparse_signals.charts.base import diverging, finish, rounded
from sparse_signals.charts.heads import packed, unpacked

VERDICTS = ["flatter", "as random", "steeper"]


def head_spectra(flatness: pd.DataFrame, bands: pd.DataFrame) -> alt.TopLevelMixin:
    """A grid of heads, flatter or steeper than random, linked to the chosen head's spectrum.

    `flatness`: null, layer, head, name, ours, random, low, high, verdict, for one measure.
    `bands`: null, name, k, sigma, low, high.
    """
    nulls = list(dict.fromkeys(flatness["null"]))
    heads = flatness.assign(change=np.log2(flatness["ours"] / flatness["random"]))
    first = heads[heads["null"] == nulls[0]]
    start = first.loc[first["change"].abs().idxmax(), "name"]
    null = alt.param(
        name="against",
        value=nulls[0],
        bind=alt.binding_select(options=nulls, name="Random with the same "),
    )
    names = list(first["name"])
    chosen = alt.selection_point(
        name="chosen_name", fields=["name"], value=[{"name": start}], on="click", empty=False,
        bind={"name": alt.binding_select(options=names, name="Head ")},
    )  # fmt: skip
    count = first["verdict"].value_counts().reindex(VERDICTS, fill_value=0)
    title = (
        f"Of {len(first)} heads, {count['flatter']} have a flatter spectrum than random matrices "
        f"of the same {nulls[0]}, {count['steeper']} a steeper one, {count['as random']} neither"
    )
    description = (
        "A grid of layers and heads: how many directions share σ², against random matrices, and "
        f"below it all singular values of the chosen head with the random band. {title}."
    )
    grid = _grid(heads, chosen)
    chart = alt.vconcat(grid, _spectrum(bands, chosen), spacing=16).add_params(null)
    return finish(chart, title, description)


def _grid(heads: pd.DataFrame, chosen: alt.Parameter) -> alt.LayerChart:
    many = heads["layer"].nunique() > 12
    columns = ["null", "layer", "head", "name", "ours", "random", "change", "verdict"]
    base = (
        alt.Chart(rounded(heads[columns], 3))
        .transform_filter("datum.null === against")
        .encode(
            alt.X("head:O").title("head").axis(labelAngle=0),
            alt.Y("layer:O").title("layer"),
            tooltip=["name:N", "verdict:N", alt.Tooltip("ours:Q", title="participation ratio"),
                     alt.Tooltip("random:Q", title="random")],
        )
    )  # fmt: skip
    shapes = alt.Scale(domain=VERDICTS, range=["triangle-up", "circle", "triangle-down"])
    marks = base.mark_point(filled=True, opacity=1, stroke="currentColor", strokeWidth=0.5).encode(
        alt.Shape("verdict:N").scale(shapes).title("than random"),
        alt.Color("change:Q").scale(diverging(heads["change"])).title("log₂(ours ÷ random)")
        .legend(gradientLength=110),
        size=alt.value(60 if many else 190),
    )  # fmt: skip
    frame = base.mark_rect(fill="transparent", stroke="currentColor").encode(
        strokeWidth=alt.condition(chosen, alt.value(2.5), alt.value(0.2))
    )
    step = 13 if many else 28
    return alt.layer(marks, frame.add_params(chosen)).properties(
        width=alt.Step(26), height=alt.Step(step)
    )


def _spectrum(bands: pd.DataFrame, chosen: alt.Parameter) -> alt.LayerChart:
    values = ["sigma", "low", "high"]
    base = (
        unpacked(packed(bands, ["null", "name"], values), values)
        .transform_filter("datum.null === against")
        .transform_filter(chosen)
        .encode(
            alt.X("k:Q").title("k, singular values in descending order").axis(tickMinStep=1),
            tooltip=["name:N", "k:Q", *(alt.Tooltip(f"{v}:Q", format=".3f") for v in values)],
        )
    )
    y = alt.Y("sigma:Q").title("σ ÷ its root mean square")
    band = base.mark_area(opacity=0.3, color="#808080").encode(alt.Y("low:Q"), alt.Y2("high:Q"))
    line = base.mark_line(color="#0072B2", point=alt.OverlayMarkDef(filled=True, size=30))
    return alt.layer(band, line.encode(y)).properties(width=380, height=210)


def published_flatness(points: pd.DataFrame, random: pd.DataFrame) -> alt.TopLevelMixin:
    """Participation ratios of this edition above the published ones, with their random bands.

    `points`: row, name, share (of all r directions); names are written in the last row.
    `random`: row, measure, low, high.
    """
    median = points.groupby("row", sort=False)["share"].median()
    rows = list(median.index)
    found = ", ".join(f"{share:.0%} ({row})" for row, share in median.items())
    title = f"The median head spreads over this part of its directions: {found}"
    description = (
        "Strip chart in rows: one point a head, how many of its directions share the spectrum, as "
        f"a part of all of them. Grey bands are random matrices of the same shape. {title}."
    )
    place = alt.Y("row:N").sort(rows).title(None).axis(labelLimit=170)
    chart = alt.layer(*_random_bands(random, place), *_points(points, rows, place))
    return finish(chart.properties(width=330, height=alt.Step(62)), title, description)


def _random_bands(random: pd.DataFrame, place: alt.Y) -> tuple[alt.Chart, alt.Chart]:
    base = alt.Chart(rounded(random.assign(text="random, " + random["measure"]), 3)).encode(
        place,
        tooltip=["text:N", *(alt.Tooltip(f"{end}:Q", format=".1%") for end in ("low", "high"))],
    )
    x = alt.X("low:Q").scale(domain=[0, 1.1]).axis(format="%", values=[0, 0.25, 0.5, 0.75, 1])
    bars = base.mark_bar(height=34, color="#808080", opacity=0.45).encode(
        x.title("participation ratio ÷ r"), alt.X2("high:Q")
    )
    return bars, base.mark_text(dy=-26, fontSize=11).encode(alt.X("high:Q"), text="measure:N")


def _points(points: pd.DataFrame, rows: list[str], place: alt.Y) -> tuple[alt.Chart, alt.Chart]:
    order = points.groupby("row")["share"].rank(method="first")
    labelled = points.assign(
        label=points["name"].where(points["row"] == rows[-1], ""), offset=order % 2 * 24 - 12
    )
    base = alt.Chart(rounded(labelled, 3)).encode(alt.X("share:Q"), place)
    dots = base.mark_point(size=45, opacity=0.9).encode(
        alt.Color("row:N").sort(rows).legend(None),
        alt.Shape("row:N").sort(rows).legend(None),
        tooltip=["row:N", "name:N", alt.Tooltip("share:Q", format=".1%")],
    )
    middle = alt.YOffset("offset:Q").scale(domain=[-31, 31])
    return dots, base.mark_text(fontSize=10).encode(text="label:N", yOffset=middle)
