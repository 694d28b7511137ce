"""Identities of chapter 3, and its tables against a slow, obvious reference."""

import numpy as np
import pytest
import torch

from sparse_signals.core.run import Attention, read_attention
from sparse_signals.core.stats import random_rotation
from sparse_signals.heads.svd import head_svd, qk_forms
from sparse_signals.signals.firings import find_firings, pairs_at, sample_silent, strongest_sources
from sparse_signals.signals.nulls import rotated, whitened
from sparse_signals.signals.slices import (
    Coordinates,
    captured_share,
    coordinates,
    head_coordinates,
    heard,
    signal_norm,
    slice_table,
    sparsity,
    support,
    usage_table,
)

KINDS = ["tiny_gpt2", "tiny_llama", "tiny_qwen2"]
LEVEL = 0.25  # random models attend weakly: a lower bar gives enough pairs


@pytest.fixture(params=KINDS)
def run(request, tokens, mask):
    model = request.getfixturevalue(request.param)
    attention = read_attention(model, tokens, mask)
    return attention, head_svd(qk_forms(model)), find_firings(attention, LEVEL)


def slow_support(slices, fraction=1.0):
    """The definition, word by word, for one pair."""
    sign = -1.0 if sum(slices) < 0 else 1.0
    order = sorted(range(len(slices)), key=lambda k: -sign * slices[k])
    chosen, total = set(), 0.0
    for k in order:
        if total > fraction * sign * sum(slices) or sign * slices[k] <= 0:
            break
        chosen.add(k)
        total += sign * slices[k]
    return chosen


def slow_firings(attention, level):
    """Every layer, prompt, head and pair, one at a time."""
    found = []
    L, P, H, T, _ = attention.pattern.shape
    for index in np.ndindex(L, P, H, T, T):
        layer, prompt, head, i, j = index
        if not 1 <= j <= i or not attention.mask[prompt, i]:
            continue
        score = attention.q[layer, prompt, head, i] @ attention.k[layer, prompt, head, j]
        if attention.pattern[index] >= level and score >= 0:
            found.append((*index, (score / attention.scale[layer]).item()))
    return found


def test_firings_equal_the_slow_reference(run):
    attention, _, pairs = run
    expected = slow_firings(attention, LEVEL)
    columns = (pairs.layer, pairs.prompt, pairs.head, pairs.dest, pairs.src)
    assert len(expected) > 20
    assert list(zip(*(c.tolist() for c in columns), strict=True)) == [row[:5] for row in expected]
    assert pairs.score.tolist() == pytest.approx([row[5] for row in expected])


def test_slices_sum_to_the_score(run):
    attention, svd, pairs = run
    total = coordinates(svd, attention, pairs).slices.sum(-1)
    torch.testing.assert_close(total, pairs.score, atol=1e-10, rtol=1e-9)


def test_head_coordinates_and_rotations_sum_to_the_score(run):
    attention, svd, pairs = run
    own = head_coordinates(attention, pairs)
    coords = coordinates(svd, attention, pairs)
    turn = random_rotation(coords.dest.shape[-1], seed=3)
    spread = rotated(whitened(coords, svd, pairs), turn)
    for other in (own, rotated(coords, turn), spread):
        torch.testing.assert_close(other.slices.sum(-1), pairs.score, atol=1e-10, rtol=1e-9)
        assert not torch.allclose(other.slices, coords.slices)


def test_slices_from_queries_equal_slices_from_the_residual_stream(tiny_gpt2, tokens, mask):
    from sparse_signals.core.model import activations

    attention = read_attention(tiny_gpt2, tokens, mask)
    svd, pairs = head_svd(qk_forms(tiny_gpt2)), find_firings(attention, LEVEL)
    x = activations(tiny_gpt2, tokens, ("normalized",))["normalized"]
    x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    at = (pairs.layer, pairs.prompt)
    left = torch.einsum("nd,ndr->nr", x[(*at, pairs.dest)], svd.U[pairs.layer, pairs.head])
    right = torch.einsum("nd,ndr->nr", x[(*at, pairs.src)], svd.V[pairs.layer, pairs.head])
    direct = left * right * svd.S[pairs.layer, pairs.head] / svd.scale[pairs.layer, None]
    ours = coordinates(svd, attention, pairs).slices
    torch.testing.assert_close(ours, direct, atol=1e-10, rtol=1e-8)


