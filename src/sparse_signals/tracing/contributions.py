"""Chapter 4: what each upstream component contributes to a firing.

The score of a firing is linear in what each component wrote at its destination, and linear in what
each wrote at its source. So on either side every component has a share of the score, or of the
slices in its support, and the shares add up to it. How much the attention weight changes without a
component is known as exactly. Pairs are batched: every array starts with the firing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from sparse_signals.core.matmul import grouped_matmul
from sparse_signals.core.model import Model
from sparse_signals.core.rotary import rotate, rotation, unrotate
from sparse_signals.core.run import Outputs, Run
from sparse_signals.core.stats import random_rotation
from sparse_signals.heads.svd import qk_forms
from sparse_signals.signals.firings import Pairs
from sparse_signals.signals.slices import (
    Basis,
    Coordinates,
    by_head,
    coordinates,
    model_basis,
    support,
)

SIDES = ("dest", "src")
WEIGHTINGS = ("exact", "attention", "answer", "published", "norm")
REMOVALS = 2**24  # of the scores of rows without each component, at once


@dataclass(frozen=True)
class Settings:
    """How to trace. The defaults are this book's; chapter 4 varies them.

    level, context: what counts as a firing (`signals.find_firings`). fraction: f of the support
    whose slices count, None for every slice, so that nothing is filtered.
    turn: the seed of a random rotation of the basis of all heads, None for the singular vectors;
    what filtering by a support does along directions that mean nothing.
    share: a side keeps its largest contributions until their sum exceeds this share of the total.
    weighting: "exact" (all components, shares of the score in softmax units), "attention" (all
    components, by how much the attention weight falls without them), "answer" (kept as by "exact",
    then times ∂F/∂a_ij, F = logit(IO) − logit(S): what the answer hears of the contribution),
    "published" (heads only, √σ weights, unscaled), or "norm" (heads by the length of their output:
    a baseline).
    bias_per_head: a quirk of the released code, the bias row added to every upstream head.

    >>> Settings().share, Settings.published().weighting
    (0.7, 'published')
    >>> Settings(share=2.0)
    Traceback (most recent call last):
    ValueError: share must be above 0 and at most 1
    """

    level: float | None = 0.5
    context: bool = False
    fraction: float | None = None
    turn: int | None = None
    share: float = 0.7
    weighting: str = "exact"
    bias_per_head: bool = False

    @classmethod
    def published(cls) -> "Settings":
        """The way of Franco and Crovella 2024: supports cut, heads alone, their weights."""
        return cls(level=0.5, fraction=1.0, share=0.7, weighting="published")

    def __post_init__(self) -> None:
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"weighting must be one of {WEIGHTINGS}, not {self.weighting!r}")
        if self.weighting == "attention" and self.fraction is not None:
            raise ValueError("fraction must be all: attention hears every slice")
        if self.level is None and self.context:
            raise ValueError("level must be a number where it is a multiple of uniform attention")
        for name in ("level", "fraction", "share"):
            value = getattr(self, name)
            if name != "share" and value is None:
                continue
            if value <= 0 or (value > 1 and not (name == "level" and self.context)):
                raise ValueError(f"{name} must be above 0 and at most 1")


@dataclass(frozen=True)
class Contributions:
    """What every component contributes to each firing, on its destination and its source side.

    The last component is the bias row; components that are not upstream of the head have zero.
    `total` is what the exact values of either side sum to: the score, or Σ_{k∈S} p_k where only
    the slices of a support S count. `support` is shown in any case. `sides` says which sides a
    trace may follow: those that belong to one token.
    """

    values: Float[Tensor, "pair side component"]
    total: Float[Tensor, "pair"]
    support: Bool[Tensor, "pair r"]
    sides: Bool[Tensor, "pair side"]

    def __getitem__(self, keep: Bool[Tensor, "pair"] | Int[Tensor, "kept"]) -> "Contributions":
        return Contributions(*(getattr(self, field.name)[keep] for field in fields(self)))

    def error(self) -> Float[Tensor, "pair"]:
        """|Σ components − total| / |total|, the worse side (exact weighting)."""
        gap = (self.values.sum(-1) - self.total[:, None]).abs().amax(1)
        return gap / self.total.abs().clamp_min(torch.finfo(gap.dtype).tiny)

    def discrepancy(self) -> Float[Tensor, "pair"]:
        """The same gap relative to Σ |contribution|, which rounding is relative to."""
        gap = (self.values.sum(-1) - self.total[:, None]).abs()
        size = self.values.abs().sum(-1).clamp_min(torch.finfo(gap.dtype).tiny)
        return (gap / size).amax(1)


def joined(parts: Sequence[Contributions]) -> Contributions:
    """Contributions to several lists of firings, as one."""
    each = zip(*(vars(part).values() for part in parts), strict=True)
    return Contributions(*(torch.cat(values) for values in each))


def contributions(
    run: Run, pairs: Pairs, settings: Settings = Settings(), outputs: Outputs | None = None
) -> Contributions:
    """What every upstream component contributes to every firing, on both sides.

    Exact, source side: Σ_k σ_k (x̃_i·u_k)(v_k·x_c(j)/s_j)/√r, over all slices or those of the
    support S; destination side likewise with x_c(i)/s_i and x̃_j. Where heads normalise queries and
    keys, x̃ is divided by what they divide these by as well.
    Attention: A_ij − A_ij without what c wrote at the token, the scale s_t frozen. At the
    destination this changes all scores of the row, at the source a_ij alone.
    Published: Σ_{k∈S} sgn(x̃_i·u_k) √σ_k v_k·x_c(j)/s_j, and likewise.
    `outputs` are those of the run that are already known.
    Source: Franco and Crovella 2024, section 5 (published).
    """
    if not len(pairs):
        return _nothing(run.model)
    outputs = outputs or Outputs(run)
    coords = coordinates(run, pairs, slicing_basis(run.model, settings))
    used = support(coords.slices, settings.fraction)
    if settings.weighting == "norm":
        values = _norms(run, pairs, outputs)
    else:
        read = reading_vectors(run, pairs, coords, used, settings)
        values = _values(run, pairs, read, outputs)
    if settings.weighting == "attention":
        values = _lost_attention(run, pairs, values[:, 1], outputs)
    if settings.bias_per_head:
        values[..., :-1] += values[..., -1:] / _scale(run, pairs)[..., None]
    values = values * _counted(run.model, pairs, settings.weighting)[:, None]
    return _summed(values, coords, settings)


def _nothing(model: Model) -> Contributions:
    """The contributions to no firing at all, which need no SVD and no outputs of components."""
    values = torch.zeros(0, 2, len(model.components), dtype=torch.float64, device=model.device)
    support = values.new_zeros(0, model.d_head, dtype=torch.bool)
    return Contributions(values, values.sum((1, 2)), support, values.new_ones(0, 2).bool())


def _summed(
    values: Float[Tensor, "pair side component"], coords: Coordinates, settings: Settings
) -> Contributions:
    every = torch.ones_like(values[..., 0], dtype=torch.bool)
    slices = coords.slices
    total = (slices * support(slices, settings.fraction)).sum(-1)
    shown = support(slices, 1.0 if settings.fraction is None else settings.fraction)
    return Contributions(values, total, shown, every)


def contrast(
    run: Run,
    pairs: Pairs,
    other: Pairs,
    settings: Settings = Settings(),
    outputs: Outputs | None = None,
) -> Contributions:
    """Why a destination prefers its source to another one: contributions to a_ij − a_ij'.

    `other` has the same heads, prompts and destinations, and sources j'. Softmax sees only such
    differences: what raises the scores of both sources alike drops out. Destination side:
    x_c(i)/s_i against the difference of the sources' coordinates; source side: x_c(j)/s_j minus
    x_c(j')/s_j'. Both sum to the difference, or to the slices in its support where only these
    count. The source side belongs to two tokens, so a trace does not follow it.
    """
    if not len(pairs):
        return _nothing(run.model)
    outputs, basis = outputs or Outputs(run), slicing_basis(run.model, settings)
    ours, theirs = (coordinates(run, x, basis) for x in (pairs, other))
    difference = Coordinates(ours.dest, ours.src - theirs.src)
    used = support(difference.slices, settings.fraction)
    read = reading_vectors(run, pairs, difference, used, settings)
    aside = reading_vectors(run, other, ours, used, settings)
    values = _values(run, pairs, read, outputs)
    values[:, 1] -= _values(run, other, aside, outputs)[:, 1]
    values = values * _counted(run.model, pairs, "exact")[:, None]
    found = _summed(values, difference, settings)
    found.sides[:, 1] = False
    return found


def slicing_basis(model: Model, settings: Settings) -> Basis:
    """The basis in which scores are sliced: the singular vectors, or random directions."""
    basis = model_basis(model)
    if settings.turn is None:
        return basis
    return basis.turned(random_rotation(model.d_head, settings.turn))


def reading_vectors(
    run: Run,
    pairs: Pairs,
    coords: Coordinates,
    chosen: Bool[Tensor, "pair r"],
    settings: Settings = Settings(),
) -> Float[Tensor, "pair side d1"]:
    """The vector w of each side whose product with x̃ is what the support of a firing hears.

    A coefficient for every slice, turned into query (key) space, rotated back to the axes of the
    token if positions are rotary, divided by what the head divides the query (key) by, and through
    its weights into the residual stream.
    """
    model, published = run.model, settings.weighting == "published"
    forms, basis = qk_forms(model), slicing_basis(model, settings)
    # on a slice of a support the signs of the two sides agree
    root, sides = model.divisor[pairs.layer, None].sqrt(), []
    for other, maps, factor, token, scale in (
        (coords.src, basis.dest, forms.A, pairs.dest, run.q_scale),
        (coords.dest, basis.src, forms.B, pairs.src, run.k_scale),
    ):
        coefficient = chosen * (other.sign() * root if published else other)
        y = by_head(coefficient, maps.mT, pairs)
        if model.rotary:
            y = unrotate(y, *rotation(model, token))
        y = y / scale[pairs.layer, pairs.prompt, pairs.head, token, None].double()
        sides.append(by_head(y, factor.mT, pairs))
    return torch.stack(sides, dim=1)


def receiving(pairs: Pairs) -> Int[Tensor, "pair side"]:
    """The token at which either side receives: destination, then source."""
    return torch.stack([pairs.dest, pairs.src], dim=1)


def _scale(run: Run, pairs: Pairs) -> Float[Tensor, "pair side"]:
    return run.scale[pairs.layer[:, None], pairs.prompt[:, None], receiving(pairs)].double()


def _outputs_at(
    run: Run, pairs: Pairs, outputs: Outputs
) -> tuple[Float[Tensor, "slot below d"], Int[Tensor, "pair side"]]:
    """What components below the highest pair wrote where pairs receive, and in which slots."""
    prompt = pairs.prompt[:, None].expand(-1, 2)
    return outputs.at(prompt, receiving(pairs), int(pairs.layer.max()))


def _values(
    run: Run, pairs: Pairs, read: Float[Tensor, "pair side d1"], outputs: Outputs
) -> Float[Tensor, "pair side component"]:
    """x_c(t)·w / s_t of every component of the residual stream, and last w's entry for the bias."""
    written, slot = _outputs_at(run, pairs, outputs)
    w = read[..., :-1].flatten(0, 1).to(written.dtype)
    found = grouped_matmul(w, written.mT, slot.flatten()).double().unflatten(0, (-1, 2))
    values = found.new_zeros(*found.shape[:2], len(run.model.components))
    values[..., : found.shape[-1]] = found / _scale(run, pairs)[..., None]
    values[..., -1] = read[..., -1]
    return values


def _norms(run: Run, pairs: Pairs, outputs: Outputs) -> Float[Tensor, "pair side component"]:
    """The length of what every component wrote where pairs receive, centred for LayerNorm."""
    written, slot = _outputs_at(run, pairs, outputs)
    written = written if run.model.rms else written - written.mean(-1, keepdim=True)
    norms = written.norm(dim=-1).double()
    return pad(norms, (0, len(run.model.components) - norms.shape[1]))[slot]


def _lost_attention(
    run: Run, pairs: Pairs, parts: Float[Tensor, "pair component"], outputs: Outputs
) -> Float[Tensor, "pair side component"]:
    """A_ij − A_ij without what a component wrote at i, and at j; `parts` of a_ij are those at j.

    Without c the query is q_i − q_c, and the scores of the row are a_ij' − q_c·k_j'/√r. Without
    c at j only a_ij falls, and the odds A/(1 − A) by the factor e^part.
    """
    each = len(run.model.components) * max(run.k.shape[-2], run.model.d_model)
    pieces = torch.arange(len(pairs), device=parts.device).split(max(1, REMOVALS // each))
    return torch.cat([_lost_rows(run, pairs[rows], parts[rows], outputs) for rows in pieces])


def _lost_rows(
    run: Run, pairs: Pairs, parts: Float[Tensor, "pair component"], outputs: Outputs
) -> Float[Tensor, "pair side component"]:
    written, slot = _outputs_at(run, pairs, outputs)
    A, below = qk_forms(run.model).A[pairs.layer, pairs.head], written.shape[1]
    q = A.new_zeros(*parts.shape, A.shape[-1])
    q[:, :below] = (written[slot[:, 0]] @ A[:, :-1].to(written.dtype)).double()
    q[:, :below] /= _scale(run, pairs)[:, :1, None]
    q[:, -1] = A[:, -1]
    q /= run.q_scale[pairs.layer, pairs.prompt, pairs.head, pairs.dest, None, None].double()
    if run.model.rotary:
        q = rotate(q, *(x[:, None] for x in rotation(run.model, pairs.dest)))
    keys = run.k[pairs.layer, pairs.prompt, pairs.head].double()
    query = run.q[pairs.layer, pairs.prompt, pairs.head, pairs.dest, None].double()
    scores, falls = (x @ keys.mT / run.model.divisor[pairs.layer, None, None] for x in (query, q))
    source = torch.arange(keys.shape[1], device=keys.device)
    scores = scores.masked_fill((source > pairs.dest[:, None])[:, None], -torch.inf)
    at_dest = _log_odds(scores - falls, pairs.src).sigmoid()
    odds = _log_odds(scores, pairs.src)
    left = torch.stack([at_dest, (odds - parts).sigmoid()], dim=1)
    return odds.sigmoid()[:, None] - left


def _log_odds(
    scores: Float[Tensor, "pair row src"], src: Int[Tensor, "pair"]
) -> Float[Tensor, "pair row"]:
    """ln A/(1 − A) of the softmax weight that each row gives to the source of its pair."""
    at = src[:, None, None].expand(-1, scores.shape[1], 1)
    others = scores.scatter(-1, at, -torch.inf).logsumexp(-1)
    return scores.gather(-1, at).squeeze(-1) - others


def _counted(model: Model, pairs: Pairs, weighting: str) -> Bool[Tensor, "pair component"]:
    """Which components are upstream of each pair's head, and counted by the weighting."""
    layer = torch.tensor(model.components["layer"].tolist(), device=pairs.layer.device)
    upstream = layer < pairs.layer[:, None]
    if weighting in ("exact", "attention", "answer"):
        return upstream
    return upstream & model.is_head


def by_source(
    run: Run, pairs: Pairs, settings: Settings = Settings()
) -> Float[Tensor, "pair side layer head source"]:
    """Contributions of heads, split by the source token whose value they moved (exact).

    A_tj (v_j W_O)·w / s_t for every head and j ≤ t: over j it sums to the head's contribution.
    """
    coords = coordinates(run, pairs, slicing_basis(run.model, settings))
    used = support(coords.slices, settings.fraction)
    read = reading_vectors(run, pairs, coords, used, settings)
    read = read / _scale(run, pairs)[..., None]
    W_O = run.model.writers.W_O.double()
    through = torch.einsum("nsd,lhrd->nslhr", read[..., :-1], W_O)
    v = run.v[:, pairs.prompt].double()
    pattern = run.pattern
    # two indices apart: the firing and its side come first
    weight = pattern[:, pairs.prompt[:, None], :, receiving(pairs)].double()
    each = torch.einsum("nslhr,lnhjr->nslhj", through, v) * weight
    layer = torch.arange(len(W_O), device=pairs.layer.device)
    return each * (layer < pairs.layer[:, None])[:, None, :, None, None]
