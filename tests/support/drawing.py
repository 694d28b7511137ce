"""What tests of charts share: the specification of a chart, its title, its picture."""

from typing import Any

import altair as alt
import vl_convert

from sparse_signals.charts.style import specification

KNOWN: dict[int, tuple[alt.TopLevelMixin, dict[str, Any]]] = {}  # Altair takes its time


def spec(chart: alt.TopLevelMixin) -> dict[str, Any]:
    """The specification of a chart, made once."""
    if id(chart) not in KNOWN:
        KNOWN[id(chart)] = chart, specification(chart)
    return KNOWN[id(chart)][1]


def title(chart: alt.TopLevelMixin) -> str:
    """The title of a chart on one line."""
    return " ".join(chart["title"]["text"])


def drawn(chart: alt.TopLevelMixin) -> str:
    """The chart as SVG, by the newer of the two versions that have to draw it."""
    pictures = [vl_convert.vegalite_to_svg(spec(chart), vl_version=v) for v in ("5.8", "6.4")]
    assert spec(chart)["description"]
    return pictures[1]