def test_flipping_a_pair_of_vectors_changes_no_slice(run):
    attention, svd, pairs = run
    flip = torch.where(torch.arange(svd.S.shape[-1]) % 2 == 0, -1.0, 1.0).double()
    flipped = type(svd)(
        svd.U * flip, svd.S, svd.V * flip, svd.dest_map * flip, svd.src_map * flip, svd.scale
    )
    one = coordinates(svd, attention, pairs).slices
    assert torch.equal(one, coordinates(flipped, attention, pairs).slices)


def test_relative_slices_sum_to_the_score_above_the_mean_of_the_others(run):
    attention, svd, pairs = run
    total = coordinates(svd, attention, pairs, relative=True).slices.sum(-1)
    for n in range(0, len(pairs), 7):
        layer, prompt, head, i, j = (
            int(getattr(pairs, c)[n]) for c in ("layer", "prompt", "head", "dest", "src")
        )
        keys, q = attention.k[layer, prompt, head, : i + 1], attention.q[layer, prompt, head, i]
        row = keys @ q / attention.scale[layer]
        others = (row.sum() - row[j]) / i
        assert total[n].item() == pytest.approx((row[j] - others).item(), abs=1e-10)


def test_relative_score_is_not_negative_where_attention_is_at_least_uniform(run):
    attention, svd, _ = run
    pairs = find_firings(attention, 1.0, context=True)
    relative = coordinates(svd, attention, pairs, relative=True).slices.sum(-1)
    assert len(pairs) > 50 and (relative >= -1e-9).all()


def test_context_bar_falls_with_the_number_of_visible_tokens(run):
    attention, _, _ = run
    pairs = find_firings(attention, 1.5, context=True)
    assert (pairs.attention >= 1.5 / (pairs.dest + 1) - 1e-12).all()
    assert (pairs.attention < LEVEL).any()


@pytest.mark.parametrize("fraction", [0.5, 0.7, 1.0])
def test_supports_equal_the_slow_reference(run, fraction):
    attention, svd, pairs = run
    slices = coordinates(svd, attention, pairs).slices
    slices = torch.cat([slices, -slices])
    for mask, row in zip(support(slices, fraction), slices.tolist(), strict=True):
        assert set(mask.nonzero().flatten().tolist()) == slow_support(row, fraction)


def test_support_of_known_slices():
    slices = torch.tensor(
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
    assert support(slices).int().tolist() == expected


def test_sparsity_of_known_slices():
    slices = torch.tensor([[4.0, 3, 2, 1], [10, 0, 0, 0], [6, 5, -4, -3]], dtype=torch.float64)
    table = sparsity(slices)
    assert table["support"].tolist() == [4, 1, 1]
    assert table["ninety"].tolist() == [3, 1, 4]
    assert table["settled"].tolist() == [3, 1, 4]
    assert table["participation"].tolist() == pytest.approx([100 / 30, 1, 324 / 86])
    assert table["cancellation"].tolist() == pytest.approx([1, 1, 4.5])


def test_silent_pairs_match_the_firings_head_by_head(run):
    attention, _, pairs = run
    silent = sample_silent(attention, pairs, LEVEL)
    assert (silent.attention < LEVEL).all() and (silent.src >= 1).all()
    assert (silent.src <= silent.dest).all()
    assert attention.mask[silent.prompt, silent.dest].all()
    counts = pairs.table()["name"].value_counts().sort_index()
    assert silent.table()["name"].value_counts().sort_index().equals(counts)
    assert torch.equal(sample_silent(attention, pairs, LEVEL).src, silent.src)


def test_signal_norm_is_the_length_of_the_projection(tiny_gpt2, tokens, mask):
    from sparse_signals.core.model import activations

    svd, attention = head_svd(qk_forms(tiny_gpt2)), read_attention(tiny_gpt2, tokens, mask)
    chosen = torch.tensor([0, 3, 5])
    x = activations(tiny_gpt2, tokens, ("normalized",))["normalized"][2]
    x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    V = svd.V[2, 1][:, chosen]
    expected = (x @ V @ V.mT).norm(dim=-1)
    ours = signal_norm(svd, attention, 2, 1, chosen)
    torch.testing.assert_close(ours, expected, atol=1e-10, rtol=1e-8)


def test_no_firing_gives_empty_tables(run):
    attention, svd, _ = run
    none = find_firings(attention, 1.1)
    slices = coordinates(svd, attention, none).slices
    assert len(none) == 0 and slices.shape == (0, svd.S.shape[-1])
    assert none.table().empty and sparsity(slices).empty


def test_coordinates_are_two_sides_of_a_slice():
    coords = Coordinates(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]]))
    assert coords.slices.tolist() == [[3.0, -2.0]]


