"""Charts of chapter 5 say what their data say, and can be drawn."""

import pandas as pd

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


def test_sweep_counts_discoveries():
    rows = [(edge, scope, control, measure, value, value - 0.5, value + 0.5, q, 9)
            for edge, value, q in (("a", -1.0, 0.01), ("b", -0.2, 0.06))
            for scope in ("local", "global")
            for control in ("signal", "random", "signal − random")
            for measure in (*charts.CHANGES, "F_size")]  # fmt: skip
    columns = ["edge", "scope", "control", "measure", "value", "low", "high", "q", "prompts"]
    table = pd.DataFrame(rows, columns=columns)
    raised = (table["edge"] == "a") & (table["measure"] == "F_change")
    table.loc[raised, "value"] = 1.0
    chart = charts.sweep_dots(table)
    assert "1 of the 2 signals lower the score, and none of the 2 the logit" in title(chart)
    shown = [row for data in spec(chart)["datasets"].values() for row in data if "control" in row]
    assert {row["control"] for row in shown} == {"signal", "random"}
    assert "F_size" not in {row["measure"] for row in shown}
    assert drawn(chart)


def test_effects_count_edges_that_move_attention_and_the_answer():
    rows = [(f"edge {n}", scope, trace, -0.5, 0.4 * answer, answer, q)
            for n, (answer, q) in enumerate(((-1.0, 0.01), (1.0, 0.01), (0.1, 0.5)))
            for scope in ("local", "global")
            for trace in ("by score", "by contrast")]  # fmt: skip
    columns = ["edge", "scope", "trace", "reader", "answer_low", "answer", "answer_q"]
    table = pd.DataFrame(rows, columns=columns)
    table["answer_low"], table["answer_high"] = table["answer"] - 0.5, table["answer"] + 0.5
    table["reader_low"], table["reader_high"], table["reader_q"] = -0.6, -0.4, 0.01
    table.loc[table["trace"] == "by contrast", "reader_q"] = 0.1
    chart = charts.effects_compared(table)
    assert title(chart).endswith(
        "by score: 1 of the 3 lower the logit difference too, 1 raise it; by contrast: none"
    )
    assert drawn(chart)


def test_joint_losses_count_gaps_clear_of_zero():
    rows = [("A: x", 1.0, 3.0, 2.0), ("B: y", 3.0, 1.0, -2.0), ("C: z", 1.0, 1.2, 0.2)]
    table = pd.DataFrame(rows, columns=["experiment", "summed", "joint", "gap"])
    for name in ("summed", "joint", "gap"):
        table[f"{name}_low"], table[f"{name}_high"] = table[name] - 0.5, table[name] + 0.5
    chart = charts.joint_losses(table)
    assert "the loss together is clearly above the sum in 1 and clearly below in 1" in title(chart)
    assert "A: x" in drawn(chart)


def test_interactions_count_discoveries():
    rows = [("1.5", "a", "b", 1.0, 0.5, 1.5, 0.01), ("1.5", "a", "c", 0.1, 0.01, 0.2, 0.06),
            ("1.5", "b", "c", -1.0, -1.5, -0.5, 0.04)]  # fmt: skip
    columns = ["root", "first", "second", "value", "low", "high", "q"]
    chart = charts.interaction_map(pd.DataFrame(rows, columns=columns))
    assert "Of 3 pairs of edges, 1 take more of the root's score together" in title(chart)
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
