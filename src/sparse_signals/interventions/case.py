"""Chapter 5: a trace and what interventions on it start from."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from sparse_signals.core.prompts import Batch
from sparse_signals.core.run import Run
from sparse_signals.interventions.changes import Clean, clean_run
from sparse_signals.tracing.contributions import Settings
from sparse_signals.tracing.roots import Root
from sparse_signals.tracing.trace import Trace, trace


def templates_of(batch: Batch) -> Int[np.ndarray, "prompt"]:
    """What varies independently: the template of every prompt, or itself where none is known."""
    known = "template" in batch.table
    return batch.table["template"].to_numpy() if known else np.arange(len(batch.tokens))


@dataclass(frozen=True)
class Case:
    """A trace of some prompts, and what interventions on its edges start from."""

    traced: Trace
    clean: Clean

    def first(self, prompts: int) -> "Case":
        """The same for the first prompts alone."""
        traced = self.traced.first(prompts)
        return Case(traced, clean_run(traced.model, traced.batch))


def prepare(run: Run, roots: Sequence[Root], settings: Settings = Settings()) -> Case:
    """Trace the prompts of a run from roots, and keep what interventions start from."""
    return Case(trace(run, roots, settings), clean_run(run.model, run.batch))
