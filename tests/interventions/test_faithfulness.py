"""Circuits run alone: known ones are faithful and complete; rankings are as defined."""

import pandas as pd
import pytest
import torch

from gated import batch_of, edge_table, every
from sparse_signals.core.run import run
from sparse_signals.interventions.faithfulness import (
    curves,
    edge_attribution,
    edges_needed,
    gates,
    head_value,
    random_value,
    ranked,
    switchable,
    traced_value,
)
from sparse_signals.interventions.gated_model import run_rows, run_switched, switchboard
from sparse_signals.planted.circuits import planted
from sparse_signals.tracing.contributions import Settings
from sparse_signals.tracing.roots import logit_attribution
from sparse_signals.tracing.trace import Trace


@pytest.fixture(scope="module")
def board(tiny_gpt2):
    return switchboard(tiny_gpt2, batch_of(6), batch_of(10, seed=1), "mean")


@pytest.fixture(scope="module")
def known():
    """The planted inhibition circuit, whose true edges each side of a firing needs."""
    return planted("inhibition", prompts=16)


@pytest.fixture(scope="module")
def known_board(known):
    return switchboard(known.model, known.batch, planted("inhibition", seed=1, prompts=32).batch)


@pytest.fixture(scope="module")
def true_edges(known, known_board):
    truth = known.truth.assign(share=1.0)
    truth["token"] = truth["dest"].where(truth["side"] == "dest", truth["src"])
    return ranked(known_board, traced_value(known_board, trace_of(known_board, truth)))


def trace_of(board, edges):
    """A trace of the prompts of a board that consists of some edges."""
    of = board.model.components.set_index("component")
    edges = edges.assign(kind=of.loc[edges["upstream"], "kind"].to_numpy())
    return Trace(board.model, board.batch, (), Settings(), pd.DataFrame(), edges)


def test_the_planted_circuit_is_faithful_and_complete(known, known_board, true_edges):
    size = len(true_edges)
    rankings = {
        "true": [true_edges],
        "random": [ranked(known_board, random_value(known_board, seed)) for seed in range(3)],
    }
    table = curves(known_board, rankings, [0, size]).set_index(["method", "size"])
    true, random = table.loc["true", size], table.loc["random", size]
    assert true["faithfulness"] == pytest.approx(1, abs=1e-3)
    assert true["completeness"] > 0.7 and true["accuracy"] == 1
    assert random["faithfulness_high"] < 0.5 and random["completeness_high"] < 0.5
    nothing = table.loc["true", 0]
    assert nothing["faithfulness"] == nothing["accuracy"] == 0


def test_attribution_finds_a_faithful_circuit(known_board, true_edges):
    best = ranked(known_board, edge_attribution(known_board))[: len(true_edges)]
    table = curves(known_board, {"attribution": [best]}, [len(best)])
    assert table["faithfulness"].item() > 0.9
    assert torch.isin(best, true_edges).sum() > len(best) / 2


def test_attribution_adds_up_to_what_opening_does(board):
    opened, closed = (run_switched(board, gates(board, every(board)[:n])) for n in (None, 0))
    gap = (opened.difference - closed.difference).mean()
    errors = [abs(float(edge_attribution(board, steps).sum() - gap)) for steps in (2, 40)]
    assert errors[1] < 0.02 * abs(gap) and errors[1] < errors[0]


def test_attribution_is_a_derivative(board):
    edge, step = int(every(board)[1000]), 1e-5
    found = edge_attribution(board, steps=1).flatten()[edge]
    differences = []
    for sign in (-1, 1):
        gate = torch.full(switchable(board).shape, 0.5, dtype=torch.float64)
        gate.view(-1)[edge] += sign * step
        differences.append(run_rows(board, gate, slice(0, 6)).difference.mean())
    assert found == pytest.approx(float(differences[1] - differences[0]) / (2 * step), rel=1e-4)


def test_attribution_needs_no_gradients_outside(board):
    with torch.no_grad():
        found = edge_attribution(board, steps=1)
    assert found.any() and not found.requires_grad


def test_traced_value_pools_prompts(board):
    """Two firings in one prompt count with their mean; biases and the first token are no edges."""
    rows = [
        ("0.1", 1, 2, "dest", 0, 6, 0.4),
        ("0.1", 1, 2, "dest", 0, 6, 0.8),
        ("0.1", 1, 2, "dest", 3, 6, 0.6),
        ("embedding", 1, 2, "src", 3, 6, 0.5),
        ("bias 0", 1, 2, "dest", 3, 6, 0.9),
        ("bias row", 1, 2, "dest", 3, 6, 0.9),
        ("0.1", 1, 2, "dest", 3, 0, 0.9),
    ]
    columns = ["upstream", "layer", "head", "side", "prompt", "token", "share"]
    value = traced_value(board, trace_of(board, pd.DataFrame(rows, columns=columns)))
    edges = ranked(board, value)
    table = edge_table(board, edges)
    assert table["upstream"].tolist() == ["0.1", "embedding"]
    assert table["side"].tolist() == ["dest", "src"]
    assert set(table["downstream"]) == {"1.2"} and set(table["role"]) == {"S2"}
    assert value.flatten()[edges].tolist() == pytest.approx([(0.6 + 0.6) / 6, 0.5 / 6])


def test_heads_come_by_direct_logit_attribution(board):
    heads = board.model.components[:-1]["kind"] == "head"
    shares = logit_attribution(run(board.model, board.batch))[0].mean(0)[:-1]
    strongest = int(shares[torch.tensor(heads.tolist())].abs().argmax())
    best = board.model.components["component"][:-1][heads].iloc[strongest]
    table = edge_table(board, ranked(board, head_value(board)))
    touches = (table["upstream"] == best) | (table["downstream"] == best)
    assert touches.any() and touches[: touches.sum()].all()
    assert len(table) == len(every(board))


def test_random_rankings_hold_every_edge_once(board):
    a, b = (ranked(board, random_value(board, seed)) for seed in (0, 1))
    assert torch.equal(a.sort().values, every(board)) and not torch.equal(a, b)


def test_curves_end_at_the_model(board):
    edges = every(board)
    table = curves(board, {"all": [edges], "few": [edges[:5]]}, [5, len(edges)])
    assert table["size"].tolist() == [5, len(edges), 5]  # a short ranking is run once, whole
    whole = table.iloc[1]
    assert whole["faithfulness"] == pytest.approx(1) and whole["completeness"] == pytest.approx(1)
    assert whole["faithfulness_low"] == pytest.approx(1)


def test_edges_needed_counts_neither_overshooting_nor_luck():
    rows = [
        ("a", 10, 0.5, 0.4, 0.7),
        ("a", 20, 0.85, 0.7, 0.9),
        ("a", 30, 0.95, 0.9, 1.0),
        ("b", 10, 3.0, 2.0, 4.0),
        ("b", 20, 1.1, 1.0, 1.3),
        ("c", 10, 0.9, 0.8, 1.0),
        ("c", 20, 0.5, 0.4, 0.6),
    ]
    names = ["method", "size", "faithfulness", "faithfulness_low", "faithfulness_high"]
    found = edges_needed(pd.DataFrame(rows, columns=names)).set_index("method")
    assert found.loc["a"].tolist() == [20, 20, 30]
    assert found.loc["b"].tolist()[:2] == [20, 20] and pd.isna(found.loc["b", "most"])
    assert found.loc["c"].isna().all()
