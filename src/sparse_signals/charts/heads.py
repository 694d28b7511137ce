"""Charts of chapter 2: scores of low rank, what singular vectors listen to, how far they turn."""

from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from sparse_signals.charts.style import (
    COLOURS,
    TOKEN_STEP,
    Layered,
    colour_and_dash,
    colour_and_shape,
    distinct,
    diverging,
    finish,
    menu,
    tooltips,
)
from sparse_signals.core.numbers import counted, fmt, percent, round_significant

COORDINATES = {"u": "destination, x̃·u", "v": "source, x̃·v"}
LISTED = 6  # tokens at each end of a direction
VERDICTS = ["flatter", "as random", "steeper"]


def outer_products(parts: pd.DataFrame) -> alt.TopLevelMixin:
    """A small form and the rank-one pieces it is the sum of. `parts`: part, row, column, value."""
    names = distinct(parts["part"])
    whole = parts.loc[parts["part"] == names[0], "value"]
    size = parts.groupby("part", sort=False)["value"].agg(lambda x: float(np.square(x).sum()))
    share = size.iloc[1] / np.square(whole).sum()
    panels = (
        alt.Chart(parts, width=130, height=130)
        .mark_rect()
        .encode(
            alt.X("column:O").title("source coordinate").axis(labels=False, ticks=False),
            alt.Y("row:O").title("destination coordinate").axis(labels=False, ticks=False),
            alt.Color("value:Q").scale(diverging(parts["value"])).title("entry"),
            alt.Facet("part:N").sort(names).columns(2).title(None),
            tooltip=["part:N", "row:O", "column:O", alt.Tooltip("value:Q", format=".2f")],
        )
    )
    title = (
        f"A form of rank {len(names) - 1} is a sum of {len(names) - 1} outer products; "
        f"the first holds {percent(share)} of its squared size"
    )
    description = (
        f"{len(names)} heat maps of the same toy matrix: the whole, then each σuvᵀ of its singular "
        f"value decomposition, whose rows are all multiples of one row. {title}."
    )
    return finish(panels, title, description, digits=3)


def packed(table: pd.DataFrame, by: list[str], columns: list[str]) -> pd.DataFrame:
    """One row per group, its numbers in one string a column: a tenth of the size in the page."""
    text = {c: [f"{round_significant(float(x), 3):.3g}" for x in table[c]] for c in columns}
    return table.assign(**text).groupby(by, as_index=False, sort=False)[columns].agg(" ".join)


def unpacked(table: pd.DataFrame, columns: list[str]) -> alt.Chart:
    """The chart of a packed table, one row per number again; k counts from 1 in a group."""
    chart = alt.Chart(table).transform_calculate(**{c: f"split(datum.{c}, ' ')" for c in columns})
    numbers = {c: f"toNumber(datum.{c})" for c in columns}
    chart = chart.transform_flatten([*columns]).transform_calculate(**numbers)
    keys = table.columns.drop(columns).tolist()
    return chart.transform_window(k="row_number()", groupby=keys)


# --- low rank ------------------------------------------------------------------------------------


def partial_sums(partial: pd.DataFrame, words: list[str], head: str) -> alt.TopLevelMixin:
    """The scores of one prompt from the first K singular pairs, with a slider, and their error.

    `partial`: dest, src, K, score. `words`: the tokens of the prompt.
    """
    rank = int(partial["K"].max())
    full = partial[partial["K"] == rank].set_index(["dest", "src"])["score"]
    wide = partial.pivot(index=["dest", "src"], columns="K", values="score")
    off = (wide.sub(full, axis=0).pow(2).sum() / full.pow(2).sum()).apply(np.sqrt)
    enough = int(off.index[off <= 0.1][0])
    slider = alt.binding_range(min=1, max=rank, step=1, name="K ")
    k = alt.param(name="K", value=enough, bind=slider)
    title = (
        f"Head {head}: the first {enough} of {rank} singular pairs give the scores of this "
        f"prompt to within {fmt(100 * off[enough], 2)} %; "
        f"the first alone is off by {fmt(100 * off[1], 2)} %"
    )
    description = (
        "Heat map of attention scores, destination by source, rebuilt from the first K singular "
        f"pairs; below it the relative error for each K. {title}."
    )
    matrix = _rebuilt(partial, words)
    chart = alt.vconcat(matrix, _error(off), spacing=14).add_params(k)
    return finish(chart.resolve_scale(color="independent"), title, description, digits=3)


