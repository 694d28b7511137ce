"""Chapter 3: firings, slices of a score, supports, and how sparse they are.

The score of a pair of tokens is a sum of r slices, a_ij = Σ_k p_k with
p_k = σ_k (x̃_i·u_k)(v_k·x̃_j) / √r. Pairs are batched: every array starts with the pair.
"""

from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_signals.core.matmul import grouped_matmul
from sparse_signals.core.model import Model, once_per_model
from sparse_signals.core.rotary import rotate, rotation, unrotate
from sparse_signals.core.run import Run
from sparse_signals.core.stats import participation_ratio
from sparse_signals.heads.svd import HeadSVD, head_svd, qk_forms
from sparse_signals.signals.firings import Pairs


@dataclass(frozen=True)
class Coordinates:
    """The two sides of every slice: slice k of a pair is `dest[k] · src[k]`.

    In the SVD basis dest = x̃_iᵀU √(σ/√r) and src = x̃_jᵀV √(σ/√r). Sharing √σ between the sides
    makes any rotation of both another exact slicing of the same score.
    """

    dest: Float[Tensor, "pair r"]
    src: Float[Tensor, "pair r"]

    @property
    def slices(self) -> Float[Tensor, "pair r"]:
        """The slices of every pair, whose sum is its score."""
        return self.dest * self.src


@dataclass(frozen=True)
class Basis:
    """A basis of every head: q @ dest and k @ src are the two sides of its slices.

    Any orthogonal matrix applied to both gives another exact slicing of the same scores.
    """

    dest: Float[Tensor, "layer head r r"]
    src: Float[Tensor, "layer head r r"]

    def turned(self, rotation: Float[Tensor, "r r"]) -> "Basis":
        """The basis after a rotation, the same one in every head."""
        rotation = rotation.to(self.dest)
        return Basis(self.dest @ rotation, self.src @ rotation)


def singular_basis(svd: HeadSVD) -> Basis:
    """The SVD basis: q @ dest = x̃ᵀU √(σ/√r) and k @ src = x̃ᵀV √(σ/√r)."""
    root = (svd.S / svd.divisor[:, None, None]).sqrt().unsqueeze(-2)
    return Basis(svd.dest_map * root, svd.src_map * root)


@once_per_model
def model_basis(model: Model) -> Basis:
    """The SVD basis of every head of a model."""
    return singular_basis(head_svd(model))


def slices(run: Run, pairs: Pairs, basis: Basis | None = None) -> Float[Tensor, "pair r"]:
    """p_k = σ_k (x̃_i·u_k)(v_k·x̃_j) / √r of every pair, in float64: they sum to its score.

    In softmax units; in the SVD basis of the head, or in another one.
    Source: Franco and Crovella 2024, section 3.

    >>> parts = slices(run, firings)
    >>> parts.shape == (len(firings), model.d_head)
    True
    >>> bool((parts.sum(-1) - firings.score).abs().max() < 1e-5)
    True
    """
    return coordinates(run, pairs, basis).slices


def coordinates(
    run: Run, pairs: Pairs, basis: Basis | None = None, relative: bool = False
) -> Coordinates:
    """Slice coordinates of every pair in the SVD basis of its head (or another), in float64.

    With `relative` the key is measured from the mean of the other visible keys, k_j − mean k_j',
    so the slices sum to the relative score a_ij − mean_j' a_ij', which softmax cannot shift.
    Source: Franco and Crovella 2024, section 3; 2025 for relative attention.
    """
    basis = basis or model_basis(run.model)
    k = (_relative_keys if relative else _keys)(run, pairs)
    q = _queries(run, pairs)
    return Coordinates(by_head(q, basis.dest, pairs), by_head(k, basis.src, pairs))


def head_coordinates(run: Run, pairs: Pairs) -> Coordinates:
    """The head's own (rotary) coordinates: slice k is q_k k_k / √r."""
    root = run.model.divisor[pairs.layer, None].sqrt()
    return Coordinates(_queries(run, pairs) / root, _keys(run, pairs) / root)


def planes_together(coords: Coordinates, width: int) -> Coordinates:
    """A head's own coordinates in another order: n beside n + width/2, which turn together.

    The first `width` coordinates turn; the others, if any, stay where they are. The sum of two
    such slices is what a rotary plane adds to the score. Turning q and k alike within a plane
    changes neither that sum nor anything else that the model does.
    """
    place = torch.arange(coords.dest.shape[-1])
    order = torch.cat([place[:width].unflatten(0, (2, -1)).T.flatten(), place[width:]])
    return Coordinates(coords.dest[:, order], coords.src[:, order])


def offset_coordinates(run: Run, pairs: Pairs, relative: bool = False) -> Coordinates:
    """Slice coordinates in the SVD of the form that a pair of tokens meets at its distance.

    With rotary positions q_i·k_j = x̃_iᵀ A R_{i−j} Bᵀ x̃_j, where R turns queries by the distance
    (row vectors): each head and distance has an SVD of its own, and moving the two tokens together
    changes no slice. With learned positions R = 1. `relative`: as for `coordinates`.
    Angles are rounded by the model, so the slices sum to the score to about 1e-6.
    """
    model = run.model
    if not model.rotary:
        return coordinates(run, pairs, relative=relative)
    forms = qk_forms(model)
    places = torch.stack([pairs.layer, pairs.head, pairs.dest - pairs.src], dim=1)
    (layer, head, distance), group = _distinct_rows(places)
    RA, RB = (torch.linalg.qr(M[layer, head], mode="r").R for M in (forms.A, forms.B))
    RA = rotate(RA, *(x[:, None] for x in rotation(model, distance)))
    U, S, Vh = torch.linalg.svd(RA @ RB.mT)
    weight = (S * model.divisor[layer, None]).rsqrt().unsqueeze(-2)
    back = rotation(model, pairs.src)
    k = (_relative_keys if relative else _keys)(run, pairs)
    q, k = (unrotate(x, *back) for x in (_queries(run, pairs), k))
    sides = ((q, RB.mT @ Vh.mT * weight), (k, RA.mT @ U * weight))
    return Coordinates(*(grouped_matmul(x, maps, group) for x, maps in sides))


