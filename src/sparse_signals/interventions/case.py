"""Chapter 5: a trace and what interventions on it start from."""

from collections.abc import Sequence
from dataclasses import dataclass

from sparse_signals.core.run import Run
from sparse_signals.interventions.changes import Clean, clean_run
from sparse_signals.tracing.contributions import Settings
from sparse_signals.tracing.roots import Root
from sparse_signals.tracing.trace import Trace, trace


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
