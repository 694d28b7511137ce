"""Rules choose heads and edges; planted backups give known joint effects."""

import numpy as np
import pandas as pd
import pytest

from sparse_signals.app.notebook import published
from sparse_signals.core.model import BIAS_ROW
from sparse_signals.core.run import run
from sparse_signals.interventions.case import prepare
from sparse_signals.interventions.intervene import Plan, intervene, summary
from sparse_signals.interventions.joint_effects import interactions, strongest_players
from sparse_signals.interventions.published import (
    EXPERIMENTS,
    alone_and_together,
    common_heads,
    commonest_edges,
    edge_sets,
    find_movers,
    first_heads,
    joint_experiments,
    joint_of_sets,
    knock_outs,
    published_experiments,
    sweep_facts,
    takeovers,
    two_effects,
)
from sparse_signals.planted.circuits import planted
from sparse_signals.tracing.roots import Root


@pytest.fixture(scope="module")
def case():
    """Movers 2.0 and 3.0 listen to 1.0 and 1.1, and these to 0.0."""
    two = planted("redundant", prompts=8)
    return prepare(run(two.model, two.batch), [Root(n, 0, "end", "IO") for n in (2, 3)])


def test_rules_find_the_planted_heads(case):
    movers = find_movers(case.traced.model, case.traced.batch)
    assert {root.name for root in movers} == {"2.0", "3.0"}
    assert sorted(common_heads(case.traced, ["2.0", "3.0"])) == ["1.0", "1.1"]
    assert sorted(first_heads(case.traced)) == ["1.0", "1.1"]  # the first layer has one head alone


def test_sets_are_those_of_the_experiments(case):
    sets = edge_sets(case.traced)
    assert list(sets) == list(EXPERIMENTS)
    edges = case.traced.edges
    one, other = (edges[mask] for mask in sets["A"])
    assert set(one["downstream"]) | set(other["downstream"]) == {"2.0", "3.0"}
    assert one["upstream"].unique().tolist() == other["upstream"].unique().tolist()
    end, io = (edges[mask] for mask in sets["E"])
    assert set(end["side"]) == {"dest"} and set(io["side"]) == {"src"}
    assert set(end["downstream"]) == set(io["downstream"]) == {"2.0"}


def test_backups_are_unmasked_jointly(case):
    edges = case.traced.edges
    first, second = (
        (edges["upstream"] == name) & (edges["downstream"] == "2.0") for name in ("1.0", "1.1")
    )
    found = joint_of_sets(case, first, second, "global")
    assert found["together"] < -10 and abs(found["first"]) < 2 and abs(found["second"]) < 2
    assert found["first"] + found["second"] == pytest.approx(-found["summed"])
    assert found["prompts"] == len(case.traced.batch.tokens)


def test_experiments_have_their_ratio(case):
    table = joint_experiments(case)
    assert set(table["key"]) <= set(EXPERIMENTS) and len(table) % 2 == 0
    ratio = table["together"] / (table["first"] + table["second"])
    finite = np.isfinite(table["ratio"])
    assert finite.any() and np.allclose(ratio[finite], table["ratio"][finite])


def test_sets_without_a_common_prompt_have_no_joint_effect(case):
    edges = case.traced.edges
    none = pd.Series(False, index=edges.index)
    assert joint_of_sets(case, none, ~none, "global") == {}


def test_edges_alone_and_together(case):
    table = alone_and_together(case, case.traced.roots[0]).set_index("edge")
    assert table["kind"].tolist() == ["alone", "alone", "sum", "together"]
    assert table.loc[["1.0", "1.1"], "value"].sum() == pytest.approx(table.loc["sum", "value"])
    assert table.loc["together", "low"] > 10
    pair = interactions(case.clean, strongest_players(case.traced, "2.0"))
    gap = table.loc["together", "value"] - table.loc["sum", "value"]
    assert pair["value"].item() == pytest.approx(gap)


def test_sweep_of_the_commonest_edges(case):
    edges = commonest_edges(case.traced, 3)
    assert BIAS_ROW not in set(edges["upstream"])
    assert len(edges) == 3 * len(case.traced.batch.tokens)
    found = summary(intervene(case.traced, edges, Plan(randoms=1)), case.traced.batch)
    assert found["edge"].nunique() == 3
    assert "random" not in set(found["control"])  # the supports leave no vector to draw
    facts = sweep_facts(found).set_index("fact")
    assert set(facts.index) <= set(published()["intervention_summary"])
    assert facts.loc["share_local_lowers_score", "value"] == 1
    assert (facts["low"] <= facts["value"]).all() and (facts["value"] <= facts["high"]).all()
    assert len(two_effects(found)) == 6


def test_first_prompts_alone(case):
    few = case.first(2)
    assert few.traced.edges["prompt"].max() == 1 and len(few.clean.end) == 2
    assert len(intervene(few.traced, commonest_edges(few.traced, 2))) > 0


def test_knock_outs_with_free_and_frozen_scales(case):
    states = takeovers({"planted": knock_outs(case, case.traced.roots[0], 1)})
    assert set(states["scales"]) == {"recomputed", "frozen"}
    back = states[(states["measure"] == "returned") & (states["scales"] == "frozen")]
    assert back["value"].item() == pytest.approx(0, abs=1e-6)


def test_published_table():
    facts = published()["multi_edge_mean_change_in_logit_diff"]
    table = published_experiments(facts)
    assert len(table) == 2 * len(EXPERIMENTS) and set(table["key"]) == set(EXPERIMENTS)
    row = table[(table["key"] == "K") & (table["scope"] == "global")].iloc[0]
    assert row["ratio"] == pytest.approx(-3.735 / (-1.54 - 1.164))
