"""Chapter 2: random spectra, perturbed vectors, coordinates and rank-K choices."""

import numpy as np
import pytest
import torch

from sparse_signals.core.run import run
from sparse_signals.core.stats import participation_ratio
from sparse_signals.heads.scores import scores as all_scores
from sparse_signals.heads.spectra import (
    basis_verdicts,
    choice_shares,
    choices_kept,
    coordinate_table,
    flatness,
    gaussian_spectra,
    outer_product_table,
    partial_scores,
    perturbed,
    random_flatness,
    random_participation,
    spectra_table,
    spectrum_band,
    svd_flops,
    turning,
)
from sparse_signals.heads.svd import QKForms, head_svd


def random_forms(n=40, r=6, layers=2, heads=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(2, layers, heads, n, r, generator=generator, dtype=torch.float64)
    return QKForms(A, B, torch.full((layers,), r**0.5, dtype=torch.float64))


@pytest.fixture(scope="module")
def ran(tiny_gpt2, batch):
    return run(tiny_gpt2, batch)


def test_outer_products_add_up_to_the_form():
    forms = random_forms(n=5, r=3)
    table = outer_product_table(forms.A[0, 0], forms.B[0, 0])
    whole = table[table["part"] == "Ω"].set_index(["row", "column"])["value"]
    parts = table[table["part"] != "Ω"].groupby(["row", "column"])["value"].sum()
    assert table["part"].nunique() == 4
    np.testing.assert_allclose(parts.sort_index(), whole.sort_index(), atol=1e-12)


def test_flops_grow_with_the_cube_only_for_the_dense_svd():
    small, large = svd_flops(100, 8), svd_flops(200, 8)
    assert large["dense"] == 8 * small["dense"]
    assert large["factors"] < 2 * small["factors"]


def test_drawn_triangles_have_the_spectra_of_gaussian_products():
    drawn = gaussian_spectra(40, 6, draws=400).square().mean(0)
    A, B = torch.randn(2, 400, 40, 6, generator=torch.Generator().manual_seed(1)).double()
    plain = torch.linalg.svdvals(A @ B.mT)[:, :6].square().mean(0)
    torch.testing.assert_close(drawn, plain, rtol=0.1, atol=0)


def test_turned_factors_have_the_participation_of_their_singular_values():
    """By an SVD of the product, with the rotations drawn in the same order."""
    forms = random_forms()
    found = random_participation(forms, "factors", draws=3, seed=5)
    rng = np.random.default_rng(5)
    left, right = (torch.linalg.svdvals(M) for M in (forms.A, forms.B))
    for each in found:
        turn = torch.linalg.qr(torch.from_numpy(rng.standard_normal((6, 6))))[0]
        S = torch.linalg.svdvals(left[..., None] * turn * right[..., None, :])
        torch.testing.assert_close(each, participation_ratio(S**2))
    assert found.std(0).min() > 0
    with pytest.raises(ValueError, match="null must be one of"):
        random_participation(forms, "colour")


def test_gaussian_heads_are_as_random_and_low_rank_ones_are_steeper():
    forms = random_forms(layers=4, heads=5)
    table = flatness(head_svd(forms), forms)
    assert (table.loc[table["null"] == "shape", "verdict"] == "as random").mean() > 0.9
    forms.A[:, :, :, 1:] *= 1e-3
    table = flatness(head_svd(forms), forms)
    assert (table.loc[table["null"] == "shape", "verdict"] == "steeper").all()


def test_equal_singular_values_are_flatter_than_random():
    turned = torch.linalg.qr(random_forms().A)[0]
    forms = QKForms(turned, turned, torch.ones(2))  # Ω is a projection
    table = flatness(head_svd(forms), forms)
    np.testing.assert_allclose(table["ours"], 6)
    assert (table.loc[table["null"] == "shape", "verdict"] == "flatter").all()
    assert (table.loc[table["null"] == "factors", "verdict"] == "as random").all()


def test_spectra_and_their_band_have_the_same_unit():
    svd = head_svd(random_forms())
    one = spectra_table(svd).query("name == '1.2'").reset_index()
    np.testing.assert_allclose(np.square(one["sigma"]).mean(), 1)
    band = spectrum_band(40, 6, draws=400)
    assert list(band["k"]) == list(one["k"]) == list(range(6))
    assert (band["low"] <= band["high"]).all()
    assert one["sigma"].between(band["low"] - 0.1, band["high"] + 0.1).all()


def test_random_flatness_is_a_share():
    table = random_flatness(50, 8, draws=50).set_index("measure")
    assert (table["low"] < table["high"]).all() and (table["high"] <= 1).all()
    assert table["high"]["σ²"] < table["high"]["σ"]


def test_in_a_near_tie_vectors_turn_and_their_plane_stays():
    svd = head_svd(random_forms(layers=1, heads=1))
    tied = svd.S[0, 0].clone()
    tied[3] = tied[2] * (1 - 1e-10)
    forms = QKForms((svd.U[0, 0] * tied)[None, None], svd.V, svd.divisor)
    table = turning(head_svd(forms), head_svd(perturbed(forms, 1e-6)))
    row = table.set_index("k").loc[2]
    assert row["vector"] > 1 and row["plane"] < 0.01 and row["gap"] < 1e-9


def test_nothing_turns_without_a_change():
    svd = head_svd(random_forms())
    assert turning(svd, svd)[["vector", "plane"]].to_numpy().max() < 1e-6


def test_perturbation_has_the_size_asked_for():
    forms = random_forms()
    change = perturbed(forms, 1e-3).A - forms.A
    ratio = change.norm(dim=(-2, -1)) / forms.A.norm(dim=(-2, -1))
    torch.testing.assert_close(ratio, torch.full_like(ratio, 1e-3))


def test_coordinates_make_the_scores(ran):
    svd = head_svd(ran.model)
    table = coordinate_table(ran, 1, 2)
    assert len(table) == int(ran.mask.sum()) * svd.S.shape[-1]
    one = table[table["prompt"] == 3].pivot(index="pos", columns="k", values=["u", "v"])
    weight = (svd.S[1, 2] / svd.divisor[1]).numpy()
    made = one["u"].to_numpy() * weight @ one["v"].to_numpy().T
    size = len(made)
    np.testing.assert_allclose(made, all_scores(ran)[1, 3, 2, :size, :size], atol=1e-9)


def test_partial_scores_end_at_the_score(ran):
    svd = head_svd(ran.model)
    table = partial_scores(ran, 1, 2, prompt=3)
    last = table[table["K"] == svd.S.shape[-1]]
    score = all_scores(ran)[1, 3, 2].numpy()
    np.testing.assert_allclose(last["score"], score[last["dest"], last["src"]], atol=1e-9)
    assert (table["src"] <= table["dest"]).all()


def test_all_directions_keep_every_choice_and_one_agrees_with_a_loop(ran):
    right, total = choices_kept(ran, [2, 8], draws=2)
    assert (right[:, -1] == total).all()
    assert total.tolist() == [int(m.sum()) - 2 for m in ran.mask]
    table = partial_scores(ran, 1, 2, prompt=3)
    table = table[(table["src"] >= 1) & (table["dest"] >= 2)]
    best = table.loc[table.groupby(["K", "dest"])["score"].idxmax()].pivot(
        index="dest", columns="K", values="src"
    )
    assert int(right[0, 0, 1, 2, 3]) == (best[2] == best[8]).sum()


def test_shares_and_directions_needed():
    right = torch.tensor([[[5, 5], [9, 10], [10, 10]], [[1, 1], [5, 5], [10, 10]]])
    shares, needed = choice_shares(right, torch.tensor([10, 10]), [1, 2, 3], [0, 1])
    ours = shares[shares["basis"] == "singular vectors"]
    np.testing.assert_allclose(ours["value"], [0.5, 0.95, 1])
    assert needed.set_index("basis")["value"].to_dict() == {
        "singular vectors": 2,
        "random directions": 3,
    }
    assert (shares["low"] <= shares["value"] + 1e-12).all()


def test_prompts_of_one_template_are_drawn_together():
    """Two templates, one always right and one never: no sample is a mixture of its prompts."""
    right = torch.tensor([[[4, 4, 0, 0]]] * 2)
    total = torch.tensor([4, 4, 4, 4])
    shares, _ = choice_shares(right, total, [1], clusters=[0, 0, 1, 1])
    assert set(shares["value"]) == {0.5}
    assert (set(shares["low"]), set(shares["high"])) == ({0.0}, {1.0})


def test_a_basis_beats_random_ones_where_it_does_in_all_sentences():
    """Three heads, ten sentences: always better, always worse, better in half of them."""
    total = torch.full((20,), 4)
    random = torch.full((2, 1, 1, 3, 20), 2)
    ours = torch.tensor([4, 0, 0]).view(3, 1).expand(3, 20).clone()
    ours[2, ::4], ours[2, 1::4] = 4, 4  # both prompts of every other sentence
    right = torch.cat([ours.view(1, 1, 1, 3, 20), random])
    table = basis_verdicts(right, total, 0, clusters=np.arange(20) // 2)
    assert table["verdict"].tolist() == ["better", "worse", "undecided"]
    np.testing.assert_allclose(table["gain"], [0.5, -0.5, 0])
