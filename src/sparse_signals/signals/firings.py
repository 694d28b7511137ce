"""Chapter 3: the pairs of tokens in which a head fires, and pairs to compare them with."""

from dataclasses import dataclass, fields

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_signals.core.model import head_name
from sparse_signals.core.prompts import Batch, PromptError
from sparse_signals.core.run import Run
from sparse_signals.heads.protagonist import template_of
from sparse_signals.heads.scores import scores

TASK_PAIRS = (("end", "IO"), ("end", "S2"), ("S2", "S1"), ("S2", "S1+1"), ("S1+1", "S1"))
ITSELF, ELSEWHERE = "a token to itself", "other tokens"


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


def roles_joined(pairs: Pairs, batch: Batch) -> np.ndarray:
    """What each pair joins: roles of the task ("end → IO", `TASK_PAIRS`), `ITSELF`, `ELSEWHERE`.

    The five pairs of roles are those of the heads in Wang et al. 2023: name movers, S-inhibition,
    duplicate-token, induction and previous-token heads. Raises PromptError without such roles.
    """
    if missing := {role for pair in TASK_PAIRS for role in pair} - set(batch.roles):
        raise PromptError(f"the prompts have no role {missing.pop()}: use ioi_prompts")
    dest, src, prompt = (x.cpu() for x in (pairs.dest, pairs.src, pairs.prompt))
    kinds = {
        f"{one} → {other}": (dest == batch.roles[one][prompt]) & (src == batch.roles[other][prompt])
        for one, other in TASK_PAIRS
    }
    return np.select(
        [*(here.numpy() for here in kinds.values()), (dest == src).numpy()],
        [*kinds, ITSELF],
        ELSEWHERE,
    )


def silent_partners(
    run: Run,
    firings: Pairs,
    level: float = 0.5,
    within: float = 0.25,
    relative: bool = False,
) -> tuple[Int[Tensor, "matched"], Pairs]:
    """A pair for each firing that scores the same and does not fire: A_ij < level, 1 ≤ j < i.

    The partner is in the same head, in a prompt of the same template, and of all such pairs its
    score is nearest. Firings without one `within` so many softmax units are left out: returns which
    have one, and the partners in the same order. A pair may be the partner of several firings.
    With `relative` scores are measured from the mean of the others in their row.
    """
    length, heads = run.pattern.shape[-1], run.model.n_heads
    earlier = torch.ones(length, length, dtype=torch.bool, device=run.pattern.device).tril(-1)
    used = torch.zeros(run.model.n_layers, heads, dtype=torch.bool, device=run.pattern.device)
    used[firings.layer, firings.head] = True
    silent = (run.pattern < level) & _visible(run) & earlier & used[:, None, :, None, None]
    places = silent.nonzero(as_tuple=True)
    every = _relative(scores(run)) if relative else scores(run)
    score = every[places].double()
    ours = every[firings.layer, firings.prompt, firings.head, firings.dest, firings.src].double()
    template = torch.tensor(template_of(run.batch), device=score.device)

    def group(layer: Tensor, prompt: Tensor, head: Tensor) -> Tensor:
        return (layer * heads + head) * (int(template.max()) + 1) + template[prompt]

    apart = 4 * float(torch.cat([score, ours]).abs().max()) + 1  # between groups
    ordered, order = (group(*places[:3]) * apart + score).sort(stable=True)
    wanted = group(firings.layer, firings.prompt, firings.head) * apart + ours
    above = torch.searchsorted(ordered, wanted).clamp(1, len(ordered) - 1)
    nearer = (ordered[above] - wanted).abs() < (ordered[above - 1] - wanted).abs()
    best = torch.where(nearer, above, above - 1)
    matched = ((ordered[best] - wanted).abs() <= within).nonzero().flatten()
    chosen = order[best[matched]]
    return matched, pairs_at(run, *(place[chosen] for place in places))


def _relative(
    scores: Float[Tensor, "layer prompt head dest src"],
) -> Float[Tensor, "layer prompt head dest src"]:
    """a_ij minus the mean of the other scores of its row, the first token's among them."""
    total = scores.tril().sum(-1, keepdim=True)
    others = torch.arange(scores.shape[-1], device=scores.device).clamp_min(1)[:, None]
    return scores - (total - scores) / others


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
