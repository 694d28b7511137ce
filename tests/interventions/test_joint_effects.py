"""Joint effects: known games, and the planted backups."""

import numpy as np
import pytest
import torch

from sparse_signals.core.run import run
from sparse_signals.interventions.case import prepare
from sparse_signals.interventions.joint_effects import (
    Ablations,
    interaction_index,
    interactions,
    joint_effect,
    losses,
    strongest_players,
)
from sparse_signals.planted.circuits import planted
from sparse_signals.tracing.roots import Root


def of_game(value, n, coalitions, weights):
    """Interactions of a game, given as a function of who plays, for every pair."""
    inside = coalitions[:, None] >> np.arange(n) & 1
    return np.array([value(*row) for row in inside.astype(bool)]) @ weights


@pytest.mark.parametrize("n", [2, 3, 5])
def test_interactions_of_known_games(n):
    game = interaction_index(n)
    pairs = n * (n - 1) // 2
    assert of_game(lambda *x: sum(x), n, *game) == pytest.approx(np.zeros(pairs))
    both = of_game(lambda *x: x[0] and x[1], n, *game)  # lost only together: backups
    assert both == pytest.approx(np.eye(pairs)[0])
    either = of_game(lambda *x: x[0] or x[1], n, *game)  # each loses it all: one line
    assert either == pytest.approx(-np.eye(pairs)[0])
    # all of n are needed: every pair gets v(N) / (n − 1), whatever the order of arrival
    assert of_game(lambda *x: all(x), n, *game) == pytest.approx(np.full(pairs, 1 / (n - 1)))


@pytest.fixture(scope="module")
def known():
    """The planted backups: movers 2.0 and 3.0 both listen to 1.0 and 1.1, either of which does."""
    circuit = planted("redundant", prompts=8)
    roots = [Root(layer, 0, "end", "IO") for layer in (2, 3)]
    return prepare(run(circuit.model, circuit.batch), roots)


@pytest.fixture(scope="module")
def players(known):
    return strongest_players(known.traced, "2.0")


def test_players_are_the_informants(known, players):
    assert players.names["upstream"].tolist() == ["1.0", "1.1"]
    assert players.names["prompts"].tolist() == [8, 8]
    both = strongest_players(known.traced, "2.0", side=None)
    assert both.names["upstream"].tolist() == ["position", "1.0", "1.1"]
    first = strongest_players(known.traced, "2.0", side=None, n=1)
    assert len(first) == 1 and len(first.signals) == 8
    with pytest.raises(ValueError, match=r"root firing of 1\.0"):
        strongest_players(known.traced, "1.0")


def test_planted_backups_are_unmasked(known, players):
    """Without rescaling, one informant alone loses us nothing and both lose us the answer."""
    effect = joint_effect(known.clean, players, Ablations(freeze_norms=True))
    F = float((clean_difference(known)).mean())
    assert effect["summed"] == pytest.approx(0, abs=1e-3)
    assert effect["joint"] == pytest.approx(F, rel=1e-3) and effect["ratio"] == np.inf
    pair = interactions(known.clean, players, Ablations(freeze_norms=True))
    assert pair[["first", "second"]].to_numpy().tolist() == [["1.0", "1.1"]]
    assert pair["value"].item() == pytest.approx(F, rel=1e-3)
    assert pair["low"].item() <= pair["value"].item() <= pair["high"].item()


def clean_difference(known):
    bridge, clean = known.traced.model.bridge, known.clean
    read = bridge.ln_final(clean.final[:, None])[:, 0] @ bridge.unembed.W_U
    return (read.gather(1, clean.answers) * torch.tensor([1.0, -1.0])).sum(1)


def test_scores_add_up_locally(known, players):
    """The score is linear in the query: what both informants take is what each takes, summed."""
    effect = joint_effect(known.clean, players, Ablations("score", "local"))
    assert effect["ratio"] == pytest.approx(1, abs=1e-9)
    assert effect["joint"] == pytest.approx(players.names["weight"].sum(), rel=1e-9)
    pair = interactions(known.clean, players, Ablations("score", "local"))
    assert pair["value"].item() == pytest.approx(0, abs=1e-9)


def test_the_two_sides_of_a_score_take_the_same(known):
    """Without its query or without its key, all of the score is gone: ½ of the sum."""
    both = strongest_players(known.traced, "2.0", side=None)
    effect = joint_effect(known.clean, both, Ablations("score", "local"))
    assert effect["ratio"] == pytest.approx(0.5, abs=1e-6)


def test_losses_do_not_depend_on_chunks(known, players, monkeypatch):
    coalitions = np.arange(4)
    whole = losses(known.clean, players, coalitions, Ablations())
    monkeypatch.setattr("sparse_signals.interventions.joint_effects.EDGES", 1)
    assert np.array_equal(losses(known.clean, players, coalitions, Ablations()), whole)
    assert (whole[:, 0] == 0).all() and (whole[:, 3] > 5).all()


def test_too_many_players(known, players, monkeypatch):
    monkeypatch.setattr("sparse_signals.interventions.joint_effects.EXACT", 1)
    with pytest.raises(ValueError, match="at most 1 players"):
        interactions(known.clean, players)


def test_unknown_measure():
    with pytest.raises(ValueError, match="measure must be one of"):
        Ablations("probability")
