"""Charts of chapter 3: they draw from small frames, and their titles follow the data."""

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


@pytest.mark.parametrize(("silent", "found"), [(2, "in all 2 heads"), (9, "in none of the 2")])
def test_support_sizes_say_where_silence_is_smaller(silent, found):
    chart = charts.support_sizes(sizes(silent))
    assert found in title(chart) and drawn(chart).count("aria-roledescription") > 5


def test_heads_can_be_chosen_by_menu():
    chart = charts.support_sizes(sizes(2)).to_dict()
    (pick,) = (p for p in chart["params"] if "bind" in p)
    assert pick["bind"]["name"]["options"] == ["0.0", "0.1"]


def rows_of(kinds, nulls=("blocks of 4", "all directions")):
    rows = [
        (kind, null, measure, value, value - 0.5, value + 0.5)
        for kind, value in kinds.items()
        for null in nulls
        for measure in charts.SPARSITY_MEASURES
    ]
    return pd.DataFrame(rows, columns=["kind", "null", "measure", "value", "low", "high"])


def test_gaps_to_nulls_are_named_for_every_kind_of_pairs():
    table = rows_of({"firing": -1.0, "silent": 0.25, "firing − silent": -1.25})
    chart = charts.null_gaps(table, "blocks of 4")
    assert "firing -1.00 [-1.50, -0.500], silent 0.250" in title(chart)
    assert "By participation ratio" in title(chart) and "blocks of 4" in title(chart)
    (pick,) = spec(chart)["params"]
    assert pick["bind"]["options"] == list(charts.SPARSITY_MEASURES)
    assert "all directions" in drawn(chart)


def differences(verdict, heads=3):
    rows = [
        (f"0.{n}", 30, measure, -1.0 - n, -2.0 - n, 0.5 - n, 0.01, verdict)
        for n in range(heads)
        for measure in charts.SPARSITY_MEASURES
    ]
    columns = ["name", "pairs", "measure", "value", "low", "high", "q", "verdict"]
    return pd.DataFrame(rows, columns=columns)


@pytest.mark.parametrize(
    ("verdict", "found"),
    [("sparser", "3 sparser, none unclear"), ("unclear", "none sparser, 3 unclear")],
)
def test_head_differences_count_verdicts(verdict, found):
    chart = charts.head_differences(differences(verdict), "blocks of 4")
    assert found in title(chart) and "blocks of 4" in title(chart) and verdict in drawn(chart)


def test_head_differences_draw_the_heads_furthest_from_zero():
    chart = charts.head_differences(differences("sparser", heads=5), "blocks of 4", most=2)
    assert "2 heads furthest" in chart.to_dict()["title"]["subtitle"][0]
    (data,) = (x for x in spec(chart)["datasets"].values() if "name" in x[0])
    assert {row["name"] for row in data} == {"0.3", "0.4"} and "of 5 heads" in title(chart)


def test_token_signals_give_the_auc_and_its_chance_line():
    words = pd.DataFrame(
        {"token": [" Mary", " to", " Mary", " to"], "name": [True, False] * 2,
         "strength": [3.0, 1, 2.5, -1]}
    )  # fmt: skip
    found = pd.Series(
        {"auc": 0.987, "verdict": "above", "chance": 0.6, "chance_low": 0.5, "chance_high": 0.7}
    )
    chart = charts.token_signals(words, found)
    assert "AUC 0.99, above" in title(chart) and "0.600 [0.500, 0.700]" in title(chart)
    assert "Mary" in drawn(chart)
