"""Chapter 4: the firings that a trace starts from, given or found by what they write."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparse_signals.contributions import Contributions, Settings, Weights, contrast
from sparse_signals.models import Model
from sparse_signals.prompts import Batch, PromptError
from sparse_signals.residual import Run
from sparse_signals.signals import Pairs, pairs_at


class TraceError(ValueError):
    """A trace that cannot start, and why, in one line."""


@dataclass(frozen=True)
class Root:
    """Firings that a trace starts from: a head, its destination and its source (None: any).

    Places are roles ("end", "IO", …) or positions. "end" is the last token, named or not. With
    `against`, another source, these firings are opened by the difference of the two scores.
    """

    layer: int
    head: int
    dest: str | int = "end"
    src: str | int | None = None
    against: str | int | None = None

    def __str__(self) -> str:
        places = [place for place in (self.dest, self.src, self.against) if place is not None]
        return ":".join([f"{self.layer}.{self.head}", *map(str, places)])


def place(batch: Batch, where: str | int) -> Int[Tensor, "prompt"]:
    """The position of a role, or a fixed position, in every prompt."""
    if isinstance(where, int):
        return torch.full((len(batch.tokens),), where)
    if where == "end":
        return batch.mask.sum(1) - 1
    if where not in batch.roles:
        known = ", ".join(batch.roles) or "end alone, since IO and S are not known"
        raise PromptError(f"no role {where!r} in these prompts: they have {known}")
    return batch.roles[where]


def matches(batch: Batch, pairs: Pairs, root: Root) -> Bool[Tensor, "pair"]:
    """Which firings a root names."""
    device = pairs.layer.device
    match = (pairs.layer == root.layer) & (pairs.head == root.head)
    match &= pairs.dest == place(batch, root.dest).to(device)[pairs.prompt]
    if root.src is not None:
        match &= pairs.src == place(batch, root.src).to(device)[pairs.prompt]
    return match


def pairs_named(run: Run, batch: Batch, root: Root) -> Pairs:
    """The pair that a root with a source names, in every prompt, whether it fires or not."""
    number = torch.arange(len(batch.tokens))
    layer, head = (torch.full_like(number, x) for x in (root.layer, root.head))
    places = (layer, number, head, place(batch, root.dest), place(batch, root.src))
    return pairs_at(run.attention, *(x.to(run.tokens.device) for x in places))


def open_contrasts(
    weights: Weights,
    run: Run,
    batch: Batch,
    pairs: Pairs,
    parts: Contributions,
    roots: Sequence[Root],
    settings: Settings,
) -> Contributions:
    """The contributions, with the firings of roots that have an `against` opened by contrast."""
    values, total, chosen = parts.values.clone(), parts.total.clone(), parts.support.clone()
    for root in roots:
        if root.against is None:
            continue
        rows = matches(batch, pairs, root).nonzero().flatten()
        ours = pairs[rows]
        src = place(batch, root.against).to(rows.device)[ours.prompt]
        other = pairs_at(run.attention, ours.layer, ours.prompt, ours.head, ours.dest, src)
        found = contrast(weights, run, ours, other, settings)
        values[rows], total[rows], chosen[rows] = found.values, found.total, found.support
    return Contributions(values, total, chosen)


def check_heads(model: Model, roots: Sequence[Root]) -> None:
    """Raise TraceError for no root at all, and for one that is no head of the model."""
    if not roots:
        raise TraceError("a trace needs at least one root")
    for root in roots:
        if not (0 <= root.layer < model.n_layers and 0 <= root.head < model.n_heads):
            raise TraceError(
                f"root {root} is no head of {model.name}, which has {model.n_layers} layers "
                f"of {model.n_heads} heads, counted from 0.0"
            )
