"""Chapter 5: every edge of a trace changed alone, beside its controls, and what that shows.

Long sweeps take the prompts in chunks, keep what is finished, and go on after an interruption.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sparse_signals.circuits import KEY, labelled, roles_of
from sparse_signals.contributions import Weights, read_weights
from sparse_signals.edge_signals import (
    PathQuirks,
    Signals,
    column,
    other_signals,
    random_signals,
    read_signals,
)
from sparse_signals.interventions import clean_run, read_layers
from sparse_signals.models import Model
from sparse_signals.paths import MODES, SCOPES, intervene
from sparse_signals.prompts import Batch
from sparse_signals.runs import chunked, run_key
from sparse_signals.tracing import Trace, chunk_rows

MEASURES = ("F_change", "F_size", "score_change", "attention_change")


@dataclass(frozen=True)
class Plan:
    """What a sweep does to every edge.

    randoms: how many random supports stand beside each signal; others: whether the signal of the
    same pooled edge in another prompt does. The rest as in `paths.intervene`.
    """

    scopes: Sequence[str] = SCOPES
    modes: Sequence[str] = MODES
    randoms: int = 0
    others: bool = False
    seed: int = 0
    quirks: PathQuirks = field(default_factory=PathQuirks)
    freeze_norms: bool = False
    probability: bool = False

    def options(self) -> dict[str, Any]:
        """What `intervene` is told."""
        names = ("scopes", "modes", "quirks", "freeze_norms", "probability")
        return {name: getattr(self, name) for name in names}


def sweep(
    model: Model,
    batch: Batch,
    traced: Trace,
    edges: pd.DataFrame | None = None,
    plan: Plan | None = None,
    *,
    weights: Weights | None = None,
    folder: Path | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Intervene on every edge of a trace (or on some of them) alone. The table of `intervene`.

    With a folder, finished chunks of prompts are kept there, and a sweep that was cut off goes on
    after them.
    """
    plan, weights = plan or Plan(), weights or read_weights(model)
    signals = read_signals(weights, batch, traced, edges, plan.quirks)
    others = other_signals(signals, batch, plan.seed) if plan.others else None
    layers = read_layers(model)

    def work(rows: slice) -> dict[str, pd.DataFrame]:
        clean, variants = clean_run(model, batch, rows), _variants(signals, others, rows, plan)
        tables = [intervene(layers, clean, variant, **plan.options()) for variant in variants]
        return {"sweep": pd.concat(tables, ignore_index=True)}

    if folder:
        folder = folder / run_key(model, batch, (plan, _digest(signals)))
    pieces = chunked(chunk_rows(model, batch), work, folder=folder, progress=progress)
    return pd.concat([piece["sweep"] for piece in pieces], ignore_index=True)


def _variants(
    signals: Signals, others: Signals | None, rows: slice, plan: Plan
) -> Iterator[Signals]:
    """The signals of the edges in some prompts, then their controls."""
    here = _in_rows(signals, rows)
    yield here
    for repeat in range(plan.randoms):
        yield random_signals(here, repeat, plan.seed)
    if others:
        yield _in_rows(others, rows)


def _in_rows(signals: Signals, rows: slice) -> Signals:
    prompt = column(signals.edges, "prompt", signals.reader.device)
    return signals[(prompt >= rows.start) & (prompt < rows.stop)]


def _digest(signals: Signals) -> str:
    """A name for edges and supports by their content."""
    columns = ["prompt", "upstream", "side", "layer", "head", "dest", "src"]
    edges = pd.util.hash_pandas_object(signals.edges[columns]).to_numpy().tobytes()
    return sha256(edges + signals.chosen.cpu().numpy().tobytes()).hexdigest()


# --- pooled --------------------------------------------------------------------------------------


def summary(
    table: pd.DataFrame,
    batch: Batch,
    measures: Sequence[str] = MEASURES,
    repeats: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """What interventions do on average, edge by pooled edge, with 95 % intervals over prompts.

    One row per pooled edge, scope, mode, control and measure: prompts, value, low, high. A prompt
    counts once: edges with the same key in it and repeats of a control are averaged first. F_size
    is |F_change|. Rows with control "signal − X" are the paired difference to control X.
    """
    table = labelled(table.assign(F_size=table["F_change"].abs()), roles_of(batch))
    by = [*KEY, "scope", "mode", "control"]
    each = table.groupby([*by, "prompt"], sort=False)[list(measures)].mean().reset_index()
    each = pd.concat([each, *_differences(each, by, measures)], ignore_index=True)
    groups = each.groupby(by, sort=False)
    number, size = groups.ngroup().to_numpy(), groups.ngroups
    pooled = groups.agg(prompts=("prompt", "size")).reset_index()
    prompts, of = each["prompt"].to_numpy(), len(batch.tokens)
    draws = np.random.default_rng(seed).multinomial(of, [1 / of] * of, repeats)
    parts = []
    for measure in measures:
        mean = partial(_mean, number, size, each[measure].to_numpy())
        resampled = [mean(draw[prompts]) for draw in draws]
        bounds = np.nanquantile(resampled, [0.025, 0.975], axis=0) if size else np.empty((2, 0))
        columns = {"value": mean(np.ones(len(each))), "low": bounds[0], "high": bounds[1]}
        parts.append(pooled.assign(measure=measure, **columns))
    return pd.concat(parts, ignore_index=True)


def _mean(number: np.ndarray, size: int, values: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Mean of each group where every value counts some times."""
    count, total = np.bincount(number, times, size), np.bincount(number, times * values, size)
    return np.divide(total, count, out=np.full(size, np.nan), where=count > 0)


def _differences(
    each: pd.DataFrame, by: Sequence[str], measures: Sequence[str]
) -> Iterator[pd.DataFrame]:
    """Signal minus each control, where a prompt has both."""
    index = [*(name for name in by if name != "control"), "prompt"]
    kinds = {name: rows.set_index(index) for name, rows in each.groupby("control", sort=False)}
    signal = kinds.pop("signal", None)
    for name, control in kinds.items():
        if signal is not None:
            gap = signal[list(measures)] - control[list(measures)]
            yield gap.dropna().reset_index().assign(control=f"signal − {name}")
