"""Charts of chapter 6 that are not graphs: titles say what their tables hold."""

import pandas as pd
import pytest
import vl_convert

from sparse_signals.charts.secants import (
    grouped_intervals,
    method_curves,
    secant_picture,
    single_edges,
)
from sparse_signals.charts.style import specification


def title(chart):
    return " ".join(specification(chart)["title"]["text"])


def test_a_secant_is_whole_and_derivatives_miss():
    lines = {"g": [0.0, 1.0], "secant": [0.0, 1.0], "derivative at x": [0.0, 2.0]}
    curve = pd.DataFrame(
        [{"z": z, "g": g, "line": name} for name, ys in lines.items() for z, g in enumerate(ys)]
    )
    ends = pd.DataFrame({"z": [1.0, 0.0], "g": [1.0, 0.0], "run": ["x", "x′"]})
    assert "the derivative at x 200" in title(secant_picture(curve, ends, "A neuron"))
    curve.loc[curve["line"] == "derivative at x", "g"] *= -1
    assert "the derivative at x −200" in title(secant_picture(curve, ends, "A neuron"))


@pytest.fixture
def curves():
    rows = [("good", 0.1, 0.5), ("good", 0.2, 0.9), ("bad", 0.1, 0.1), ("bad", 0.2, 0.2)]
    rows += [("good", 1.0, 1.0), ("bad", 1.0, 1.0)]
    table = pd.DataFrame(rows, columns=["method", "size", "f"])
    return table.assign(low=table["f"] - 0.1, high=table["f"] + 0.1, F=1.0, P=0.5, top1=0.5)


def test_curves_say_how_many_edges_are_enough(curves):
    said = title(method_curves(curves))
    assert "good with 20" in said
    assert "not by bad" in said
    assert "ranked by nothing here" in title(method_curves(curves.assign(f=0.0)))


def test_curves_have_one_legend_with_colour_and_dash(curves):
    drawn = vl_convert.vegalite_to_vega(specification(method_curves(curves)))
    (legend,) = drawn["legends"]
    assert {"stroke", "strokeDash"} <= set(legend)


def test_points_of_single_edges_can_be_chosen():
    table = pd.DataFrame(
        {
            "upstream": "0.1", "downstream": "1.1", "input": "q", "edges": ["largest", "random"],
            "effect": [1.0, 0.1], "estimate": [0.9, 0.2], "method": "share",
        }
    )  # fmt: skip
    spec = specification(single_edges(table, "A finding"))
    assert spec["params"][0]["bind"]["options"] == ["largest", "random"]


def test_intervals_stand_in_the_order_of_the_table():
    table = pd.DataFrame({"row": ["b", "a"], "kind": "k", "value": 1.0, "low": 0.5, "high": 1.5})
    spec = specification(grouped_intervals(table, "row", "kind", "A finding", "x", "what"))
    assert spec["layer"][1]["encoding"]["y"]["sort"] == ["b", "a"]
