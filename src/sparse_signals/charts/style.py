"""The look of every chart, and the renderer that keeps its output small and reproducible.

A chart function takes a tidy data frame and returns an Altair chart. It ends with `finish`,
which gives the chart its title (the finding) and its description (for screen readers).
"""

import json
import re
import textwrap
from collections import Counter
from collections.abc import Iterable
from typing import Any

import altair as alt
import numpy as np

from sparse_signals.core.numbers import round_significant, rounded_everywhere

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
AUTOMATIC = re.compile(r"\b(?P<kind>param|view|data)[_-](?:[0-9a-f]{16,32}|\d+)\b")
KINDS = {"param": "param", "view": "view", "data": "table"}  # Vega-Lite keeps data_1 to itself
TINY = 1e-12  # below this a float64 result is rounding noise, which differs between processors


@alt.theme.register("book", enable=True)
def theme() -> alt.theme.ThemeConfig:
    """Vega-Lite configuration shared by all charts."""
    text = {"labelColor": INK, "titleColor": INK, "labelFontSize": 12, "titleFontSize": 12}
    lines = {"domainColor": INK, "tickColor": INK, "gridColor": INK, "gridOpacity": 0.15}
    title = {"color": INK, "subtitleColor": INK, "fontSize": 14, "subtitleFontSize": 12}
    return {
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


def finish(
    chart: alt.TopLevelMixin, title: str, description: str, subtitle: str | None = None
) -> alt.TopLevelMixin:
    """The chart with its title, which states the finding, and its description in plain words.

    Titles are wrapped, since Vega does not wrap them. Raises ValueError when either is empty.
    """
    if not title.strip() or not description.strip():
        raise ValueError("a chart needs a title that states the finding, and a description")
    heading = {"text": textwrap.wrap(title, 70)}
    if subtitle:
        heading["subtitle"] = textwrap.wrap(subtitle, 85)
    return chart.properties(title=alt.TitleParams(**heading), description=description.strip())


def canonical(spec: dict[str, Any]) -> dict[str, Any]:
    """A Vega-Lite spec that depends on the chart alone, not on what was drawn before it.

    Every float is rounded, in the data and in scales; data sets, views and parameters are
    numbered as they appear.
    """
    spec = rounded_everywhere(spec | {"$schema": SCHEMA})
    text = json.dumps(spec, ensure_ascii=False)
    counts: Counter[str] = Counter()
    names: dict[str, str] = {}
    for match in AUTOMATIC.finditer(text):
        if match.group() not in names:
            kind = KINDS[match["kind"]]
            counts[kind] += 1
            names[match.group()] = f"{kind}_{counts[kind]}"
    return json.loads(AUTOMATIC.sub(lambda match: names[match.group()], text))


def render(spec: dict[str, Any], **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Altair renderer "book": the canonical spec, and its description for places without Vega."""
    bundle = {MIME: canonical(spec), "text/plain": spec.get("description", "")}
    return bundle, {MIME: {"embed_options": {"renderer": "svg", "actions": False}}}


def use_book_renderer() -> None:
    """Let Altair show charts as the book does; inline data of any size."""
    alt.renderers.register("book", render)
    alt.renderers.enable("book")
    alt.data_transformers.disable_max_rows()
