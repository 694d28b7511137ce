"""Chapter 4: follow signals upstream, from the heads that answer back to the embeddings.

A firing keeps, on either side, the components with the largest contributions: these are its edges.
A kept head that fires itself, with the receiving token as destination, is traced further. Each
firing of a prompt is opened once, however many paths reach it, so a trace is an acyclic graph.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_signals.core.model import Model
from sparse_signals.core.prompts import Batch
from sparse_signals.core.resume import chunked, run_key
from sparse_signals.core.run import Outputs, Run, fitting_rows, run
from sparse_signals.core.stats import DRAWS
from sparse_signals.signals.firings import Pairs, find_firings
from sparse_signals.tracing.answer import score_gradients
from sparse_signals.tracing.circuit import Circuit, Quirks, pool
from sparse_signals.tracing.contributions import (
    SIDES,
    Contributions,
    Settings,
    contributions,
    joined,
    receiving,
)
from sparse_signals.tracing.roots import (
    Root,
    TraceError,
    TraceWarning,
    check_roots,
    open_contrasts,
    position_of,
    starts,
)

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}
SAMPLE = 64  # firings of which the exact sums are checked, where other weights are asked for


@dataclass(frozen=True)
class Trace:
    """Firings that were reached from the roots, the edges into them, and what was traced.

    firings: firing (number), prompt, layer, head, name, dest, src, attention, score, root,
    visits (paths that lead to it from the roots), vectors (the singular pairs in the support) and,
    where edges are kept by exact contributions, error (relative, of their sum).
    edges: firing, prompt, upstream (component), kind (of upstream), downstream (head), layer, head,
    side, dest, src, token (where upstream writes), weight (as `Settings.weighting` says), share (of
    the contributions to its side), visits, up_layer and down_layer (heights in a chart).
    """

    model: Model
    batch: Batch
    roots: tuple[Root, ...]
    settings: Settings
    firings: pd.DataFrame
    edges: pd.DataFrame

    def first(self, prompts: int) -> "Trace":
        """The trace of the first prompts alone."""
        return replace(
            self,
            batch=self.batch.rows(slice(0, prompts)),
            roots=tuple(root.within(range(prompts)) for root in self.roots),
            firings=self.firings[self.firings["prompt"] < prompts],
            edges=self.edges[self.edges["prompt"] < prompts],
        )

    def silent(self) -> list[tuple[Root, list[int]]]:
        """Every root, and its prompts on which it does not fire and nothing is traced from it."""
        found, every = [], range(len(self.batch.tokens))
        for root in self.roots:
            firings = self.firings[self.firings["root"] & (self.firings["name"] == root.name)]
            prompt = torch.tensor(firings["prompt"].tolist(), dtype=torch.long)
            for end, where in (("dest", root.dest), ("src", root.src)):
                if where is not None:
                    at = torch.tensor(firings[end].tolist(), dtype=torch.long)
                    match = at == position_of(self.batch, where)[prompt]
                    firings, prompt = firings[match.numpy()], prompt[match]
            own = every if root.prompts is None else root.prompts
            found.append((root, sorted({*own} - set(prompt.tolist()))))
        return found

    def untraced(self) -> list[int]:
        """The prompts on which no root fires, so that nothing is traced."""
        return sorted({*range(len(self.batch.tokens))} - set(self.firings["prompt"]))

    def pool(self, quirks: Quirks = Quirks(), draws: int = DRAWS, seed: int = 0) -> Circuit:
        """The circuit that all prompts share: `circuit.pool`, and how it was made."""
        given = asdict(self.settings) | {
            "level": self.settings.level or "auto",
            "fraction": self.settings.fraction or "all",
        }
        facts = {
            "model": self.model.name,
            "prompts": str(len(self.batch.tokens)),
            "roots": ", ".join(map(str, self.roots)),
            "settings": ", ".join(
                f"{name} {x}" for name, x in given.items() if x is not None and x is not False
            ),
        }
        return Circuit(pool(self.edges, self.batch, quirks, draws, seed), facts)


def trace(
    run: Run, roots: Sequence[Root], settings: Settings = Settings(), **changes: Any
) -> Trace:
    """Trace every prompt of a run from the given roots, a chunk of prompts at a time.

    `changes` are settings by name: `trace(run, roots, share=0.9)`.
    Raises TraceError for a root that is no head of the model and where no root fires, PromptError
    for a role that the prompts do not have; warns of single roots that never fire.
    Source: Franco and Crovella 2024, section 5; exact shares and contrasts are this book's.

    >>> root = strongest_roots(model, batch, 1)
    >>> traced = trace(run, root, share=0.9)
    >>> bool((traced.firings["error"] < 1e-3).all())  # contributions add up to the score
    True
    >>> bool((traced.edges["weight"] > 0).all()), len(traced.edges) > len(traced.firings)
    (True, True)
    """
    settings = replace(settings, **changes)
    check_roots(run.model, roots, settings)
    pieces = [trace_chunk(part, roots, settings, rows.start) for rows, part in run.chunks()]
    return _joined(run.model, run.batch, roots, settings, pieces)


def trace_prompts(
    model: Model,
    batch: Batch,
    roots: Sequence[Root],
    settings: Settings = Settings(),
    *,
    folder: Path | None = None,
    progress: bool = False,
) -> Trace:
    """`trace` for any number of prompts: the model runs on a chunk of them at a time.

    With a folder, finished chunks are kept there, and a run that was cut off goes on after them.
    """
    check_roots(model, roots, settings)
    chunks = fitting_rows(model, batch)
    if folder:
        folder = folder / run_key(model, batch, (settings, tuple(roots), chunks))

    def work(rows: slice) -> dict[str, pd.DataFrame]:
        part = run(model, batch.rows(rows))
        firings, edges = trace_chunk(part, roots, settings, rows.start)
        return {"firings": firings, "edges": edges}

    found = chunked(chunks, work, folder=folder, progress=progress)
    pieces = [(piece["firings"], piece["edges"]) for piece in found]
    return _joined(model, batch, roots, settings, pieces)


def trace_chunk(
    run: Run, roots: Sequence[Root], settings: Settings, first_prompt: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Firings and edges of a run whose outputs fit in memory; prompts count from `first_prompt`."""
    check_attention(run)
    roots = [root.within(range(first_prompt, first_prompt + len(run))) for root in roots]
    pairs, outputs = find_firings(run, settings.level, settings.context), Outputs(run)
    plain = replace(settings, weighting="exact", bias_per_head=False)
    contrasts = any(root.against is not None for root in roots)

    def opened(rows: Int[Tensor, "row"]) -> Contributions:
        parts = contributions(run, pairs[rows], settings, outputs)
        if contrasts:
            parts = open_contrasts(run, pairs[rows], parts, roots, settings, outputs)
        few = rows[:SAMPLE]
        exact = parts if plain == settings else contributions(run, pairs[few], plain, outputs)
        check_sums(run.model, exact.discrepancy(), "contributions")
        return parts

    firings, edges = follow(run, pairs, opened, starts(run, pairs, roots), settings, first_prompt)
    if settings.weighting == "answer":
        heard = score_gradients(run.model, run.batch).cpu().numpy()
        place = edges[["layer", "prompt", "head", "dest", "src"]].to_numpy()
        edges["weight"] *= heard[tuple((place - [0, first_prompt, 0, 0, 0]).T)]
    return firings, edges


