"""Rules choose heads and edges; planted backups give known joint effects."""

import pandas as pd
import pytest

from sparse_signals.app.notebook import published
from sparse_signals.core.model import BIAS_ROW
from sparse_signals.core.run import run
from sparse_signals.interventions.case import prepare
from sparse_signals.interventions.intervene import Plan, intervene, summary
from sparse_signals.interventions.published import (
    EXPERIMENTS,
    common_heads,
    edge_sets,
    find_movers,
    first_heads,
    joint_experiments,
    joint_of_sets,
    knock_outs,
    published_experiments,
    sampled_edges,
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
    found = joint_of_sets(case, first, second)
    assert found["joint"] > 10 and abs(found["first"]) < 2 and abs(found["second"]) < 2
    assert found["first"] + found["second"] == pytest.approx(found["summed"])
    assert found["gap"] == pytest.approx(found["joint"] - found["summed"])
    assert found["prompts"] == len(case.traced.batch.tokens)


def test_experiments_have_a_ratio_where_both_are_harm(case):
    table = joint_experiments(case).set_index("key")
    assert set(table.index) <= set(EXPERIMENTS)
    harm = (table["summed_low"] > 0) & (table["joint_low"] > 0)
    assert (table["ratio"].notna() == harm).all() and 0 < harm.sum() < len(table)
    ratio = (table["joint"] / table["summed"])[harm]
    assert table.loc[harm, "ratio"].to_numpy() == pytest.approx(ratio.to_numpy())


def test_sets_without_a_common_prompt_have_no_joint_effect(case):
    edges = case.traced.edges
    none = pd.Series(False, index=edges.index)
    assert joint_of_sets(case, none, ~none) == {}


def test_sweep_of_a_random_sample(case):
    sample = sampled_edges(case.traced, 3, least=2)
    assert BIAS_ROW not in set(sample.edges["upstream"])
    assert len(sample.keys) == 3 <= sample.often <= sample.pooled
    again = sampled_edges(case.traced, 3, least=2)
    assert again.keys.equals(sample.keys) and again.rare.equals(sample.rare)
    assert not set(sample.edges.index) & set(sample.rare.index)
    table = intervene(case.traced, sample.edges, Plan(randoms=1))
    found = summary(table, case.traced.batch, keys=sample.keys)
    assert found["edge"].nunique() == 3 and (found["p"] <= found["q"]).all()
    assert "random" not in set(found["control"])  # the supports leave no vector to draw
    facts = sweep_facts(found).set_index("fact")
    assert set(facts.index) <= set(published()["intervention_summary"])
    share = facts.loc["share_local_lowers_score"]
    assert share[["value", "high"]].tolist() == [1, 1]
    assert share["low"] == pytest.approx(0.025 ** (1 / 3))  # of three edges
    assert (facts["low"] <= facts["value"]).all() and (facts["value"] <= facts["high"]).all()
    assert len(two_effects(found)) == 6


def test_edges_that_are_in_no_template_often_enough_are_rare(case):
    sample = sampled_edges(case.traced, 3, least=10**6)
    assert sample.keys.empty and sample.edges.empty and sample.often == 0
    assert len(sample.rare) == 9


def test_first_prompts_alone(case):
    few = case.first(2)
    assert few.traced.edges["prompt"].max() == 1 and len(few.clean.end) == 2
    assert len(intervene(few.traced, few.traced.edges.head(4))) > 0


def test_knock_outs_with_free_and_frozen_scales(case):
    states = takeovers({"planted": knock_outs(case, case.traced.roots[0], 1)})
    assert set(states["scales"]) == {"recomputed", "frozen"}
    back = states[(states["measure"] == "returned") & (states["scales"] == "frozen")]
    assert back["value"].item() == pytest.approx(0, abs=1e-6)


def test_published_table():
    facts = published()["multi_edge_mean_change_in_logit_diff"]
    table = published_experiments(facts).set_index("key")
    assert set(table.index) == set(EXPERIMENTS) and "ratio" not in table
    assert table.loc["K", ["first", "second", "together"]].tolist() == [1.54, 1.164, 3.735]
