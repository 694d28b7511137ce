"""Paths in a trace: which is best."""

from dataclasses import replace

import pandas as pd
import pytest

from sparse_signals.core.run import run
from sparse_signals.interventions.best_paths import best_paths
from sparse_signals.planted.circuits import planted
from sparse_signals.tracing.roots import Root
from sparse_signals.tracing.trace import trace


@pytest.fixture(scope="module")
def known():
    circuit = planted("redundant", prompts=8)
    roots = [Root(layer, 0, "end", "IO") for layer in (2, 3)]
    return trace(run(circuit.model, circuit.batch), roots)


@pytest.fixture(scope="module")
def made_up(known):
    """A trace of one prompt, of edges (firing, upstream, side, share); firings 0 to 4 are of heads
    2.0, 1.0, 1.1, 0.0 and 0.1 at tokens 5, 5, 4, 5 and 4; 0 is the root."""
    places = {0: ("2.0", 5, 4), 1: ("1.0", 5, 3), 2: ("1.1", 4, 2), 3: ("0.0", 5, 1),
              4: ("0.1", 4, 1)}  # fmt: skip
    rows = [(n, 0, *place, n == 0) for n, place in places.items()]
    firings = pd.DataFrame(rows, columns=["firing", "prompt", "name", "dest", "src", "root"])

    def of_edges(edges):
        table = pd.DataFrame(edges, columns=["firing", "upstream", "side", "share"])
        table = table.merge(firings, on="firing").rename(columns={"name": "downstream"})
        table["token"] = table["dest"].where(table["side"] == "dest", table["src"])
        return replace(known, firings=firings, edges=table)

    return of_edges


DIAMOND = [
    (0, "1.0", "dest", 0.5),
    (0, "1.1", "src", 0.4),
    (0, "MLP 0", "dest", 0.3),
    (0, "position", "src", 0.2),
    (1, "embedding", "dest", 0.9),
    (2, "embedding", "src", 0.1),
]


def test_a_path_needs_the_firing_at_the_receiving_token(made_up):
    """1.1 fires at token 4; what it writes at token 5 comes from no traced firing."""
    only = [(0, "1.1", "src", 0.4), (2, "embedding", "src", 0.1)]
    assert best_paths(made_up(only))["path"].iloc[0] == "2.0 ← 1.1 ← embedding"
    assert best_paths(made_up([(0, "1.1", "dest", 0.4), only[1]])).empty


def test_a_root_without_path(made_up):
    assert best_paths(made_up([(0, "MLP 0", "dest", 0.9)])).empty
    alone = best_paths(made_up([(0, "MLP 0", "dest", 0.9)]), ends=None)
    assert alone["path"].tolist() == ["2.0 ← MLP 0"]


def test_best_path_has_the_largest_product(made_up):
    best = best_paths(made_up(DIAMOND))
    assert best["path"].unique().tolist() == ["2.0 ← 1.0 ← embedding"]
    assert best["step"].tolist() == [0, 1] and best["product"].tolist() == pytest.approx([0.45] * 2)
    src = best_paths(made_up(DIAMOND), "src")
    assert src["path"].tolist() == ["2.0 ← position"]
    large = [*DIAMOND[:5], (2, "embedding", "src", 2.0)]  # shares above 1 make no loop
    assert best_paths(made_up(large))["product"].iloc[0] == pytest.approx(0.8)


@pytest.mark.parametrize("first", ["1.0", "1.1"])
def test_of_paths_with_the_same_shares_the_first_is_best(made_up, first):
    """0.1 · 0.2 · 0.3 in either order, though the logarithms do not add up to the same float."""
    one = [(0, "1.0", "dest", 0.1), (1, "0.0", "dest", 0.2), (3, "embedding", "dest", 0.3)]
    other = [(0, "1.1", "src", 0.3), (2, "0.1", "dest", 0.2), (4, "embedding", "dest", 0.1)]
    edges = one + other if first == "1.0" else other + one
    assert best_paths(made_up(edges))["upstream"].iloc[0] == first
