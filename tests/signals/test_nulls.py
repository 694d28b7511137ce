"""The null models of chapter 3 keep what they promise to keep."""

import numpy as np
import pandas as pd
import pytest
import torch

from sparse_signals.core.run import run
from sparse_signals.core.stats import random_rotation
from sparse_signals.signals.firings import Pairs, find_firings, sample_silent
from sparse_signals.signals.nulls import (
    MEASURES,
    basis_gaps,
    block_names,
    block_rotation,
    gap_texts,
    gaps,
    gaussian_slices,
    head_gaps,
    mean_gaps,
    rotated,
    rotation_sparsity,
    verdict,
)
from sparse_signals.signals.slices import Coordinates, head_coordinates, slices, sparsity

LEVEL = 0.25


@pytest.fixture(scope="module", params=["tiny_gpt2", "tiny_llama"])
def ran(request, batch):
    return run(request.getfixturevalue(request.param), batch)


@pytest.fixture(scope="module")
def pairs(ran):
    return find_firings(ran, LEVEL)


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


def test_block_rotation_mixes_neighbours_alone():
    turn = block_rotation(10, 4, seed=1)
    torch.testing.assert_close(turn.mT @ turn, torch.eye(10, dtype=torch.float64))
    block = torch.arange(10) // 4
    assert ((turn != 0) == (block[:, None] == block)).all()
    assert not torch.equal(turn[:4, :4], turn[4:8, 4:8])


@pytest.mark.parametrize(
    ("rank", "widths"), [(8, [2, 4, 8]), (12, [2, 4, 8, 12]), (2, [2]), (64, [2, 4, 8, 16, 32, 64])]
)
def test_blocks_double_until_they_hold_all_directions(rank, widths):
    assert [*block_names(rank).values()] == widths


def planted(rank=16, count=200):
    """A code of two slices in blocks of four of their own; and its pairs, in ten clusters."""
    generator = torch.Generator().manual_seed(0)
    code = torch.zeros(count, rank, dtype=torch.float64)
    code[:, ::8] = 1 + torch.rand(count, 2, generator=generator, dtype=torch.float64)
    ids = torch.arange(count)
    pairs = Pairs(ids * 0, ids, ids * 0 + 1, ids, ids, ids.double(), ids.double())
    return Coordinates(code, code), pairs, np.arange(count) % 10


def test_a_code_in_single_directions_beats_blocks_and_a_code_in_blocks_beats_only_wider_ones():
    coords, _, _ = planted()
    sharp = gaps(coords).groupby("null").mean()["participation"]
    assert sharp["blocks of 4"] < -0.5 and sharp["all directions"] < sharp["blocks of 4"]
    rows = [gaps(rotated(coords, block_rotation(16, 4, 9 + n)), repeats=2) for n in range(20)]
    blurred = pd.concat(rows).groupby("null").mean()["participation"]
    assert abs(blurred["blocks of 4"]) < 0.25 and blurred["all directions"] < -2


def test_gaps_are_ours_minus_null_pair_by_pair():
    coords, _, _ = planted(count=5)
    slices_of_null = coords.slices.flip(-1) + 1
    found = gaps(coords, {"other": slices_of_null}, repeats=2)
    ours, null = sparsity(coords.slices), sparsity(slices_of_null)
    expected = (ours - null)[list(MEASURES)].astype(float)
    pd.testing.assert_frame_equal(found.loc["other"], expected, check_names=False)
    assert found.index.unique("null").tolist() == [*block_names(16), "other"]


def test_mean_gaps_have_a_difference_of_differences():
    coords, _, clusters = planted()
    fire = gaps(coords, repeats=2)
    rest = fire + 1.0 + 0.01 * np.arange(len(fire))[:, None] % 0.1
    table = mean_gaps({"firing": fire, "silent": rest}, clusters)
    row = table.set_index(["kind", "null", "measure"]).loc[
        ("firing − silent", "blocks of 4", "ninety")
    ]
    assert row["value"] == pytest.approx((fire - rest).loc["blocks of 4", "ninety"].mean())
    assert row["low"] <= row["value"] <= row["high"] < 0 and row["verdict"] == "sparser"
    assert table["null"].drop_duplicates().tolist() == [*block_names(16)]
    texts = gap_texts(table[table["measure"] == "ninety"])
    assert texts.index.tolist() == [*block_names(16)] and texts.columns[0] == "firing"
    assert texts.loc["blocks of 4", "firing − silent"].endswith("] sparser")


def test_heads_are_tested_over_clusters_with_a_false_discovery_rate():
    _, pairs, clusters = planted(count=300)
    head = torch.arange(300) // 100
    three = Pairs(head, *(getattr(pairs, f) for f in ("prompt", "layer", "dest", "src")),
                  pairs.attention, pairs.score)  # fmt: skip
    rng = np.random.default_rng(0)
    shift = np.repeat([-2.0, 0.0, 2.0], 100)[:, None]
    found = pd.DataFrame(rng.standard_normal((300, 4)) + shift, columns=list(MEASURES))
    heads = head_gaps(found, three, clusters).query("measure == 'participation'")
    assert heads["verdict"].tolist() == ["sparser", "unclear", "less sparse"]
    assert (heads["pairs"] == 100).all() and (heads["q"] <= 1).all()
    assert head_gaps(found, three, np.zeros(300)).empty


@pytest.mark.parametrize("kind", ["tiny_gpt2", "tiny_llama"])
def test_basis_gaps_compare_the_bases_that_a_model_has(kind, request, batch):
    ran = run(request.getfixturevalue(kind), batch)
    pairs = find_firings(ran, LEVEL)
    found = basis_gaps(ran, pairs)
    own = sparsity(head_coordinates(ran, pairs).slices) - sparsity(slices(ran, pairs))
    name = "own coordinates − singular"
    assert found.loc[name, "settled"].mean() == pytest.approx(own["settled"].mean())
    assert found.index.unique("null").size == (4 if ran.model.rotary else 1)


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


def test_gaussian_null_of_a_head_without_spread_shares_the_total_evenly():
    ids = torch.zeros(3, dtype=torch.long)
    pairs = Pairs(ids, ids, ids, ids, ids, ids.double(), ids.double())
    flat = torch.zeros(3, 4, dtype=torch.float64)
    null = gaussian_slices(pairs, pairs, flat, torch.full((3,), 8.0).double())
    assert (null == 2).all()
