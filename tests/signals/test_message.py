"""What a head's directions say: learned on some prompts, asked on others, beside chance."""

import numpy as np
import pytest
import torch

from batches import with_roles
from sparse_signals.core.run import run
from sparse_signals.core.stats import auc
from sparse_signals.signals.firings import find_firings
from sparse_signals.signals.message import (
    against_chance,
    learn_message,
    names_and_words,
    random_sets,
    separation_bounds,
    separations,
    signal_parts,
)
from sparse_signals.signals.slices import coordinates, slices, support


@pytest.fixture(scope="module")
def ran(tiny_gpt2, batch):
    return run(tiny_gpt2, with_roles(batch))


@pytest.fixture(scope="module")
def pairs(ran):
    found = find_firings(ran, 0.25)
    busiest = found.table()["name"].mode()[0]
    return found[torch.tensor((found.table()["name"] == busiest).to_numpy())]


@pytest.fixture(scope="module")
def message(ran, pairs):
    return learn_message(ran, pairs)


def test_a_message_holds_the_singular_pairs_used_most(ran, pairs, message):
    chosen = support(slices(ran, pairs))
    used = chosen.double().mean(0)
    left = [k for k in range(len(used)) if k not in message.vectors.tolist()]
    assert len(message.vectors) == int(chosen.sum(-1).double().median())
    assert used[message.vectors].min() >= used[left].max()
    torch.testing.assert_close(message.dest, coordinates(ran, pairs).dest.mean(0))


def test_a_message_needs_a_pair(ran, pairs):
    with pytest.raises(ValueError, match="at least one pair"):
        learn_message(ran, pairs[:0])


def test_what_all_directions_carry_is_the_score_with_the_typical_destination(ran, pairs):
    one = learn_message(ran, pairs[:1])
    words = names_and_words(ran)
    heard = signal_parts(ran, one, words)["heard"].sum(-1).numpy()
    here = (words["prompt"] == int(pairs.prompt[0])) & (words["pos"] == int(pairs.src[0]))
    assert heard[here.to_numpy()].item() == pytest.approx(pairs.score[0].item())


def test_lengths_are_those_of_the_projection(ran, message):
    words = names_and_words(ran)
    parts = signal_parts(ran, message, words)["length"]
    whole = ran.k[message.layer, 0, message.head, 1].double()
    assert (parts >= 0).all() and parts.shape == (len(words), len(whole))


def test_names_are_the_two_people_of_each_prompt(ran):
    words = names_and_words(ran)
    names = {*ran.batch.table["io"], *ran.batch.table["s"]}
    assert set(words[words["name"]]["token"].str.strip()) <= names
    assert words["name"].sum() >= 3 * len(ran) and not words["name"].all()


def test_separations_equal_the_area_of_each_set():
    rng = np.random.default_rng(0)
    parts, positive = torch.from_numpy(rng.standard_normal((50, 6))), rng.random(50) < 0.4
    sets = random_sets(6, 2, draws=20)
    assert (sets.sum(1) == 2).all() and len(sets.unique(dim=0)) > 8
    expected = [auc(parts[:, s].sum(1).numpy(), positive) for s in sets]
    assert separations(parts, sets, positive) == pytest.approx(expected)


def test_bounds_hold_the_area_and_shrink_to_a_point_where_all_is_clear():
    rng = np.random.default_rng(0)
    positive = np.arange(60) % 3 == 0
    clusters, noise = np.repeat(np.arange(6), 10), rng.standard_normal(60)
    low, high = separation_bounds(noise + positive, positive, clusters)
    assert low < auc(noise + positive, positive) < high < 1
    assert separation_bounds(noise + 99 * positive, positive, clusters) == (1, 1)


def test_a_planted_message_is_above_chance_and_a_random_one_is_not(ran, message, monkeypatch):
    words = names_and_words(ran)
    names = torch.from_numpy(words["name"].to_numpy(float))[:, None]
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((len(words), 8)))
    told = noise.clone()
    told[:, message.vectors] += 3 * names / len(message.vectors) ** 0.5
    for parts, verdict in ((told, "above"), (noise, "inside")):
        monkeypatch.setattr(
            "sparse_signals.signals.message.signal_parts", lambda *_, parts=parts: {"heard": parts}
        )
        row = against_chance(ran, message, words, draws=200).iloc[0]
        assert row["verdict"] == verdict
        assert row["low"] <= row["auc"] <= row["high"]
        assert row["chance_low"] <= row["chance"] <= row["chance_high"]
