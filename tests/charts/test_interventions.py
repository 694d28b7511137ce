"""Charts of chapter 5 say what their data say, and can be drawn."""

import numpy as np
import pandas as pd
import pytest

from drawing import drawn, spec, title
from sparse_signals.charts import interventions as charts


def test_together_compares_the_sum_with_the_joint_loss():
    rows = [("planted", "1.0", "alone", 0.0), ("planted", "sum", "sum", 0.25),
            ("planted", "together", "together", 18.0), ("1.5", "0.2", "alone", 1.0),
            ("1.5", "sum", "sum", 1.0), ("1.5", "together", "together", 0.5)]  # fmt: skip
    table = pd.DataFrame(rows, columns=["circuit", "edge", "kind", "value"])
    chart = charts.together(table.assign(low=table["value"] - 0.1, high=table["value"] + 0.1))
    assert "planted: 0.25 in sum, 18.00 together; 1.5: 1.00 in sum, 0.50 together" in title(chart)
    assert "1.0" in drawn(chart)


def test_sweep_counts_intervals_clear_of_zero():
    rows = [(edge, scope, mode, control, measure, value, value - 0.5, value + 0.5, 9)
            for edge, value in (("a", -1.0), ("b", -0.2))
            for scope in ("local", "global")
            for mode in ("ablate", "boost")
            for control in ("signal", "random", "signal − random")
            for measure in (*charts.CHANGES, "F_size")]  # fmt: skip
    columns = ["edge", "scope", "mode", "control", "measure", "value", "low", "high", "prompts"]
    chart = charts.sweep_dots(pd.DataFrame(rows, columns=columns))
    assert "the signals of 1 of 2 edges lower the score, and those of 1 lower" in title(chart)
    shown = [row for data in spec(chart)["datasets"].values() for row in data if "control" in row]
    assert {row["control"] for row in shown} == {"signal", "random"}
    assert "F_size" not in {row["measure"] for row in shown}
    assert drawn(chart)


def test_effects_count_edges_that_move_attention_and_the_answer():
    rows = [(f"edge {n}", scope, trace, -0.5, 0.4 * answer, answer)
            for n, answer in enumerate((-1.0, 1.0, 0.1))
            for scope in ("local", "global")
            for trace in ("by score", "by contrast")]  # fmt: skip
    columns = ["edge", "scope", "trace", "reader", "answer_low", "answer"]
    table = pd.DataFrame(rows, columns=columns)
    table["answer_low"], table["answer_high"] = table["answer"] - 0.5, table["answer"] + 0.5
    table["reader_low"], table["reader_high"] = -0.6, -0.4
    table.loc[table["trace"] == "by contrast", "reader_high"] = 0.1
    chart = charts.effects_compared(table)
    assert title(chart).endswith(
        "by score: of 3 edges 1 lower the logit difference, 1 raise it; "
        "by contrast: of 0 edges 0 lower the logit difference, 0 raise it"
    )
    assert drawn(chart)


def test_ratios_stay_in_the_frame():
    rows = [("A: x", "by score", "global", 0.5, 0.2, 0.8, -1.0, -1.0, -1.0),
            ("A: x", "by contrast", "global", 0.5, 0.2, 0.8, -1.0, -1.0, -1.0),  # the same again
            ("B: y", "by score", "global", np.inf, 1.2, np.inf, -1.0, 0.5, -2.0),
            ("C: z", "by score", "global", 0.5, 0.2, 0.8, 1.0, 1.0, 1.0),  # a gain
            ("A: x", "published", "global", 0.8, np.nan, np.nan, -1.0, -1.0, -1.6)]  # fmt: skip
    columns = ["experiment", "source", "scope", "ratio", "low", "high"]
    table = pd.DataFrame(rows, columns=[*columns, "first", "second", "together"])
    chart = charts.ratios(table)
    assert "of 2 different global losses here, the ratio is clearly below 1 in 1 and" in title(
        chart
    )
    numbers = [row["ratio"] for data in spec(chart)["datasets"].values() for row in data
               if "ratio" in row]  # fmt: skip
    assert max(numbers) == charts.FRAME[1]
    assert drawn(chart)


def test_interactions_ignore_rounding():
    rows = [("1.5", "a", "b", 1.0, 0.5, 1.5), ("1.5", "a", "c", 1e-17, 1e-18, 1e-16),
            ("1.5", "b", "c", -1.0, -1.5, -0.5)]  # fmt: skip
    columns = ["root", "first", "second", "value", "low", "high"]
    chart = charts.interaction_map(pd.DataFrame(rows, columns=columns))
    assert "Of 3 pairs of edges, 1 lose more together than in sum and 1 less" in title(chart)
    assert "1.00" in drawn(chart)


def test_takeover_says_what_returns():
    rows = [(circuit, scales, n, measure, 0.25, -0.001, 0.5)
            for circuit in ("planted", "1.5")
            for scales in ("recomputed", "frozen")
            for n in (0, 1, 2)
            for measure in (*charts.ROOT_MEASURES, "returned")]  # fmt: skip
    columns = ["circuit", "scales", "round", "measure", "value", "low", "high"]
    chart = charts.takeover_lines(pd.DataFrame(rows, columns=columns))
    assert "1.5 (frozen) 25\xa0% [0, 50]" in title(chart)
    assert drawn(chart)


@pytest.mark.parametrize(
    ("reached", "said"),
    [
        ({"trace": np.nan, "EAP-IG": 32}, "EAP-IG 32; never reached by trace"),
        ({"trace": 16, "EAP-IG": 1024}, "trace 16, EAP-IG 1,024"),
        ({"trace": np.nan}, "none; never reached by trace"),
    ],
)
def test_curves_say_who_needs_the_fewest_edges(reached, said):
    rows = [(method, size, value) for method in ("trace", "EAP-IG")
            for size, value in ((4, 0.1), (32, 0.9))]  # fmt: skip
    table = pd.DataFrame(rows, columns=["method", "size", "faithfulness"])
    table["completeness"] = table["faithfulness"]
    for name in ("faithfulness", "completeness"):
        table[f"{name}_low"], table[f"{name}_high"] = table[name] - 0.1, table[name] + 0.1
    chart = charts.faithfulness_curves(table, pd.Series(reached, dtype=float), 0.8)
    assert title(chart).endswith(f"Edges to reach 80\xa0% of the logit difference: {said}")
    assert drawn(chart)
