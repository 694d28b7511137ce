"""Identities of chapter 2, on random forms and models of every supported kind, in float64."""

import pytest
import torch

from sparse_signals.core.stats import participation_ratio
from sparse_signals.heads.svd import QKForms, head_svd, head_table, qk_forms


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
    mirrored = QKForms(-forms.A, -forms.B, forms.divisor)
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


def test_table_has_one_row_per_head():
    svd = head_svd(random_forms())
    heads = head_table(svd)
    assert len(heads) == 6
    assert heads["name"].tolist()[-1] == "1.2"
    assert heads["condition"].iloc[0] == pytest.approx((svd.S[0, 0, 0] / svd.S[0, 0, -1]).item())


def test_forms_and_svd_are_kept_with_their_model(tiny_gpt2, tiny_llama):
    assert qk_forms(tiny_gpt2) is qk_forms(tiny_gpt2)
    assert head_svd(tiny_gpt2) is head_svd(tiny_gpt2)
    assert torch.equal(head_svd(tiny_gpt2).U, head_svd(qk_forms(tiny_gpt2)).U)
    assert not torch.equal(head_svd(tiny_gpt2).S, head_svd(tiny_llama).S)
