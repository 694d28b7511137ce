"""How attention heads in language models talk to each other.

The way of the data: prompts → `encode` → `run` → `find_firings` → `slices`, `support`, `sparsity`;
and from roots upstream: `trace` → `Circuit`. From the answer: `questions` → `trace_answer`.
Each name is loaded when it is first used.

>>> import sparse_signals as ss
>>> model = ss.load_model("gpt2-ioi")
>>> run = ss.run(model, ss.encode(model, ss.ioi_prompts(64, tokenizer=model.tokenizer)))
>>> firings = ss.find_firings(run)
>>> circuit = ss.trace(run, [ss.Root(2, 4, "end", "IO")], share=0.7).pool()
>>> len(firings) > 1000, len(circuit.edges) > 10
(True, True)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparse_signals.attribution.answer import trace_answer as trace_answer
    from sparse_signals.core.model import load_model as load_model
    from sparse_signals.core.prompts import encode as encode
    from sparse_signals.core.prompts import ioi_prompts as ioi_prompts
    from sparse_signals.core.questions import questions as questions
    from sparse_signals.core.run import run as run
    from sparse_signals.core.stats import bootstrap as bootstrap
    from sparse_signals.core.tasks import task_prompts as task_prompts
    from sparse_signals.heads.svd import head_svd as head_svd
    from sparse_signals.interventions.intervene import intervene as intervene
    from sparse_signals.signals.firings import find_firings as find_firings
    from sparse_signals.signals.slices import slices as slices
    from sparse_signals.signals.slices import sparsity as sparsity
    from sparse_signals.signals.slices import support as support
    from sparse_signals.tracing.circuit import Circuit as Circuit
    from sparse_signals.tracing.contributions import Settings as Settings
    from sparse_signals.tracing.roots import Root as Root
    from sparse_signals.tracing.trace import trace as trace

HOMES = {
    "load_model": "core.model",
    "ioi_prompts": "core.prompts",
    "encode": "core.prompts",
    "run": "core.run",
    "task_prompts": "core.tasks",
    "questions": "core.questions",
    "head_svd": "heads.svd",
    "find_firings": "signals.firings",
    "slices": "signals.slices",
    "support": "signals.slices",
    "sparsity": "signals.slices",
    "Root": "tracing.roots",
    "Settings": "tracing.contributions",
    "trace": "tracing.trace",
    "Circuit": "tracing.circuit",
    "intervene": "interventions.intervene",
    "trace_answer": "attribution.answer",
    "bootstrap": "core.stats",
}
__all__ = list(HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'sparse_signals' has no attribute {name!r}")
    value = getattr(import_module(f"sparse_signals.{HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *HOMES})
