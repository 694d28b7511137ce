"""Every published number has one rule, and the comparison says what it must."""

import numpy as np
import pytest

from sparse_signals.app.notebook import published
from sparse_signals.interventions.published_facts import (
    Estimate,
    Quantity,
    Uncomputed,
    catalogue,
    leaves,
    side_by_side,
)

# --- the catalogue -------------------------------------------------------------------------------


def test_every_leaf_of_the_facts_has_exactly_one_entry():
    facts = published()
    entries = catalogue(facts)
    assert [entry.fact for entry in entries] == [fact for fact, _ in leaves(facts)]
    assert len({entry.fact for entry in entries}) == len(entries) > 600

    def count(value):  # all that is neither a section nor a list of sections or of two effects
        inner = list(value.values()) if isinstance(value, dict) else value
        deeper = isinstance(value, dict) or (
            isinstance(value, list) and isinstance(value[0], dict | float)
        )
        return sum(map(count, inner)) if deeper else 1

    assert len(entries) == count(facts)


def test_what_is_not_computed_has_a_reason_and_what_is_a_tolerance():
    entries = catalogue(published())
    left = [entry for entry in entries if isinstance(entry, Uncomputed)]
    assert {x.fact.split("/")[0] for x in left} == {
        "about", "setup", "firings_pile", "support_size_mean_pile", "slices_8_6_prompt_6", "graph",
        "edges_by_count", "edges_by_weight_count_ge_50", "single_edge_mean_change",
        "ioi_paper_circuit", "circuit_comparison_ioi_f1_vs_path_patching_nodes",
    }  # fmt: skip
    assert all(entry.reason for entry in left)
    ours = [entry for entry in entries if isinstance(entry, Quantity)]
    assert all(x.tolerance.size >= 0 and x.tolerance.basis and x.how and x.why for x in ours)


@pytest.mark.parametrize("more", [{"new": {"number": 1}}, {"logit_diff": {"skew": 0.1}}])
def test_a_fact_without_a_rule_is_refused(more):
    facts = published()
    facts |= {name: facts.get(name, {}) | value for name, value in more.items()}
    with pytest.raises(ValueError, match="0 rules for the published fact"):
        catalogue(facts)


def test_tolerances_are_those_of_two_samples():
    sizes = {x.fact: x.tolerance.size for x in catalogue(published()) if isinstance(x, Quantity)}
    two = 1.96 * 2**0.5
    assert sizes["logit_diff/mean"] == pytest.approx(two * 1.4665 / 16)
    assert sizes["root_prompts/9.9"] == pytest.approx(two * np.sqrt(201 * 55 / 256))
    assert sizes["firings_ioi/4.11"] == pytest.approx(two * np.sqrt(3825))
    assert sizes["edges_by_count/0.9->7.9@S2/count"] == pytest.approx(two * np.sqrt(434))
    assert sizes["plain_omega_singular_values/8.6/largest"] == pytest.approx(0.005 * 2.685)
    assert sizes["slices_8_6_prompt_6/support"] == sizes["setup/abba"] == 0


# --- the comparison ------------------------------------------------------------------------------


def test_verdicts_follow_the_tolerance():
    facts = published()
    edge = 3.011 + next(x.tolerance.size for x in catalogue(facts) if x.fact == "logit_diff/mean")
    found = {
        "logit_diff/mean": Estimate(edge - 1e-9, 2.0, 4.0),
        "logit_diff/median": Estimate(9.0),
        "slices_8_6_prompt_6/support": Estimate([6, 7, 10, 20, 43, 50]),
        "setup/bos": Estimate(True),
        "setup/roots": Estimate(["9.6", "9.9", "10.0"]),
    }
    table = side_by_side(facts, found, {"graph": "no roots"}).set_index("fact")
    verdicts = table["verdict"]
    assert verdicts["logit_diff/mean"] == verdicts["slices_8_6_prompt_6/support"] == "agrees"
    assert verdicts["logit_diff/median"] == verdicts["setup/bos"] == "differs"
    assert verdicts["setup/roots"] == "agrees"
    assert verdicts["logit_diff/sd"] == verdicts["graph/nodes"] == "undefined"
    assert table.loc["graph/nodes", "note"] == "no roots"
    assert "no such head" in table.loc["logit_diff/sd", "note"]
    assert verdicts["firings_pile/8.6"] == "not computed"
    beyond = side_by_side(facts, {"logit_diff/mean": Estimate(edge + 1e-6)}, {}).set_index("fact")
    assert beyond.loc["logit_diff/mean", "verdict"] == "differs"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_refused(value):
    with pytest.raises(ValueError, match="logit_diff/mean is"):
        side_by_side(published(), {"logit_diff/mean": Estimate(value)}, {})
