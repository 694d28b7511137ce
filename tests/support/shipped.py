"""The heads of the shipped model, by what its card says that they do."""

from importlib.resources import files

import pandas as pd

from sparse_signals.tracing.roots import Root

HEADS = pd.read_csv(
    str(files("sparse_signals") / "assets" / "gpt2-ioi" / "heads.csv"), dtype={"head": str}
)


def heads(stage: str, by: str) -> list[str]:
    """The heads of a stage, those first that look most along an edge."""
    return HEADS[HEADS["stage"] == stage].sort_values(by, ascending=False)["head"].tolist()


MOVERS, CARRIERS = heads("movers", "END→IO"), heads("carriers", "END→S2")


def root_of(head: str, *places: str) -> Root:
    """A root at a head given by its name."""
    layer, number = head.split(".")
    return Root(int(layer), int(number), *places)
