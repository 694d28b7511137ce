"""Redundancy: known games, the planted backups, and sampled against exact interactions."""

import numpy as np
import pytest
import torch

from sparse_signals.interventions.changes import clean_run, read_layers
from sparse_signals.interventions.joint_effects import (
    Ablations,
    exact_index,
    interactions,
    joint_effect,
    losses,
    sampled_index,
    strongest_players,
)
from sparse_signals.planted.circuits import planted
from sparse_signals.tracing.contributions import read_weights
from sparse_signals.tracing.roots import Root
from sparse_signals.tracing.trace import trace


def of_game(value, n, coalitions, weights):
    """Interactions of a game, given as a function of who plays, for every pair."""
    inside = coalitions[:, None] >> np.arange(n) & 1
    return np.array([value(*row) for row in inside.astype(bool)]) @ weights


@pytest.mark.parametrize("n", [2, 3, 5])
def test_interactions_of_known_games(n):
    game = exact_index(n)
    pairs = n * (n - 1) // 2
    assert of_game(lambda *x: sum(x), n, *game) == pytest.approx(np.zeros(pairs))
    both = of_game(lambda *x: x[0] and x[1], n, *game)  # lost only together: backups
    assert both == pytest.approx(np.eye(pairs)[0])
    either = of_game(lambda *x: x[0] or x[1], n, *game)  # each loses it all: one line
    assert either == pytest.approx(-np.eye(pairs)[0])
    # all of n are needed: every pair gets v(N) / (n − 1), whatever the order of arrival
    assert of_game(lambda *x: all(x), n, *game) == pytest.approx(np.full(pairs, 1 / (n - 1)))


def test_sampled_interactions_agree_with_exact_ones():
    n, rng = 6, np.random.default_rng(0)
    value = rng.standard_normal(2**n)
    exact = value @ exact_index(n)[1]
    errors = []
    for permutations in (50, 5000):
        coalitions, weights = sampled_index(n, permutations)
        errors.append(np.abs(value[coalitions] @ weights - exact).max())
    assert errors[1] < 0.15 and errors[1] < errors[0] / 3
    assert sampled_index(10, 20)[0].max() < 2**10
    again = [sampled_index(n, 30, seed)[1] for seed in (0, 0, 1)]
    assert np.array_equal(again[0], again[1]) and not np.array_equal(again[0], again[2])


@pytest.fixture(scope="module")
def known():
    """The planted backups: movers 2.0 and 3.0 both listen to 1.0 and 1.1, either of which does."""
    circuit = planted("redundant", prompts=8)
    weights = read_weights(circuit.model)
    roots = [Root(layer, 0, "end", "IO") for layer in (2, 3)]
    traced = trace(circuit.model, circuit.batch, roots, weights=weights)
    clean = clean_run(circuit.model, circuit.batch)
    return circuit, weights, traced, read_layers(circuit.model), clean


@pytest.fixture(scope="module")
def players(known):
    circuit, weights, traced, *_ = known
    return strongest_players(weights, circuit.batch, traced, "2.0")


def test_players_are_the_informants(known, players):
    assert players.names["upstream"].tolist() == ["1.0", "1.1"]
    assert players.names["prompts"].tolist() == [8, 8]
    circuit, weights, traced, *_ = known
    both = strongest_players(weights, circuit.batch, traced, "2.0", side=None)
    assert both.names["upstream"].tolist() == ["position", "1.0", "1.1"]
    first = strongest_players(weights, circuit.batch, traced, "2.0", side=None, n=1)
    assert len(first) == 1 and len(first.signals) == 8
    with pytest.raises(ValueError, match=r"root firing of 1\.0"):
        strongest_players(weights, circuit.batch, traced, "1.0")


def test_planted_backups_are_unmasked(known, players):
    """Without rescaling, one informant alone loses us nothing and both lose us the answer."""
    *_, layers, clean = known
    effect = joint_effect(layers, clean, players, Ablations(freeze_norms=True))
    F = float((clean_difference(known)).mean())
    assert effect["summed"] == pytest.approx(0, abs=1e-3)
    assert effect["joint"] == pytest.approx(F, rel=1e-3) and effect["ratio"] == np.inf
    pair = interactions(layers, clean, players, Ablations(freeze_norms=True))
    assert pair["value"].item() == pytest.approx(F, rel=1e-3)
    assert pair["low"].item() <= pair["value"].item() <= pair["high"].item()


def clean_difference(known):
    circuit, *_, clean = known
    final = circuit.model.bridge.ln_final(clean.final[:, None])[:, 0]
    read = final @ circuit.model.bridge.unembed.W_U
    return (read.gather(1, clean.answers) * torch.tensor([1.0, -1.0])).sum(1)


def test_scores_add_up_locally(known, players):
    """The score is linear in the query: what both informants take is what each takes, summed."""
    *_, layers, clean = known
    effect = joint_effect(layers, clean, players, Ablations("score", "local"))
    assert effect["ratio"] == pytest.approx(1, abs=1e-9)
    assert effect["joint"] == pytest.approx(players.names["weight"].sum(), rel=1e-9)
    pair = interactions(layers, clean, players, Ablations("score", "local"))
    assert pair["value"].item() == pytest.approx(0, abs=1e-9)


def test_the_two_sides_of_a_score_take_the_same(known):
    """Without its query or without its key, all of the score is gone: ½ of the sum."""
    circuit, weights, traced, layers, clean = known
    both = strongest_players(weights, circuit.batch, traced, "2.0", side=None)
    effect = joint_effect(layers, clean, both, Ablations("score", "local"))
    assert effect["ratio"] == pytest.approx(0.5, abs=1e-6)


def test_losses_do_not_depend_on_chunks(known, players, monkeypatch):
    *_, layers, clean = known
    coalitions = np.arange(4)
    whole = losses(layers, clean, players, coalitions, Ablations())
    monkeypatch.setattr("sparse_signals.interventions.joint_effects.EDGES", 1)
    assert np.array_equal(losses(layers, clean, players, coalitions, Ablations()), whole)
    assert (whole[:, 0] == 0).all() and (whole[:, 3] > 5).all()


def test_unknown_measure():
    with pytest.raises(ValueError, match="measure must be one of"):
        Ablations("probability")