def _distinct_rows(
    rows: Int[Tensor, "row n"],
) -> tuple[tuple[Int[Tensor, "distinct"], ...], Int[Tensor, "row"]]:
    """The columns of the distinct rows, and which of these every row is."""
    found, which = rows.unique(dim=0, return_inverse=True)
    return found.unbind(1), which


def _queries(run: Run, pairs: Pairs) -> Float[Tensor, "pair r"]:
    return run.q[pairs.layer, pairs.prompt, pairs.head, pairs.dest].double()


def _keys(run: Run, pairs: Pairs) -> Float[Tensor, "pair r"]:
    return run.k[pairs.layer, pairs.prompt, pairs.head, pairs.src].double()


def _relative_keys(run: Run, pairs: Pairs) -> Float[Tensor, "pair r"]:
    seen = run.k.double().cumsum(dim=-2)
    total = seen[pairs.layer, pairs.prompt, pairs.head, pairs.dest]
    key = _keys(run, pairs)
    return key - (total - key) / pairs.dest.clamp_min(1)[:, None]


def by_head(
    x: Float[Tensor, "pair n"], maps: Float[Tensor, "layer head n m"], pairs: Pairs
) -> Float[Tensor, "pair m"]:
    """Every row times the map of its head."""
    head = pairs.layer * maps.shape[1] + pairs.head
    return grouped_matmul(x, maps.to(x.device).flatten(0, 1), head)


def support(
    slices: Float[Tensor, "pair r"], fraction: float | None = 1.0
) -> Bool[Tensor, "pair r"]:
    """The slices that make a head fire: the smallest set of largest ones exceeding f·a_ij.

    Slices are sorted in descending order (equal ones keep their order) and taken until their sum
    exceeds f·Σp; negative slices are outvoted, never chosen. If nothing is negative, all positive
    slices are taken. For a negative score the mirror image. Sums that differ by rounding count
    as equal. With f None, every slice. Source: Franco and Crovella 2024, section 4.

    >>> import torch
    >>> support(torch.tensor([[5.0, 3.0, -1.0, -2.0]])).tolist()  # 5 does not exceed 5, 5 + 3 does
    [[True, True, False, False]]
    """
    if fraction is None:
        return torch.ones_like(slices, dtype=torch.bool)
    total = slices.sum(-1, keepdim=True)
    upright = torch.where(total < 0, -slices, slices)
    ordered, order = upright.sort(dim=-1, descending=True, stable=True)
    rounding = 1e-12 * slices.abs().sum(-1, keepdim=True)
    before = ordered.cumsum(-1) - ordered
    wanted = (before <= fraction * total.abs() + rounding) & (ordered > 0)
    return torch.zeros_like(wanted).scatter(-1, order, wanted)


def sparsity(slices: Float[Tensor, "pair r"], fraction: float | None = 1.0) -> pd.DataFrame:
    """How few slices carry each score. One row per pair:

    * support: size of the published support (cancellation shrinks it);
    * participation: (Σ|p|)² / Σp²;
    * ninety: how many of the largest |p| hold 90 % of Σ|p|;
    * settled: after how many of the largest |p| the partial sum stays within 10 % of the score;
    * cancellation: Σ|p| / |Σp|, 1 where all slices agree.

    >>> import torch
    >>> sparsity(torch.tensor([[4.0, 3.0, 2.0, 1.0]]).double()).round(2).iloc[0].to_dict()
    {'support': 4.0, 'participation': 3.33, 'ninety': 3.0, 'settled': 3.0, 'cancellation': 1.0}
    """
    total = slices.sum(-1, keepdim=True)
    size, order = slices.abs().sort(dim=-1, descending=True, stable=True)
    held = size.cumsum(-1) / size.sum(-1, keepdim=True)
    partial = slices.gather(-1, order).cumsum(-1)
    off = (partial - total).abs() > 0.1 * total.abs()
    steps = torch.arange(1, slices.shape[-1] + 1, device=slices.device)
    columns = {
        "support": support(slices, fraction).sum(-1),
        "participation": participation_ratio(slices),
        "ninety": (held < 0.9 - 1e-12).sum(-1) + 1,
        "settled": (off * steps).amax(-1) + 1,
        "cancellation": size.sum(-1) / total.squeeze(-1).abs(),
    }
    return pd.DataFrame({name: values.cpu().numpy() for name, values in columns.items()})


def slice_table(slices: Float[Tensor, "pair r"]) -> pd.DataFrame:
    """One row per slice of every pair, largest first: n (pair), k, p, rank, running total, chosen.

    `score` is the sum of the slices of the pair.
    """
    values, order = slices.sort(dim=-1, descending=True, stable=True)
    pairs, rank = values.shape
    columns = {
        "n": torch.arange(pairs).repeat_interleave(rank),
        "k": order.flatten(),
        "p": values.flatten(),
        "rank": torch.arange(1, rank + 1).repeat(pairs),
        "total": values.cumsum(-1).flatten(),
        "chosen": support(slices).gather(-1, order).flatten(),
        "score": slices.sum(-1).repeat_interleave(rank),
    }
    return pd.DataFrame({name: values.cpu().numpy() for name, values in columns.items()})
