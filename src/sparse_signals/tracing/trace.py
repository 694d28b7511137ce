"""Chapter 4: follow signals upstream, from the heads that answer back to the embeddings.

A firing keeps, on either side, the components with the largest contributions: these are its edges.
A kept head that fires itself, with the receiving token as destination, is traced further. Each
firing of a prompt is opened once, however many paths reach it, so a trace is an acyclic graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparse_signals.core.model import Model
from sparse_signals.core.prompts import Batch
from sparse_signals.core.resume import chunked, run_key
from sparse_signals.core.run import Run, chunk_rows, new_outputs, run_model
from sparse_signals.signals.firings import Pairs, find_firings
from sparse_signals.tracing.contributions import (
    SIDES,
    Contributions,
    Settings,
    Weights,
    contributions,
    read_weights,
    receiving,
)
from sparse_signals.tracing.roots import (
    Root,
    TraceError,
    check_roots,
    open_contrasts,
    place,
    starts,
)


@dataclass(frozen=True)
class Trace:
    """Firings that were reached from the roots, and the edges into them.

    firings: firing (number), prompt, layer, head, name, dest, src, attention, score, root,
    visits (paths that lead to it from the roots), vectors (the singular pairs in the support) and,
    for the exact weighting, error (relative, of the sum of contributions).
    edges: firing, prompt, upstream (component), downstream (head), layer, head, side, dest, src,
    token (where upstream writes), weight (contribution), share (of its side), visits, up_layer
    and down_layer (heights in a chart).
    """

    firings: pd.DataFrame
    edges: pd.DataFrame


def trace(
    model: Model,
    batch: Batch,
    roots: Sequence[Root],
    settings: Settings | None = None,
    *,
    weights: Weights | None = None,
    folder: Path | None = None,
    progress: bool = False,
) -> Trace:
    """Trace every prompt from the given roots, a chunk of prompts at a time.

    With a folder, finished chunks are kept there, and a run that was cut off goes on after them.
    Raises TraceError for a root that is no head of the model or fires on no prompt, and
    PromptError for a role that the prompts do not have.
    Source: Franco and Crovella 2024, section 5; exact shares and contrasts are this book's.
    """
    settings, weights = settings or Settings(), weights or read_weights(model)
    check_roots(model, roots, settings)
    chunks = chunk_rows(model, batch)
    if folder:
        key = (settings, tuple(roots), chunks)
        folder = folder / run_key(model, batch, key, weights.maps.dest, weights.maps.src)
    space = new_outputs(model, chunks[0].stop, batch.tokens.shape[1])

    def work(rows: slice) -> dict[str, pd.DataFrame]:
        part = batch.rows(rows)
        run = run_model(model, part.tokens, part.mask, space)
        return vars(trace_run(weights, run, part, roots, settings, first_prompt=rows.start))

    pieces = chunked(chunks, work, folder=folder, progress=progress)
    traced = _joined([Trace(**piece) for piece in pieces])
    _check_fired(traced, batch, roots, settings)
    return traced


def trace_run(
    weights: Weights,
    run: Run,
    batch: Batch,
    roots: Sequence[Root],
    settings: Settings,
    first_prompt: int = 0,
) -> Trace:
    """Trace the prompts of a run that is there already; they are numbered from `first_prompt`."""
    pairs = find_firings(run.attention, settings.level, settings.context)
    parts = contributions(weights, run, pairs, settings)
    start = starts(run, batch, pairs, roots)
    if any(root.against is not None for root in roots):
        parts = open_contrasts(weights, run, batch, pairs, parts, roots, settings)
    return follow(weights, run, pairs, parts, start, settings, first_prompt)


def follow(
    weights: Weights,
    run: Run,
    pairs: Pairs,
    parts: Contributions,
    start: Int[Tensor, "pair"],
    settings: Settings,
    first_prompt: int = 0,
) -> Trace:
    """The graph that is reached from the firings where `start` (how many roots) is not zero."""
    kept = kept_components(parts, settings)
    visits = _visits(weights, run, pairs, kept, start)
    reached = visits > 0
    firings = pairs[reached].table()
    firings["prompt"] += first_prompt
    firings["root"] = start[reached].cpu().numpy() > 0
    firings["visits"] = visits[reached].cpu().numpy()
    if settings.weighting == "exact":
        firings["error"] = parts.error()[reached].cpu().numpy()
    firings["vectors"] = index_lists(parts.support[reached])
    firings.insert(0, "firing", range(len(firings)))
    return Trace(firings, _edges(weights, firings, parts.values[reached], kept[reached]))


def kept_components(parts: Contributions, settings: Settings) -> Bool[Tensor, "pair side c"]:
    """On each side, the smallest set of largest contributions exceeding a share of their sum."""
    values = parts.values
    ordered, order = values.sort(dim=-1, descending=True, stable=True)
    rounding = 1e-12 * values.abs().sum(-1, keepdim=True)
    enough = ordered.cumsum(-1) > settings.share * values.sum(-1, keepdim=True) + rounding
    wanted = (enough.cumsum(-1) - enough.long() == 0) & (ordered > 0) & parts.sides[..., None]
    return torch.zeros_like(wanted).scatter(-1, order, wanted)


def _visits(
    weights: Weights,
    run: Run,
    pairs: Pairs,
    kept: Bool[Tensor, "pair side c"],
    start: Int[Tensor, "pair"],
) -> Int[Tensor, "pair"]:
    """How many paths reach each firing from the roots: one pass over the layers, from the top.

    A path goes from a firing to a kept head at the receiving token, and to every firing of that
    head whose destination is this token.
    """
    model = weights.model
    is_head = torch.tensor((weights.components["kind"] == "head").tolist(), device=kept.device)
    to_heads = kept[..., is_head].unflatten(-1, (model.n_layers, model.n_heads))
    token, visits = receiving(pairs), start.clone()
    prompts, length = run.tokens.shape
    calls = visits.new_zeros(prompts, model.n_layers, model.n_heads, length)
    for layer in reversed(range(model.n_layers)):
        here = (pairs.layer == layer).nonzero().flatten()
        visits[here] += calls[pairs.prompt[here], layer, pairs.head[here], pairs.dest[here]]
        pair, side, up, head = to_heads[here].nonzero(as_tuple=True)
        pair = here[pair]
        called = (pairs.prompt[pair], up, head, token[pair, side])
        calls.index_put_(called, visits[pair], accumulate=True)
    return visits


def _edges(
    weights: Weights,
    firings: pd.DataFrame,
    values: Tensor,
    kept: Bool[Tensor, "pair side c"],
) -> pd.DataFrame:
    firing, side, component = kept.nonzero(as_tuple=True)
    weight = values[firing, side, component]
    share = weight / values.sum(-1)[firing, side]
    firing, side, component = (t.cpu().numpy() for t in (firing, side, component))
    table = weights.components
    of = firings.iloc[firing].reset_index(drop=True)
    edges = of[["firing", "prompt", "name", "layer", "head", "dest", "src", "visits"]]
    edges = edges.rename(columns={"name": "downstream"})
    edges.insert(2, "upstream", table["component"].array[component])
    edges.insert(6, "side", pd.array(SIDES, dtype="str")[side])
    edges["token"] = edges["dest"].where(side == 0, edges["src"])
    edges["weight"], edges["share"] = weight.cpu().numpy(), share.cpu().numpy()
    edges["up_layer"] = table["height"].to_numpy()[component]
    return edges.assign(down_layer=edges["layer"].astype(float))


def index_lists(chosen: Bool[Tensor, "pair r"]) -> list[np.ndarray]:
    """The places of the true entries of each row."""
    ends = chosen.sum(1).cumsum(0).cpu().numpy()
    return np.split(chosen.nonzero()[:, 1].cpu().numpy(), ends)[:-1]


def _joined(pieces: list[Trace]) -> Trace:
    """Traces of disjoint prompts as one, with firings numbered through."""
    before, firings, edges = 0, [], []
    for piece in pieces:
        firings.append(piece.firings.assign(firing=piece.firings["firing"] + before))
        edges.append(piece.edges.assign(firing=piece.edges["firing"] + before))
        before += len(piece.firings)
    return Trace(*(pd.concat(tables, ignore_index=True) for tables in (firings, edges)))


def _check_fired(traced: Trace, batch: Batch, roots: Sequence[Root], settings: Settings) -> None:
    silent = [str(root) for root in roots if not _fired(traced, batch, root)]
    if silent:
        raise TraceError(
            f"never fires on these prompts (attention of at least {settings.level:g}): "
            f"{', '.join(silent)}; choose another root or lower the level"
        )


def _fired(traced: Trace, batch: Batch, root: Root) -> bool:
    rows = traced.firings[traced.firings["name"] == f"{root.layer}.{root.head}"]
    prompt = torch.tensor(rows["prompt"].tolist(), dtype=torch.long)
    places = {"dest": root.dest, "src": root.src}
    match = [
        rows[end].to_numpy() == place(batch, where)[prompt].numpy()
        for end, where in places.items()
        if where is not None
    ]
    return bool(np.logical_and.reduce(match).any())
