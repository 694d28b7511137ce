"""What tests of charts share: the specification of a chart, its title, its picture."""

import vl_convert

from sparse_signals.charts.style import specification as spec


def title(chart):
    return " ".join(spec(chart)["title"]["text"])


def drawn(chart):
    """The chart as SVG, by the newer of the two versions that have to draw it."""
    pictures = [vl_convert.vegalite_to_svg(spec(chart), vl_version=v) for v in ("5.8", "6.4")]
    assert spec(chart)["description"]
    return pictures[1]