def test_padding_never_fires(run):
    attention, _, pairs = run
    assert isinstance(attention, Attention)
    assert attention.mask[pairs.prompt, pairs.dest].all()
    assert attention.mask[pairs.prompt, pairs.src].all()


def test_strongest_source_has_the_largest_weight_of_its_row(run):
    attention, _, _ = run
    pairs = strongest_sources(attention)
    assert len(pairs) == 3 * 4 * (attention.mask.sum() - len(attention.mask))
    rows = attention.pattern[pairs.layer, pairs.prompt, pairs.head, pairs.dest, 1:]
    torch.testing.assert_close(pairs.attention, rows.amax(-1))


def test_pairs_at_given_places(run):
    attention, _, pairs = run
    places = (pairs.layer, pairs.prompt, pairs.head, pairs.dest, pairs.src)
    assert torch.equal(pairs_at(attention, *places).score, pairs.score)


def test_slice_table_is_sorted_and_adds_up():
    table = slice_table(torch.tensor([[1.0, -2.0, 3.0]]))
    assert table["k"].tolist() == [2, 0, 1] and table["total"].tolist() == [3, 4, 2]
    assert table["chosen"].tolist() == [True, False, False] and (table["score"] == 2).all()


def test_usage_is_the_share_of_supports_with_each_vector(run):
    attention, svd, pairs = run
    chosen = support(coordinates(svd, attention, pairs).slices)
    table = usage_table(pairs, chosen)
    here = (pairs.layer == 1) & (pairs.head == 2)
    row = table.query("name == '1.2' and k == 3")["share"].item()
    assert row == pytest.approx(chosen[here, 3].double().mean().item())


def test_captured_share_ends_at_the_whole_score(run):
    attention, svd, pairs = run
    strong = pairs[pairs.score > 0.1]
    table = captured_share(coordinates(svd, attention, strong).slices)
    assert table["share"].iloc[-1] == pytest.approx(1) and len(table) == svd.S.shape[-1]
    assert (table["low"] <= table["high"]).all()


def test_auc_of_known_orders():
    def auc(*values):
        return auc(np.array(values), np.arange(len(values)) < len(values) // 2)

    assert auc(3, 2, 1, 0) == 1 and auc(0, 2, 1, 3) == 0.25 and auc(1, 1, 1) == 0.5


def test_what_a_single_destination_hears_is_its_score(run):
    attention, svd, pairs = run
    one, every = pairs[5:6], torch.arange(svd.S.shape[-1])
    loud = heard(svd, attention, one, every)
    assert loud[one.prompt, one.src].item() == pytest.approx(one.score.item())
    half = heard(svd, attention, one, every[:4])
    slices = coordinates(svd, attention, one).slices
    assert half[one.prompt, one.src].item() == pytest.approx(slices[0, :4].sum().item())
