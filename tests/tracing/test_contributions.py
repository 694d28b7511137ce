"""Contributions add up to the score, whatever the model, the weighting or the basis."""

from dataclasses import replace

import pytest
import torch

from batches import plain_batch
from sparse_signals.core.model import load_model, qk_weights
from sparse_signals.core.rotary import rotate, rotation
from sparse_signals.core.run import run
from sparse_signals.heads.svd import head_svd
from sparse_signals.signals.firings import find_firings, pairs_at
from sparse_signals.signals.slices import Basis, coordinates, model_basis, slices, support
from sparse_signals.tracing.contributions import (
    Settings,
    by_source,
    contrast,
    contributions,
    receiving,
)

KINDS = ["gpt2", "llama", "qwen2", "qwen3", "gpt_neox"]
LEVEL = 0.25  # random models attend weakly: a lower bar gives enough pairs


def opened(model, tokens, mask):
    ran = run(model, plain_batch(tokens, mask))
    return ran, find_firings(ran, LEVEL)


@pytest.fixture(params=KINDS)
def parts(request, tokens, mask):
    return opened(request.getfixturevalue(f"tiny_{request.param}"), tokens, mask)


@pytest.mark.parametrize("fraction", [0.6, 1.0, None])
def test_components_sum_to_what_counts_for_every_firing(parts, fraction):
    ran, pairs = parts
    found, parts = contributions(ran, pairs, Settings(fraction=fraction)), slices(ran, pairs)
    assert len(found.total) > 100 and found.discrepancy().max() < 1e-12
    assert found.error().max() < 1e-9
    expected = parts.sum(-1) if fraction is None else (parts * support(parts, fraction)).sum(-1)
    torch.testing.assert_close(found.total, expected)


def test_the_published_support_is_shown_where_all_slices_count(parts):
    ran, pairs = parts
    assert torch.equal(contributions(ran, pairs).support, support(slices(ran, pairs)))


@pytest.mark.parametrize("kind", KINDS)
def test_components_sum_to_the_score_in_single_precision(tiny_directories, tokens, mask, kind):
    model = load_model(tiny_directories[kind], device="cpu", dtype=torch.float32)
    found = contributions(*opened(model, tokens, mask))
    assert 0 < found.discrepancy().max() < 1e-5


def slow_contribution(run, pairs, n, side, component, keep):
    """Σ_{k∈S} p_k with one component in place of the residual stream, from the full SVD."""
    svd = head_svd(run.model)
    at = (int(pairs.layer[n]), int(pairs.head[n]))
    places = (pairs.dest[n], pairs.src[n])
    x = []
    for which, place in enumerate(places):
        scale = run.scale[at[0], pairs.prompt[n], place]
        upstream = torch.tensor((run.model.components["layer"] < at[0]).tolist())[:-1]
        read = run.outputs[pairs.prompt[n], place]
        if which == side:
            whole, one = read[component] / scale, 0.0
        else:
            whole, one = read[upstream].sum(0) / scale, 1.0
        x.append(torch.cat([whole, whole.new_tensor([one])]))
    left, right = x[0] @ svd.U[at], x[1] @ svd.V[at]
    return ((left * svd.S[at] * right)[keep].sum() / svd.divisor[at[0]]).item()


@pytest.mark.parametrize("fraction", [1.0, None])
def test_contributions_equal_the_definition_word_by_word(tiny_gpt2, tokens, mask, fraction):
    ran, pairs = opened(tiny_gpt2, tokens, mask)
    found = contributions(ran, pairs, Settings(fraction=fraction))
    upper = (pairs.layer == 2).nonzero().flatten()[::2].tolist()
    assert len(upper) > 5
    for n in upper:
        keep = slice(None) if fraction is None else found.support[n]
        for side in (0, 1):
            for component in range(ran.outputs.shape[2]):
                if ran.model.components["layer"][component] >= 2:
                    assert found.values[n, side, component] == 0
                    continue
                expected = slow_contribution(ran, pairs, n, side, component, keep)
                ours = found.values[n, side, component].item()
                assert ours == pytest.approx(expected, abs=1e-10)


