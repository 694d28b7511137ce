"""Identities of chapter 1, on random models of every supported kind, in float64."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from batches import plain_batch
from sparse_signals.core.model import activations
from sparse_signals.core.rotary import rotate, rotation
from sparse_signals.core.run import run
from sparse_signals.core.stats import tidy
from sparse_signals.heads.scores import (
    additive_fit,
    attention_between,
    bilinear_scores,
    pair_shares,
    pair_verdicts,
    score_parts,
    scores,
    shuffle_sources,
    source_pairs,
    variation_shares,
)
from sparse_signals.heads.svd import qk_forms

KINDS = ("tiny_gpt2", "tiny_llama", "tiny_qwen2", "tiny_qwen3", "tiny_gpt_neox")


@pytest.mark.parametrize("kind", KINDS)
def test_scores_rebuilt_from_cached_queries_and_keys(kind, request, batch):
    model = request.getfixturevalue(kind)
    cached = activations(model, batch.tokens, ("scores",))["scores"]
    mask, size = batch.mask, batch.tokens.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    seen = causal & mask[:, None, :, None] & mask[:, None, None, :]
    seen = seen.expand_as(cached)
    torch.testing.assert_close(scores(run(model, batch))[seen], cached[seen], atol=1e-10, rtol=1e-9)


def test_bilinear_form_gives_the_scores_of_the_model(tiny_gpt2, batch):
    forms = qk_forms(tiny_gpt2)
    cached = activations(tiny_gpt2, batch.tokens, ("normalized",))
    rebuilt = scores(run(tiny_gpt2, batch))
    for layer in range(tiny_gpt2.n_layers):
        for head in range(tiny_gpt2.n_heads):
            ours = bilinear_scores(forms, layer, head, cached["normalized"][layer])
            torch.testing.assert_close(ours, rebuilt[layer, :, head], atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_first_token_of_a_rotary_model_is_not_rotated(kind, request, batch):
    model = request.getfixturevalue(kind)
    x = activations(model, batch.tokens, ("normalized",))["normalized"][1][:, :1]
    ran = run(model, batch)
    score = scores(ran)[1, :, 2, :1, :1] * (ran.q_scale * ran.k_scale)[1, :, 2, :1, None]
    ours = bilinear_scores(qk_forms(model), 1, 2, x)
    torch.testing.assert_close(ours, score, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_follow_from_folded_forms_scales_and_positions(kind, request, batch):
    """a_ij = R_i(x̃_iᵀA) · R_j(x̃_jᵀB) / (s_q(i) s_k(j) √r) of every pair of every head."""
    model = request.getfixturevalue(kind)
    ran, forms = run(model, batch), qk_forms(model)
    x = activations(model, batch.tokens, ("normalized",))["normalized"]
    x = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
    sides = []
    for factor, scale in ((forms.A, ran.q_scale), (forms.B, ran.k_scale)):
        y = torch.einsum("lptd,lhdr->lphtr", x, factor) / scale[..., None]
        places = torch.arange(y.shape[3])
        sides.append(rotate(y, *rotation(model, places)) if model.rotary else y)
    rebuilt = sides[0] @ sides[1].mT / model.divisor[:, None, None, None, None]
    torch.testing.assert_close(rebuilt, scores(ran), atol=1e-10, rtol=1e-9)
    normalises = bool((ran.q_scale != 1).all()) and bool((ran.k_scale != 1).all())
    assert normalises is bool(model.head_gains) is (kind == "tiny_qwen3")


def test_score_parts_add_up_and_the_last_two_do_not_vary_within_a_row(tiny_gpt2, batch):
    a = scores(run(tiny_gpt2, batch))
    x = activations(tiny_gpt2, batch.tokens, ("normalized",))["normalized"]
    parts = score_parts(qk_forms(tiny_gpt2), x)
    torch.testing.assert_close(parts.sum(0), a, atol=1e-10, rtol=1e-10)
    content, source, destination, constant = parts
    for part, same in ((source, -2), (destination, -1), (constant, -1), (constant, -2)):
        assert (part.amax(same) - part.amin(same)).abs().max() < 1e-12
    assert (content.std(-1) > 0).all()


def additive(first: int):
    """Scores f_i + g_j of two heads on three prompts of up to seven tokens; junk before `first`."""
    generator = torch.Generator().manual_seed(1)
    f, g = torch.randn(2, 1, 3, 2, 7, generator=generator, dtype=torch.float64)
    a = f[..., :, None] + g[..., None, :]
    a[..., :first] = torch.randn(1, 3, 2, 7, first, generator=generator, dtype=torch.float64)
    return a, torch.arange(7) < torch.tensor([7, 5, 7])[:, None]


def test_additive_scores_leave_nothing_to_the_pair():
    a, mask = additive(first=1)
    left, total = additive_fit(a, mask)
    assert (left / total).max() < 1e-20
    left, total = additive_fit(a, mask, first=0)
    assert (left / total).min() > 1e-3


def test_additive_fit_is_least_squares_and_ignores_padding():
    generator = torch.Generator().manual_seed(2)
    a = torch.randn(2, 3, 2, 7, 7, generator=generator, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor([7, 5, 6])[:, None]
    left, total = additive_fit(a, mask)
    pairs = [(i, j) for i in range(1, 5) for j in range(1, i + 1)]  # prompt 1 has five tokens
    X = torch.zeros(len(pairs), 14, dtype=torch.float64)
    for n, (i, j) in enumerate(pairs):
        X[n, i] = X[n, 7 + j] = 1
    y = torch.stack([a[1, 1, 0, i, j] for i, j in pairs])
    fitted = X @ torch.linalg.lstsq(X, y, driver="gelsd").solution
    torch.testing.assert_close(left[1, 1, 0], ((y - fitted) ** 2).sum())
    rows = [torch.stack([a[1, 1, 0, i, j] for j in range(1, i + 1)]) for i in range(1, 5)]
    expected = sum(((row - row.mean()) ** 2).sum() for row in rows)
    torch.testing.assert_close(total[1, 1, 0], expected)


def noise(prompts=20, seed=3):
    """Scores without any structure, ten templates of two prompts."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(2, prompts, 3, 9, 9, generator=generator, dtype=torch.float64)
    whole = plain_batch(torch.ones(prompts, 9).long(), torch.ones(prompts, 9, dtype=torch.bool))
    templates = pd.DataFrame({"template": [n // 2 for n in range(prompts)], "order": "ABBA"})
    return a, replace(whole, table=templates)


def test_pair_shares_have_an_interval_around_them():
    a, whole = noise()
    table = pair_shares(a, whole)
    assert list(table.columns) == ["layer", "head", "name", "share", "low", "high"]
    assert len(table) == 6
    assert (table["low"] < table["share"]).all() and (table["share"] < table["high"]).all()
    free = (8 * 9 / 2 - 15) / (8 * 9 / 2 - 8)  # degrees of freedom: pure noise leaves this share
    assert abs(table["share"].mean() - free) < 0.02


def test_verdicts_on_the_pair_follow_the_construction():
    """Head 0.0 is noise, 0.1 a list of sources with little noise; the rest is half of each."""
    a, whole = noise()
    order = torch.randn(9, generator=torch.Generator().manual_seed(0)).double()
    a[0, :, 1] = 10 * order + 0.1 * a[0, :, 1]
    verdicts = pair_verdicts(a, a.roll(1, 2), whole).set_index("name")
    assert verdicts["half"]["0.0"] == "more" and verdicts["half"]["0.1"] == "less"
    assert verdicts["control"]["0.1"] == "less" and verdicts["control"]["0.2"] == "more"
    assert set(verdicts["control"][["1.0", "1.1", "1.2"]]) == {"undecided"}


def test_variation_shares_are_a_covariance_and_sum_to_one():
    a, whole = noise()
    first = torch.zeros_like(a)
    first[:, :, 0] = a[:, :, 0]  # all of head 0, nothing of the others
    row = a.mean(-1, keepdim=True).expand_as(a)  # the same for all sources
    parts = torch.stack([first, a - first, row, -row])
    table = variation_shares(parts, whole.mask).set_index(["scope", "part", "head", "layer"])
    shares = table["share"].unstack("part")
    torch.testing.assert_close(torch.tensor(shares.sum(axis=1).to_numpy()), torch.ones(12).double())
    inside = shares.loc["within a softmax row"]
    assert inside["content"][0].tolist() == pytest.approx([1, 1])
    assert inside["content"][1].tolist() == pytest.approx([0, 0])
    assert inside[["destination", "constant"]].abs().to_numpy().max() < 1e-12
    assert shares.loc["over all pairs of tokens", "destination"].abs().max() > 0.01


def test_pairs_of_sources_lie_on_the_line_of_the_softmax(tiny_gpt2, batch):
    ran = run(tiny_gpt2, batch)
    table = source_pairs(scores(ran), ran.pattern, batch, 100)
    np.testing.assert_allclose(np.log(table["odds"]), table["difference"], atol=1e-6)
    assert len(table) > 90 and (table["difference"] != 0).all()


def test_attention_between_roles_is_read_at_their_places(tiny_gpt2, batch):
    roles = {"end": batch.last, "IO": torch.arange(8) % 4}
    ordered = batch.table.assign(order=["ABBA", "BABA"] * 4)
    ran = run(tiny_gpt2, replace(batch, roles=roles, table=ordered))
    table = attention_between(ran, [("end", "IO")])
    row = table.query("prompt == 3 and name == '2.1'").iloc[0]
    assert row["attention"] == float(ran.pattern[2, 3, 1, batch.last[3], 3])
    assert (row["pair"], row["order"], len(table)) == ("end → IO", "BABA", 8 * 12)


def test_shuffled_sources_keep_the_scores_of_a_row():
    generator = torch.Generator().manual_seed(4)
    a = torch.randn(1, 4, 2, 8, 8, generator=generator, dtype=torch.float64)
    b = shuffle_sources(a, seed=0)
    assert torch.equal(b[..., 0], a[..., 0])
    past = torch.ones(8, 8, dtype=torch.bool).tril()
    for i in range(8):
        before, after = (t[..., i, : i + 1].sort().values for t in (a, b))
        assert torch.equal(before, after)
    assert torch.equal(b[..., ~past], a[..., ~past])
    assert not torch.equal(b, a)


def test_tidy_has_one_row_per_entry():
    table = tidy(torch.arange(6.0).view(2, 3), ("layer", "head"), "x")
    assert list(table.columns) == ["layer", "head", "x"]
    assert table.query("layer == 1 and head == 2")["x"].item() == 5
