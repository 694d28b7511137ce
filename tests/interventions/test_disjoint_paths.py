"""Paths in a trace: how many are disjoint, what they carry, which is best."""

from dataclasses import replace

import pandas as pd
import pytest

from sparse_signals.core.run import run
from sparse_signals.interventions.disjoint_paths import (
    best_paths,
    disjoint_paths,
    pool_trace,
)
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


def test_flow_and_paths_of_a_made_up_trace(made_up):
    """0.5 through 1.0, 0.1 through 1.1 (its own edge is the narrow one), 0.2 from position."""
    found = disjoint_paths(made_up(DIAMOND)).iloc[0]
    assert (found["paths"], found["cut"]) == (3, 3)
    assert found["flow"] == pytest.approx(0.8)


def test_a_path_needs_the_firing_at_the_receiving_token(made_up):
    """1.1 fires at token 4; what it writes at token 5 comes from no traced firing."""
    moved = [(0, "1.1", "dest", 0.4) if edge[1] == "1.1" else edge for edge in DIAMOND]
    found = disjoint_paths(made_up(moved)).iloc[0]
    assert found["paths"] == 2 and found["flow"] == pytest.approx(0.7)


def test_a_root_without_path(made_up):
    found = disjoint_paths(made_up([(0, "MLP 0", "dest", 0.9), (0, "1.0", "src", 0.1)])).iloc[0]
    assert found[["paths", "flow", "cut"]].tolist() == [0, 0, 0]
    assert best_paths(made_up([(0, "MLP 0", "dest", 0.9)])).empty


def test_paths_may_begin_wherever_the_trace_ends(made_up):
    """At MLP 0 too, and at 1.1 if it did not fire; but 1.0 fired, and is led to."""
    assert disjoint_paths(made_up(DIAMOND), None)["flow"].item() == pytest.approx(1.1)
    silent = made_up([edge for edge in DIAMOND if edge[0] != 2])
    found = disjoint_paths(silent, None).iloc[0]
    assert found["paths"] == 4 and found["flow"] == pytest.approx(1.4)
    assert disjoint_paths(made_up(DIAMOND), ["MLP 0"])["flow"].item() == pytest.approx(0.3)
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


@pytest.mark.parametrize("pooled", [False, True])
def test_planted_movers_have_three_disjoint_paths(known, pooled):
    """Through 1.0 and 1.1, half of the query each, and from position to the key."""
    found = disjoint_paths(pool_trace(known) if pooled else known)
    assert len(found) == (2 if pooled else 16)
    assert (found["paths"] == 3).all() and (found["cut"] == 3).all()
    assert found["flow"].to_numpy() == pytest.approx(2, abs=1e-3)


def test_pooled_shares_are_means_over_prompts(known):
    pooled = pool_trace(replace(known, edges=known.edges[known.edges["prompt"] < 4]))
    into = pooled.edges.query("downstream == '2.0' and side == 'dest'")
    assert into["share"].tolist() == pytest.approx([0.25, 0.25], abs=1e-3)
    assert into["prompts"].tolist() == [4, 4] and set(into["dest"]) == {"end"}
    assert disjoint_paths(pooled)["flow"].to_numpy() == pytest.approx(1, abs=1e-3)
