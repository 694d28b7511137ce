"""Chapter 2: what a spectrum, a singular vector and a rank-K score must be compared with."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

from sparse_signals.core.model import head_name
from sparse_signals.core.run import Run
from sparse_signals.core.stats import (
    DRAWS,
    bounds,
    false_discovery,
    participation_ratio,
    random_rotation,
    resample,
    sign_flip,
)
from sparse_signals.heads.svd import HeadSVD, QKForms, head_svd

NULLS = ("shape", "factors")


def svd_flops(n: int, r: int) -> dict[str, int]:
    """Floating-point operations for the SVD of one n×n form of rank r, dense and in factors.

    Dense: 22 n³. Factors: two thin QR (4nr² each, Q included), the product of two triangles,
    an r×r SVD (22 r³) and Q Û, Q V̂ (2nr² each). Source: Golub and Van Loan 2013, section 8.6.
    """
    return {"dense": 22 * n**3, "factors": 12 * n * r**2 + 24 * r**3}


def outer_product_table(A: Float[Tensor, "n r"], B: Float[Tensor, "m r"]) -> pd.DataFrame:
    """Ω = A Bᵀ and each σ_k u_k v_kᵀ: part ("Ω", "pair 0", …), row, column, value (an entry)."""
    U, S, Vh = torch.linalg.svd(A @ B.mT)
    parts = {"Ω": A @ B.mT}
    parts |= {f"pair {k}": S[k] * torch.outer(U[:, k], Vh[k]) for k in range(A.shape[-1])}
    tables = []
    for part, matrix in parts.items():
        row, column = np.indices(matrix.shape).reshape(2, -1)
        columns = {"row": row, "column": column, "value": matrix.flatten().numpy()}
        tables.append(pd.DataFrame(columns).assign(part=part))
    return pd.concat(tables, ignore_index=True)


# --- spectra -------------------------------------------------------------------------------------


def random_participation(
    forms: QKForms, null: str, draws: int = DRAWS, seed: int = 0
) -> Float[Tensor, "draw layer head"]:
    """PR of σ² of random forms that have one thing in common with each head.

    "shape": A and B are Gaussian, of the same size. "factors": the singular values of A and of B
    are kept, their directions meet at random. All heads share the draws. No SVD is needed:
    Σσ² = ‖M‖² and Σσ⁴ = ‖MᵀM‖² for M with these singular values. Raises ValueError for another
    null.
    """
    if null not in NULLS:
        raise ValueError(f"null must be one of {NULLS}, not {null!r}")
    layers, heads, n, r = forms.A.shape
    if null == "shape":
        S = gaussian_spectra(n, r, draws, seed)
        return participation_ratio(S**2)[:, None, None].expand(draws, layers, heads)
    left, right = (
        torch.linalg.svdvals(M.double().cpu()).square().flatten(0, 1) for M in (forms.A, forms.B)
    )
    rng, found = np.random.default_rng(seed), torch.empty(draws, layers * heads).double()
    for draw in range(draws):  # MᵀM of M = diag(a) T diag(b) is diag(b) Tᵀ diag(a²) T diag(b)
        turn = torch.linalg.qr(torch.from_numpy(rng.standard_normal((r, r))))[0]
        gram = (left @ (turn[:, :, None] * turn[:, None, :]).flatten(1)).unflatten(1, (r, r))
        total = torch.einsum("hkk,hk->h", gram, right)
        squares = torch.einsum("hkl,hk,hl->h", gram.square(), right, right)
        found[draw] = total.square() / squares
    return found.unflatten(1, (layers, heads))


def gaussian_spectra(n: int, r: int, draws: int = DRAWS, seed: int = 0) -> Float[Tensor, "draw r"]:
    """Singular values of A Bᵀ with Gaussian A and B of n×r.

    Only the R of A = QR matters, and for Gaussian A it can be drawn directly (Bartlett 1933).
    """
    rng = np.random.default_rng(seed)
    RA, RB = (_gaussian_r(rng, (draws,), n, r) for _ in range(2))
    return torch.linalg.svdvals(RA @ RB.mT)


def _gaussian_r(
    rng: np.random.Generator, shape: tuple[int, ...], n: int, r: int
) -> Float[Tensor, "... r r"]:
    """R of the QR of an n×r Gaussian matrix: chi on the diagonal, normal above it."""
    R = np.triu(rng.standard_normal((*shape, r, r)), 1)
    R[..., range(r), range(r)] = np.sqrt(rng.chisquare(n - np.arange(r), (*shape, r)))
    return torch.from_numpy(R)


def spectra_table(svd: HeadSVD) -> pd.DataFrame:
    """Every σ, all σ of a head divided by their root mean square: layer, head, k, sigma, name."""
    ours = _unit(svd.S.cpu())
    return _head_rows(ours.shape, {"sigma": ours.numpy()}, ["layer", "head", "k"])


def spectrum_band(n: int, r: int, draws: int = DRAWS, seed: int = 0) -> pd.DataFrame:
    """95 % of the spectra of Gaussian heads of one shape, scaled alike: k, low, high."""
    random = _unit(gaussian_spectra(n, r, draws, seed)).numpy()
    low, high = np.quantile(random, [0.025, 0.975], axis=0)
    return pd.DataFrame({"k": range(r), "low": low, "high": high})


def flatness(
    svd: HeadSVD, forms: QKForms, draws: int = DRAWS, rate: float = 0.05, seed: int = 0
) -> pd.DataFrame:
    """PR of σ² of every head beside its nulls. One row per null and head.

    Columns: null, layer, head, name, ours, random (median), low, high (95 % of draws), verdict
    ("flatter", "steeper" or "as random": what is beyond chance at a false-discovery rate of `rate`
    over all heads, two-sided, by the rank among the draws).
    """
    tables, ours = [], participation_ratio(svd.S.cpu() ** 2).numpy()
    for null in NULLS:
        random = random_participation(forms, null, draws, seed).numpy()
        low, middle, high = np.quantile(random, [0.025, 0.5, 0.975], axis=0)
        beyond = 1 + np.minimum((random <= ours).sum(0), (random >= ours).sum(0))
        p = (2 * beyond / (1 + draws)).clip(max=1)
        real = false_discovery(p.ravel()).reshape(p.shape) <= rate
        verdict = np.where(real, np.where(ours > middle, "flatter", "steeper"), "as random")
        columns = {"ours": ours, "random": middle, "low": low, "high": high, "verdict": verdict}
        tables.append(_head_rows(ours.shape, columns, ["layer", "head"]).assign(null=null))
    return pd.concat(tables, ignore_index=True)


def _unit(S: Float[Tensor, "... r"]) -> Float[Tensor, "... r"]:
    return S / S.square().mean(-1, keepdim=True).sqrt()


def _head_rows(shape: Sequence[int], columns: dict, names: list[str]) -> pd.DataFrame:
    index = pd.MultiIndex.from_product([range(n) for n in shape], names=names)
    flat = {name: np.asarray(values).ravel() for name, values in columns.items()}
    table = pd.DataFrame(flat, index=index).reset_index()
    return table.assign(name=head_name(table["layer"], table["head"]))


def random_flatness(n: int, r: int, draws: int = DRAWS, seed: int = 0) -> pd.DataFrame:
    """Participation ratios ÷ r of Gaussian heads of one shape: measure, low, high (95 %)."""
    S = gaussian_spectra(n, r, draws, seed)
    shares = {"σ": participation_ratio(S) / r, "σ²": participation_ratio(S**2) / r}
    rows = [(name, *np.quantile(share.numpy(), [0.025, 0.975])) for name, share in shares.items()]
    return pd.DataFrame(rows, columns=["measure", "low", "high"])


# --- vectors and planes --------------------------------------------------------------------------


def perturbed(forms: QKForms, size: float, seed: int = 0) -> QKForms:
    """The forms after Gaussian noise on A and B, `size` times the norm of each factor."""
    rng = np.random.default_rng(seed)

    def shaken(M: Float[Tensor, "layer head n r"]) -> Float[Tensor, "layer head n r"]:
        noise = torch.from_numpy(rng.standard_normal(M.shape)).to(M.device)
        return M + size * noise * (M.norm(dim=(-2, -1)) / noise.norm(dim=(-2, -1)))[..., None, None]

    return QKForms(shaken(forms.A), shaken(forms.B), forms.divisor)


def turning(svd: HeadSVD, after: HeadSVD) -> pd.DataFrame:
    """How far left singular vectors, and planes of two neighbours, turn between two SVDs.

    One row per head and neighbours k, k+1: name, k, gap = (σ_k − σ_{k+1}) / σ_k, and, in degrees,
    vector (the angle of u_k, signs ignored) and plane (the largest principal angle of the planes).
    """
    pair, new = (torch.stack([s.U[..., :-1], s.U[..., 1:]], -1).transpose(-3, -2)
                 for s in (svd, after))  # fmt: skip
    u, moved = pair[..., :1], new[..., :1]
    vector = (moved - u @ (u.mT @ moved)).norm(dim=(-2, -1))
    left = new - pair @ (pair.mT @ new)
    plane = torch.linalg.eigvalsh(left.mT @ left)[..., -1].clamp_min(0).sqrt()
    gap = (svd.S[..., :-1] - svd.S[..., 1:]) / svd.S[..., :-1]
    angles = {"vector": vector, "plane": plane}
    columns = {n: sin.clamp_max(1).arcsin().rad2deg().cpu() for n, sin in angles.items()}
    return _head_rows(gap.shape, {"gap": gap.cpu(), **columns}, ["layer", "head", "k"])


# --- what the coordinates are on real tokens -----------------------------------------------------


def coordinate_table(run: Run, layer: int, head: int) -> pd.DataFrame:
    """x̃·u_k and x̃·v_k of every token in one head, from q and k: prompt, pos, k, u, v."""
    svd = head_svd(run.model)
    dest = run.q[layer, :, head].double() @ svd.dest_map[layer, head]
    src = run.k[layer, :, head].double() @ svd.src_map[layer, head]
    index = [range(n) for n in dest.shape]
    table = pd.MultiIndex.from_product(index, names=["prompt", "pos", "k"]).to_frame(index=False)
    table = table.assign(u=dest.flatten().cpu().numpy(), v=src.flatten().cpu().numpy())
    return table[run.mask.cpu().numpy()[table["prompt"], table["pos"]]]


def partial_scores(run: Run, layer: int, head: int, prompt: int) -> pd.DataFrame:
    """Scores of one prompt from the first K singular pairs: dest, src ≤ dest, K, score."""
    svd = head_svd(run.model)
    length = int(run.mask[prompt].sum())
    dest = run.q[layer, prompt, head, :length].double() @ svd.dest_map[layer, head]
    src = run.k[layer, prompt, head, :length].double() @ svd.src_map[layer, head]
    weight = svd.S[layer, head] / svd.divisor[layer]
    sums = torch.einsum("ik,k,jk->ijk", dest, weight, src).cumsum(-1).cpu()
    i, j = torch.tril_indices(length, length)
    rank = sums.shape[-1]
    columns = {"dest": i.repeat_interleave(rank), "src": j.repeat_interleave(rank)}
    columns |= {"K": torch.arange(1, rank + 1).repeat(len(i)), "score": sums[i, j].flatten()}
    return pd.DataFrame({name: values.numpy() for name, values in columns.items()})


def choices_kept(
    run: Run, counts: Sequence[int], draws: int = 10, seed: int = 0
) -> tuple[Int[Tensor, "basis count layer head prompt"], Int[Tensor, "prompt"]]:
    """Of how many destinations K directions still find the most attended source.

    The destination side x̃ᵀU is projected on K orthonormal directions: the first K singular
    vectors (basis 0), or the first K columns of a random rotation of them (bases 1 … draws).
    The first token is no candidate, so that destinations have two sources or more. Returns the
    right choices, and out of how many.
    """
    svd = head_svd(run.model)
    rank, size = svd.S.shape[-1], run.mask.shape[-1]
    turns = [torch.eye(rank, dtype=torch.float64)]
    turns += [random_rotation(rank, seed + n) for n in range(draws)]
    pos = torch.arange(size, device=run.mask.device)
    hidden = (pos[None] > pos[:, None]) | (pos[None] < 1)
    real = run.mask & (pos >= 2)
    dest = run.q.double() @ svd.dest_map[:, None]
    src = run.k.double() @ (svd.src_map * svd.S.unsqueeze(-2))[:, None]
    best = (dest @ src.mT).masked_fill_(hidden, -torch.inf).argmax(-1)
    right = torch.zeros(len(turns), len(counts), *svd.S.shape[:2], len(real), dtype=torch.long)
    for b, turn in enumerate(turns):
        left, other = dest @ turn.to(dest), src @ turn.to(src)
        for c, K in enumerate(counts):
            partial = left[..., :K] @ other[..., :K].mT
            found = partial.masked_fill_(hidden, -torch.inf).argmax(-1)
            right[b, c] = ((found == best) & real[:, None]).sum(-1).transpose(1, 2).cpu()
    return right, real.sum(-1).cpu()


def choice_shares(
    right: Int[Tensor, "basis count *heads prompt"],
    total: Int[Tensor, "prompt"],
    counts: Sequence[int],
    clusters: ArrayLike,
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Share of right choices for every K, and how many directions reach 95 %.

    Heads are pooled. clusters: the independent unit of every prompt, such as its template.
    Intervals resample these and, for random directions, the draw. Returns two tables with value,
    low, high: one row per basis and K, and one row per basis.
    """
    pooled = right.flatten(2, -2).double().mean(2) if right.ndim > 3 else right.double()
    names, cluster = np.unique(clusters, return_inverse=True)
    times = torch.from_numpy(resample(len(names), draws, seed)[:, cluster])
    share = torch.einsum("bcp,np->nbc", pooled, times) / (times @ total.double())[:, None, None]
    mean, drawn = share[0], share[1:]
    draw = 1 + torch.arange(draws) % (len(pooled) - 1)
    bases = {"singular vectors": (mean[:1], drawn[:, 0]),
             "random directions": (mean[1:], drawn[torch.arange(draws), draw])}  # fmt: skip
    shares, needed = [], []
    for basis, (value, samples) in bases.items():
        low, high = bounds(samples.numpy())
        columns = {"K": list(counts), "value": value.mean(0).numpy(), "low": low, "high": high}
        shares.append(pd.DataFrame(columns).assign(basis=basis))
        low, high = bounds(_needed(samples, counts))
        columns = {"basis": basis, "value": _needed(value.mean(0), counts), "low": low}
        needed.append(columns | {"high": high})
    return pd.concat(shares, ignore_index=True), pd.DataFrame(needed)


