"""Chapter 5: knock out the best path to a root, trace what the model does then, and repeat.

A knock-out takes the signals of edges from what components wrote, in the run at hand, and the
model goes on from there. So a path that was not needed before can take over, and is found.
"""

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sparse_signals.core.forward import forward
from sparse_signals.core.model import Model
from sparse_signals.core.prompts import Batch
from sparse_signals.core.run import Outputs, Run, fitting_rows
from sparse_signals.core.stats import DRAWS, bootstrap
from sparse_signals.interventions.best_paths import best_paths
from sparse_signals.interventions.case import templates_of
from sparse_signals.interventions.edge_signals import column, read_signals
from sparse_signals.signals.firings import Pairs, find_firings, pairs_at
from sparse_signals.tracing.contributions import Settings, contributions
from sparse_signals.tracing.roots import Root, check_roots, matches
from sparse_signals.tracing.trace import Trace, follow

ROUNDING = 1e-6  # a score that is this small a part of the clean one is what rounding left of it


def knock_out(
    model: Model,
    batch: Batch,
    root: Root,
    settings: Settings = Settings(),
    *,
    number: int = 2,
    freeze_norms: bool = False,
) -> pd.DataFrame:
    """Knock out the best path to the firings of a root, trace again, and repeat `number` times.

    The best path is that of `best_paths`, from wherever the trace ends to the destination side.
    Its edge into the root is knocked out: one breaks it, and the others may serve other paths. With
    `freeze_norms` all normalisations divide by what they divide by in the clean run, so that
    nothing comes back only because the rest of the stream is scaled up.
    Firings are those of the clean run, even if they then cease. One row per firing and round (0:
    nothing knocked out): prompt, template, src, round, F, score, attention; of the best path then:
    path, product and carried (the weight of its edge into the root), missing where no path is left
    or the score is not positive (beyond rounding); and expected, the score if nothing but the loss
    of that edge had changed since the round before.
    """
    check_roots(model, [root], settings)
    pieces = []
    for rows in fitting_rows(model, batch):
        piece = _knock_out(model, batch.rows(rows), root, settings, number, freeze_norms)
        pieces.append(piece.assign(prompt=piece["prompt"] + rows.start))
    table = pd.concat(pieces, ignore_index=True)
    return table.assign(template=templates_of(batch)[table["prompt"]])


@torch.no_grad()
def _knock_out(
    model: Model, batch: Batch, root: Root, settings: Settings, number: int, freeze_norms: bool
) -> pd.DataFrame:
    now = forward(model, batch)
    removed, like = torch.zeros_like(now.run.outputs), now.scales if freeze_norms else None
    pairs = find_firings(now.run, settings.level, settings.context)
    firings, states = pairs[matches(batch, pairs, root)], []
    for done in range(number + 1):
        traced = _trace_again(now.run, firings, root, settings)
        last = _last_edges(traced, firings)
        states.append(_state(traced, last, now.difference).assign(round=done))
        if done < number and len(last):
            _take(removed, now.run, traced, last)
            now = forward(model, batch, removed=removed, like=like)
    table = pd.concat(states, ignore_index=True)
    before = table.groupby(["prompt", "src"])[["score", "carried"]].shift()
    return table.assign(expected=before["score"] - before["carried"])


def _trace_again(run: Run, firings: Pairs, root: Root, settings: Settings) -> Trace:
    """The trace of a run from given firings, whether they still fire or not."""
    names = ("layer", "prompt", "head", "dest", "src")
    roots = pairs_at(run, *(getattr(firings, name) for name in names))
    found = find_firings(run, settings.level, settings.context)
    places = [torch.stack([getattr(x, name) for name in names]) for x in (roots, found)]
    others = found[~(places[0][:, :, None] == places[1][:, None]).all(0).any(0)]
    fields = vars(roots)
    pairs = Pairs(**{name: torch.cat([fields[name], getattr(others, name)]) for name in fields})
    start = (torch.arange(len(pairs), device=pairs.layer.device) < len(roots)).long()
    outputs = Outputs(run)
    tables = follow(
        run,
        pairs,
        lambda rows: contributions(run, pairs[rows], settings, outputs),
        start,
        settings,
    )
    return Trace(run.model, run.batch, (root,), settings, *tables)


def _last_edges(traced: Trace, clean: Pairs) -> pd.DataFrame:
    """The last edges of the best paths to the roots that still have a positive score.

    Of others there is nothing left to carry. `clean` are the roots in the clean run.
    """
    paths, roots = best_paths(traced, "dest", ends=None), traced.firings[traced.firings["root"]]
    left = roots.loc[roots["score"] > ROUNDING * clean.score.cpu().numpy(), "firing"]
    return paths[paths["root"].isin(left) & (paths["step"] == 0)]


def _state(traced: Trace, last: pd.DataFrame, F: Float[Tensor, "prompt"]) -> pd.DataFrame:
    roots = traced.firings.loc[traced.firings["root"]]
    table = roots[["firing", "prompt", "src", "score", "attention"]]
    last = last[["root", "path", "product", "weight"]]
    last = last.rename(columns={"root": "firing", "weight": "carried"})
    table = table.merge(last, on="firing", how="left").drop(columns="firing")
    return table.assign(F=F.cpu().numpy()[table["prompt"]])


def _take(
    removed: Float[Tensor, "prompt pos component d"], run: Run, traced: Trace, edges: pd.DataFrame
) -> None:
    """Add to `removed`, in place, the signals of edges as they are in this run."""
    signals = read_signals(traced, edges[traced.edges.columns], run)
    prompt, token = (column(edges, name, removed.device) for name in ("prompt", "token"))
    names = pd.Index(run.model.components["component"])
    component = torch.tensor(names.get_indexer(pd.Index(edges["upstream"])), device=removed.device)
    removed.index_put_((prompt, token, component), signals.delta, accumulate=True)


def takeover(table: pd.DataFrame, draws: int = DRAWS, seed: int = 0) -> pd.DataFrame:
    """What happens on average in each round of `knock_out`, with 95 % intervals over templates.

    One row per round and measure: round, measure, value, low, high, firings. Measures are F,
    score, attention, product, and returned: of the score that the last knock-out took from the
    root, the share that came back, Σ (score − expected) / Σ (carried in the round before).
    """
    table = table.sort_values(["prompt", "src", "round"], kind="stable")
    table["returned"] = table["score"] - table["expected"]
    table["taken"] = table.groupby(["prompt", "src"])["carried"].shift()
    table, parts = table.fillna({"product": 0.0, "returned": 0.0, "taken": 0.0}), []
    for number, group in table.groupby(table["round"]):
        measures = ["F", "score", "attention", "product"]
        weights = pd.DataFrame(1.0, group.index, measures)
        if number > 0 and group["taken"].sum() > 0:
            weights["returned"] = group["taken"]
        found = bootstrap(group[[*weights]], group["template"], weights, draws, seed)
        parts.append(found.assign(round=number, firings=len(group)))
    columns = ["round", "measure", "value", "low", "high", "firings"]
    return pd.concat(parts, ignore_index=True)[columns]
