"""The look of every chart, its parts that are alike, and what keeps it small and reproducible.

A chart function takes a tidy data frame and returns an Altair chart. It ends with `finish`,
which gives the chart its title (the finding) and its description (for screen readers).
"""

import json
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from sparse_signals.core.numbers import round_significant, rounded, rounded_everywhere

# JupyterLab 4 draws this type and knows no later one; the site draws it with Vega-Lite 6.
MIME = "application/vnd.vegalite.v5+json"
SCHEMA = "https://vega.github.io/schema/vega-lite/v5.json"
VEGA_LITE = "6.4"  # what draws charts on pages: the bundle of vl-convert
WIDTH = 560
"""Width in pixels of a chart that fills the text column."""

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#B36BA0", "#9A7D0A", "#808080"]
"""Colours for categories: told apart by colour-blind readers, visible on white and on black."""

HIGHLIGHT = "#C2188B"
"""Outline of what is selected: visible on every colour of the scales, on white and on black."""

INK = "currentColor"  # the text colour of the page, so that dark mode needs no second drawing
FONT = "system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', Arial, sans-serif"
TOKEN_STEP = 13  # pixels a token in lists and matrices: twenty tokens fit on a phone
SIDE_WORDS = {"dest": "destination", "src": "source"}
Layered = alt.LayerChart | alt.FacetChart  # by its types, `alt.layer` may return either
DIGITS = 4  # significant digits of a chart's numbers
AUTOMATIC = re.compile(r"\b(param|view|data)[_-](?:[0-9a-f]{16,32}(?:_\d+)?|\d+)\b")


@alt.theme.register("book", enable=True)
def theme() -> alt.theme.ThemeConfig:
    """Vega-Lite configuration shared by all charts."""
    text = {"labelColor": INK, "titleColor": INK, "labelFontSize": 12, "titleFontSize": 12}
    lines = {"domainColor": INK, "tickColor": INK, "gridColor": INK, "gridOpacity": 0.15}
    title = {"color": INK, "subtitleColor": INK, "fontSize": 14, "subtitleFontSize": 12}
    return {  # pyright: ignore[reportReturnType]  # Vega-Lite takes null, Altair's types do not
        "config": {
            "font": FONT,
            "background": None,
            "mark": {"color": COLOURS[0]},
            "view": {"stroke": None, "continuousWidth": WIDTH, "continuousHeight": 280},
            "axis": text | lines | {"titleFontWeight": "normal", "labelLimit": 240},
            "header": text | {"titleFontWeight": "normal"},
            "legend": text | {"titleFontWeight": "normal", "symbolStrokeWidth": 2},
            "title": title | {"anchor": "start", "frame": "group", "offset": 12},
            "text": {"fill": INK, "fontSize": 12},
            "rule": {"stroke": INK},
            "range": {
                "category": COLOURS,
                "diverging": {"scheme": "blueorange"},
                "heatmap": {"scheme": "viridis"},
            },
        },
    }


def diverging(values: Iterable[float]) -> alt.Scale:
    """Colour scale for signed values: [−m, m] with m = max |values|, so that zero is its middle."""
    limit = round_significant(np.abs(np.asarray(list(values), dtype=float)).max(initial=0.0), 3)
    return alt.Scale(domain=[-(limit or 1), limit or 1], scheme="blueorange", reverse=True)


def colour_and_shape(field: str, title: str) -> dict[str, Any]:
    """Encodings that tell categories apart twice: `mark_point().encode(..., **these)`."""
    return {"color": alt.Color(field).title(title), "shape": alt.Shape(field).title(title)}


def colour_and_dash(field: str, title: str) -> dict[str, Any]:
    """Encodings that tell lines apart twice: `mark_line().encode(..., **these)`."""
    dash = alt.StrokeDash(field).title(title)
    return {"color": alt.Color(field).title(title), "strokeDash": dash}


def tooltips(*columns: str, form: str = ".3f") -> list[alt.Tooltip]:
    """Numbers that show at the pointer, all in one format."""
    return [alt.Tooltip(f"{name}:Q", format=form) for name in columns]


