"""Chapters 1 and 2: the attention score of every head as a bilinear form, and its SVD.

A head reads the normalised residual stream x̂ and scores a destination token i against a source
token j by q_i·k_j / √r. With x̃ = [x̂ ; 1] that score is x̃_iᵀ Ω x̃_j / √r, where Ω = A Bᵀ has
rank at most r. All heads of a model are stacked: every array starts with (layer, head).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_signals.models import Model, activations, qk_weights, score_divisors


@dataclass(frozen=True)
class QKForms:
    """The QK form Ω = A Bᵀ of every head, kept in factors; `scale` is what scores divide by."""

    A: Float[Tensor, "layer head d1 r"]
    B: Float[Tensor, "layer head d1 r"]
    scale: Float[Tensor, "layer"]


@dataclass(frozen=True)
class HeadSVD:
    """Ω = U diag(S) Vᵀ of every head, and the change of basis from (q, k) to its coordinates.

    `q @ dest_map` is x̃ᵀU and `k @ src_map` is x̃ᵀV. Where S is zero the direction cannot be
    reached from q and k; its coordinate, which never enters a score, is reported as zero.
    """

    U: Float[Tensor, "layer head d1 r"]
    S: Float[Tensor, "layer head r"]
    V: Float[Tensor, "layer head d1 r"]
    dest_map: Float[Tensor, "layer head r r"]
    src_map: Float[Tensor, "layer head r r"]
    scale: Float[Tensor, "layer"]


@dataclass(frozen=True)
class Attention:
    """What the heads of a model did on a batch of prompts (queries and keys rotated, if rotary)."""

    q: Float[Tensor, "layer prompt head pos r"]
    k: Float[Tensor, "layer prompt head pos r"]
    pattern: Float[Tensor, "layer prompt head dest src"]
    mask: Bool[Tensor, "prompt pos"]
    scale: Float[Tensor, "layer"]


def qk_forms(model: Model) -> QKForms:
    """Fold normalisation and biases into the QK form of every head.

    A = [C diag(g) W_Q ; (b W_Q + b_Q)ᵀ] and B likewise, with g and b the gain and shift of the
    normalisation. C = I − 11ᵀ/d where the normalisation centres its input (LayerNorm), else I:
    it changes no score, and it makes Ω unique. float64, whatever the dtype of the model.
    Source: Franco and Crovella 2024, section 3; Elhage et al. 2021 for the form itself.
    """
    w = qk_weights(model)
    A = _fold(w.W_Q, w.b_Q, w.gain, w.shift, w.centred)
    B = _fold(w.W_K, w.b_K, w.gain, w.shift, w.centred)
    return QKForms(A, B, w.scale)


def _fold(
    W: Float[Tensor, "layer head d r"],
    b: Float[Tensor, "layer head r"],
    gain: Float[Tensor, "layer d"],
    shift: Float[Tensor, "layer d"],
    centred: bool,
) -> Float[Tensor, "layer head d1 r"]:
    rows = gain[:, None, :, None] * W
    if centred:
        rows = rows - rows.mean(dim=-2, keepdim=True)
    bias = torch.einsum("ld,lhdr->lhr", shift, W) + b
    return torch.cat([rows, bias.unsqueeze(-2)], dim=-2)


def head_svd(forms: QKForms) -> HeadSVD:
    """SVD of every Ω = A Bᵀ without forming it.

    Thin QR of both factors, A = Q_A R_A and B = Q_B R_B, then the SVD of the r×r matrix
    R_A R_Bᵀ = Û S V̂ᵀ: U = Q_A Û, V = Q_B V̂. Since Ω V = U S, the coordinates of a token
    follow from its query alone, x̃ᵀU = q (R_Bᵀ V̂) / S, and from its key alone, x̃ᵀV = k (R_Aᵀ Û) / S.
    Signs are canonical: the entry of largest magnitude of each u is positive.
    """
    QA, RA = torch.linalg.qr(forms.A.double())
    QB, RB = torch.linalg.qr(forms.B.double())
    U_small, S, Vh_small = torch.linalg.svd(RA @ RB.mT)
    V_small = Vh_small.mT
    U = QA @ U_small
    sign = U.gather(-2, U.abs().argmax(dim=-2, keepdim=True)).sign()
    U_small, V_small = U_small * sign, V_small * sign
    tolerance = S.amax(dim=-1, keepdim=True) * S.shape[-1] * torch.finfo(S.dtype).eps
    inverse = torch.where(tolerance < S, 1 / S, 0.0).unsqueeze(-2)
    return HeadSVD(
        U=QA @ U_small,
        S=torch.where(tolerance < S, S, 0.0),
        V=QB @ V_small,
        dest_map=RB.mT @ V_small * inverse,
        src_map=RA.mT @ U_small * inverse,
        scale=forms.scale,
    )


def read_attention(
    model: Model,
    tokens: Int[Tensor, "prompt pos"],
    mask: Bool[Tensor, "prompt pos"],
    progress: bool = False,
) -> Attention:
    """Run the model and keep the queries, keys and attention weights of every head."""
    cache = activations(model, tokens, ("q", "k", "pattern"), progress=progress)
    mask = mask.to(model.device)
    return Attention(cache["q"], cache["k"], cache["pattern"], mask, score_divisors(model))


def scores(attention: Attention) -> Float[Tensor, "layer prompt head dest src"]:
    """a_ij = q_i·k_j / √r for every pair of tokens, future ones and padding included."""
    raw = attention.q @ attention.k.mT
    return raw / attention.scale.to(raw.dtype)[:, None, None, None, None]


def bilinear_scores(
    forms: QKForms, layer: int, head: int, x: Float[Tensor, "... pos d"]
) -> Float[Tensor, "... pos pos"]:
    """a_ij = x̃_iᵀ A Bᵀ x̃_j / √r from the normalised residual stream x̂ (no rotary positions)."""
    x1 = torch.cat([x.double(), x.new_ones(*x.shape[:-1], 1, dtype=torch.float64)], dim=-1)
    left, right = x1 @ forms.A[layer, head], x1 @ forms.B[layer, head]
    return left @ right.mT / forms.scale[layer]


def participation_ratio(weights: Float[Tensor, "... n"]) -> Float[Tensor, "..."]:
    """(Σ|w|)² / Σw²: how many of n entries share the weight; 1 if one has all, n if all equal."""
    size = weights.abs()
    return size.sum(-1) ** 2 / (size**2).sum(-1).clamp_min(torch.finfo(size.dtype).tiny)


def spectrum_table(svd: HeadSVD) -> pd.DataFrame:
    """One row per head and singular value: layer, head, k, sigma, share of Σσ²."""
    layers, heads, rank = svd.S.shape
    index = pd.MultiIndex.from_product(
        [range(layers), range(heads), range(rank)], names=["layer", "head", "k"]
    )
    energy = svd.S**2 / (svd.S**2).sum(-1, keepdim=True)
    columns = {"sigma": svd.S.flatten().cpu(), "share": energy.flatten().cpu()}
    return pd.DataFrame({k: v.numpy() for k, v in columns.items()}, index=index).reset_index()


def head_table(svd: HeadSVD) -> pd.DataFrame:
    """One row per head: largest and smallest σ, condition number, participation ratio of σ."""
    top, bottom = svd.S[..., 0], svd.S[..., -1]
    layers, heads = top.shape
    index = pd.MultiIndex.from_product([range(layers), range(heads)], names=["layer", "head"])
    columns = {
        "largest": top,
        "smallest": bottom,
        "condition": top / bottom,
        "participation": participation_ratio(svd.S),
        "participation_squares": participation_ratio(svd.S**2),
    }
    flat = {name: values.flatten().cpu().numpy() for name, values in columns.items()}
    table = pd.DataFrame(flat, index=index).reset_index()
    names = table["layer"].astype(str) + "." + table["head"].astype(str)
    return table.assign(name=names)


PARTS = ("content", "source", "destination", "constant")


def score_parts(
    forms: QKForms, x: Float[Tensor, "layer prompt pos d"]
) -> Float[Tensor, "part layer prompt head pos pos"]:
    """Every score as a sum of four `PARTS`, one for each block of Ω (no rotary positions).

    With A = [A₀ ; α] and B = [B₀ ; β]: content x̂_iᵀA₀B₀ᵀx̂_j, source αᵀB₀ᵀx̂_j, destination
    x̂_iᵀA₀β and constant αᵀβ, each divided by √r. Softmax over j never sees the last two.
    """
    x, forms = x.double(), QKForms(forms.A.to(x.device), forms.B.to(x.device), forms.scale)
    left = torch.einsum("lpid,lhdr->lphir", x, forms.A[:, :, :-1])
    right = torch.einsum("lpjd,lhdr->lphjr", x, forms.B[:, :, :-1])
    alpha, beta = forms.A[:, None, :, -1:], forms.B[:, None, :, -1:]
    blocks = (left @ right.mT, alpha @ right.mT, left @ beta.mT, alpha @ beta.mT)
    scale = forms.scale.to(x.device)[:, None, None, None, None]
    return torch.stack(torch.broadcast_tensors(*blocks)) / scale


def additive_fit(
    scores: Float[Tensor, "... dest src"], mask: Bool[Tensor, "prompt pos"], first: int = 1
) -> tuple[Float[Tensor, "layer prompt head"], Float[Tensor, "layer prompt head"]]:
    """How much of a head's choice among sources is a matter of the pair.

    Least squares of a_ij on f_i + g_j over the pairs j ≤ i of each prompt, tokens before `first`
    left out; f and g are free for every token. Returns the sum of squares that is left and that
    of a_ij about its row mean: their ratio is 0 where a head ranks sources alike for all
    destinations.
    """
    left, total = torch.zeros(2, *scores.shape[:3], dtype=torch.float64, device=scores.device)
    for length in mask.sum(1).unique().tolist():
        rows = (mask.sum(1) == length).nonzero().flatten()
        dest, src = torch.tril_indices(length - first, length - first, device=scores.device)
        a = scores[:, rows][..., dest + first, src + first].double()
        row, column = (torch.nn.functional.one_hot(t).double() for t in (dest, src))
        for out, effects in ((left, torch.cat([row, column], 1)), (total, row)):
            fitted = a @ (effects @ torch.linalg.pinv(effects)).mT
            out[:, rows] = (a - fitted).square().sum(-1)
    return left, total


def pair_shares(
    scores: Float[Tensor, "layer prompt head dest src"],
    mask: Bool[Tensor, "prompt pos"],
    first: int = 1,
    repeats: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """The share of a head's variation within softmax rows that `additive_fit` leaves.

    One row per head: layer, head, share, and its 95 % interval, low and high, from `repeats`
    bootstrap samples of the prompts.
    """
    left, total = (t.cpu() for t in additive_fit(scores, mask, first))
    prompts = left.shape[1]
    draws = np.random.default_rng(seed).multinomial(prompts, [1 / prompts] * prompts, repeats)
    times = torch.from_numpy(np.vstack([np.ones(prompts), draws]))
    share = torch.einsum("np,lph->nlh", times, left) / torch.einsum("np,lph->nlh", times, total)
    bounds = share[1:].quantile(torch.tensor([0.025, 0.975], dtype=share.dtype), dim=0)
    table = tidy(torch.stack([share[0], *bounds]), ("value", "layer", "head"), "number")
    table = table.pivot(index=["layer", "head"], columns="value", values="number").reset_index()
    return table.set_axis(["layer", "head", "share", "low", "high"], axis=1)


def shuffle_sources(
    scores: Float[Tensor, "layer prompt head dest src"], seed: int = 0, first: int = 1
) -> Float[Tensor, "layer prompt head dest src"]:
    """The visible scores of each row in random order, the first `first` left in place.

    Every row keeps its scores, so its attention is as sharp as before; who gets them is chance.
    """
    size = scores.shape[-1]
    noise = torch.rand((*scores.shape[:-1], size), generator=torch.Generator().manual_seed(seed))
    noise[..., :first] = torch.arange(-first, 0)
    future = torch.ones(size, size, dtype=torch.bool).triu(1)
    order = torch.where(future, 2.0 + torch.arange(size), noise).argsort(-1)
    return scores.gather(-1, order.to(scores.device))


def tidy(values: Tensor, dims: Sequence[str], name: str) -> pd.DataFrame:
    """One row per entry of an array: its place in each dimension, and its value as `name`."""
    index = pd.MultiIndex.from_product([range(size) for size in values.shape], names=dims)
    column = values.detach().cpu().flatten().numpy()
    return pd.DataFrame({name: column}, index=index).reset_index()
