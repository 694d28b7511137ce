"""Chapter 1: attention scores, and the four parts of which each is the sum."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparse_signals.core.model import head_name
from sparse_signals.core.prompts import Batch
from sparse_signals.core.run import Run
from sparse_signals.core.stats import DRAWS, bootstrap, false_discovery, sign_flip, tidy
from sparse_signals.heads.protagonist import template_of
from sparse_signals.heads.svd import QKForms

PARTS = ("content", "source", "destination", "constant")
VARIATIONS = {"within a softmax row": (-1,), "over all pairs of tokens": (-4, -2, -1)}
SHARE_COLUMNS = {"share": "value", "low": "low", "high": "high"}


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
    batch: Batch,
    first: int = 1,
    draws: int = DRAWS,
    seed: int = 0,
) -> pd.DataFrame:
    """The share of a head's variation within softmax rows that `additive_fit` leaves.

    One row per head: layer, head, name, share, and its 95 % interval, low and high, from `draws`
    bootstrap samples of the templates.
    """
    left, total = additive_fit(scores, batch.mask, first)
    by_prompt, weights = (pd.DataFrame(_by_prompt(t)) for t in (left, total))
    found = bootstrap(by_prompt, template_of(batch), weights, draws, seed)
    columns = {name: found[column] for name, column in SHARE_COLUMNS.items()}
    return _heads_of(left).assign(**columns)


def pair_verdicts(
    scores: Float[Tensor, "layer prompt head dest src"],
    control: Float[Tensor, "layer prompt head dest src"],
    batch: Batch,
    rate: float = 0.05,
    first: int = 1,
) -> pd.DataFrame:
    """Whether the pair carries more or less than half of a head's variation, and than a control.

    For every template the share that `additive_fit` leaves, minus 1/2 and minus that of the
    control; both are tested by flipping signs of templates, at a false-discovery rate of `rate`
    over all heads. One row per head: layer, head, name, half and control, each "more", "less" or
    "undecided".
    """
    template, cluster = np.unique(template_of(batch), return_inverse=True)
    member = cluster == np.arange(len(template))[:, None]
    found = [additive_fit(each, batch.mask, first) for each in (scores, control)]
    own, other = ((member @ _by_prompt(x)) / (member @ _by_prompt(y)) for x, y in found)
    verdicts = {}
    for name, excess in {"half": own - 0.5, "control": own - other}.items():
        real = false_discovery(sign_flip(excess.T)) <= rate
        words = np.where(excess.mean(0) > 0, "more", "less")
        verdicts[name] = np.where(real, words, "undecided")
    return _heads_of(found[0][0]).assign(**verdicts)


def _by_prompt(values: Float[Tensor, "layer prompt head"]) -> Float[np.ndarray, "prompt each"]:
    return values.transpose(0, 1).flatten(1).cpu().numpy()


def _heads_of(values: Float[Tensor, "layer prompt head"]) -> pd.DataFrame:
    heads = pd.MultiIndex.from_product([range(len(values)), range(values.shape[2])])
    table = heads.to_frame(index=False, name=["layer", "head"])
    return table.assign(name=head_name(table["layer"], table["head"]))


def variation_shares(
    parts: Float[Tensor, "part layer prompt head dest src"], mask: Bool[Tensor, "prompt pos"]
) -> pd.DataFrame:
    """How much each part adds to the variation of the scores: Cov(part, score) / Var(score).

    Variation is about the mean of each softmax row, or about the mean of all visible pairs. One
    row per scope, part and head: scope, part, layer, head, share; shares of a head sum to 1.
    """
    whole, seen, tables = parts.sum(0), visible(mask).to(parts.device), []
    for scope, dims in VARIATIONS.items():
        part, score = (_about_mean(x, seen, dims) for x in (parts, whole))
        share = (part * score).sum((2, 4, 5)) / score.square().sum((1, 3, 4))
        table = tidy(share, ("part", "layer", "head"), "share").assign(scope=scope)
        tables.append(table.assign(part=[PARTS[k] for k in table["part"]]))
    return pd.concat(tables, ignore_index=True)


def visible(mask: Bool[Tensor, "prompt pos"]) -> Bool[Tensor, "prompt 1 dest src"]:
    """Which pairs of tokens a head scores: none of padding, and no source after its destination."""
    return torch.tril(mask[:, None, :, None] & mask[:, None, None, :])


def _about_mean(
    values: Float[Tensor, "*some prompt head dest src"],
    seen: Bool[Tensor, "prompt 1 dest src"],
    dims: tuple[int, ...],
) -> Float[Tensor, "*some prompt head dest src"]:
    count = seen.sum(dims, keepdim=True).clamp_min(1)
    return (values - (values * seen).sum(dims, keepdim=True) / count) * seen


def source_pairs(
    scores: Float[Tensor, "layer prompt head dest src"],
    pattern: Float[Tensor, "layer prompt head dest src"],
    batch: Batch,
    n: int,
    least: float = 1e-6,
    seed: int = 0,
) -> pd.DataFrame:
    """Two sources of one destination, n times, of random heads and prompts.

    Columns: layer, head, difference (a_ij − a_ij'), odds (A_ij / A_ij'). Left out are pairs of
    which one has less than `least` of the attention.
    """
    rng, last = np.random.default_rng(seed), batch.last.numpy()
    layer, prompt, head = (rng.integers(size, size=n) for size in scores.shape[:3])
    dest = rng.integers(1, last[prompt] + 1)
    one = rng.integers(0, dest + 1)
    other = (one + rng.integers(1, dest + 1)) % (dest + 1)  # never the same
    here = layer, prompt, head, dest
    weights = [pattern[*here, source].cpu().numpy() for source in (one, other)]
    difference = (scores[*here, one] - scores[*here, other]).cpu().numpy()
    columns = {"layer": layer, "head": head, "difference": difference}
    kept = np.minimum(*weights) > least
    return pd.DataFrame(columns | {"odds": weights[0] / weights[1]})[kept]


def attention_between(run: Run, pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """Attention between roles: pair ("end → IO"), prompt, layer, head, name, order, attention."""
    tables, prompt, roles = [], torch.arange(len(run)), run.batch.roles
    for dest, src in pairs:
        looks = run.pattern[:, prompt, :, roles[dest], roles[src]]
        table = tidy(looks, ("prompt", "layer", "head"), "attention")
        tables.append(table.assign(pair=f"{dest} → {src}"))
    table = pd.concat(tables, ignore_index=True)
    order = run.batch.table["order"].to_numpy()[table["prompt"]]
    return table.assign(order=order, name=head_name(table["layer"], table["head"]))


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