def check_attention(run: Run) -> None:
    """Raise TraceError where attention is not softmax(q·k / divisor), which all else stands on."""
    worst = []
    for q, k, divisor, pattern in zip(run.q, run.k, run.model.divisor, run.pattern, strict=True):
        scores = (q @ k.mT).div_(divisor.to(q.dtype))
        future = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
        weights = scores.masked_fill_(future, -torch.inf).softmax(-1)
        worst.append(weights.sub_(pattern).abs_().max())
    check_sums(run.model, torch.stack(worst), "attention weights")


def check_sums(model: Model, error: Float[Tensor, "sum"], what: str) -> None:
    """Raise TraceError where sums miss what they must give by more than rounding explains."""
    worst = float(error.max()) if len(error) else 0.0
    if not worst <= TOLERANCE[model.dtype]:  # NaN is no small error
        raise TraceError(
            f"the {what} of {model.name} do not add up (worst error {worst:.1e}, relative): "
            "its attention is not what this package computes, and no result can be trusted"
        )


def follow(
    run: Run,
    pairs: Pairs,
    opened: Callable[[Int[Tensor, "row"]], Contributions],
    start: Int[Tensor, "pair"],
    settings: Settings,
    first_prompt: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The graph that is reached from the firings where `start` (how many roots) is not zero.

    One pass over the layers, from the top: `opened` gives the contributions to the firings of a
    layer that were reached, by their rows. A path goes from a firing to a kept head at the
    receiving token, and to every firing of that head whose destination is this token; `visits`
    counts the paths.
    """
    model, visits = run.model, start.clone()
    prompts, length = run.tokens.shape
    calls = visits.new_zeros(prompts, model.n_layers, model.n_heads, length)
    layers = []
    for layer in reversed(range(model.n_layers)):
        here = (pairs.layer == layer).nonzero().flatten()
        visits[here] += calls[pairs.prompt[here], layer, pairs.head[here], pairs.dest[here]]
        here = here[visits[here] > 0]
        parts = opened(here)
        kept = kept_components(parts, settings)
        layers.append((here, parts, kept))
        to_heads = kept[..., model.is_head].unflatten(-1, (model.n_layers, model.n_heads))
        pair, side, up, head = to_heads.nonzero(as_tuple=True)
        token = receiving(pairs[here])[pair, side]
        called = (pairs.prompt[here][pair], up, head, token)
        calls.index_put_(called, visits[here][pair], accumulate=True)
    rows, each, kept = zip(*reversed(layers), strict=True)
    reached, kept, parts = torch.cat(rows), torch.cat(kept), joined(each)
    firings = pairs[reached].table()
    firings["prompt"] += first_prompt
    firings["root"] = start[reached].cpu().numpy() > 0
    firings["visits"] = visits[reached].cpu().numpy()
    if settings.weighting in ("exact", "answer"):
        firings["error"] = parts.error().cpu().numpy()
    firings["vectors"] = pd.Series(index_lists(parts.support), firings.index)
    firings.insert(0, "firing", range(len(firings)))
    return firings, _edges(model, firings, parts.values, kept)


def kept_components(parts: Contributions, settings: Settings) -> Bool[Tensor, "pair side c"]:
    """On each side, the smallest set of largest contributions exceeding a share of their sum."""
    values = parts.values
    ordered, order = values.sort(dim=-1, descending=True, stable=True)
    rounding = 1e-12 * values.abs().sum(-1, keepdim=True)
    enough = ordered.cumsum(-1) > settings.share * values.sum(-1, keepdim=True) + rounding
    wanted = (enough.cumsum(-1) - enough.long() == 0) & (ordered > 0) & parts.sides[..., None]
    return torch.zeros_like(wanted).scatter(-1, order, wanted)


def _edges(
    model: Model,
    firings: pd.DataFrame,
    values: Tensor,
    kept: Bool[Tensor, "pair side c"],
) -> pd.DataFrame:
    firing, side, component = kept.nonzero(as_tuple=True)
    weight = values[firing, side, component]
    share = weight / values.sum(-1)[firing, side]
    firing, side, component = (t.cpu().numpy() for t in (firing, side, component))
    table = model.components
    of = firings.iloc[firing].reset_index(drop=True)
    edges = of[["firing", "prompt", "name", "layer", "head", "dest", "src", "visits"]]
    edges = edges.rename(columns={"name": "downstream"})
    edges.insert(2, "upstream", table["component"].array[component])
    edges.insert(3, "kind", table["kind"].array[component])
    edges.insert(7, "side", pd.array(SIDES, dtype="str")[side])  # pyright: ignore[reportArgumentType]
    edges["token"] = edges["dest"].where(side == 0, edges["src"])
    edges["weight"], edges["share"] = weight.cpu().numpy(), share.cpu().numpy()
    edges["up_layer"] = table["height"].to_numpy()[component]
    return edges.assign(down_layer=edges["layer"].astype(float))


def index_lists(chosen: Bool[Tensor, "pair r"]) -> list[np.ndarray]:
    """The places of the true entries of each row."""
    ends = chosen.sum(1).cumsum(0).cpu().numpy()
    return np.split(chosen.nonzero()[:, 1].cpu().numpy(), ends)[:-1]


def _joined(
    model: Model,
    batch: Batch,
    roots: Sequence[Root],
    settings: Settings,
    pieces: list[tuple[pd.DataFrame, pd.DataFrame]],
) -> Trace:
    """Traces of disjoint prompts as one, with firings numbered through."""
    before, firings, edges = 0, [], []
    for found, into in pieces:
        firings.append(found.assign(firing=found["firing"] + before))
        edges.append(into.assign(firing=into["firing"] + before))
        before += len(found)
    tables = (pd.concat(parts, ignore_index=True) for parts in (firings, edges))
    traced = Trace(model, batch, tuple(roots), settings, *tables)
    every = range(len(batch.tokens))
    silent = [
        str(root)
        for root, missing in traced.silent()
        if len(missing) == len(every if root.prompts is None else root.prompts)
    ]
    if silent:
        bar = "that of the row" if settings.level is None else f"{settings.level:g}"
        message = (
            f"never fires on these prompts (attention of at least {bar}): "
            f"{', '.join(silent)}; choose another root or lower the level"
        )
        if len(silent) == len(roots):
            raise TraceError(message)
        warnings.warn(message, TraceWarning, stacklevel=3)
    return traced
