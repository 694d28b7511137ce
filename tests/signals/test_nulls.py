"""The null models of chapter 3 keep what they promise to keep."""

import pandas as pd
import pytest
import torch

from sparse_signals.core.run import run
from sparse_signals.core.stats import random_rotation
from sparse_signals.signals.firings import Pairs, find_firings, sample_silent
from sparse_signals.signals.nulls import (
    gaussian_slices,
    intervals,
    rotation_sparsity,
    shuffled,
    sparser_heads,
    sparsity_table,
    verdict,
)
from sparse_signals.signals.slices import Coordinates, coordinates, slices, sparsity

LEVEL = 0.25


@pytest.fixture(scope="module", params=["tiny_gpt2", "tiny_llama"])
def ran(request, batch):
    return run(request.getfixturevalue(request.param), batch)


@pytest.fixture(scope="module")
def pairs(ran):
    return find_firings(ran, LEVEL)


def test_shuffling_keeps_the_sources_of_each_head(ran, pairs):
    coords = coordinates(ran, pairs)
    mixed = shuffled(coords, pairs)
    assert torch.equal(mixed.dest, coords.dest) and not torch.equal(mixed.src, coords.src)
    for layer, head in {
        (a, b) for a, b in zip(pairs.layer.tolist(), pairs.head.tolist(), strict=True)
    }:
        here = (pairs.layer == layer) & (pairs.head == head)
        before, after = coords.src[here, 0].sort().values, mixed.src[here, 0].sort().values
        assert torch.equal(before, after)


def test_gaussian_null_keeps_the_total_and_the_profile(ran, pairs):
    silent = sample_silent(ran, pairs, LEVEL)
    reference = slices(ran, silent)
    null = gaussian_slices(pairs, silent, reference, pairs.score)
    torch.testing.assert_close(null.sum(-1), pairs.score)


def test_gaussian_null_has_the_variance_of_each_direction():
    ones = torch.zeros(20000, dtype=torch.long)
    pairs = Pairs(ones, ones, ones, ones, ones, ones.double(), ones.double())
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([3.0, 1.0, 0.5, 0.0], dtype=torch.float64)
    reference = torch.randn(20000, 4, generator=generator, dtype=torch.float64) * spread
    total = reference.sum(-1)
    null = gaussian_slices(pairs, pairs, reference, total)
    torch.testing.assert_close(null.std(0), spread, atol=0.05, rtol=0)


def test_random_rotation_is_orthogonal_and_seeded():
    turn = random_rotation(16, seed=5)
    torch.testing.assert_close(turn.mT @ turn, torch.eye(16, dtype=torch.float64))
    assert torch.equal(turn, random_rotation(16, seed=5))
    assert not torch.equal(turn, random_rotation(16, seed=6))


def test_sparse_code_in_a_known_basis_beats_its_rotations():
    generator = torch.Generator().manual_seed(0)
    few = torch.zeros(200, 16, dtype=torch.float64)
    few[:, :2] = 1 + torch.rand(200, 2, generator=generator, dtype=torch.float64)
    coords = Coordinates(few, few)
    ours = sparsity(coords.slices)
    null = rotation_sparsity(coords, repeats=5)
    assert (ours["participation"] <= 2 + 1e-9).all() and null["participation"].mean() > 3
    ids = torch.arange(200)
    pairs = Pairs(ids * 0, ids, ids * 0 + 1, ids, ids, ids.double(), ids.double())
    heads = sparser_heads(ours, null, pairs).set_index("measure")
    assert set(heads["name"]) == {"0.1"} and heads.loc["participation", "high"] < 0
    assert verdict(*heads.loc["participation", ["low", "high"]]) == "sparser"


def test_gaussian_code_does_not_beat_its_rotations():
    generator = torch.Generator().manual_seed(0)
    dest, src = torch.randn(2, 2000, 16, generator=generator, dtype=torch.float64)
    coords = Coordinates(dest, src)
    ours, null = sparsity(coords.slices), rotation_sparsity(coords, repeats=5)
    for measure in ("participation", "ninety", "settled"):
        assert ours[measure].mean() == pytest.approx(null[measure].mean(), rel=0.03)


def test_verdict_needs_an_interval_away_from_zero():
    assert verdict(-2.0, -1.0) == "sparser" and verdict(1.0, 2.0) == "less sparse"
    assert verdict(-1.0, 1.0) == "unclear"


def test_intervals_are_those_of_each_group(ran, pairs):
    table = sparsity(slices(ran, pairs))
    codes = pd.concat(
        [
            sparsity_table(pairs, table, "SVD", "firing"),
            sparsity_table(pairs, table + 1, "more", "firing"),
        ]
    )
    rows = intervals(codes, ["basis", "pairs"]).set_index(["basis", "measure"])
    assert rows.loc[("SVD", "support"), "value"] == pytest.approx(table["support"].mean())
    assert rows.loc[("more", "ninety"), "low"] == rows.loc[("SVD", "ninety"), "low"] + 1


def test_gaussian_null_of_a_head_without_spread_shares_the_total_evenly():
    ids = torch.zeros(3, dtype=torch.long)
    pairs = Pairs(ids, ids, ids, ids, ids, ids.double(), ids.double())
    flat = torch.zeros(3, 4, dtype=torch.float64)
    null = gaussian_slices(pairs, pairs, flat, torch.full((3,), 8.0).double())
    assert (null == 2).all()
