"""Identities of chapter 3, and its tables against a slow, obvious reference."""

import numpy as np
import pytest
import torch

from batches import plain_batch
from sparse_signals.core.model import activations
from sparse_signals.core.run import run
from sparse_signals.core.stats import auc, random_rotation
from sparse_signals.heads.svd import HeadSVD, head_svd
from sparse_signals.signals.firings import find_firings, pairs_at
from sparse_signals.signals.nulls import block_rotation, rotated
from sparse_signals.signals.slices import (
    Coordinates,
    coordinates,
    head_coordinates,
    model_basis,
    offset_coordinates,
    planes_together,
    singular_basis,
    slice_table,
    slices,
    sparsity,
    support,
)

KINDS = ["tiny_gpt2", "tiny_llama", "tiny_qwen2", "tiny_qwen3", "tiny_gpt_neox"]
LEVEL = 0.25  # random models attend weakly: a lower bar gives enough pairs


@pytest.fixture(scope="module", params=KINDS)
def ran(request, batch):
    return run(request.getfixturevalue(request.param), batch)


@pytest.fixture(scope="module")
def pairs(ran):
    return find_firings(ran, LEVEL)


def slow_support(row, fraction=1.0):
    """The definition, word by word, for one pair."""
    sign = -1.0 if sum(row) < 0 else 1.0
    order = sorted(range(len(row)), key=lambda k: -sign * row[k])
    chosen, total = set(), 0.0
    for k in order:
        if total > fraction * sign * sum(row) or sign * row[k] <= 0:
            break
        chosen.add(k)
        total += sign * row[k]
    return chosen


def test_slices_sum_to_the_score(ran, pairs):
    total = slices(ran, pairs).sum(-1)
    torch.testing.assert_close(total, pairs.score, atol=1e-10, rtol=1e-9)


def test_head_coordinates_and_rotations_sum_to_the_score(ran, pairs):
    own = head_coordinates(ran, pairs)
    coords = coordinates(ran, pairs)
    turn = random_rotation(coords.dest.shape[-1], seed=3)
    turned = coordinates(ran, pairs, model_basis(ran.model).turned(turn))
    for other in (own, rotated(coords, turn), turned):
        torch.testing.assert_close(other.slices.sum(-1), pairs.score, atol=1e-10, rtol=1e-9)
        assert not torch.allclose(other.slices, coords.slices)
    torch.testing.assert_close(turned.slices, rotated(coords, turn).slices)


def test_slices_from_queries_equal_slices_from_the_residual_stream(tiny_gpt2, batch):
    ran, svd = run(tiny_gpt2, batch), head_svd(tiny_gpt2)
    pairs = find_firings(ran, LEVEL)
    x = activations(tiny_gpt2, batch.tokens, ("normalized",))["normalized"]
    x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    at = (pairs.layer, pairs.prompt)
    left = torch.einsum("nd,ndr->nr", x[(*at, pairs.dest)], svd.U[pairs.layer, pairs.head])
    right = torch.einsum("nd,ndr->nr", x[(*at, pairs.src)], svd.V[pairs.layer, pairs.head])
    direct = left * right * svd.S[pairs.layer, pairs.head] / svd.divisor[pairs.layer, None]
    torch.testing.assert_close(slices(ran, pairs), direct, atol=1e-10, rtol=1e-8)


def test_flipping_a_pair_of_vectors_changes_no_slice(ran, pairs):
    svd = head_svd(ran.model)
    flip = torch.where(torch.arange(svd.S.shape[-1]) % 2 == 0, -1.0, 1.0).double()
    flipped = HeadSVD(
        svd.U * flip, svd.S, svd.V * flip, svd.dest_map * flip, svd.src_map * flip, svd.divisor
    )
    basis = singular_basis(flipped)
    assert not torch.equal(basis.dest, model_basis(ran.model).dest)
    assert torch.equal(slices(ran, pairs), slices(ran, pairs, basis))


def test_relative_slices_sum_to_the_score_above_the_mean_of_the_others(ran, pairs):
    total = coordinates(ran, pairs, relative=True).slices.sum(-1)
    for n in range(0, len(pairs), 7):
        layer, prompt, head, i, j = (
            int(getattr(pairs, c)[n]) for c in ("layer", "prompt", "head", "dest", "src")
        )
        keys, q = ran.k[layer, prompt, head, : i + 1], ran.q[layer, prompt, head, i]
        row = keys @ q / ran.model.divisor[layer]
        others = (row.sum() - row[j]) / i
        assert total[n].item() == pytest.approx((row[j] - others).item(), abs=1e-10)


def test_relative_score_is_not_negative_where_attention_is_at_least_uniform(ran):
    pairs = find_firings(ran, 1.0, context=True)
    relative = coordinates(ran, pairs, relative=True).slices.sum(-1)
    assert len(pairs) > 50 and (relative >= -1e-9).all()


