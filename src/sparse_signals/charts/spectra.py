"""Charts of chapter 2: the spectra of heads, beside random ones and published ones."""

import altair as alt
import numpy as np
import pandas as pd

from sparse_signals.charts.base import colour_and_shape, diverging, finish, rounded
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


def published_flatness(points: pd.DataFrame, random: pd.DataFrame, r: int) -> alt.TopLevelMixin:
    """Participation ratios of this edition beside the published ones, with their random bands.

    `points`: row, name, measure, share (of all r directions). `random`: row, measure, low, high.
    """
    order = list(dict.fromkeys(points["row"]))
    median = points.groupby(["row", "measure"], sort=False)["share"].median()
    found = [f"{share:.0%} ({row}, {measure})" for (row, measure), share in median.items()]
    title = f"The median head spreads over {', '.join(found)} of its directions"
    labelled = points.assign(
        label=points["name"].where(points["row"] == order[-1], ""),
        offset=points.groupby("row")["share"].rank(method="first") % 2 * 22 - 15,
    )
    place = alt.Y("row:N").sort(order).title(None).axis(labelLimit=170)
    measures = list(dict.fromkeys(points["measure"]))
    colours = colour_and_shape("measure:N", "participation ratio of")
    colours = {key: channel.scale(domain=measures) for key, channel in colours.items()}
    colours["color"] = colours["color"].legend(orient="bottom")
    colours["shape"] = colours["shape"].legend(orient="bottom")
    fill = alt.Fill("measure:N").scale(domain=measures).legend(None)
    x = alt.X("low:Q").scale(domain=[0, 1]).axis(format="%", tickCount=5)
    bars = alt.Chart(rounded(random, 3)).mark_bar(height=30, opacity=0.35).encode(
        x.title("participation ratio ÷ r"), alt.X2("high:Q"), place, fill,
        tooltip=["row:N", "measure:N", alt.Tooltip("low:Q", format=".1%"),
                 alt.Tooltip("high:Q", format=".1%")],
    )  # fmt: skip
    base = alt.Chart(rounded(labelled, 3)).encode(alt.X("share:Q"), place)
    dots = base.mark_point(size=45, opacity=0.9).encode(
        tooltip=["row:N", "name:N", "measure:N", alt.Tooltip("share:Q", format=".1%")], **colours
    )
    text = base.mark_text(baseline="middle", fontSize=11).encode(
        text="label:N", yOffset=alt.YOffset("offset:Q").scale(None)
    )
    chart = alt.layer(bars, dots, text).properties(width=300, height=alt.Step(58))
    description = (
        "Strip chart: one point a head, how many of its directions share the spectrum, as a part "
        f"of all of them; bands are random matrices of the same shape (r = {r} here). {title}."
    )
    return finish(chart, title, description)