def test_published_weights_equal_the_definition(tiny_gpt2, tokens, mask):
    ran, pairs = opened(tiny_gpt2, tokens, mask)
    svd = head_svd(tiny_gpt2)
    plain = contributions(ran, pairs, Settings.published())
    quirky = contributions(ran, pairs, replace(Settings.published(), bias_per_head=True))
    names = list(ran.model.components["component"])
    n = int((pairs.layer == 2).nonzero()[3])
    at, prompt, src = (2, int(pairs.head[n])), int(pairs.prompt[n]), int(pairs.src[n])
    keep = plain.support[n]
    sign = coordinates(ran, pairs).dest[n].sign()
    root = svd.S[at].sqrt()
    for name in ("0.1", "1.3"):
        x = ran.outputs[prompt, src, names.index(name)]
        s = ran.scale[2, prompt, src]
        loud = (sign * root * (svd.V[at][:-1].T @ x / s))[keep].sum()
        constant = (sign * root * svd.V[at][-1] / s)[keep].sum()
        assert plain.values[n, 1, names.index(name)].item() == pytest.approx(loud.item())
        assert quirky.values[n, 1, names.index(name)].item() == pytest.approx(
            (loud + constant).item()
        )
    heads = ran.model.is_head
    assert (plain.values[:, :, ~heads] == 0).all()


def test_published_weights_of_outvoted_slices_have_the_sign_of_the_other_side(
    tiny_gpt2, tokens, mask
):
    ran, pairs = opened(tiny_gpt2, tokens, mask)
    found = contributions(ran, pairs, Settings(weighting="published", fraction=None))
    svd, n = head_svd(tiny_gpt2), int((pairs.layer == 2).nonzero()[3])
    at, prompt, dest = (2, int(pairs.head[n])), int(pairs.prompt[n]), int(pairs.dest[n])
    names = list(ran.model.components["component"])
    x = ran.outputs[prompt, dest, names.index("0.1")] / ran.scale[2, prompt, dest]
    sign = coordinates(ran, pairs).src[n].sign()
    loud = (sign * svd.S[at].sqrt() * (svd.U[at][:-1].T @ x)).sum()
    assert found.values[n, 0, names.index("0.1")].item() == pytest.approx(loud.item())


def test_flipping_singular_vectors_changes_no_contribution(parts, monkeypatch):
    ran, pairs = parts
    basis = model_basis(ran.model)
    flip = torch.where(torch.arange(basis.dest.shape[-1]) % 2 == 0, -1.0, 1.0).double()
    flipped = Basis(basis.dest * flip, basis.src * flip)
    for weighting in ("exact", "published"):
        settings = Settings(fraction=1.0, weighting=weighting)
        one = contributions(ran, pairs, settings)
        with monkeypatch.context() as patch:
            patch.setattr("sparse_signals.tracing.contributions.model_basis", lambda _: flipped)
            other = contributions(ran, pairs, settings)
        torch.testing.assert_close(one.values, other.values, atol=1e-12, rtol=1e-12)


def test_a_random_basis_is_exact_too_and_another_one(parts):
    ours, theirs = (contributions(*parts, Settings(fraction=1.0, turn=x)) for x in (None, 1))
    assert theirs.error().max() < 1e-9
    assert not torch.equal(ours.support, theirs.support)
    whole = [contributions(*parts, Settings(turn=turn)).values for turn in (None, 1)]
    torch.testing.assert_close(*whole)  # all slices together do not depend on the basis


def test_sources_sum_to_the_contribution_of_their_head(parts):
    ran, pairs = parts
    found, each = contributions(ran, pairs), by_source(ran, pairs)
    heads = ran.model.is_head
    torch.testing.assert_close(
        each.sum(-1).flatten(2), found.values[:, :, heads], atol=1e-12, rtol=1e-9
    )
    for n in range(0, len(pairs), 40):
        for side, token in enumerate(receiving(pairs)[n].tolist()):
            assert (each[n, side, :, :, token + 1 :] == 0).all()


def test_norms_are_lengths_of_centred_outputs(tiny_gpt2, tokens, mask):
    ran, pairs = opened(tiny_gpt2, tokens, mask)
    found = contributions(ran, pairs, Settings(weighting="norm"))
    n, names = len(pairs) - 1, list(ran.model.components["component"])
    x = ran.outputs[pairs.prompt[n], pairs.dest[n], names.index("0.2")]
    assert found.values[n, 0, names.index("0.2")].item() == pytest.approx(
        (x - x.mean()).norm().item()
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"weighting": "loud"},
        {"share": 0.0},
        {"fraction": 1.2},
        {"level": 2.0},
        {"level": None, "context": True},
        {"fraction": 1.0, "weighting": "attention"},
    ],
)
def test_settings_refuse_nonsense(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)


