"""Tracers against planted truth: methods, their comparison, and the fates of missed edges."""

from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch

from sparse_signals.planted.circuits import EDGE, LOUD, MUTE, PLANTED, planted, recovery
from sparse_signals.planted.scoring import (
    FATES,
    HEADS_ONLY,
    METHODS,
    among,
    compare,
    cuts,
    duels,
    fate_shares,
    fates,
    planted_attention,
    pooled,
    run_case,
    shares,
    sign_test,
    strays,
    sweep_noise,
    sweep_superposition,
    trace_case,
    with_all,
)
from sparse_signals.tracing.roots import Root
from sparse_signals.tracing.trace import trace


@cache
def case(name="inhibition", noise=0.0, seed=0):
    return run_case(planted(name, noise, seed, prompts=4))


@pytest.mark.parametrize("name", PLANTED)
def test_tracing_is_that_of_the_tracer(name):
    one = case(name)
    heads = one.planted.roots[["layer", "head"]].drop_duplicates().to_numpy().tolist()
    roots = [Root(*head) for head in heads]
    expected = trace(one.run, roots).edges
    pd.testing.assert_frame_equal(trace_case(one), expected)


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("method", ["exact", "whole score"])
def test_the_truth_is_found_without_noise(name, method):
    result = recovery(trace_case(case(name), method), case(name).planted.truth)
    assert result[["precision", "recall"]].tolist() == [1, 1]


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_shares_of_the_whole_score_add_up_to_it(noise):
    one = case("redundant", noise)
    values = shares(one, "whole score").values
    gap = (values.sum(-1) - one.pairs.score[:, None]).abs().max()
    assert gap < 1e-10 * one.pairs.score.abs().max()


def test_methods_that_see_heads_only_name_heads_only():
    found = {name: trace_case(case(noise=0.03), name) for name in METHODS}
    for name, edges in found.items():
        others = edges["kind"] != "head"
        assert (others == ~edges["upstream"].str.match(r"\d")).all()
        assert others.any() == (name not in HEADS_ONLY)
    table = compare(case(noise=0.03), found)
    counted = set(table.loc[table["edges"] == "all edges", "method"])
    assert counted == set(METHODS) - set(HEADS_ONLY)


def test_random_methods_depend_on_their_seed_alone():
    for method in ("random basis", "dice"):
        first, again, other = (shares(case(), method, seed).values for seed in (1, 1, 2))
        assert torch.equal(first, again) and not torch.equal(first, other)


def test_unknown_methods_are_named():
    with pytest.raises(ValueError, match="no method called 'magic': choose among exact, whole"):
        trace_case(case(), "magic")


def test_the_loudest_follows_decoys_and_exact_tracing_does_not():
    one = case("decoys")
    assert not trace_case(one)["upstream"].isin(MUTE + LOUD).any()
    assert trace_case(one, "loudest")["upstream"].isin(LOUD).any()


def test_a_small_share_is_content_with_one_of_two_informants():
    one = case("redundant")
    table = cuts(one, [0.4, 0.5, 0.7], ["exact"]).query("edges == 'all edges'")
    recall = table.set_index("share")["recall"]
    assert recall[0.4] < 1 and recall[0.5] == recall[0.7] == 1


# --- fates ---------------------------------------------------------------------------------------


def test_fates_without_noise_are_found():
    assert set(fates(case(), trace_case(case()))) == {"found"}


def silenced(one, name):
    """The case as if a head fired nowhere."""
    keep = torch.tensor((one.pairs.table()["name"] != name).tolist())
    return replace(one, pairs=one.pairs[keep], start=one.start[keep])


def test_a_silent_head_cuts_off_what_is_behind_it():
    one = silenced(case(), "1.0")
    fate = fates(one, trace_case(one))
    edges = one.planted.truth
    reader = edges["layer"].astype(str) + "." + edges["head"].astype(str)
    assert set(fate[reader == "1.0"]) == {"reader silent"}
    assert set(fate[reader == "0.0"]) == {"cut off by silence"}
    assert set(fate[reader == "2.0"]) == {"found"}


def test_one_of_two_informants_keeps_the_way_open():
    one = silenced(case("redundant"), "1.0")
    fate = fates(one, trace_case(one))
    edges = one.planted.truth
    assert set(fate[edges["layer"] == 0]) == {"found"}


def test_what_could_be_found_and_was_not_is_lost_by_the_cut():
    found = trace_case(case())
    fate = fates(case(), found[found["downstream"] != "0.0"])
    assert set(fate[case().planted.truth["layer"] == 0]) == {"lost by the cut"}


def test_stray_edges_of_random_bases_are_no_part_of_the_score():
    stray = strays(case(), trace_case(case(), "random basis"))
    assert set(stray["sender"]) == {"position"}
    assert stray["share"].min() > 0.1 and stray["whole"].abs().max() < 1e-9
    assert strays(case(), trace_case(case())).empty


