"""Chapter 1: attention scores, and the four parts of which each is the sum."""

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparse_signals.core.run import Run
from sparse_signals.core.stats import DRAWS, bootstrap
from sparse_signals.heads.svd import QKForms

PARTS = ("content", "source", "destination", "constant")


def scores(run: Run) -> Float[Tensor, "layer prompt head dest src"]:
    """a_ij = q_i·k_j / √r for every pair of tokens, future ones and padding included."""
    raw = run.q @ run.k.mT
    return raw / run.model.divisor.to(raw.dtype)[:, None, None, None, None]


def bilinear_scores(
    forms: QKForms, layer: int, head: int, x: Float[Tensor, "... pos d"]
) -> Float[Tensor, "... pos pos"]:
    """a_ij = x̃_iᵀ A Bᵀ x̃_j / √r from the normalised residual stream x̂.

    Without what rotary positions and normalisations inside heads do to queries and keys.
    """
    x1 = torch.cat([x.double(), x.new_ones(*x.shape[:-1], 1, dtype=torch.float64)], dim=-1)
    left, right = x1 @ forms.A[layer, head], x1 @ forms.B[layer, head]
    return left @ right.mT / forms.divisor[layer]


def score_parts(
    forms: QKForms, x: Float[Tensor, "layer prompt pos d"]
) -> Float[Tensor, "part layer prompt head pos pos"]:
    """Every score as a sum of four `PARTS`, one for each block of Ω (no rotary positions).

    With A = [A₀ ; α] and B = [B₀ ; β]: content x̂_iᵀA₀B₀ᵀx̂_j, source αᵀB₀ᵀx̂_j, destination
    x̂_iᵀA₀β and constant αᵀβ, each divided by √r. Softmax over j never sees the last two.
    """
    x, forms = x.double(), QKForms(forms.A.to(x.device), forms.B.to(x.device), forms.divisor)
    left = torch.einsum("lpid,lhdr->lphir", x, forms.A[:, :, :-1])
    right = torch.einsum("lpjd,lhdr->lphjr", x, forms.B[:, :, :-1])
    alpha, beta = forms.A[:, None, :, -1:], forms.B[:, None, :, -1:]
    blocks = (left @ right.mT, alpha @ right.mT, left @ beta.mT, alpha @ beta.mT)
    scale = forms.divisor.to(x.device)[:, None, None, None, None]
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
    draws: int = DRAWS,
    seed: int = 0,
) -> pd.DataFrame:
    """The share of a head's variation within softmax rows that `additive_fit` leaves.

    One row per head: layer, head, share, and its 95 % interval, low and high, from `draws`
    bootstrap samples of the prompts.
    """
    left, total = (t.cpu() for t in additive_fit(scores, mask, first))
    by_prompt, weights = (pd.DataFrame(t.transpose(0, 1).flatten(1).numpy()) for t in (left, total))
    found = bootstrap(by_prompt, np.arange(len(by_prompt)), weights, draws, seed)
    heads = pd.MultiIndex.from_product([range(len(left)), range(left.shape[2])])
    table = heads.to_frame(index=False, name=["layer", "head"])
    return table.assign(share=found["value"], low=found["low"], high=found["high"])


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