def test_no_firing_gives_no_contribution(parts):
    ran, _ = parts
    none = find_firings(ran, 1.1)
    assert contributions(ran, none).values.shape[0] == 0


def test_contrast_sums_to_the_difference_of_two_scores(parts):
    ran, pairs = parts
    pairs = pairs[pairs.dest >= 3]
    src = (pairs.src % pairs.dest) + 1 - (pairs.src == pairs.dest).long()
    src = torch.where(src == pairs.src, src - 1, src)
    other = pairs_at(ran, pairs.layer, pairs.prompt, pairs.head, pairs.dest, src)
    gap = pairs.score - other.score
    whole = contrast(ran, pairs, other)
    torch.testing.assert_close(whole.total, gap)
    assert whole.discrepancy().max() < 1e-12
    found = contrast(ran, pairs, other, Settings(fraction=1.0))
    assert found.error().max() < 1e-8 and len(pairs) > 50
    assert (found.total >= gap - 1e-9)[gap > 0].all()  # outvoted slices are left out


def test_contrast_drops_what_raises_both_scores_alike(tiny_gpt2, tokens, mask):
    ran, pairs = opened(tiny_gpt2, tokens, mask)
    pairs = pairs[(pairs.layer == 2) & (pairs.src >= 2)]
    other = pairs_at(ran, pairs.layer, pairs.prompt, pairs.head, pairs.dest, pairs.src - 1)
    found = contrast(ran, pairs, other, Settings(fraction=1.0))
    bias = found.values[:, 1, -1]
    assert bias.abs().max() < 1e-12  # the bias row of the keys is the same for both
    parts = contributions(ran, pairs)
    assert parts.values[:, 1, -1].abs().max() > 1e-3
    same = contrast(ran, pairs, pairs)
    assert same.values.abs().max() < 1e-12


def without(run, pair, side, component):
    """The attention weight of a pair after one component was taken from its query or its key."""
    model, w = run.model, qk_weights(run.model)
    layer, prompt, head = int(pair.layer), int(pair.prompt), int(pair.head)
    token = int((pair.dest, pair.src)[side])
    if model.components["component"][component] == "bias row":
        x, bias = run.outputs.new_zeros(model.d_model), 1.0
    else:
        x, bias = run.outputs[prompt, token, component] / run.scale[layer, prompt, token], 0.0
    x = x if model.rms else x - x.mean()
    W, b = ((w.W_Q, w.b_Q), (w.W_K, w.b_K))[side]
    part = (x * w.gain[layer]) @ W[layer, head]
    part = part + bias * (w.shift[layer] @ W[layer, head] + b[layer, head])
    if model.head_gains:
        scale = (run.q_scale, run.k_scale)[side][layer, prompt, head, token]
        part = part * model.head_gains["qk"[side]][layer] / scale
    if model.rotary:
        part = rotate(part[None], *rotation(model, torch.tensor([token])))[0]
    q, k = run.q[layer, prompt, head].clone(), run.k[layer, prompt, head].clone()
    (q, k)[side][token] -= part
    scores = q[pair.dest] @ k[: int(pair.dest) + 1].T / model.divisor[layer]
    return scores.flatten().softmax(-1)[pair.src].item()


def test_attention_weights_are_what_the_softmax_loses(parts):
    ran, pairs = parts
    found = contributions(ran, pairs, Settings(weighting="attention")).values
    layer = ran.model.components["layer"]
    seen = 0
    for n in (pairs.layer == 2).nonzero().flatten()[::3].tolist():
        for side in (0, 1):
            for component in range(found.shape[-1]):
                expected = 0.0
                if layer[component] < 2:
                    pair = pairs[torch.tensor([n])]
                    expected = pair.attention.item() - without(ran, pair, side, component)
                    seen += abs(expected) > 0.01
                assert found[n, side, component].item() == pytest.approx(expected, abs=1e-12)
    assert seen > 20


def test_attention_weights_do_not_depend_on_how_many_firings_are_opened_at_once(parts, monkeypatch):
    settings = Settings(weighting="attention")
    whole = contributions(*parts, settings).values
    monkeypatch.setattr("sparse_signals.tracing.contributions.REMOVALS", 1)
    torch.testing.assert_close(contributions(*parts, settings).values, whole)
