"""Chapter 5: a trace and what interventions on it start from."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sparse_signals.core.model import Model
from sparse_signals.core.prompts import Batch
from sparse_signals.interventions.changes import Clean, Layers, clean_run, read_layers
from sparse_signals.tracing.contributions import Weights, read_weights
from sparse_signals.tracing.roots import Root
from sparse_signals.tracing.trace import Trace, trace


@dataclass(frozen=True)
class Case:
    """A trace of some prompts, and what interventions on its edges start from."""

    model: Model
    batch: Batch
    roots: list[Root]
    weights: Weights
    traced: Trace
    layers: Layers
    clean: Clean

    def first(self, prompts: int) -> "Case":
        """The same for the first prompts alone."""
        kept = self.traced.firings["prompt"] < prompts
        edges = self.traced.edges[self.traced.edges["prompt"] < prompts]
        batch = self.batch.rows(slice(0, prompts))
        return replace(
            self,
            batch=batch,
            traced=Trace(self.traced.firings[kept], edges),
            clean=clean_run(self.model, batch),
        )


def prepare(model: Model, batch: Batch, roots: Sequence[Root]) -> Case:
    """Trace a batch from roots, and run it once without interventions."""
    weights = read_weights(model)
    traced = trace(model, batch, roots, weights=weights)
    clean = clean_run(model, batch)
    return Case(model, batch, list(roots), weights, traced, read_layers(model), clean)


def head_name(root: Root) -> str:
    """layer.head of a root."""
    return f"{root.layer}.{root.head}"