def test_strays_of_the_whole_score_have_the_shares_they_are_kept_for():
    one = case("decoys", 0.04)
    stray = strays(one, trace_case(one, "whole score"))
    assert len(stray) and np.allclose(stray["share"], stray["whole"])


# --- sweeps --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept():
    return sweep_noise(["induction"], [0.0, 0.06], seeds=2, methods=["exact", "published"])


def test_sweep_has_a_row_for_each_run(swept):
    scores, ends = swept
    assert len(scores) == 2 * 2 * 3 and len(ends) == 2 * 2
    clean = scores[(scores["noise"] == 0) & (scores["method"] == "exact")]
    assert clean[["precision", "recall"]].eq(1).all(axis=None)
    assert ends.loc[ends["noise"] == 0, ["silent", "quiet"]].eq(0).all(axis=None)
    assert ends[list(FATES)].sum(axis=1).eq(32).all()


def test_pooled_rates_are_sums_before_they_are_ratios():
    counts = pd.DataFrame(
        {"method": "m", "circuit": ["a", "b"] * 2, "seed": [0, 0, 1, 1],
         "correct": [1, 1, 4, 0], "spurious": [1, 1, 0, 0], "missing": [0, 2, 0, 4]}
    )  # fmt: skip
    row = pooled(counts, ["method"]).iloc[0]
    assert row["precision"] == 6 / 8 and row["recall"] == 6 / 12
    assert (row["precision_low"], row["precision_high"]) == (2 / 4, 1)
    assert (row["recall_low"], row["recall_high"]) == (2 / 4, 2 / 4)


def test_intervals_of_pooled_rates_are_over_seeds_not_rows():
    counts = pd.DataFrame(
        {"method": "m", "seed": np.repeat(range(10), 50), "correct": 1, "spurious": 0,
         "missing": np.repeat([0, 1], 250)}
    )  # fmt: skip
    row = pooled(counts, ["method"]).iloc[0]
    assert row["precision_low"] == row["precision_high"] == 1
    assert row["recall"] == 2 / 3 and 0.5 <= row["recall_low"] < 0.56 and row["recall_high"] > 0.8


def test_the_sign_test_is_exact():
    assert sign_test(4, 0) == sign_test(0, 4) == 0.125
    assert sign_test(9, 1) == pytest.approx(2 * (10 + 1) / 1024)
    assert sign_test(3, 3) == sign_test(0, 0) == 1


def test_duels_are_won_seed_by_seed():
    """A method that is better in all seeds but one, a tie; and one that loses everywhere."""
    rows = [
        {"edges": "head edges", "method": method, "circuit": circuit, "seed": seed,
         "correct": 6, "spurious": wrong, "missing": 0}
        for seed in range(8)
        for circuit in ("a", "b")
        for method, wrong in (("exact", 2), ("good", 2 if seed == 0 else 1), ("bad", 5))
    ]  # fmt: skip
    table = duels(pd.DataFrame(rows)).set_index("method")
    assert table.loc["good", ["higher", "lower"]].tolist() == [7, 0]
    assert table.loc["bad", ["higher", "lower"]].tolist() == [0, 8]
    assert table["p"].to_dict() == {"good": 2 / 2**7, "bad": 2 / 2**8}
    assert table["q"].to_dict() == {"good": 2 / 2**7, "bad": 2 / 2**7}


def test_the_published_weighting_loses_duels_under_noise():
    scores, _ = sweep_noise(["inhibition"], [0.03], seeds=3, methods=["exact", "published"])
    row = duels(scores).iloc[0]
    assert (row["method"], row["higher"], row["lower"]) == ("published", 0, 3)


def test_a_sweep_of_superposition_is_judged_like_one_of_noise(swept):
    scores, ends = sweep_superposition(["inhibition"], [1, 4], seeds=2, methods=["exact"])
    assert set(scores.columns) ^ set(swept[0].columns) == {"fewer", "noise"}
    assert len(scores) == 2 * 2 * 2 and ends["fewer"].tolist() == [1, 4, 1, 4]
    assert ends[list(FATES)].sum(axis=1).eq(48).all()


def test_fate_shares_add_up_to_one(swept):
    table = fate_shares(with_all(swept[1]), ["circuit", "noise"])
    sums = table.groupby(["circuit", "noise"])["share"].sum()
    assert len(sums) == 4 and np.allclose(sums, 1)
    assert table["circuit"].iloc[0] == "all four"


def test_planted_pairs_attend_fully():
    weights = planted_attention(case())
    assert len(weights) == 3 * 4 and weights.min() > 0.99


def test_keys_tell_edges_apart():
    found = trace_case(case())
    assert among(found, case().planted.truth, EDGE).all()
    assert not among(found.assign(side="x"), case().planted.truth, EDGE).any()
