"""Identities of chapters 1 and 2, on random models of every supported kind, in float64."""

import pytest
import torch

from sparse_signals.core.model import activations
from sparse_signals.core.run import read_attention
from sparse_signals.core.stats import participation_ratio, tidy
from sparse_signals.heads.scores import (
    additive_fit,
    bilinear_scores,
    pair_shares,
    score_parts,
    scores,
    shuffle_sources,
)
from sparse_signals.heads.svd import QKForms, head_svd, head_table, qk_forms, spectrum_table


def random_forms(d=24, r=8, layers=2, heads=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(2, layers, heads, d + 1, r, generator=generator, dtype=torch.float64)
    return QKForms(A, B, torch.full((layers,), r**0.5, dtype=torch.float64))


def omega(svd):
    return svd.U * svd.S.unsqueeze(-2) @ svd.V.mT


def test_svd_rebuilds_omega_with_orthonormal_vectors():
    forms = random_forms()
    svd = head_svd(forms)
    torch.testing.assert_close(omega(svd), forms.A @ forms.B.mT, atol=1e-12, rtol=1e-12)
    for vectors in (svd.U, svd.V):
        eye = torch.eye(vectors.shape[-1], dtype=torch.float64).expand(2, 3, -1, -1)
        torch.testing.assert_close(vectors.mT @ vectors, eye, atol=1e-13, rtol=0)


def test_singular_values_are_those_of_the_dense_svd():
    forms = random_forms()
    dense = torch.linalg.svdvals(forms.A @ forms.B.mT)[..., :8]
    torch.testing.assert_close(head_svd(forms).S, dense, atol=1e-12, rtol=1e-12)


def test_largest_entry_of_every_left_vector_is_positive():
    U = head_svd(random_forms()).U
    largest = U.gather(-2, U.abs().argmax(-2, keepdim=True))
    assert (largest > 0).all()


def test_canonical_signs_do_not_depend_on_the_signs_of_the_factors():
    forms = random_forms()
    mirrored = QKForms(-forms.A, -forms.B, forms.scale)
    one, two = head_svd(forms), head_svd(mirrored)
    torch.testing.assert_close(one.U, two.U, atol=1e-10, rtol=0)
    torch.testing.assert_close(one.V, two.V, atol=1e-10, rtol=0)


def test_coordinates_come_from_queries_and_keys_alone():
    forms = random_forms()
    svd = head_svd(forms)
    x = torch.randn(5, 25, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(x @ forms.A @ svd.dest_map, x @ svd.U, atol=1e-10, rtol=0)
    torch.testing.assert_close(x @ forms.B @ svd.src_map, x @ svd.V, atol=1e-10, rtol=0)


def test_rank_deficient_heads_keep_the_score():
    forms = random_forms()
    forms.A[..., 5:] = 0
    svd = head_svd(forms)
    x = torch.randn(5, 25, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    dest, src = x @ forms.A @ svd.dest_map, x @ forms.B @ svd.src_map
    expected = (x @ forms.A) @ (x @ forms.B).mT
    torch.testing.assert_close((dest * svd.S[..., None, :]) @ src.mT, expected)
    assert (svd.S[..., 5:] == 0).all() and (dest[..., 5:] == 0).all()


@pytest.mark.parametrize("kind", ["tiny_gpt2", "tiny_llama", "tiny_qwen2"])
def test_scores_rebuilt_from_cached_queries_and_keys(kind, request, tokens, mask):
    model = request.getfixturevalue(kind)
    attention = read_attention(model, tokens, mask)
    cached = activations(model, tokens, ("scores",))["scores"]
    causal = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
    seen = causal & mask[:, None, :, None] & mask[:, None, None, :]
    seen = seen.expand_as(cached)
    torch.testing.assert_close(scores(attention)[seen], cached[seen], atol=1e-10, rtol=1e-9)


def test_bilinear_form_gives_the_scores_of_the_model(tiny_gpt2, tokens, mask):
    forms = qk_forms(tiny_gpt2)
    cached = activations(tiny_gpt2, tokens, ("normalized",))
    rebuilt = scores(read_attention(tiny_gpt2, tokens, mask))
    for layer in range(tiny_gpt2.n_layers):
        for head in range(tiny_gpt2.n_heads):
            ours = bilinear_scores(forms, layer, head, cached["normalized"][layer])
            torch.testing.assert_close(ours, rebuilt[layer, :, head], atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_qwen2"])
def test_first_token_of_a_rotary_model_is_not_rotated(kind, request, tokens, mask):
    model = request.getfixturevalue(kind)
    x = activations(model, tokens, ("normalized",))["normalized"][1][:, :1]
    score = scores(read_attention(model, tokens, mask))[1, :, 2, :1, :1]
    ours = bilinear_scores(qk_forms(model), 1, 2, x)
    torch.testing.assert_close(ours, score, atol=1e-6, rtol=1e-6)


def test_grouped_heads_share_the_key_factor(tiny_llama):
    B = qk_forms(tiny_llama).B
    assert torch.equal(B[:, 0], B[:, 1]) and not torch.equal(B[:, 1], B[:, 2])


def test_centring_is_folded_only_where_the_model_centres(tiny_gpt2, tiny_llama):
    ones = qk_forms(tiny_gpt2).A[..., :-1, :].sum(-2)
    assert ones.abs().max() < 1e-12
    assert qk_forms(tiny_llama).A[..., :-1, :].sum(-2).abs().max() > 1e-3


def test_participation_ratio_counts_equal_weights():
    weights = torch.tensor([[3.0, 0, 0, 0], [1, -1, 1, 1], [2, 2, 0, 0]], dtype=torch.float64)
    assert participation_ratio(weights).tolist() == [1, 4, 2]


def test_tables_have_one_row_per_head_and_value():
    svd = head_svd(random_forms())
    spectrum, heads = spectrum_table(svd), head_table(svd)
    assert len(spectrum) == 2 * 3 * 8 and len(heads) == 6
    row = spectrum.query("layer == 1 and head == 2 and k == 3").iloc[0]
    assert row["sigma"] == pytest.approx(svd.S[1, 2, 3].item())
    assert spectrum.groupby(["layer", "head"])["share"].sum().tolist() == pytest.approx([1.0] * 6)
    assert heads["name"].tolist()[-1] == "1.2"
    assert heads["condition"].iloc[0] == pytest.approx((svd.S[0, 0, 0] / svd.S[0, 0, -1]).item())


def test_score_parts_add_up_and_the_last_two_do_not_vary_within_a_row(tiny_gpt2, tokens, mask):
    a = scores(read_attention(tiny_gpt2, tokens, mask))
    x = activations(tiny_gpt2, tokens, ("normalized",))["normalized"]
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


def test_pair_shares_have_an_interval_around_them():
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(2, 20, 3, 9, 9, generator=generator, dtype=torch.float64)
    mask = torch.ones(20, 9, dtype=torch.bool)
    table = pair_shares(a, mask)
    assert list(table.columns) == ["layer", "head", "share", "low", "high"] and len(table) == 6
    assert (table["low"] < table["share"]).all() and (table["share"] < table["high"]).all()
    free = (8 * 9 / 2 - 15) / (8 * 9 / 2 - 8)  # degrees of freedom: pure noise leaves this share
    assert abs(table["share"].mean() - free) < 0.02


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
