"""Charts of chapter 4 say what their data say, and can be drawn."""

import pandas as pd
import pytest

from drawing import drawn, title
from sparse_signals.charts import tracing as charts


@pytest.fixture
def opened():
    rows = [
        ("0.1", side, slices, weight, component_kept)
        for side, component_kept in (("dest", True), ("src", False))
        for slices, weight in (("the support", 2.0), ("all slices", 4.0))
    ]
    rows += [
        ("MLP 0", "dest", "the support", -1.0, False),
        ("MLP 0", "dest", "all slices", 1.0, False),
    ]
    return pd.DataFrame(rows, columns=["component", "side", "slices", "weight", "kept"])


def test_opened_firing_counts_what_is_kept(opened):
    chart = charts.firing_opened(opened, "Head 1.0")
    assert title(chart).startswith("Head 1.0: 1 components are kept on the destination side and 0")
    assert "0.1" in drawn(chart)


def test_kinds_state_the_share_of_heads_above_the_first_layer():
    rows = [(layer, side, kind, share, share - 0.1, share + 0.1)
            for layer, heads in ((0, 0.0), (1, 0.25), (2, 0.75))
            for side in ("dest", "src")
            for kind, share in (("head", heads), ("MLP", 1 - heads))]  # fmt: skip
    table = pd.DataFrame(rows, columns=["layer", "side", "kind", "share", "low", "high"])
    chart = charts.kinds_of_components(table)
    assert "heads carry 50\xa0% of the destination side and 50\xa0%" in title(chart)
    assert drawn(chart)


def test_sensitivity_names_the_setting_that_matters_most():
    rows = [(setting, x, value, value, value, 10.0, weighting)
            for setting, lowest in (("level", 0.9), ("share", 0.3), ("fraction", 0.6))
            for x, value in ((0.5, lowest), (0.7, 1.0))
            for weighting in ("exact", "published")]  # fmt: skip
    columns = ["setting", "x", "value", "low", "high", "edges", "weighting"]
    chart = charts.sensitivity_curves(pd.DataFrame(rows, columns=columns))
    assert "most on the share of a side that is kept (overlap down to 0.30)" in title(chart)
    assert "least on the attention" in title(chart)
    assert drawn(chart)


def test_reasons_name_the_largest_share_of_each_question():
    rows = [(component, question, slices, share, share, share)
            for slices in ("all slices", "the support")
            for question, shares in (("why look at IO", {"0.2": 0.8, "0.0": 0.1}),
                                     ("why IO rather than S1", {"0.2": -0.1, "0.0": 0.5}))
            for component, share in shares.items()]  # fmt: skip
    columns = ["component", "question", "slices", "share", "low", "high"]
    chart = charts.reasons(pd.DataFrame(rows, columns=columns), "1.4")
    assert "0.2 writes most of 1.4's score at the indirect object (80\xa0%)" in title(chart)
    assert "0.0 most of its preference over the subject (50\xa0%)" in title(chart)
    assert drawn(chart)


@pytest.mark.parametrize(("p", "clear"), [(0.01, "2 of 2"), (0.2, "0 of 2")])
def test_heads_compared_say_how_many_traces_beat_chance(p, clear):
    rows = [(f"1.{n}", trace, n / 4, n - 1.0, n - 1.5, n - 0.5, 0.6, 0.1, p)
            for trace in ("by score", "by contrast") for n in range(4)]  # fmt: skip
    columns = ["name", "trace", "share", "effect", "low", "high", "rho", "chance", "p"]
    chart = charts.heads_compared(pd.DataFrame(rows, columns=columns))
    assert title(chart).startswith(f"In {clear} kinds of trace") and "by score ρ = 0.60" in title(
        chart
    )
    assert "1.3" in drawn(chart)


def test_dots_have_a_row_each():
    table = pd.DataFrame({"n": ["five", "ten"], "value": [1, 2], "low": [0, 1], "high": [2, 3]})
    picture = drawn(charts.dots(table, "n", "words", "Title", "axis"))
    assert "five" in picture and "ten" in picture
