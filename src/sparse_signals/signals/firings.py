"""Chapter 3: the pairs of tokens in which a head fires, and pairs to compare them with."""

from dataclasses import dataclass, fields

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_signals.core.model import head_name
from sparse_signals.core.run import Run


@dataclass(frozen=True)
class Pairs:
    """Pairs of tokens (destination, source), each in one head on one prompt."""

    layer: Int[Tensor, "pair"]
    prompt: Int[Tensor, "pair"]
    head: Int[Tensor, "pair"]
    dest: Int[Tensor, "pair"]
    src: Int[Tensor, "pair"]
    attention: Float[Tensor, "pair"]
    score: Float[Tensor, "pair"]

    def __len__(self) -> int:
        return len(self.score)

    def __getitem__(self, keep: Bool[Tensor, "pair"] | Int[Tensor, "kept"] | slice) -> "Pairs":
        return Pairs(*(getattr(self, field.name)[keep] for field in fields(self)))

    def table(self) -> pd.DataFrame:
        """One row per pair, with the columns above and the head's name ("9.9")."""
        columns = {f.name: getattr(self, f.name).cpu().numpy() for f in fields(self)}
        table = pd.DataFrame(columns)
        return table.assign(name=head_name(table["layer"], table["head"]))


def find_firings(run: Run, level: float | None = 0.5, context: bool = False) -> Pairs:
    """All pairs in which a head fires: A_ij ≥ level, a_ij ≥ 0 and j ≥ 1.

    The first token is left out because it is the attention sink. With `context` the bar falls
    with the number of visible tokens, A_ij ≥ level / (i + 1), and level is a multiple of uniform
    attention. With level None the row sets its own bar, A_ij ≥ Σ_j' A_ij'²: the attention of the
    average token that is attended to, or 1 / the participation ratio of the row, so that a row
    which attends to n tokens alike fires at all of them, and where it rests at the first token at
    none. Source: Franco and Crovella 2024, section 4 (level 0.5); 2025 for the context rule.

    >>> firings = find_firings(run)
    >>> bool((firings.attention >= 0.5).all()), bool((firings.src >= 1).all())
    (True, True)
    >>> list(firings.table().columns)
    ['layer', 'prompt', 'head', 'dest', 'src', 'attention', 'score', 'name']
    """
    if level is None:
        bar = run.pattern.square().sum(-1, keepdim=True)
    else:
        dest = torch.arange(run.pattern.shape[-1], device=run.pattern.device)[:, None]
        bar = level / (dest + 1) if context else torch.full_like(dest, level, dtype=torch.float64)
    fires = run.pattern >= bar
    pairs = _pairs(run, fires & _visible(run))
    return pairs[pairs.score >= 0]


def sample_silent(run: Run, like: Pairs, level: float = 0.5, seed: int = 0) -> Pairs:
    """As many pairs that do not fire as `like` has, in the same proportion per head (j ≥ 1)."""
    layers, _, heads = run.pattern.shape[:3]
    silent = (_visible(run) & (run.pattern < level)).movedim(2, 1)
    noise = torch.rand(silent.shape, generator=torch.Generator().manual_seed(seed))
    noise = noise.to(silent.device).masked_fill(~silent, -1).flatten(2)
    wanted = torch.zeros(layers, heads, dtype=torch.long, device=silent.device)
    wanted.index_put_((like.layer, like.head), torch.ones_like(like.layer), accumulate=True)
    rank = noise.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    taken = (rank < wanted[..., None]) & (noise >= 0)
    return _pairs(run, taken.view_as(silent).movedim(1, 2))


def _visible(run: Run) -> Bool[Tensor, "prompt #head dest src"]:
    """Source at or before destination, not the first token, both real tokens."""
    pos = torch.arange(run.pattern.shape[-1], device=run.pattern.device)
    causal = (pos[None, :] <= pos[:, None]) & (pos[None, :] >= 1)
    return (causal & run.mask[:, :, None] & run.mask[:, None, :])[:, None]


def strongest_sources(run: Run) -> Pairs:
    """For every head and destination i ≥ 1, the pair with the largest attention weight, j ≥ 1."""
    visible = _visible(run)
    best = run.pattern.masked_fill(~visible, -1).argmax(-1, keepdim=True)
    source = torch.arange(run.pattern.shape[-1], device=best.device)
    return _pairs(run, (source == best) & visible)


def _pairs(run: Run, chosen: Bool[Tensor, "layer prompt head dest src"]) -> Pairs:
    return pairs_at(run, *chosen.nonzero(as_tuple=True))


def pairs_at(
    run: Run,
    layer: Int[Tensor, "pair"],
    prompt: Int[Tensor, "pair"],
    head: Int[Tensor, "pair"],
    dest: Int[Tensor, "pair"],
    src: Int[Tensor, "pair"],
) -> Pairs:
    """The pairs at given places, with their attention weights and scores (float64)."""
    q = run.q[layer, prompt, head, dest].double()
    k = run.k[layer, prompt, head, src].double()
    score = (q * k).sum(-1) / run.model.divisor[layer]
    weight = run.pattern[layer, prompt, head, dest, src].double()
    return Pairs(layer, prompt, head, dest, src, weight, score)
