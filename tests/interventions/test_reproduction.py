"""What is computed of the published numbers, against its definitions, on random models."""

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
from sparse_signals.interventions.published_facts import side_by_side
from sparse_signals.interventions.released import released_firings
from sparse_signals.interventions.reproduction import measure, mover_facts

PROMPTS = 8
SWEPT = 4
COUNTED = ["agrees", "differs"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return loaded(save_published_size(tmp_path_factory.mktemp("reproduction") / "gpt2"))


@pytest.fixture(scope="module")
def facts(model):
    """The published ones, with a root that fires in the random model."""
    facts = facts_of_shipped_words()
    ran = run(model, ioi_batch(model, PROMPTS))
    firings, roles = released_firings(ran), ran.batch.roles
    end, io = (roles[role].numpy()[firings["prompt"]] for role in ("end", "IO"))
    at = (firings["dest"] == end) & (firings["src"] == io) & (firings["score"] >= 0)
    found = firings.loc[at & (firings["layer"] > 3), "name"].value_counts()
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
