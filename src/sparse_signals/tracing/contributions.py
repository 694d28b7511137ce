"""Chapter 4: what each upstream component contributes to a firing.

The score of a firing is linear in what each component wrote at its destination, and linear in what
each wrote at its source. So on either side every component has a share of the slices in the
support, and the shares add up to it. Pairs are batched: every array starts with the firing.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_signals.core.matmul import grouped_matmul
from sparse_signals.core.model import Model
from sparse_signals.core.rotary import rotation, unrotate
from sparse_signals.core.run import Run
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
WEIGHTINGS = ("exact", "published", "norm")


@dataclass(frozen=True)
class Settings:
    """How to trace. The defaults are this book's; chapter 4 varies them.

    level, context: what counts as a firing (`signals.find_firings`). fraction: f of the support,
    None for every slice, so that nothing is filtered.
    turn: the seed of a random rotation of the basis of all heads, None for the singular vectors;
    what filtering by a support does along directions that mean nothing.
    share: a side keeps its largest contributions until their sum exceeds this share of the total.
    weighting: "exact" (all components, shares of the score in softmax units), "published" (heads
    only, √σ weights, unscaled), or "norm" (heads by the length of their output: a baseline).
    bias_per_head: a quirk of the released code, the bias row added to every upstream head.

    >>> Settings().share, Settings(weighting="published").weighting
    (0.7, 'published')
    >>> Settings(share=2.0)
    Traceback (most recent call last):
    ValueError: share must be above 0 and at most 1
    """

    level: float = 0.5
    context: bool = False
    fraction: float | None = 1.0
    turn: int | None = None
    share: float = 0.7
    weighting: str = "exact"
    bias_per_head: bool = False

    def __post_init__(self) -> None:
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"weighting must be one of {WEIGHTINGS}, not {self.weighting!r}")
        for name in ("level", "fraction", "share"):
            value = getattr(self, name)
            if name == "fraction" and value is None:
                continue
            if value <= 0 or (value > 1 and not (name == "level" and self.context)):
                raise ValueError(f"{name} must be above 0 and at most 1")


@dataclass(frozen=True)
class Contributions:
    """What every component contributes to each firing, on its destination and its source side.

    The last component is the bias row; components that are not upstream of the head have zero.
    `total` is what the exact values of either side sum to, Σ_{k∈S} p_k. `sides` says which sides
    a trace may follow: those that belong to one token.
    """

    values: Float[Tensor, "pair side component"]
    total: Float[Tensor, "pair"]
    support: Bool[Tensor, "pair r"]
    sides: Bool[Tensor, "pair side"]

    def error(self) -> Float[Tensor, "pair"]:
        """|Σ components − Σ_{k∈S} p_k| / |Σ_{k∈S} p_k|, the worse side (exact weighting)."""
        gap = (self.values.sum(-1) - self.total[:, None]).abs().amax(1)
        return gap / self.total.abs().clamp_min(torch.finfo(gap.dtype).tiny)

    def discrepancy(self) -> Float[Tensor, "pair"]:
        """The same gap relative to Σ |contribution|, which rounding is relative to."""
        gap = (self.values.sum(-1) - self.total[:, None]).abs()
        size = self.values.abs().sum(-1).clamp_min(torch.finfo(gap.dtype).tiny)
        return (gap / size).amax(1)


def contributions(run: Run, pairs: Pairs, settings: Settings = Settings()) -> Contributions:
    """The share of every upstream component in every firing, on both sides.

    Exact, source side: Σ_{k∈S} σ_k (x̃_i·u_k)(v_k·x_c(j)/s_j)/√r; destination side likewise with
    x_c(i)/s_i and x̃_j. Published: Σ_{k∈S} sgn(x̃_i·u_k) √σ_k v_k·x_c(j)/s_j, and likewise.
    Source: Franco and Crovella 2024, section 5 (published).
    """
    if not len(pairs):
        return _nothing(run.model)
    coords = coordinates(run, pairs, slicing_basis(run.model, settings))
    chosen = support(coords.slices, settings.fraction)
    if settings.weighting == "norm":
        outputs = run.outputs if run.model.rms else run.outputs - run.outputs.mean(-1, keepdim=True)
        norms = torch.nn.functional.pad(outputs.norm(dim=-1), (0, 1)).double()
        values = norms[pairs.prompt[:, None], receiving(pairs)]
    else:
        values = _values(run, pairs, reading_vectors(run.model, pairs, coords, chosen, settings))
        if settings.bias_per_head:
            values[..., :-1] += values[..., -1:] / _scale(run, pairs)[..., None]
    values = values * _counted(run.model, pairs, settings.weighting)[:, None]
    return _summed(values, coords, chosen)


def _nothing(model: Model) -> Contributions:
    """The contributions to no firing at all, which need no SVD and no outputs of components."""
    values = torch.zeros(0, 2, len(model.components), dtype=torch.float64, device=model.device)
    support = values.new_zeros(0, model.d_head, dtype=torch.bool)
    return Contributions(values, values.sum((1, 2)), support, values.new_ones(0, 2).bool())


def _summed(
    values: Float[Tensor, "pair side component"],
    coords: Coordinates,
    chosen: Bool[Tensor, "pair r"],
) -> Contributions:
    every = torch.ones_like(values[..., 0], dtype=torch.bool)
    return Contributions(values, (coords.slices * chosen).sum(-1), chosen, every)


def contrast(
    run: Run, pairs: Pairs, other: Pairs, settings: Settings = Settings()
) -> Contributions:
    """Why a destination prefers its source to another one: contributions to a_ij − a_ij'.

    `other` has the same heads, prompts and destinations, and sources j'. Softmax sees only such
    differences: what raises the scores of both sources alike drops out. Destination side:
    x_c(i)/s_i against the difference of the sources' coordinates; source side: x_c(j)/s_j minus
    x_c(j')/s_j'. Both sum to Σ_{k∈S} of the difference, whose support S is. The source side
    belongs to two tokens, so a trace does not follow it.
    """
    basis = slicing_basis(run.model, settings)
    ours, theirs = (coordinates(run, x, basis) for x in (pairs, other))
    difference = Coordinates(ours.dest, ours.src - theirs.src)
    chosen = support(difference.slices, settings.fraction)
    values = _values(run, pairs, reading_vectors(run.model, pairs, difference, chosen, settings))
    aside = _values(run, other, reading_vectors(run.model, other, ours, chosen, settings))
    values[:, 1] -= aside[:, 1]
    values = values * _counted(run.model, pairs, "exact")[:, None]
    found = _summed(values, difference, chosen)
    found.sides[:, 1] = False
    return found


def slicing_basis(model: Model, settings: Settings) -> Basis:
    """The basis in which scores are sliced: the singular vectors, or random directions."""
    basis = model_basis(model)
    if settings.turn is None:
        return basis
    return basis.turned(random_rotation(model.d_head, settings.turn))


def reading_vectors(
    model: Model,
    pairs: Pairs,
    coords: Coordinates,
    chosen: Bool[Tensor, "pair r"],
    settings: Settings = Settings(),
) -> Float[Tensor, "pair side d1"]:
    """The vector w of each side whose product with x̃ is what the support of a firing hears.

    A coefficient for every slice, turned into query (key) space, rotated back to the axes of the
    token if positions are rotary, and through the query (key) weights into the residual stream.
    """
    published = settings.weighting == "published"
    forms, basis = qk_forms(model), slicing_basis(model, settings)
    # on a slice of a support the signs of the two sides agree
    root, sides = model.divisor[pairs.layer, None].sqrt(), []
    for other, maps, factor, token in (
        (coords.src, basis.dest, forms.A, pairs.dest),
        (coords.dest, basis.src, forms.B, pairs.src),
    ):
        coefficient = chosen * (other.sign() * root if published else other)
        y = by_head(coefficient, maps.mT, pairs)
        if model.rotary:
            y = unrotate(y, *rotation(model, token))
        sides.append(by_head(y, factor.mT, pairs))
    return torch.stack(sides, dim=1)


def receiving(pairs: Pairs) -> Int[Tensor, "pair side"]:
    """The token at which either side receives: destination, then source."""
    return torch.stack([pairs.dest, pairs.src], dim=1)


def _scale(run: Run, pairs: Pairs) -> Float[Tensor, "pair side"]:
    return run.scale[pairs.layer[:, None], pairs.prompt[:, None], receiving(pairs)].double()


def _values(
    run: Run, pairs: Pairs, read: Float[Tensor, "pair side d1"]
) -> Float[Tensor, "pair side component"]:
    """x_c(t)·w / s_t of every component of the residual stream, and last w's entry for the bias."""
    length, components = run.outputs.shape[1:3]
    w = read[..., :-1].flatten(0, 1).to(run.outputs.dtype)
    place = (pairs.prompt[:, None] * length + receiving(pairs)).flatten()
    values = grouped_matmul(w, run.outputs.flatten(0, 1).mT, place)
    values = values.double().view(len(pairs), 2, components) / _scale(run, pairs)[..., None]
    return torch.cat([values, read[..., -1:]], dim=-1)


def _counted(model: Model, pairs: Pairs, weighting: str) -> Bool[Tensor, "pair component"]:
    """Which components are upstream of each pair's head, and counted by the weighting."""
    layer = torch.tensor(model.components["layer"].tolist(), device=pairs.layer.device)
    upstream = layer < pairs.layer[:, None]
    if weighting == "exact":
        return upstream
    return upstream & model.is_head


def by_source(
    run: Run, pairs: Pairs, settings: Settings = Settings()
) -> Float[Tensor, "pair side layer head source"]:
    """Contributions of heads, split by the source token whose value they moved (exact).

    A_tj (v_j W_O)·w / s_t for every head and j ≤ t: over j it sums to the head's contribution.
    """
    coords = coordinates(run, pairs, slicing_basis(run.model, settings))
    chosen = support(coords.slices, settings.fraction)
    read = reading_vectors(run.model, pairs, coords, chosen, settings)
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
