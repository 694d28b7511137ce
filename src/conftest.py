"""What the examples in docstrings take as given: a model, a batch, a run, its firings, a trace."""

from functools import cache
from typing import Any

import pytest


@cache
def given() -> dict[str, Any]:
    """Made once, for all examples."""
    import sparse_signals as ss
    from sparse_signals.tracing.roots import strongest_roots

    model = ss.load_model("gpt2-ioi", device="cpu")
    batch = ss.encode(model, ss.ioi_prompts(8, tokenizer=model.tokenizer))
    run = ss.run(model, batch)
    traced = ss.trace(run, strongest_roots(model, batch, 1))
    names = {"ss": ss, "model": model, "batch": batch, "run": run, "traced": traced}
    names |= {"strongest_roots": strongest_roots, "circuit": traced.pool(draws=20)}
    return names | {"firings": ss.find_firings(run)}


@pytest.fixture(autouse=True)
def examples(doctest_namespace: dict[str, Any]) -> None:
    """Let every example see them, unless it says otherwise itself."""
    for name, value in given().items():
        doctest_namespace.setdefault(name, value)
