"""Joint effects: known games, and the planted backups."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sparse_signals.core.run import run
from sparse_signals.interventions.case import prepare
from sparse_signals.interventions.joint_effects import (
    alone_and_together,
    gap_parts,
    interaction_index,
    interactions,
    joint_effect,
    play,
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
    game = play(known, players, freeze_norms=True)
    effect = joint_effect(game)
    F = float((clean_difference(known)).mean())
    assert effect["summed"] == pytest.approx(0, abs=1e-3)
    assert effect["joint"] == pytest.approx(F, rel=1e-3)
    assert effect["gap"] == pytest.approx(F, rel=1e-3) and np.isnan(effect["ratio"])
    pair = interactions(game)
    assert pair[["first", "second"]].to_numpy().tolist() == [["1.0", "1.1"]]
    assert pair["value"].item() == pytest.approx(F, rel=1e-3)
    assert pair["low"].item() <= pair["value"].item() <= pair["high"].item()


def test_planted_redundancy_is_the_softmax_and_no_backup(known, players):
    """Half of the score is enough for full attention: no informant reacts to the other's loss."""
    games = [
        play(known, players, **how) for how in ({}, {"scope": "local"}, {"freeze_norms": True})
    ]
    parts = gap_parts(*games).set_index("part")["value"]
    assert parts["F"] > 10 and parts["softmax alone"] > 0.9
    assert abs(parts["rest"]) < 0.1 and abs(parts["score"]) < 1e-6
    assert parts["attention"] == pytest.approx(parts["softmax alone"] + parts["rest"])


def test_alone_in_sum_and_together(known, players):
    game = play(known, players, every=False)
    table = alone_and_together(game).set_index("edge")
    assert table["kind"].tolist() == ["alone", "alone", "sum", "together"]
    assert table.loc[["1.0", "1.1"], "value"].sum() == pytest.approx(table.loc["sum", "value"])
    assert table.loc["together", "low"] > 10
    gap = table.loc["together", "value"] - table.loc["sum", "value"]
    assert joint_effect(game)["gap"] == pytest.approx(gap)
    assert interactions(play(known, players))["value"].item() == pytest.approx(gap)


def clean_difference(known):
    bridge, clean = known.traced.model.bridge, known.clean
    read = bridge.ln_final(clean.final[:, None])[:, 0] @ bridge.unembed.W_U
    return (read.gather(1, clean.answers) * torch.tensor([1.0, -1.0])).sum(1)


def test_scores_add_up_locally(known, players):
    """The score is linear in the query: what both informants take is what each takes, summed."""
    game = play(known, players, "local")
    effect = joint_effect(game, "score")
    assert effect["ratio"] == pytest.approx(1, abs=1e-9)
    assert effect["ratio_low"] == pytest.approx(1, abs=1e-9)
    assert effect["joint"] == pytest.approx(players.names["weight"].sum(), rel=1e-9)
    assert interactions(game, "score")["value"].item() == pytest.approx(0, abs=1e-9)


def test_the_two_sides_of_a_score_take_the_same(known):
    """Without its query or without its key, all of the score is gone: ½ of the sum."""
    both = strongest_players(known.traced, "2.0", side=None)
    effect = joint_effect(play(known, both, "local", every=False), "score")
    assert effect["ratio"] == pytest.approx(0.5, abs=1e-6)


def test_losses_do_not_depend_on_chunks(known, players, monkeypatch):
    whole = play(known, players)
    monkeypatch.setattr("sparse_signals.interventions.joint_effects.EDGES", 1)
    assert np.array_equal(play(known, players).lost, whole.lost)
    assert (whole.of("F")[:, 0] == 0).all() and (whole.together("F") > 5).all()


def test_intervals_resample_templates(known, players):
    game = play(known, players, every=False)
    one = replace(game, cluster=np.zeros_like(game.cluster))
    effect = joint_effect(one)
    assert effect["joint_low"] == effect["joint_high"] == pytest.approx(effect["joint"])
    batch = known.traced.batch
    table = batch.table.assign(template=np.arange(len(batch.tokens)) // 2)
    halves = replace(known, traced=replace(known.traced, batch=replace(batch, table=table)))
    assert play(halves, players, every=False).cluster.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_too_many_players(known, players, monkeypatch):
    monkeypatch.setattr("sparse_signals.interventions.joint_effects.EXACT", 1)
    with pytest.raises(ValueError, match="at most 1 players"):
        play(known, players)


def test_unknown_measure(known, players):
    with pytest.raises(ValueError, match="measure must be one of"):
        play(known, players, every=False).of("probability")
