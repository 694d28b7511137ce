"""Chapter 5: knock out the best path to a root, trace what the model does then, and repeat.

A knock-out takes the signals of edges from what components wrote, in the run at hand, and the
model goes on from there. So a path that was not needed before can take over, and is found.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sparse_signals.core.forward import run_without
from sparse_signals.core.prompts import Batch
from sparse_signals.core.run import Run, chunk_rows
from sparse_signals.core.stats import DRAWS, bootstrap
from sparse_signals.interventions.disjoint_paths import EMBEDDINGS, best_paths
from sparse_signals.interventions.edge_signals import by_reader, column, read_signals, solve
from sparse_signals.signals.firings import Pairs, find_firings, pairs_at
from sparse_signals.tracing.contributions import Settings, Weights, contributions
from sparse_signals.tracing.roots import Root, check_roots, matches
from sparse_signals.tracing.trace import Trace, follow


@dataclass(frozen=True)
class Rounds:
    """How paths are knocked out.

    number: how often. side, ends: the best path is that of `flows.best_paths` arriving at this side
    of the root ("dest", "src", None: either), from these components (None: any). depth: how many
    of its edges are knocked out, counted from the root (None: all); one breaks it, and the others
    may serve other paths. freeze_norms: all normalisations divide by what they divide by in the
    clean run, so that nothing comes back only because the rest of the stream is scaled up.
    """

    number: int = 2
    side: str | None = "dest"
    ends: Sequence[str] | None = EMBEDDINGS
    depth: int | None = 1
    freeze_norms: bool = False


def knock_out(
    weights: Weights,
    batch: Batch,
    root: Root,
    settings: Settings | None = None,
    rounds: Rounds | None = None,
) -> pd.DataFrame:
    """Knock out the best path to the firings of a root, trace again, and repeat.

    Firings are those of the clean run, even if they then cease. One row per firing and round (0:
    nothing knocked out): prompt, src, round, F, score, attention; of the best path then: path,
    product and carried (the weight of its edge into the root), missing where no path is left or
    the score is not positive; and expected, the score if nothing but the loss of that edge had
    changed since the round before.
    """
    settings, rounds, pieces = settings or Settings(), rounds or Rounds(), []
    check_roots(weights.model, [root], settings)
    for rows in chunk_rows(weights.model, batch):
        piece = _knock_out(weights, batch.rows(rows), root, settings, rounds)
        pieces.append(piece.assign(prompt=piece["prompt"] + rows.start))
    return pd.concat(pieces, ignore_index=True)


@torch.no_grad()
def _knock_out(
    weights: Weights, batch: Batch, root: Root, settings: Settings, rounds: Rounds
) -> pd.DataFrame:
    shape = (*batch.tokens.shape, len(weights.components) - 1, weights.model.d_model)
    removed = torch.zeros(shape, dtype=weights.model.dtype, device=weights.model.device)
    run, streams, F = run_without(weights, batch, removed)
    pairs = find_firings(run.attention, settings.level, settings.context)
    firings, states = pairs[matches(batch, pairs, root)], []
    for number in range(rounds.number + 1):
        traced = _trace_again(weights, run, firings, settings)
        paths = _paths(traced, rounds)
        states.append(_state(traced, paths, F).assign(round=number))
        paths = paths[paths["step"] < (rounds.depth or len(weights.components))]
        if number < rounds.number and len(paths):
            _take(removed, weights, batch, run, traced, paths)
            like = streams if rounds.freeze_norms else None
            run, _, F = run_without(weights, batch, removed, like)
    table = pd.concat(states, ignore_index=True)
    before = table.groupby(["prompt", "src"])[["score", "carried"]].shift()
    return table.assign(expected=before["score"] - before["carried"])


def _trace_again(weights: Weights, run: Run, firings: Pairs, settings: Settings) -> Trace:
    """The trace of a run from given firings, whether they still fire or not."""
    names = ("layer", "prompt", "head", "dest", "src")
    roots = pairs_at(run.attention, *(getattr(firings, name) for name in names))
    found = find_firings(run.attention, settings.level, settings.context)
    places = [torch.stack([getattr(x, name) for name in names]) for x in (roots, found)]
    others = found[~(places[0][:, :, None] == places[1][:, None]).all(0).any(0)]
    fields = vars(roots)
    pairs = Pairs(**{name: torch.cat([fields[name], getattr(others, name)]) for name in fields})
    start = (torch.arange(len(pairs), device=pairs.layer.device) < len(roots)).long()
    return follow(
        weights, run, pairs, contributions(weights, run, pairs, settings), start, settings
    )


def _paths(traced: Trace, rounds: Rounds) -> pd.DataFrame:
    """The best paths to firings of positive score: of others there is nothing left to carry."""
    paths = best_paths(traced, rounds.side, rounds.ends)
    left = traced.firings.loc[traced.firings["score"] > 0, "firing"]
    return paths[paths["root"].isin(left)]


def _state(traced: Trace, paths: pd.DataFrame, F: Float[Tensor, "prompt"]) -> pd.DataFrame:
    roots = traced.firings.loc[traced.firings["root"]]
    table = roots[["firing", "prompt", "src", "score", "attention"]]
    last = paths.loc[paths["step"] == 0, ["root", "path", "product", "weight"]]
    last = last.rename(columns={"root": "firing", "weight": "carried"})
    table = table.merge(last, on="firing", how="left").drop(columns="firing")
    return table.assign(F=F.cpu().numpy()[table["prompt"]])


def _take(
    removed: Float[Tensor, "prompt pos component d"],
    weights: Weights,
    batch: Batch,
    run: Run,
    traced: Trace,
    edges: pd.DataFrame,
) -> None:
    """Add to `removed`, in place, the signals of edges as they are in this run."""
    signals = read_signals(weights, batch, traced, edges[traced.edges.columns])
    device = removed.device
    prompt, token, layer = (column(edges, name, device) for name in ("prompt", "token", "layer"))
    names = pd.Index(weights.components["component"])
    component = torch.tensor(names.get_indexer(edges["upstream"]), device=device)
    written = run.outputs[prompt, token, component]
    heard = by_reader(written.double(), signals.readers.raw[:, :, :-1], layer, signals.reader)
    delta = solve(replace(signals, written=written, heard=heard), signals.chosen)
    removed.index_put_((prompt, token, component), delta, accumulate=True)


def takeover(table: pd.DataFrame, draws: int = DRAWS, seed: int = 0) -> pd.DataFrame:
    """What happens on average in each round of `knock_out`, with 95 % intervals over prompts.

    One row per round and measure: round, measure, value, low, high, firings. Measures are F,
    score, attention, product, and returned: of the score that the last knock-out took from the
    root, the share that came back, Σ (score − expected) / Σ (carried in the round before).
    """
    table = table.sort_values(["prompt", "src", "round"], kind="stable")
    table["returned"] = table["score"] - table["expected"]
    table["taken"] = table.groupby(["prompt", "src"])["carried"].shift()
    table, parts = table.fillna({"product": 0.0, "returned": 0.0, "taken": 0.0}), []
    for number, group in table.groupby("round"):
        measures = ["F", "score", "attention", "product"]
        weights = pd.DataFrame(1.0, group.index, measures)
        if number > 0 and group["taken"].sum() > 0:
            weights["returned"] = group["taken"]
        found = bootstrap(group[[*weights]], group["prompt"], weights, draws, seed)
        parts.append(found.assign(round=number, firings=len(group)))
    columns = ["round", "measure", "value", "low", "high", "firings"]
    return pd.concat(parts, ignore_index=True)[columns]
