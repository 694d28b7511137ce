"""Charts of what a score does: they build from small frames, and their titles follow the data."""

import numpy as np
import pandas as pd
import pytest

from sparse_signals.charts.attention import log_odds, pair_share, score_parts, softmax_bars


def text(chart) -> str:
    """The title of a chart in one line."""
    return " ".join(chart.to_dict()["title"]["text"]).replace("\u00a0", " ")


@pytest.mark.parametrize(("scores", "found"), [
    ([0.0, 2.0, 1.0], "“b” 67 % of its attention: its score is 1.0 above"),
    ([9.0, 2.0, 1.0], "“a” 100 % of its attention: its score is 7.0 above"),
])  # fmt: skip
def test_softmax_bars_name_the_favourite(scores, found):
    chart = softmax_bars(pd.DataFrame({"label": ["a", "b", "c"], "score": scores}), "2.3")
    assert found in text(chart) and "Head 2.3" in text(chart)
    spec = chart.to_dict()
    assert spec["description"]
    assert {"token", "extra"} <= {p["name"] for p in spec["params"]}


def points(factor: float) -> pd.DataFrame:
    difference = np.linspace(-3, 3, 7)
    return pd.DataFrame({
        "layer": 0, "head": 1, "difference": difference, "odds": np.exp(factor * difference),
    })  # fmt: skip


def test_log_odds_says_whether_the_points_are_on_the_line():
    assert "All 7 pairs lie on the line" in text(log_odds(points(1)))
    off = text(log_odds(points(1.1)))
    assert "on the line" not in off and "within 0.3 of the line" in off
    assert log_odds(points(1)).to_dict()["description"]


def parts(content: float) -> pd.DataFrame:
    rows = [
        (scope, part, 0, head, share)
        for scope in ("within a softmax row", "over all pairs")
        for part, share in (("content", content), ("source", 1 - content),
                            ("destination", 0.0), ("constant", 0.0))
        for head in range(3)
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["scope", "part", "layer", "head", "share"])


def test_parts_chart_says_which_parts_are_nothing():
    title = text(score_parts(parts(0.75)))
    assert "content 75 %, source 25 %" in title
    assert "destination and constant exactly nothing" in title
    assert "source, destination and constant exactly nothing" in text(score_parts(parts(1)))
    assert score_parts(parts(0.75)).to_dict()["description"]


def shares(mine: list[float]) -> pd.DataFrame:
    rows = [
        (kind, 0, head, share, share - 0.05, share + 0.05)
        for kind, all_shares in (("this head", mine), ("sources shuffled", [0.9, 0.9]))
        for head, share in enumerate(all_shares)
    ]
    return pd.DataFrame(rows, columns=["kind", "layer", "head", "share", "low", "high"])


@pytest.mark.parametrize(("mine", "found"), [
    ([0.6, 0.7], "in 2 of 2 heads, less than half in 0 (median 65 %"),
    ([0.2, 0.52], "in 0 of 2 heads, less than half in 1 (median 36 %"),
])  # fmt: skip
def test_pair_chart_counts_heads_by_their_intervals(mine, found):
    chart = pair_share(shares(mine))
    assert found in text(chart)
    assert "sources shuffled: median 90 %" in text(chart)
    assert chart.to_dict()["description"]
