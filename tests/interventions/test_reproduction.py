"""Every published number has one rule, and the comparison says what it must."""

import json

import numpy as np
import pandas as pd
import pytest

from reproduced import facts_of_shipped_words, ioi_batch, loaded, save_published_size
from sparse_signals.app.notebook import published
from sparse_signals.core.forward import logit_difference
from sparse_signals.core.run import run
from sparse_signals.heads.svd import head_svd
from sparse_signals.interventions import reproduction
from sparse_signals.interventions.released import released_firings
from sparse_signals.interventions.reproduction import (
    Estimate,
    Quantity,
    Uncomputed,
    catalogue,
    leaves,
    measure,
    mover_facts,
    side_by_side,
)

PROMPTS = 8
SWEPT = 4
COUNTED = ["agrees", "differs"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return loaded(save_published_size(tmp_path_factory.mktemp("reproduction") / "gpt2"))


@pytest.fixture(scope="module")
def facts(model):
    """The published ones, with a root that fires in the random model."""
    text = json.dumps(facts_of_shipped_words())
    ran = run(model, ioi_batch(model, PROMPTS))
    firings, roles = released_firings(ran), ran.batch.roles
    end, io = (roles[role].numpy()[firings["prompt"]] for role in ("end", "IO"))
    at = (firings["dest"] == end) & (firings["src"] == io) & (firings["score"] >= 0)
    found = firings.loc[at & (firings["layer"] > 3), "name"].value_counts()
    facts = json.loads(text)
    facts["setup"]["roots"] = found.index[-1:].tolist()  # one that fires in few prompts
    return facts


@pytest.fixture(scope="module")
def batch(model):
    return ioi_batch(model, PROMPTS)


@pytest.fixture(scope="module")
def found(model, batch, facts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproduction, "SWEPT_PROMPTS", SWEPT)
        return measure(model, batch, facts)


@pytest.fixture(scope="module")
def table(facts, found):
    return side_by_side(facts, *found).set_index("fact")


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


# --- what is computed ----------------------------------------------------------------------------


def test_every_section_is_computed_on_a_random_model(table):
    counted = table[table["verdict"].isin(COUNTED)]
    sections = set(counted.index.str.split("/").str[0])
    assert sections >= {
        "setup", "logit_diff", "firings_ioi", "support_size_mean_ioi", "slices_8_6_prompt_6",
        "plain_omega_singular_values", "nfiring_heads", "root_prompts", "graph",
        "multi_edge_mean_change_in_logit_diff", "intervention_summary",
    }  # fmt: skip
    assert (table["verdict"] == "undefined").any()
    assert table.loc[table["verdict"] == "undefined", "note"].notna().all()
    assert np.isfinite(counted["difference"]).all()
    interval = counted[counted["low"].notna()]
    value = interval["computed"].map(json.loads)
    assert len(interval) > 60 and (interval["low"] < interval["high"]).all()
    inside = (interval["low"] <= value + 1e-9) & (value <= interval["high"] + 1e-9)
    assert inside.mean() > 0.9  # a percentile interval need not hold the mean


def test_numbers_are_those_of_their_definitions(model, batch, table):
    computed = table["computed"].map(json.loads, na_action="ignore")
    F = logit_difference(model, batch).numpy()
    assert computed["logit_diff/mean"] == pytest.approx(F.mean())
    assert computed["logit_diff/sd"] == pytest.approx(F.std(ddof=1))
    assert computed["logit_diff/share_positive"] == pytest.approx((F > 0).mean())
    ran = run(model, batch)
    pattern = ran.pattern[8, :, 6] * (ran.mask[:, :, None] & ran.mask[:, None])
    fires = (pattern[:, :, 1:] >= 0.5).nonzero()
    assert computed["firings_ioi/8.6"] == len(fires) > 0
    scores = (ran.q[8, :, 6] @ ran.k[8, :, 6].mT)[fires[:, 0], fires[:, 1], fires[:, 2] + 1]
    assert computed["nfiring_heads/8.6"] == int((scores >= 0).sum())
    S = head_svd(model).S[4, 11]
    assert computed["plain_omega_singular_values/4.11/largest"] == pytest.approx(float(S[0]))
    ratio = float(S.sum() ** 2 / (S**2).sum())
    assert computed["plain_omega_singular_values/4.11/participation_ratio"] == pytest.approx(ratio)
    assert computed["setup/mean_end_position"] == pytest.approx(float(batch.last.double().mean()))
    assert computed["setup/abba"] == computed["setup/baba"] == PROMPTS / 2


def test_the_signal_of_names_is_measured_in_the_vectors_used_often(model, batch):
    place = {"end": int(batch.last[0]), "IO": int(batch.roles["IO"][0])}
    prompts = range(PROMPTS)
    firings = pd.DataFrame({
        "prompt": prompts, "name": "9.9", "score": 1.0, "size": 2,
        "dest": batch.last.numpy(), "src": batch.roles["IO"].numpy(),
        "vectors": [[0, 3] if n < 5 else [1] for n in prompts],
    })  # fmt: skip
    coordinates = [
        (n, pos, k, float(pos == int(batch.roles["IO"][n])) if k in (0, 3) else 9.0)
        for n in prompts for pos in range(int(batch.last[n]) + 1) for k in range(4)
    ]  # fmt: skip
    coordinates = pd.DataFrame(coordinates, columns=["prompt", "pos", "k", "v"])
    found = mover_facts(firings, coordinates, batch)
    section = "head_9_9_end_to_IO/"
    assert found[section + "vectors_in_at_least_100"].value == [0, 3]
    assert found[section + "firings"].value == PROMPTS and place["end"] > place["IO"]
    assert found[section + "support_total"].value == 2 * PROMPTS
    # of three names in a prompt, one carries √2
    assert found[section + "name_projection_mean"].value == pytest.approx(2**0.5 / 3)
    assert found[section + "other_projection_mean"].value == 0
    assert found[section + "name_projection_auc"].value == pytest.approx(0.5 + 0.5 / 3)


@pytest.mark.slow
def test_an_interrupted_run_goes_on(model, batch, facts, found, monkeypatch, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduction, "SWEPT_PROMPTS", SWEPT)
    with monkeypatch.context() as patch:
        patch.setattr(reproduction, "released_effects", stop)
        with pytest.raises(KeyboardInterrupt):
            measure(model, batch, facts, folder=tmp_path)
    monkeypatch.setattr(reproduction, "released_firings", stop)  # it is not needed again
    again, _ = measure(model, batch, facts, folder=tmp_path)
    assert again.keys() == found[0].keys()
    for fact, estimate in found[0].items():
        assert again[fact].value == estimate.value, fact


def test_a_model_without_these_heads_has_undefined_numbers(tmp_path):
    model = loaded(save_published_size(tmp_path / "two", layers=2))
    table = side_by_side(published(), *measure(model, ioi_batch(model, 6), published()))
    verdicts = table.set_index("fact")["verdict"]
    assert verdicts["plain_omega_singular_values/8.6/largest"] == "undefined"
    assert verdicts["firings_ioi/8.6"] == verdicts["graph/nodes"] == "undefined"
    assert verdicts["nfiring_heads/1.0"] in COUNTED and verdicts["logit_diff/mean"] in COUNTED
    note = table.set_index("fact").loc["graph/nodes", "note"]
    assert note == "nothing to trace: none of 9.6, 9.9, 10.0 fires from end to IO"


def test_rotary_models_are_refused(tiny_llama, batch):
    with pytest.raises(ValueError, match="rotary positions: the published numbers are of GPT-2"):
        measure(tiny_llama, batch, published())
