"""Chapter 4: the firings that a trace starts from, given or found by what they write."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_signals.core.model import Model, head_name
from sparse_signals.core.objective import Objective
from sparse_signals.core.prompts import Batch, PromptError
from sparse_signals.core.run import Outputs, Run, runs
from sparse_signals.signals.firings import Pairs, find_firings, pairs_at
from sparse_signals.tracing.contributions import Contributions, Settings, contrast


class TraceError(ValueError):
    """A trace that cannot start, and why, in one line."""


class TraceWarning(UserWarning):
    """A trace from fewer roots than were asked for."""


@dataclass(frozen=True)
class Root:
    """Firings that a trace starts from: a head, its destination and its source (None: any).

    Places are roles ("end", "IO", "S2-1", …) or positions. "end" is the last token, named or not.
    With `against`, another source, these firings are opened by the difference of the two scores,
    where it is positive. `prompts` says on which prompts it is a root (None: on all).

    >>> str(Root(9, 9)), str(Root(9, 6, "end", "IO", "S1")), str(Root(9, 9, prompts=(0, 3)))
    ('9.9:end', '9.6:end:IO:S1', '9.9:end on 2 prompts')
    """

    layer: int
    head: int
    dest: str | int = "end"
    src: str | int | None = None
    against: str | int | None = None
    prompts: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """layer.head."""
        return head_name(self.layer, self.head)

    def __str__(self) -> str:
        places = [place for place in (self.dest, self.src, self.against) if place is not None]
        name = ":".join([self.name, *map(str, places)])
        if self.prompts is None:
            return name
        return f"{name} on {len(self.prompts)} prompt{'s' if len(self.prompts) > 1 else ''}"

    def within(self, rows: range) -> "Root":
        """The same root for a piece of the prompts, counted from its first one."""
        if self.prompts is None:
            return self
        return replace(self, prompts=tuple(n - rows.start for n in self.prompts if n in rows))


def position_of(batch: Batch, where: str | int) -> Int[Tensor, "prompt"]:
    """The position of a role, of a neighbour of one, or a fixed position, in every prompt."""
    prompts, length = batch.tokens.shape
    if isinstance(where, int):
        if not 0 <= where < length:
            raise PromptError(f"no position {where}: the longest prompt has {length} tokens")
        return torch.full((prompts,), where)
    roles = batch.roles | {"end": batch.last}
    role, step = where, 0
    if where not in roles and (found := re.fullmatch(r"(.+)([+-]\d{1,9})", where)):
        role, step = found[1], int(found[2])
    if role not in roles:
        known = ", ".join(roles) if batch.roles else "end alone, since IO and S are not known"
        raise PromptError(f"no role {where!r} in these prompts: they have {known}")
    return (roles[role] + step).clamp(0, length - 1)


def matches(batch: Batch, pairs: Pairs, root: Root) -> Bool[Tensor, "pair"]:
    """Which firings a root names."""
    device = pairs.layer.device
    match = (pairs.layer == root.layer) & (pairs.head == root.head)
    match &= pairs.dest == position_of(batch, root.dest).to(device)[pairs.prompt]
    if root.src is not None:
        match &= pairs.src == position_of(batch, root.src).to(device)[pairs.prompt]
    if root.prompts is not None:
        match &= torch.isin(pairs.prompt, torch.tensor(root.prompts, device=device))
    return match


def pairs_named(run: Run, root: Root) -> Pairs:
    """The pair that a root with a source names, in every prompt, whether it fires or not.

    Raises ValueError for a root without a source.
    """
    if root.src is None:
        raise ValueError(f"root {root} names no source: give its src")
    number = torch.arange(len(run))
    layer, head = (torch.full_like(number, x) for x in (root.layer, root.head))
    dest, src = (position_of(run.batch, where) for where in (root.dest, root.src))
    places = (layer, number, head, dest, src)
    return pairs_at(run, *(x.to(run.tokens.device) for x in places))


def starts(run: Run, pairs: Pairs, roots: Sequence[Root]) -> Int[Tensor, "pair"]:
    """How many of the roots each firing starts a trace for."""
    count = torch.zeros_like(pairs.layer)
    for root in roots:
        match = matches(run.batch, pairs, root)
        if root.against is not None:
            other = _other_source(run, pairs, root.against)
            match &= (other.src <= pairs.dest) & (pairs.score > other.score)
        count += match
    return count


def open_contrasts(
    run: Run,
    pairs: Pairs,
    parts: Contributions,
    roots: Sequence[Root],
    settings: Settings,
    outputs: Outputs | None = None,
) -> Contributions:
    """The contributions, with the firings of roots that have an `against` opened by contrast."""
    opened = Contributions(*(value.clone() for value in vars(parts).values()))
    for root in roots:
        if root.against is None:
            continue
        rows = matches(run.batch, pairs, root).nonzero().flatten()
        ours = pairs[rows]
        found = contrast(run, ours, _other_source(run, ours, root.against), settings, outputs)
        for name, value in vars(opened).items():
            value[rows] = getattr(found, name)
    return opened


def _other_source(run: Run, pairs: Pairs, against: str | int) -> Pairs:
    src = position_of(run.batch, against).to(pairs.src.device)[pairs.prompt]
    return pairs_at(run, pairs.layer, pairs.prompt, pairs.head, pairs.dest, src)


def check_roots(model: Model, roots: Sequence[Root], settings: Settings) -> None:
    """Raise TraceError for no root, one that is no head of the model, and a useless contrast."""
    if not roots:
        raise TraceError("a trace needs at least one root")
    for root in roots:
        if root.against is not None and settings.weighting != "exact":
            raise TraceError(f"root {root} is a contrast, which only the exact weighting can open")
        if root.against is not None and root.against == root.src:
            raise TraceError(f"root {root} compares a source with itself")
    for root in roots:
        if not (0 <= root.layer < model.n_layers and 0 <= root.head < model.n_heads):
            raise TraceError(
                f"root {root} is no head of {model.name}, which has {model.n_layers} layers "
                f"of {model.n_heads} heads, counted from 0.0"
            )


def logit_attribution(
    run: Run, objective: Objective | None = None
) -> tuple[Float[Tensor, "prompt component"], Float[Tensor, "prompt"]]:
    """What every component writes itself into logit(IO) − logit(S) at the last token.

    x_c·w / s with w the difference of two unembedding columns times the final gain (centred for
    LayerNorm) and s the scale of the final normalisation. The last column is the share of biases,
    so that rows sum to the logit difference, which is returned too. With an `objective`, w is the
    sum of its columns times their weights (without the logarithm). Source: Wang et al. 2023.
    Raises PromptError where no objective is given and the prompts have no names.
    """
    asked = (Objective.of_names(run.batch) if objective is None else objective).to(run.q)
    norm, unembed = run.model.bridge.ln_final, run.model.bridge.unembed
    columns = torch.einsum("pk,pkd->dp", asked.weights, unembed.W_U.T[asked.tokens])
    w = (norm.w[:, None] * columns).T
    constant = torch.linalg.vecdot(asked.weights, unembed.b_U[asked.tokens])
    if not run.model.rms:
        w = w - w.mean(-1, keepdim=True)
        constant = constant + norm.b @ columns
    last = run.batch.last.to(w.device)
    written, slot = Outputs(run).at(torch.arange(len(last), device=last.device), last, len(run.q))
    at_end = written[slot]
    x = at_end.sum(1)
    x = x if run.model.rms else x - x.mean(-1, keepdim=True)
    scale = (x.square().mean(-1) + run.model.bridge.cfg.eps).sqrt()
    shares = torch.einsum("pcd,pd->pc", at_end, w) / scale[:, None]
    shares = torch.cat([shares, constant[:, None]], dim=1)
    return shares, shares.sum(1)


def strongest_roots(
    model: Model,
    batch: Batch,
    n: int = 3,
    settings: Settings = Settings(),
    *,
    each: bool = False,
) -> list[Root]:
    """The n heads that write most of logit(IO) − logit(S) themselves, of those that fire from end.

    The same heads for all prompts, by the mean over prompts; or, with `each`, those of each prompt,
    of the ones that fire in it and write for the answer: fewer than n, or none, where fewer do.
    Raises PromptError where the prompts have no names, TraceError where no head fires from end.
    """
    written, fires = [], []
    for _, part in runs(model, batch):
        shares = logit_attribution(part)[0][:, model.is_head]
        pairs = find_firings(part, settings.level, settings.context)
        at_end = pairs[pairs.dest == part.batch.last.to(pairs.dest.device)[pairs.prompt]]
        firing = torch.zeros_like(shares, dtype=torch.bool)
        firing[at_end.prompt, at_end.layer * model.n_heads + at_end.head] = True
        written.append(shares)
        fires.append(firing)
    shares, firing = torch.cat(written).double(), torch.cat(fires)
    if not firing.any():
        raise TraceError("no head fires from the last token of any prompt: lower the level")
    if not each:
        per_head = shares.sum(0).masked_fill(~firing.any(0), -torch.inf)
        best = per_head.argsort(descending=True, stable=True)[: min(n, int(firing.any(0).sum()))]
        return [Root(*divmod(head, model.n_heads)) for head in best.tolist()]
    own = shares.masked_fill(~firing, -torch.inf)
    best = own.argsort(dim=1, descending=True, stable=True)[:, :n]
    chosen = torch.zeros_like(firing).scatter(1, best, own.gather(1, best) > 0)
    if not chosen.any():
        raise TraceError("no head that fires from the last token writes for the answer")
    head, prompt = (places.cpu().numpy() for places in chosen.T.nonzero(as_tuple=True))
    groups = pd.Series(prompt).groupby(head).agg(tuple)  # commonest heads first
    groups = groups.iloc[groups.map(len).argsort(kind="stable")[::-1]]
    return [
        Root(*divmod(int(head), model.n_heads), prompts=tuple(map(int, prompts)))
        for head, prompts in zip(groups.index, groups, strict=True)
    ]
