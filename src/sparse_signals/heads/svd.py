"""Chapters 1 and 2: the attention score of every head as a bilinear form, and its SVD.

A head reads the normalised residual stream x̂ and scores a destination token i against a source
token j by q_i·k_j / √r. With x̃ = [x̂ ; 1] that score is x̃_iᵀ Ω x̃_j / √r, where Ω = A Bᵀ has
rank at most r. All heads of a model are stacked: every array starts with (layer, head).
"""

from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sparse_signals.core.forward import folded
from sparse_signals.core.model import Model, head_name, once_per_model, qk_weights
from sparse_signals.core.stats import participation_ratio


@dataclass(frozen=True)
class QKForms:
    """The QK form Ω = A Bᵀ of every head, kept in factors; scores are divided by `divisor`."""

    A: Float[Tensor, "layer head d1 r"]
    B: Float[Tensor, "layer head d1 r"]
    divisor: Float[Tensor, "layer"]


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
    divisor: Float[Tensor, "layer"]


@once_per_model
def qk_forms(model: Model) -> QKForms:
    """Fold normalisation and biases into the QK form of every head.

    A = [C diag(g) W_Q ; (b W_Q + b_Q)ᵀ] and B likewise, with g and b the gain and shift of the
    normalisation. C = I − 11ᵀ/d where the normalisation centres its input (LayerNorm), else I:
    it changes no score, and it makes Ω unique. float64, whatever the dtype of the model.
    Where heads normalise queries and keys, the gains of that are folded in too, and the score is
    divided by both scales, s_q(i) s_k(j), taken as they are (`Run.q_scale`, `Run.k_scale`).
    Source: Franco and Crovella 2024, section 3; Elhage et al. 2021 for the form itself.
    """
    w = qk_weights(model)
    A = folded(w.W_Q, w.b_Q, w.gain, w.shift, w.centred)
    B = folded(w.W_K, w.b_K, w.gain, w.shift, w.centred)
    if model.head_gains:
        A, B = (x * model.head_gains[n][:, None, None].double() for x, n in ((A, "q"), (B, "k")))
    return QKForms(A, B, w.divisor)


def head_svd(of: Model | QKForms) -> HeadSVD:
    """SVD of every Ω = A Bᵀ without forming it, of a model (computed once) or of given forms.

    Thin QR of both factors, A = Q_A R_A and B = Q_B R_B, then the SVD of the r×r matrix
    R_A R_Bᵀ = Û S V̂ᵀ: U = Q_A Û, V = Q_B V̂. Since Ω V = U S, the coordinates of a token
    follow from its query alone, x̃ᵀU = q (R_Bᵀ V̂) / S, and from its key alone, x̃ᵀV = k (R_Aᵀ Û) / S.
    Signs are canonical: the entry of largest magnitude of each u is positive.

    >>> svd = head_svd(model)
    >>> svd.S.shape == (model.n_layers, model.n_heads, model.d_head)
    True
    >>> bool((svd.S[..., :-1] >= svd.S[..., 1:]).all())
    True
    """
    return _svd(of) if isinstance(of, QKForms) else _model_svd(of)


@once_per_model
def _model_svd(model: Model) -> HeadSVD:
    return _svd(qk_forms(model))


def _svd(forms: QKForms) -> HeadSVD:
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
        divisor=forms.divisor,
    )


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
    return table.assign(name=head_name(table["layer"], table["head"]))
