"""Contributions add up to the score, whatever the model, the weighting or the basis."""

from dataclasses import replace

import pytest
import torch

from sparse_signals.core.model import load_model
from sparse_signals.core.run import run_model
from sparse_signals.core.stats import random_rotation
from sparse_signals.heads.svd import head_svd, qk_forms
from sparse_signals.signals.firings import find_firings, pairs_at
from sparse_signals.signals.slices import SliceMaps, coordinates
from sparse_signals.tracing.contributions import (
    Settings,
    by_source,
    contrast,
    contributions,
    read_weights,
    receiving,
)

KINDS = ["gpt2", "llama", "qwen2"]
LEVEL = 0.25  # random models attend weakly: a lower bar gives enough pairs


def opened(model, tokens, mask):
    weights, run = read_weights(model), run_model(model, tokens, mask)
    return weights, run, find_firings(run.attention, LEVEL)


@pytest.fixture(params=KINDS)
def parts(request, tokens, mask):
    return opened(request.getfixturevalue(f"tiny_{request.param}"), tokens, mask)


@pytest.mark.parametrize("fraction", [0.6, 1.0])
def test_components_sum_to_the_support_for_every_firing(parts, fraction):
    found = contributions(*parts, Settings(fraction=fraction))
    assert len(found.total) > 100 and found.error().max() < 1e-9
    assert (found.total > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_components_sum_to_the_support_in_single_precision(tiny_directories, tokens, mask, kind):
    model = load_model(tiny_directories[kind], device="cpu", dtype=torch.float32)
    found = contributions(*opened(model, tokens, mask))
    assert 0 < found.error().max() < 1e-4


def slow_contribution(model, weights, run, pairs, n, side, component, keep):
    """Σ_{k∈S} p_k with one component in place of the residual stream, from the full SVD."""
    svd = head_svd(qk_forms(model))
    at = (int(pairs.layer[n]), int(pairs.head[n]))
    places = (pairs.dest[n], pairs.src[n])
    x = []
    for which, place in enumerate(places):
        scale = run.scale[at[0], pairs.prompt[n], place]
        upstream = torch.tensor((weights.components["layer"] < at[0]).tolist())[:-1]
        read = run.outputs[pairs.prompt[n], place]
        if which == side:
            whole, one = read[component] / scale, 0.0
        else:
            whole, one = read[upstream].sum(0) / scale, 1.0
        x.append(torch.cat([whole, whole.new_tensor([one])]))
    left, right = x[0] @ svd.U[at], x[1] @ svd.V[at]
    return ((left * svd.S[at] * right)[keep].sum() / svd.scale[at[0]]).item()


def test_contributions_equal_the_definition_word_by_word(tiny_gpt2, tokens, mask):
    weights, run, pairs = opened(tiny_gpt2, tokens, mask)
    found = contributions(weights, run, pairs)
    upper = (pairs.layer == 2).nonzero().flatten()[::2].tolist()
    assert len(upper) > 5
    for n in upper:
        keep = found.support[n]
        for side in (0, 1):
            for component in range(run.outputs.shape[2]):
                if weights.components["layer"][component] >= 2:
                    assert found.values[n, side, component] == 0
                    continue
                expected = slow_contribution(
                    tiny_gpt2, weights, run, pairs, n, side, component, keep
                )
                ours = found.values[n, side, component].item()
                assert ours == pytest.approx(expected, abs=1e-10)


def test_published_weights_equal_the_definition(tiny_gpt2, tokens, mask):
    weights, run, pairs = opened(tiny_gpt2, tokens, mask)
    svd = head_svd(qk_forms(tiny_gpt2))
    plain = contributions(weights, run, pairs, Settings(weighting="published"))
    quirky = contributions(weights, run, pairs, Settings(weighting="published", bias_per_head=True))
    names = list(weights.components["component"])
    n = int((pairs.layer == 2).nonzero()[3])
    at, prompt, src = (2, int(pairs.head[n])), int(pairs.prompt[n]), int(pairs.src[n])
    keep = plain.support[n]
    sign = coordinates(weights.maps, run.attention, pairs).dest[n].sign()
    root = svd.S[at].sqrt()
    for name in ("0.1", "1.3"):
        x = run.outputs[prompt, src, names.index(name)]
        s = run.scale[2, prompt, src]
        loud = (sign * root * (svd.V[at][:-1].T @ x / s))[keep].sum()
        constant = (sign * root * svd.V[at][-1] / s)[keep].sum()
        assert plain.values[n, 1, names.index(name)].item() == pytest.approx(loud.item())
        assert quirky.values[n, 1, names.index(name)].item() == pytest.approx(
            (loud + constant).item()
        )
    heads = torch.tensor((weights.components["kind"] == "head").tolist())
    assert (plain.values[:, :, ~heads] == 0).all()


def test_published_weights_of_outvoted_slices_have_the_sign_of_the_other_side(
    tiny_gpt2, tokens, mask
):
    weights, run, pairs = opened(tiny_gpt2, tokens, mask)
    found = contributions(weights, run, pairs, Settings(weighting="published", fraction=None))
    svd, n = head_svd(qk_forms(tiny_gpt2)), int((pairs.layer == 2).nonzero()[3])
    at, prompt, dest = (2, int(pairs.head[n])), int(pairs.prompt[n]), int(pairs.dest[n])
    names = list(weights.components["component"])
    x = run.outputs[prompt, dest, names.index("0.1")] / run.scale[2, prompt, dest]
    sign = coordinates(weights.maps, run.attention, pairs).src[n].sign()
    loud = (sign * svd.S[at].sqrt() * (svd.U[at][:-1].T @ x)).sum()
    assert found.values[n, 0, names.index("0.1")].item() == pytest.approx(loud.item())


def test_flipping_singular_vectors_changes_no_contribution(parts):
    weights, run, pairs = parts
    flip = torch.where(torch.arange(weights.maps.dest.shape[-1]) % 2 == 0, -1.0, 1.0).double()
    maps = SliceMaps(weights.maps.dest * flip, weights.maps.src * flip)
    for weighting in ("exact", "published"):
        settings = Settings(weighting=weighting)
        one = contributions(weights, run, pairs, settings)
        other = contributions(replace(weights, maps=maps), run, pairs, settings)
        torch.testing.assert_close(one.values, other.values, atol=1e-12, rtol=1e-12)


def test_a_random_basis_is_exact_too_and_another_one(parts):
    weights, run, pairs = parts
    turned = read_weights(weights.model, random_rotation(8, seed=1))
    ours, theirs = (contributions(w, run, pairs) for w in (weights, turned))
    assert theirs.error().max() < 1e-9
    assert not torch.equal(ours.support, theirs.support)


def test_sources_sum_to_the_contribution_of_their_head(parts):
    weights, run, pairs = parts
    found, each = contributions(weights, run, pairs), by_source(weights, run, pairs)
    heads = torch.tensor((weights.components["kind"] == "head").tolist())
    # rows of float32 softmax do not sum to 1 exactly, and value biases pass through them
    tolerance = 1e-6 if weights.model.rotary else 1e-12
    torch.testing.assert_close(
        each.sum(-1).flatten(2), found.values[:, :, heads], atol=tolerance, rtol=1e-6
    )
    for n in range(0, len(pairs), 40):
        for side, token in enumerate(receiving(pairs)[n].tolist()):
            assert (each[n, side, :, :, token + 1 :] == 0).all()


def test_norms_are_lengths_of_centred_outputs(tiny_gpt2, tokens, mask):
    weights, run, pairs = opened(tiny_gpt2, tokens, mask)
    found = contributions(weights, run, pairs, Settings(weighting="norm"))
    n, names = len(pairs) - 1, list(weights.components["component"])
    x = run.outputs[pairs.prompt[n], pairs.dest[n], names.index("0.2")]
    assert found.values[n, 0, names.index("0.2")].item() == pytest.approx(
        (x - x.mean()).norm().item()
    )


@pytest.mark.parametrize(
    "wrong", [{"weighting": "loud"}, {"share": 0.0}, {"fraction": 1.2}, {"level": 2.0}]
)
def test_settings_refuse_nonsense(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)


def test_no_firing_gives_no_contribution(parts):
    weights, run, _ = parts
    none = find_firings(run.attention, 1.1)
    assert contributions(weights, run, none).values.shape[0] == 0


def test_contrast_sums_to_the_difference_of_two_scores(parts):
    weights, run, pairs = parts
    pairs = pairs[pairs.dest >= 3]
    src = (pairs.src % pairs.dest) + 1 - (pairs.src == pairs.dest).long()
    src = torch.where(src == pairs.src, src - 1, src)
    other = pairs_at(run.attention, pairs.layer, pairs.prompt, pairs.head, pairs.dest, src)
    found = contrast(weights, run, pairs, other)
    assert found.error().max() < 1e-8 and len(pairs) > 50
    gap = pairs.score - other.score
    assert (found.total >= gap - 1e-9)[gap > 0].all()  # outvoted slices are left out


def test_contrast_drops_what_raises_both_scores_alike(tiny_gpt2, tokens, mask):
    weights, run, pairs = opened(tiny_gpt2, tokens, mask)
    pairs = pairs[(pairs.layer == 2) & (pairs.src >= 2)]
    other = pairs_at(
        run.attention, pairs.layer, pairs.prompt, pairs.head, pairs.dest, pairs.src - 1
    )
    found = contrast(weights, run, pairs, other, Settings(fraction=1.0))
    bias = found.values[:, 1, -1]
    assert bias.abs().max() < 1e-12  # the bias row of the keys is the same for both
    parts = contributions(weights, run, pairs)
    assert parts.values[:, 1, -1].abs().max() > 1e-3
    same = contrast(weights, run, pairs, pairs)
    assert same.values.abs().max() < 1e-12