@pytest.mark.parametrize("fraction", [0.5, 0.7, 1.0])
def test_supports_equal_the_slow_reference(ran, pairs, fraction):
    rows = torch.cat([slices(ran, pairs), -slices(ran, pairs)])
    for mask, row in zip(support(rows, fraction), rows.tolist(), strict=True):
        assert set(mask.nonzero().flatten().tolist()) == slow_support(row, fraction)


def test_without_a_fraction_every_slice_is_in_the_support(ran, pairs):
    rows = slices(ran, pairs)
    assert support(rows, None).all()
    assert (sparsity(rows, None)["support"] == rows.shape[1]).all()


def test_support_of_known_slices():
    known = torch.tensor(
        [
            [5.0, 3, -1, -2],  # 5 does not exceed 5, 5 + 3 does
            [4, 3, 2, 1],  # nothing negative: all of them
            [-5, -3, 1, 2],  # mirror image
            [6, 1, 0, -3],  # 6 exceeds 4 at once
            [2, 2, 2, -4],  # ties in order
        ],
        dtype=torch.float64,
    )
    expected = [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]]
    assert support(known).int().tolist() == expected


def test_sparsity_of_known_slices():
    known = torch.tensor([[4.0, 3, 2, 1], [10, 0, 0, 0], [6, 5, -4, -3]], dtype=torch.float64)
    table = sparsity(known)
    assert table["support"].tolist() == [4, 1, 1]
    assert table["ninety"].tolist() == [3, 1, 4]
    assert table["settled"].tolist() == [3, 1, 4]
    assert table["participation"].tolist() == pytest.approx([100 / 30, 1, 324 / 86])
    assert table["cancellation"].tolist() == pytest.approx([1, 1, 4.5])


def test_no_firing_gives_empty_tables(ran):
    none = find_firings(ran, 1.1)
    nothing = slices(ran, none)
    assert len(none) == 0 and nothing.shape == (0, ran.model.d_head)
    assert none.table().empty and sparsity(nothing).empty


def test_coordinates_are_two_sides_of_a_slice():
    coords = Coordinates(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]]))
    assert coords.slices.tolist() == [[3.0, -2.0]]


def test_slice_table_is_sorted_and_adds_up():
    table = slice_table(torch.tensor([[1.0, -2.0, 3.0]]))
    assert table["k"].tolist() == [2, 0, 1] and table["total"].tolist() == [3, 4, 2]
    assert table["chosen"].tolist() == [True, False, False] and (table["score"] == 2).all()


def test_auc_of_known_orders():
    def found(*values):
        return auc(np.array(values), np.arange(len(values)) < len(values) // 2)

    assert found(3, 2, 1, 0) == 1 and found(0, 2, 1, 3) == 0.25 and found(1, 1, 1) == 0.5


def test_slices_at_the_distance_sum_to_the_score_and_are_diagonal_there(ran, pairs):
    coords = offset_coordinates(ran, pairs)
    torch.testing.assert_close(coords.slices.sum(-1), pairs.score, atol=1e-5, rtol=1e-5)
    if not ran.model.rotary:
        assert torch.equal(coords.slices, slices(ran, pairs))
        return
    assert not torch.allclose(coords.slices, slices(ran, pairs))
    relative = coordinates(ran, pairs, relative=True).slices.sum(-1)
    other = offset_coordinates(ran, pairs, relative=True).slices.sum(-1)
    torch.testing.assert_close(other, relative, atol=1e-5, rtol=1e-5)


def test_slices_at_the_distance_do_not_change_where_both_tokens_move(tiny_llama, batch):
    """The first layer reads nothing but the token: the same two tokens, one place further on."""
    tokens = batch.tokens[-1:].clone()
    tokens[0, 3:5] = tokens[0, 8:10] = torch.tensor([7, 9])
    ran = run(tiny_llama, plain_batch(tokens, batch.mask[-1:]))
    head, zero = torch.arange(4).repeat(2), torch.zeros(8, dtype=torch.long)
    dest = torch.tensor([4, 9]).repeat_interleave(4)
    pairs = pairs_at(ran, zero, zero, head, dest, dest - 1)
    first, second = offset_coordinates(ran, pairs).slices.chunk(2)
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)
    first, second = slices(ran, pairs).chunk(2)
    assert (first - second).abs().max() > 1e-3


def test_a_plane_adds_the_same_however_it_is_turned(tiny_llama, batch):
    ran = run(tiny_llama, batch)
    pairs = find_firings(ran, LEVEL)
    own = head_coordinates(ran, pairs)
    half = own.dest.shape[-1] // 2
    planes = planes_together(own, 2 * half)
    added = planes.slices.unflatten(-1, (-1, 2)).sum(-1)
    torch.testing.assert_close(added, own.slices[:, :half] + own.slices[:, half:])
    turned = rotated(planes, block_rotation(2 * half, 2, seed=4)).slices
    assert not torch.allclose(turned, planes.slices)
    torch.testing.assert_close(turned.unflatten(-1, (-1, 2)).sum(-1), added)
    part = planes_together(own, half).slices  # of a model that turns half of its coordinates
    assert torch.equal(part[:, half:], own.slices[:, half:])
    assert torch.equal(part[:, 1], own.slices[:, half // 2])
