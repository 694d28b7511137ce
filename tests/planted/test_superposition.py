"""Features in superposition: directions that crowd, and circuits written along them."""

import pytest
import torch

from sparse_signals.core.model import logits
from sparse_signals.planted.circuits import PLANTED, planted
from sparse_signals.planted.scoring import answered
from sparse_signals.planted.superposition import (
    crowded_directions,
    feature_count,
    superpose,
)


def cosines(features, fewer):
    U = crowded_directions(features, fewer, seed=1)
    return U @ U.T - torch.eye(features)


def test_crowded_directions_are_unit_vectors_in_fewer_dimensions():
    U = crowded_directions(40, 4, seed=1)
    assert torch.linalg.matrix_rank(U) == 36
    assert torch.allclose(U.norm(dim=1), torch.ones(40).double())
    assert not torch.equal(U, crowded_directions(40, 4, seed=2))


@pytest.mark.parametrize("fewer", [1, 4, 10])
def test_cosines_are_about_as_small_as_they_can_be(fewer):
    n, found = 40, cosines(40, fewer)
    size = (found.square().sum() / (n * (n - 1))).sqrt().item()
    least = (fewer / (n - fewer) / (n - 1)) ** 0.5  # Welch 1974
    assert least <= size < 1.25 * least and found.diagonal().abs().max() < 1e-12


@pytest.mark.parametrize("name", PLANTED)
def test_no_dimension_fewer_changes_nothing(name):
    case = planted(name, prompts=4)
    same, last = superpose(case, 0), case.batch.last
    ours, theirs = (logits(one.model, case.batch.tokens, last) for one in (same, case))
    assert torch.allclose(ours, theirs, atol=1e-9)


def test_who_reads_a_feature_hears_another_by_their_cosine():
    name, fewer = "inhibition", 3
    case = superpose(planted(name, prompts=4), fewer, seed=1)
    W_E = case.model.bridge.embed.W_E.detach()
    expected = cosines(feature_count(name), fewer) + torch.eye(feature_count(name))
    assert torch.allclose(W_E @ W_E.T, expected[: len(W_E), : len(W_E)])
    assert torch.allclose(W_E.mean(1), torch.zeros(len(W_E)).double(), atol=1e-12)


def test_crowding_costs_answers():
    right = [
        sum(answered(superpose(planted("inhibition", seed=n), fewer, n)) for n in range(3))
        for fewer in (0, 12)
    ]
    assert right[0] == 3 and right[1] < 2


def test_some_dimension_must_be_left():
    with pytest.raises(ValueError, match="of 5 dimensions 0 to 4 can go, not 5"):
        crowded_directions(5, 5)