def _rebuilt(partial: pd.DataFrame, words: list[str]) -> alt.Chart:
    labels = pd.Series([f"{n} {word.strip().replace('|', '¦')}" for n, word in enumerate(words)])
    table = packed(partial, ["dest", "src"], ["score"])
    table = table.assign(dest=table["dest"].map(labels), src=table["src"].map(labels))
    scale = diverging(partial["score"])
    return (
        alt.Chart(table, width=alt.Step(TOKEN_STEP), height=alt.Step(TOKEN_STEP))
        .transform_calculate(a="toNumber(split(datum.score, ' ')[K - 1])")
        .mark_rect()
        .encode(
            alt.X("src:N").sort(list(labels)).title("source").axis(labelAngle=-60),
            alt.Y("dest:N").sort(list(labels)).title("destination"),
            alt.Color("a:Q").scale(scale).title("score").legend(gradientLength=130),
            tooltip=["dest:N", "src:N", alt.Tooltip("a:Q", format=".2f", title="score")],
        )
    )


def _error(off: pd.Series) -> Layered:
    table = pd.DataFrame({"K": off.index, "error": off.to_numpy()})
    x = (
        alt.X("K:Q")
        .title("K, singular pairs kept")
        .scale(domain=[1, int(off.index[-1])], nice=False)
    )
    y = alt.Y("error:Q").title("relative error").axis(format="%")
    base = alt.Chart(table, width=330, height=120).encode(
        x, y, tooltip=["K:Q", alt.Tooltip("error:Q", format=".1%")]
    )
    line = base.mark_line(color=COLOURS[0])
    here = base.transform_filter("datum.K == K")
    dot = here.mark_point(filled=True, size=90, color=COLOURS[1], shape="diamond", opacity=1)
    text = here.mark_text(dx=8, dy=-10, align="left").encode(text=alt.Text("error:Q", format=".1%"))
    return alt.layer(line, dot, text)


def span(count: pd.Series) -> str:
    """A count with its interval, for people: "25 (24–26)"; alone where all draws agree with it."""
    value, low, high = (int(count[name]) for name in ("value", "low", "high"))
    return str(value) if low == high == value else f"{value} ({low}–{high})"


def choices(shares: pd.DataFrame, needed: pd.DataFrame, of: int) -> alt.TopLevelMixin:
    """How often K directions find the right source: singular vectors against random directions.

    `shares`: name, basis, K, value, low, high. `needed`: basis, value, low, high, all heads.
    `of`: how many directions there are.
    """
    head = menu("shown", distinct(shares["name"]), "Heads")
    count = needed.set_index("basis")
    bases = list(count.index)
    found = " against ".join(f"{span(count.loc[b])} {b}" for b in bases)
    title = f"To find the right source at 95 % of destinations takes {found}, of {of}, all heads"
    values = ["K", "value", "low", "high"]
    base = (
        unpacked(packed(shares, ["name", "basis"], values), values)
        .transform_filter("datum.name === shown")
        .encode(
            alt.X("K:Q").title("K, directions kept").scale(domain=[1, of], nice=False),
            tooltip=["name:N", "basis:N", "K:Q", *tooltips(*values[1:], form=".1%")],
        )
    )
    y = alt.Y("value:Q").title("right source found").axis(format="%").scale(domain=[0, 1])
    styles = colour_and_dash("basis:N", "kept")
    styles = {key: channel.sort(bases) for key, channel in styles.items()}
    styles["color"] = styles["color"].legend(None)  # the dashes say the same
    styles["strokeDash"] = styles["strokeDash"].legend(orient="bottom", symbolSize=400)
    band = base.mark_area(opacity=0.3, strokeWidth=0)
    band = band.encode(alt.Y("low:Q"), alt.Y2("high:Q"), styles["color"])
    line = base.mark_line().encode(y, **styles)
    goal = alt.Chart(pd.DataFrame({"value": [0.95]})).mark_rule(strokeDash=[2, 3]).encode(y)
    chart = alt.layer(band, line, goal).properties(width=340, height=250).add_params(head)
    description = (
        "Line chart with 95 % bands: the share of destinations whose most attended source is still "
        f"the right one when K directions are kept, for two ways of choosing them. {title}."
    )
    return finish(chart, title, description, digits=3)