def menu(
    name: str,
    options: Sequence[Any] | Mapping[Any, str],
    label: str | None = None,
    *,
    start: Any = None,
    radio: bool = False,
) -> alt.Parameter:
    """A parameter set by a menu or radio buttons, at first to `start` or to the first option.

    `options` may map values to what the menu calls them. `label` stands before the menu.
    """
    value = next(iter(options)) if start is None else start
    if len(options) == 1:  # nothing to choose
        return alt.param(name=name, value=value)
    labels = list(options.values()) if isinstance(options, Mapping) else alt.Undefined
    binding = alt.binding_radio if radio else alt.binding_select
    bind = binding(options=list(options), name=f"{label or name} ", labels=labels)
    return alt.param(name=name, value=value, bind=bind)


def distinct(values: Iterable[Any]) -> list[Any]:
    """Different values in the order in which they come."""
    return list(dict.fromkeys(values))


def finish(
    chart: alt.TopLevelMixin,
    title: str,
    description: str,
    subtitle: str | None = None,
    digits: int = DIGITS,
) -> alt.TopLevelMixin:
    """The chart with its title, which states the finding, and its description in plain words.

    Titles are wrapped, since Vega does not wrap them. `digits`: significant digits of its data.
    Raises ValueError when title or description is empty.
    """
    if not title.strip() or not description.strip():
        raise ValueError("a chart needs a title that states the finding, and a description")
    heading: dict[str, Any] = {"text": textwrap.wrap(title, 70)}
    if subtitle:
        heading["subtitle"] = textwrap.wrap(subtitle, 85)
    for part in _parts(chart):
        if isinstance(part.data, pd.DataFrame):
            part.data = part.data.copy(deep=False)  # the caller's table stays as it is
            part.data.attrs["digits"] = digits
    return chart.properties(title=alt.TitleParams(**heading), description=description.strip())


def _parts(chart: Any) -> Iterator[Any]:
    """A chart and all charts in it."""
    yield chart
    for name in ("layer", "hconcat", "vconcat"):
        for part in getattr(chart, name, []):
            yield from _parts(part)
    if isinstance(chart, alt.FacetChart):
        yield from _parts(chart.spec)


def inline(data: pd.DataFrame) -> dict[str, Any]:
    """Altair data transformer "book": all rows, floats as `finish` says, or at four digits."""
    return alt.to_values(rounded(data, data.attrs.get("digits", DIGITS)))


alt.data_transformers.register("book", inline)  # pyright: ignore[reportArgumentType]


def canonical(spec: dict[str, Any]) -> dict[str, Any]:
    """A Vega-Lite spec that depends on the chart alone, not on what was drawn before it.

    Floats outside the data (in scales, say) are rounded. Data, views and parameters are numbered
    as they appear: Altair names them by hashes of what they hold, and views again when charts are
    combined, so that naming them when a chart is made would not last.
    """
    names: dict[str, str] = {}

    def numbered(name: re.Match[str]) -> str:
        kind = name[1].replace("data", "table")  # Vega-Lite keeps data_1 to itself
        number = 1 + sum(other.startswith(kind) for other in names.values())
        return names.setdefault(name[0], f"{kind}_{number}")

    parts = {key: x if key == "datasets" else rounded_everywhere(x) for key, x in spec.items()}
    text = json.dumps(parts | {"$schema": SCHEMA}, ensure_ascii=False)
    return json.loads(AUTOMATIC.sub(numbered, text))


def specification(chart: alt.TopLevelMixin) -> dict[str, Any]:
    """The canonical spec of a chart, its data rounded: what is kept or drawn outside a notebook."""
    with alt.data_transformers.enable("book"):
        return canonical(chart.to_dict())


def render(spec: dict[str, Any], **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Altair renderer "book": the canonical spec, and its description for places without Vega."""
    bundle = {MIME: canonical(spec), "text/plain": spec.get("description", "")}
    return bundle, {MIME: {"embed_options": {"renderer": "svg", "actions": False}}}


def use_book_renderer() -> None:
    """Let Altair show charts as the book does: rounded, and with data of any size."""
    alt.renderers.register("book", render)
    alt.renderers.enable("book")
    alt.data_transformers.enable("book")
