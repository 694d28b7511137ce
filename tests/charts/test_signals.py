"""Charts of chapter 3: they draw from small frames, and their titles follow the data."""

import numpy as np
import pandas as pd
import pytest
import torch

from drawing import drawn, spec, title
from sparse_signals.charts import signals as charts
from sparse_signals.signals.slices import slice_table


def opened(silent):
    slices = {"firing": [5.0, 3, -1, -2], "silent": silent}
    tables = [
        slice_table(torch.tensor([p], dtype=torch.float64)).assign(pair=name)
        for name, p in slices.items()
    ]
    return pd.concat(tables)


@pytest.mark.parametrize(
    ("silent", "found"), [([1.0, -1, 0.5, -0.2], "2 of 4 and 1 of 4"), ([1.0] * 4, "2 of 4 and 4")]
)
def test_slice_bars_count_the_support(silent, found):
    chart = charts.slice_bars(opened(silent))
    assert found in title(chart) and "in the support" in drawn(chart)


def test_explorer_opens_on_the_last_token_of_the_named_head():
    rows = [
        (prompt, name, dest, 1, ["<|x|>", "a", "it's"], [0.1, 0.7, 0.2], [1.0, -2.5], [True, False])
        for prompt in (0, 1)
        for name in ("0.0", "1.2")
        for dest in (1, 2)
    ]
    columns = ["prompt", "name", "dest", "src", "labels", "weights", "slices", "chosen"]
    chart = charts.score_explorer(pd.DataFrame(rows, columns=columns), head="1.2")
    values = {p["name"]: p["value"] for p in spec(chart)["params"]}
    assert values == {"pick_prompt": 0, "pick_name": "1.2", "pick_dest": 2}
    svg = drawn(chart)
    assert "&lt;|x|&gt;" in svg and "it's" in svg and "value: -2.5" not in title(chart)


def sizes(silent):
    return pd.DataFrame(
        {"name": ["0.0", "0.1"] * 4, "pairs": ["firing"] * 4 + ["silent"] * 4,
         "support": [4, 5, 4, 5, silent, silent, silent, silent]}
    )  # fmt: skip


@pytest.mark.parametrize(("silent", "found"), [(2, "in 2 of 2"), (9, "in 0 of 2")])
def test_support_sizes_say_where_silence_is_smaller(silent, found):
    chart = charts.support_sizes(sizes(silent))
    assert found in title(chart) and drawn(chart).count("aria-roledescription") > 5


def test_heads_can_be_chosen_by_menu():
    chart = charts.support_sizes(sizes(2)).to_dict()
    (pick,) = (p for p in chart["params"] if "bind" in p)
    assert pick["bind"]["name"]["options"] == ["0.0", "0.1"]


def intervals(best):
    rows = [
        (basis, "firing", measure, 3.0 - (basis == best), 2.5, 3.5)
        for basis in ("SVD", "random rotation")
        for measure in charts.SPARSITY_MEASURES
    ]
    return pd.DataFrame(rows, columns=["basis", "pairs", "measure", "value", "low", "high"])


@pytest.mark.parametrize("best", ["SVD", "random rotation"])
def test_measure_intervals_name_the_sparsest_basis(best):
    chart = charts.measure_intervals(intervals(best))
    assert title(chart).endswith(best) and "random rotation" in drawn(chart)


def differences(high):
    rows = [
        (name, 30, "random rotation", measure, high - 1, high - 2, high)
        for name in ("0.0", "0.1", "1.0")
        for measure in charts.SPARSITY_MEASURES
    ]
    columns = ["name", "pairs", "null", "measure", "difference", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


@pytest.mark.parametrize(("high", "found"), [(-0.5, "in 3 of 3"), (0.5, "in 0 of 3")])
def test_head_differences_count_clear_heads(high, found):
    chart = charts.head_differences(differences(high))
    assert found in title(chart) and "SVD sparser" in drawn(chart)


def test_head_differences_draw_the_busiest_heads_only():
    chart = charts.head_differences(differences(-1), most=2)
    assert "2 heads that fire most" in chart.to_dict()["title"]["subtitle"][0]


def test_captured_says_where_the_median_reaches_ninety_percent():
    share = np.array([0.5, 0.8, 0.95, 1.0])
    one = pd.DataFrame(
        {"basis": "SVD", "n": [1, 2, 3, 4], "share": share, "low": share - 0.1, "high": share}
    )
    both = pd.concat([one, one.assign(basis="other", share=share**4)])
    chart = charts.captured(both)
    assert "3 (SVD)" in title(chart) and "4 (other)" in title(chart) and drawn(chart)


@pytest.mark.parametrize(("share", "found"), [(0.9, "uses 4 of its 4"), (0.1, "uses 0 of its 4")])
def test_vectors_in_use_count_the_frequent_ones(share, found):
    rows = [
        (n, k, p, share) for n in ("0.0", "0.1") for k in range(4) for p in ("firing", "silent")
    ]
    chart = charts.vectors_in_use(pd.DataFrame(rows, columns=["name", "k", "pairs", "share"]))
    assert found in title(chart) and drawn(chart)


def test_token_signals_give_the_auc_and_its_chance_line():
    words = pd.DataFrame(
        {"token": [" Mary", " to", " Mary", " to"], "name": [True, False] * 2,
         "strength": [3.0, 1, 2.5, -1]}
    )  # fmt: skip
    chart = charts.token_signals(words, 0.987, "0.6 [0.5, 0.7]")
    assert "AUC 0.99" in title(chart) and "0.6 [0.5, 0.7]" in title(chart)
    assert "Mary" in drawn(chart)
