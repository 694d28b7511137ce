"""Curves of circuits: what their tables say of answers that are known."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from aligned import aligned
from sparse_signals.core.objective import Objective
from sparse_signals.core.prompts import PromptError
from sparse_signals.core.stats import bootstrap
from sparse_signals.interventions.aligned_circuits import AlignedPrompts, Edges
from sparse_signals.interventions.circuit_curves import (
    SHARES_OF_EDGES,
    area_table,
    curve_table,
    edge_answers,
)

CURVES = {"good": [0.4, 0.8, 1.1, 1.0], "poor": [0.0, -0.2, 0.3, 1.0]}
SIZES = [0.01, 0.1, 0.5, 1.0]


def answers_of(curves=CURVES, noise=0.0, draws=2, whole=4.0):
    """Answers of four templates of three prompts, of which F has these curves."""
    rng, rows = np.random.default_rng(0), []
    for draw in range(draws):
        for prompt in range(12):
            closed, opened = -1.0 - prompt, -1.0 - prompt + whole + noise * rng.standard_normal()
            for method, curve in curves.items():
                for size, f in zip(SIZES, curve, strict=True):
                    moved = noise * rng.standard_normal() * (size < 1)
                    F = closed + f * (opened - closed) + moved
                    rows.append((method, draw, size, prompt, prompt % 4, F, 0.5, True))
                    rows[-1] += (closed, opened)
    columns = ["method", "draw", "size", "prompt", "template", "F", "P", "first", "closed", "open"]
    return pd.DataFrame(rows, columns=columns)


def test_a_curve_is_what_circuits_keep_of_the_difference():
    found = curve_table(answers_of()).set_index(["method", "draw", "size"]).sort_index()
    assert len(found) == 2 * 2 * 4
    for method, curve in CURVES.items():
        for draw in (0, 1):
            for name in ("f", "low", "high"):
                assert found.loc[(method, draw), name].tolist() == pytest.approx(curve)
    assert found["P"].eq(0.5).all() and found["top1"].eq(1).all()
    assert found.loc[("good", 0, 0.5), "F"] == pytest.approx(-6.5 + 1.1 * 4)


def test_intervals_resample_templates():
    answers = answers_of(noise=1.0)
    found = curve_table(answers, by=("method", "size")).set_index(["method", "size"])
    part = answers.query("method == 'good' and size == 0.1")
    moved = pd.DataFrame({"f": part["F"] - part["closed"]})
    whole = part["open"] - part["closed"]
    expected = bootstrap(moved, part["template"], weights=whole).iloc[0]
    assert found.loc[("good", 0.1), ["f", "low", "high"]].tolist() == pytest.approx(
        expected[["value", "low", "high"]].tolist()
    )
    assert expected["low"] < expected["value"] < expected["high"]


def test_areas_are_trapezoids():
    found = area_table(answers_of()).set_index(["method", "measure"])["value"]
    log = np.log(SIZES)
    for method, curve in CURVES.items():
        f = np.array(curve)
        assert found[method, "CPR"] == pytest.approx(np.trapezoid(f, SIZES))
        assert found[method, "CMD"] == pytest.approx(np.trapezoid(abs(1 - f), SIZES))
        width = log[-1] - log[0]
        assert found[method, "log CPR"] == pytest.approx(np.trapezoid(f, log) / width)
        assert found[method, "log CMD"] == pytest.approx(np.trapezoid(abs(1 - f), log) / width)


def test_a_perfect_circuit_of_the_log_average_is_one():
    found = area_table(answers_of({"all": [1.0] * 4}))
    assert found["value"].tolist() == pytest.approx([0.99, 0, 1, 0])


def test_differences_are_paired():
    """What both methods have in common does not widen the interval of their difference."""
    answers = answers_of({"good": CURVES["good"], "level": CURVES["good"]}, noise=1.0)
    base = answers["method"] == "good"
    answers.loc[~base, "F"] = answers.loc[base, "F"].to_numpy() - 0.4
    answers.loc[answers["size"] == 1, "F"] = answers["open"]
    alone = area_table(answers).query("method == 'level' and measure == 'log CPR'").iloc[0]
    found = area_table(answers, against="good")
    assert set(found["method"]) == {"level"}
    paired = found.query("measure == 'log CPR'").iloc[0]
    each = area_table(answers).set_index(["method", "measure"])["value"]
    assert paired["value"] == pytest.approx(each["level", "log CPR"] - each["good", "log CPR"])
    assert paired["high"] < 0
    assert paired["high"] - paired["low"] < (alone["high"] - alone["low"]) / 3
    with pytest.raises(ValueError, match="no method 'best'"):
        area_table(answers, against="best")


def test_a_difference_that_may_be_nothing_is_refused():
    answers = answers_of(whole=0.1, noise=2.0)
    for table in (curve_table, area_table):
        with pytest.raises(PromptError, match="no part of it can be measured"):
            table(answers)


def test_numbers_of_nodes_have_curves_and_no_areas():
    answers = answers_of().replace({"size": {0.01: 10, 0.1: 20, 0.5: 40, 1.0: np.inf}})
    assert curve_table(answers)["f"].iloc[1] == pytest.approx(0.8)
    with pytest.raises(ValueError, match="shares of edges"):
        area_table(answers)


def test_rankings_are_run_at_all_sizes(tiny_gpt2, tokens, mask):
    batch, other = aligned(tokens, mask)
    batch = replace(batch, table=batch.table.assign(template=[0, 1, 2, 3] * 2))
    prompts = AlignedPrompts(tiny_gpt2, batch, other, Objective.of_names(batch))
    edges = Edges.of(tiny_gpt2)
    rankings = {"first": -torch.arange(len(edges)).double(), "random": torch.zeros(len(edges))}
    found = edge_answers(prompts, rankings, draw=3)
    assert len(found) == 2 * len(SHARES_OF_EDGES) * 8 and found["draw"].eq(3).all()
    whole = found[found["size"] == 1]
    assert np.allclose(whole["F"], whole["open"], atol=1e-12)
    assert found["template"].tolist()[:5] == [0, 1, 2, 3, 0]
    smallest = found[(found["size"] == 0.001) & (found["method"] == "first")]
    assert (
        np.abs(smallest["F"] - smallest["closed"]).max()
        < np.abs(whole["F"] - whole["closed"]).max()
    )