def basis_verdicts(
    right: Int[Tensor, "basis count layer head prompt"],
    total: Int[Tensor, "prompt"],
    count: int,
    clusters: ArrayLike,
    rate: float = 0.05,
) -> pd.DataFrame:
    """Whether singular vectors find the right source more often than random directions do.

    right, total: of `choices_kept`; count: the place in its `counts`. The gain is the share of
    right choices minus the mean share over random directions, in every cluster, whose signs are
    flipped; false-discovery rate over all heads. One row per head: layer, head, name, gain,
    verdict ("better", "worse" or "undecided").
    """
    more = (right[0, count] - right[1:, count].double().mean(0)).flatten(0, 1).numpy()
    names, cluster = np.unique(clusters, return_inverse=True)
    member = (cluster == np.arange(len(names))[:, None]).astype(float)
    gains = (more @ member.T) / (member @ total.double().numpy())  # head, cluster
    real = false_discovery(sign_flip(gains)) <= rate
    mean = gains.mean(1)
    verdict = np.where(real, np.where(mean > 0, "better", "worse"), "undecided")
    shape = tuple(right.shape[2:4])
    return _head_rows(shape, {"gain": mean, "verdict": verdict}, ["layer", "head"])


def _needed(share: Float[Tensor, "... count"], counts: Sequence[int]) -> Int[np.ndarray, "..."]:
    """The smallest of `counts` from which on the share is 95 % or more."""
    short = (share < 0.95).long() * torch.arange(1, len(counts) + 1)
    return np.asarray(np.append(counts, counts[-1])[short.amax(-1).numpy()])