# --- vectors -------------------------------------------------------------------------------------


def stability(turns: pd.DataFrame, closest: int = 10, most: int = 200) -> alt.TopLevelMixin:
    """How far vectors and planes turn when weights change a little, against the gap of their σ.

    `turns`: size (of the change), name, k, gap, vector, plane (degrees).
    """
    sizes = sorted(turns["size"].unique())
    names = {size: f"one in {fmt(round(1 / size))}" for size in sizes}
    middle = sizes[len(sizes) // 2]
    near = turns[turns["size"] == middle].nsmallest(closest, "gap")
    vector, plane = near[["vector", "plane"]].median()
    title = (
        f"A relative change of {names[middle]} in the weights turns the vectors of the {closest} "
        f"closest neighbours by {fmt(vector, 2)}° (median), their planes by {fmt(plane, 2)}°"
    )
    size = menu("size", list(names.values()), "Relative change", start=names[middle])
    long = turns.melt(["size", "name", "k", "gap"], ["vector", "plane"], "object", "angle")
    long = long.assign(size=long["size"].map(names))
    chart = alt.layer(_turned(long, most), _medians(long)).add_params(size)
    description = (
        "Scatter chart, both axes logarithmic: for neighbouring singular values of all heads, the "
        "relative gap, and how far the singular vector and the plane of the two vectors turn when "
        f"the weights change a little. {title}."
    )
    return finish(chart.properties(width=360, height=270), title, description, digits=3)


def _turned(long: pd.DataFrame, most: int) -> alt.Chart:
    """The pairs with the smallest gaps, and of the others so many that about `most` are drawn."""
    place = long.groupby(["size", "object"])["gap"].rank(method="first")
    points = long[(place <= 20) | (place % max(1, place.max() // most) < 1)]
    styles = colour_and_shape("object:N", "one pair of neighbours")
    styles["color"] = styles["color"].legend(None)  # the shapes say the same
    styles["shape"] = styles["shape"].legend(orient="bottom")
    return (
        alt.Chart(points)
        .transform_filter("datum.size === size")
        .mark_point(size=20, opacity=0.35)
        .encode(
            *_gap_and_angle(),
            tooltip=["name:N", "k:Q", "gap:Q", "object:N", "angle:Q"],
            **styles,
        )
    )


def _medians(long: pd.DataFrame, least: int = 3) -> alt.Chart:
    """Medians over thirds of a decade, where there are a few pairs at `least`."""
    cut = np.floor(3 * np.log10(long["gap"]))
    groups = long.assign(cut=cut, pairs=1).groupby(["size", "object", "cut"], as_index=False)
    lines = groups.agg(gap=("gap", "median"), angle=("angle", "median"), pairs=("pairs", "sum"))
    lines = lines.loc[lines["pairs"] >= least, ["size", "object", "gap", "angle"]]
    return (
        alt.Chart(lines)
        .transform_filter("datum.size === size")
        .mark_line(strokeWidth=3)
        .encode(
            *_gap_and_angle(),
            alt.Color("object:N").legend(None),
            alt.StrokeDash("object:N").title("median").legend(orient="bottom", symbolSize=400),
        )
    )


def _gap_and_angle() -> tuple[alt.X, alt.Y]:
    log = alt.Scale(type="log")
    gap = alt.X("gap:Q").scale(log).title("relative gap between σ and the next σ")
    angle = alt.Y("angle:Q").scale(log).title("turned by (degrees)")
    return gap.axis(format="~g", tickCount=4), angle.axis(format="~g", tickCount=5)


def listeners(groups: pd.DataFrame, head: str, first: int) -> alt.TopLevelMixin:
    """The tokens a singular pair answers to most and least, on both sides; choose the pair.

    `groups`: side ("u" or "v"), k, label, value (mean coordinate), count. `first`: the pair shown
    at first.
    """
    ranked = groups.sort_values(
        ["side", "k", "value", "label"], ascending=[True, True, False, True]
    )
    keys = ranked.groupby(["side", "k"])
    rank, size = keys.cumcount(), keys["k"].transform("size")
    kept = ranked[(rank < LISTED) | (rank >= size - LISTED)]
    top = (
        kept[kept["k"] == first]
        .groupby("side")
        .agg(most=("label", "first"), least=("label", "last"))
    )
    title = (
        f"Pair {first} of head {head}: u points towards “{top['most']['u']}” and away from "
        f"“{top['least']['u']}”, v towards “{top['most']['v']}” and away from “{top['least']['v']}”"
    )
    k = menu("pair", [int(n) for n in sorted(kept["k"].unique())], "Pair", start=first)
    sides = [_bars(kept[kept["side"] == side], text) for side, text in COORDINATES.items()]
    description = (
        f"Two bar charts for the chosen singular pair of head {head}: the tokens with the largest "
        f"and smallest mean coordinate, as destination and as source. {title}."
    )
    chart = alt.vconcat(*sides, spacing=12).resolve_scale(color="independent").add_params(k)
    return finish(chart, title, description, digits=3)


def _bars(side: pd.DataFrame, title: str) -> alt.Chart:
    limit = float(side["value"].abs().max())
    return (
        alt.Chart(side[["k", "label", "value", "count"]])
        .transform_filter("datum.k == pair")
        .mark_bar()
        .encode(
            alt.X("value:Q").scale(domain=[-limit, limit]).title(f"mean coordinate, {title}"),
            alt.Y("label:N").sort(field="value", order="descending").title(None),
            alt.Color("value:Q").scale(diverging(side["value"])).legend(None),
            tooltip=["label:N", "value:Q", "count:Q"],
        )
        .properties(width=280, height=alt.Step(TOKEN_STEP + 2))
    )


def head_spectra(
    flatness: pd.DataFrame, spectra: pd.DataFrame, band: pd.DataFrame
) -> alt.TopLevelMixin:
    """A grid of heads, flatter or steeper than random, linked to the chosen head's spectrum.

    `flatness`: null, layer, head, name, ours, random, low, high, verdict. `spectra`: name, k,
    sigma. `band`: k, low, high, of random heads of the first null.
    """
    nulls = distinct(flatness["null"])
    heads = flatness.assign(change=np.log2(flatness["ours"] / flatness["random"]))
    first = heads[heads["null"] == nulls[0]]
    start = first.loc[first["change"].abs().idxmax(), "name"]
    null = menu("against", nulls, "Random with the same")
    names = list(first["name"])
    chosen = alt.selection_point(
        name="chosen_name", fields=["name"], value=[{"name": start}], on="click", empty=False,
        bind={"name": alt.binding_select(options=names, name="Head ")},  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    counted = "; ".join(
        f"{_counts(heads.loc[heads['null'] == name, 'verdict'])} random matrices of the same {name}"
        for name in nulls
    )
    title = counted[0].upper() + counted[1:]
    description = (
        "A grid of layers and heads: how many directions share σ², against random matrices, and "
        f"below it all singular values of the chosen head with the random band. {title}."
    )
    grid = _flatness_grid(heads, chosen)
    lines = _spectrum(spectra, band, nulls[0], chosen)
    chart = alt.vconcat(grid, lines, spacing=16).add_params(null)
    return finish(chart, title, description, digits=3)


def _flatness_grid(heads: pd.DataFrame, chosen: alt.Parameter) -> Layered:
    many = heads["layer"].nunique() > 12
    columns = ["null", "layer", "head", "name", "ours", "random", "change", "verdict"]
    base = (
        alt.Chart(heads[columns])
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


def _counts(verdicts: pd.Series) -> str:
    count = verdicts.value_counts()
    flatter, steeper = (
        counted(int(count.get(word, 0)), len(verdicts), "heads") for word in ("flatter", "steeper")
    )
    return f"{steeper} are clearly steeper and {flatter} clearly flatter than"


def _spectrum(
    spectra: pd.DataFrame, band: pd.DataFrame, null: str, chosen: alt.Parameter
) -> Layered:
    size: dict[str, Any] = {"width": 380, "height": 210}
    x = alt.X("k:Q").title("k, singular values in descending order").axis(tickMinStep=1)
    y = alt.Y("sigma:Q").title("σ ÷ its root mean square")
    area = alt.Chart(band.rename(columns={"low": "sigma"}), **size)
    area = area.mark_area(color=COLOURS[5])
    area = area.encode(
        x,
        y,
        alt.Y2("high:Q"),
        alt.Opacity("text:O")
        .title(None)
        .scale(range=[0.3, 0.3])
        .legend(orient="bottom", labelLimit=320),
    )
    area = area.transform_calculate(text=f"'95 % of random heads of the same {null}'")
    line = (
        unpacked(packed(spectra, ["name"], ["sigma"]), ["sigma"])
        .transform_filter(chosen)
        .transform_calculate(k="datum.k - 1")
        .mark_line(color=COLOURS[0], point=alt.OverlayMarkDef(filled=True, size=30))
        .encode(x, y, tooltip=["name:N", "k:Q", *tooltips("sigma")])
    )
    return alt.layer(area, line).properties(**size)


def published_flatness(points: pd.DataFrame, random: pd.DataFrame) -> alt.TopLevelMixin:
    """Participation ratios of this edition above the published ones, with their random bands.

    `points`: row, name, share (of all r directions); names are written in the last row.
    `random`: row, measure, low, high.
    """
    median = points.groupby("row", sort=False)["share"].median()
    rows = list(median.index)
    found = ", ".join(f"{percent(share)} ({row})" for row, share in median.items())
    title = f"The median head spreads over this part of its directions: {found}"
    description = (
        "Strip chart in rows: one point a head, how many of its directions share the spectrum, as "
        f"a part of all of them. Grey bands are random matrices of the same shape. {title}."
    )
    place = alt.Y("row:N").sort(rows).title(None).axis(labelLimit=170)
    chart = alt.layer(*_random_bands(random, place), *_points(points, rows, place))
    return finish(chart.properties(width=330, height=alt.Step(62)), title, description, digits=3)


def _random_bands(random: pd.DataFrame, place: alt.Y) -> tuple[alt.Chart, alt.Chart]:
    base = alt.Chart(random.assign(text="random, " + random["measure"])).encode(
        place,
        tooltip=["text:N", *tooltips("low", "high", form=".1%")],
    )
    x = alt.X("low:Q").scale(domain=[0, 1.1]).axis(format="%", values=[0, 0.25, 0.5, 0.75, 1])
    bars = base.mark_bar(height=34, color=COLOURS[5], opacity=0.45).encode(
        x.title("participation ratio ÷ r"), alt.X2("high:Q")
    )
    return bars, base.mark_text(dy=-26, fontSize=11).encode(alt.X("high:Q"), text="measure:N")


def _points(points: pd.DataFrame, rows: list[str], place: alt.Y) -> tuple[alt.Chart, alt.Chart]:
    order = points.groupby("row")["share"].rank(method="first")
    labelled = points.assign(
        label=points["name"].where(points["row"] == rows[-1], ""), offset=order % 2 * 24 - 12
    )
    base = alt.Chart(labelled).encode(alt.X("share:Q"), place)
    dots = base.mark_point(size=45, opacity=0.9).encode(
        alt.Color("row:N").sort(rows).legend(None),
        alt.Shape("row:N").sort(rows).legend(None),
        tooltip=["row:N", "name:N", alt.Tooltip("share:Q", format=".1%")],
    )
    middle = alt.YOffset("offset:Q").scale(domain=[-31, 31])
    return dots, base.mark_text(fontSize=11).encode(text="label:N", yOffset=middle)
