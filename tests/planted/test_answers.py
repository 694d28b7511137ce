"""Planted answers: a trace from the answer finds their edges, and a score trace cannot."""

from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch

from sparse_signals.attribution.answer import trace_answer
from sparse_signals.core.model import activations, logits
from sparse_signals.planted.answers import (
    ANSWER_EDGE,
    LINK,
    PLANTED_ANSWERS,
    planted_answer,
)
from sparse_signals.planted.circuits import recovery
from sparse_signals.planted.scoring import (
    among,
    drawn_links,
    exchange,
    judge_answer,
    score_edges,
    strong,
)
from sparse_signals.planted.weights import Head, Unit, handwritten_model

WITH_DECOYS = PLANTED_ANSWERS[:4]
SHARES = {
    "carried": [1, 1, 1],
    "negative": [1, 4 / 3, 4 / 3, -1 / 3, -1 / 3],
    "sum": [1 / 2, 1 / 2, 1 / 2, 1 / 2, 1],
    "switch": [1, 1, 1, 1],
    "redundant": [1, 1 / 2, 1 / 2, 1 / 4, 1 / 4, 1 / 4, 1 / 4, 1 / 2, 1 / 2],
}
SEEN = {"carried": 1 / 3, "negative": 2 / 5, "sum": 0.0, "switch": 2 / 4, "redundant": 7 / 9}


@cache
def case(name, noise=0.0, seed=0):
    return planted_answer(name, noise, seed)


@cache
def traced(name, noise=0.0, seed=0):
    one = case(name, noise, seed)
    return trace_answer(one.model, one.batch, one.counterfactual)


def rates(found, truth, key=ANSWER_EDGE):
    return recovery(found, truth, key)[["precision", "recall"]].tolist()


# --- models and prompts --------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANTED_ANSWERS)
def test_models_answer_prompts_and_counterfactuals(name):
    one = case(name)
    for batch in (one.batch, one.counterfactual):
        found = logits(one.model, batch.tokens, batch.last)
        assert (found.argmax(-1) == batch.io).all()
        others = found.scatter(1, batch.io[:, None], 0.0)
        assert found.max(-1).values.min() > 5 and others.abs().max() < 0.01


@pytest.mark.parametrize("name", PLANTED_ANSWERS)
def test_counterfactuals_are_aligned_and_swap_the_answers(name):
    one = case(name)
    assert torch.equal(one.batch.mask, one.counterfactual.mask)
    assert torch.equal(one.batch.io, one.counterfactual.s)
    assert torch.equal(one.batch.s, one.counterfactual.io)
    changed = (one.batch.tokens != one.counterfactual.tokens).nonzero()
    sources = one.truth[one.truth["upstream"] == "embedding"]
    assert changed.tolist() == sources[["prompt", "token"]].to_numpy().tolist()
    assert len(set(one.batch.mask.sum(1).tolist())) == 2


def test_sums_and_switches_by_arithmetic():
    digits = {"zero": 0, "one": 1, "two": 2, "three": 3, "four": 4}
    for row in case("sum").batch.table.itertuples():
        assert sum(digits.get(word, 0) for word in row.text.split()) % 5 == digits[row.io]
    for row in case("switch").batch.table.itertuples():
        flag, first, _, second, *_, end = row.text.split()
        swapped = (flag == "leave") != (end == "latter")
        assert row.io == (second if swapped else first)


@pytest.mark.parametrize("name", ["sum", "switch"])
def test_one_unit_speaks_at_the_end_and_none_elsewhere(name):
    one = case(name)
    W_out = one.model.bridge.blocks[0].mlp.out.weight.detach()
    written = activations(one.model, one.batch.tokens, ["mlp_out"])["mlp_out"][0]
    units = written @ W_out.T / W_out.square().sum(1).max()  # the messages are orthogonal
    every = torch.arange(len(units))
    strongest = units[every, one.batch.last].max(-1).values
    said = units[every, one.batch.last] > 1e-3 * strongest[:, None]
    messages = [len(W_out[mine].round(decimals=9).unique(dim=0)) for mine in said]
    assert strongest.min() > 4 and messages == [1] * len(units)
    units[every, one.batch.last] = 0
    assert units[one.batch.mask].abs().max() < 1e-3


# --- traces from the answer ----------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANTED_ANSWERS)
def test_a_trace_from_the_answer_finds_the_truth_and_nothing_else(name):
    one, found = case(name), traced(name)
    assert rates(strong(found.edges), one.truth) == [1, 1]
    assert rates(strong(found.pool()), one.links, LINK) == [1, 1]
    assert rates(found.edges[found.edges["graph"]], one.truth) == [1, 1]
    assert np.allclose(drawn_links(one, found.edges)["share"], SHARES[name], atol=1e-3)


@pytest.mark.parametrize("name", WITH_DECOYS)
def test_decoys_are_loud_and_have_no_share(name):
    one, found = case(name), traced(name)
    assert not found.edges["upstream"].isin(one.decoys).any()
    assert not found.edges["downstream"].isin(one.decoys).any()
    norms = {head: written_norm(one, head) for head in ("0.0", "0.2", "0.3", "1.1")}
    assert norms["0.2"] > 3.9 * norms["0.0"] and norms["0.3"] > 3.9 * norms["0.0"]
    assert norms["1.1"] == 0
    for decoy in set(one.decoys) - {"MLP 1"}:
        assert np.abs(exchange(one, [decoy])).max() < 1e-9


def written_norm(one, head):
    layer, number = map(int, head.split("."))
    z = activations(one.model, one.batch.tokens, ["z"])["z"][layer, :, number]
    W_O = one.model.bridge.blocks[layer].attn.W_O[number].detach()
    return (z @ W_O).norm(dim=-1).max().item()


@pytest.mark.parametrize("name", ["carried", "switch"])
def test_mute_decoys_attend_as_the_head_that_answers(name):
    one = case(name)
    pattern = activations(one.model, one.batch.tokens, ["pattern"])["pattern"][1]
    end = pattern[torch.arange(len(pattern)), :, one.batch.last]
    assert torch.allclose(end[:, 0], end[:, 1]) and end[:, 1, 1:].max(-1).values.min() > 0.99


def test_what_both_prompts_share_has_no_share_of_the_difference():
    """If only one digit changes, the head of the other one has nothing, and is needed."""
    one = case("sum")
    right = one.batch.roles["right"][:, None]
    tokens = one.counterfactual.tokens.scatter(1, right, one.batch.tokens.gather(1, right))
    other = logits(one.model, tokens, one.batch.last).argmax(-1)
    assert (other != one.batch.io).all()
    batch = replace(one.batch, s=other)
    found = trace_answer(one.model, batch, replace(one.counterfactual, tokens=tokens))
    assert not found.edges["upstream"].eq("0.1").any()
    left = found.pool().set_index(LINK)["share"]["0.0", "end", "MLP", "MLP 0", "end"]
    assert left == pytest.approx(1, abs=1e-3)


# --- for and against -----------------------------------------------------------------------------


def test_without_its_opponent_the_answer_is_stronger_by_its_share():
    one, found = case("negative"), traced("negative")
    for head, share in (("1.0", 4 / 3), ("1.2", -1 / 3)):
        assert np.allclose(share_of(found, head), share, atol=1e-3)
        assert np.allclose(exchange(one, [head]), share, atol=0.03)


@pytest.mark.parametrize("name", ["carried", "negative"])
def test_what_keeps_helpers_only_misses_a_negative_mover(name):
    one, found = case(name), traced(name)
    table = judge_answer(one, found.edges, found.pool(), seed=3).set_index("kind")
    assert table.loc[["shares", "pooled"], ["precision", "recall"]].eq(1).all(axis=None)
    assert table.loc["helpers", "recall"] == (1 if name == "carried" else 3 / 5)
    assert table.loc["scores", "recall"] == pytest.approx(SEEN[name])
    assert table["seed"].eq(3).all() and table["answers"].eq(1).all()


# --- copies --------------------------------------------------------------------------------------


def share_of(found, head):
    return found.edges[found.edges["upstream"] == head].groupby("prompt")["share"].sum().to_numpy()


def test_shares_of_copies_are_equal_and_add_up():
    found = traced("redundant")
    for copies in (("1.0", "1.1"), ("2.0", "3.0")):
        first, second = (share_of(found, head) for head in copies)
        assert np.allclose(first, second, atol=1e-4) and np.allclose(first + second, 1, atol=1e-4)


def test_exchanging_copies_one_at_a_time_does_not_add_up():
    one = case("redundant")
    single = exchange(one, ["1.0"])
    assert np.allclose(single, exchange(one, ["1.1"]))
    assert np.allclose(exchange(one, ["1.0", "1.1"]), 1, atol=1e-3)
    assert set((2 * single).round(1)) == {0.3, 1.7}


# --- what a score trace finds --------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANTED_ANSWERS)
def test_a_score_trace_misses_values_and_mlps(name):
    one = case(name)
    found = score_edges(one)
    assert recovery(found, one.truth, ANSWER_EDGE)["recall"] == pytest.approx(SEEN[name])
    missed = one.truth[~among(one.truth, found, ANSWER_EDGE)]
    from_mlps = missed["upstream"].str.startswith("MLP")
    assert set(missed.loc[~from_mlps, "channel"]) <= {"value", "MLP"}
    assert set(missed.loc[from_mlps, "channel"]) <= {"direct"}
    assert np.isclose(drawn_links(one, traced(name).edges)["seen"].mean(), SEEN[name])


def test_a_score_trace_names_the_pair_of_the_redundant_circuit_by_its_key():
    found = score_edges(case("redundant"))
    pairs = found[(found["upstream"] == "0.0") & found["downstream"].isin(["1.0", "1.1"])]
    assert set(pairs["channel"]) == {"key"} and len(pairs) == 16


# --- noise ---------------------------------------------------------------------------------------


def noisy(name, noise):
    """Precision and recall, per prompt and pooled, mean over seeds."""
    rows = []
    for seed in range(3):
        one, found = case(name, noise, seed), traced(name, noise, seed)
        rows.append(
            rates(strong(found.edges), one.truth) + rates(strong(found.pool()), one.links, LINK)
        )
    return np.mean(rows, axis=0)


@pytest.mark.parametrize("name", PLANTED_ANSWERS)
def test_a_little_noise_costs_a_little(name):
    precision, recall, pooled_precision, pooled_recall = noisy(name, 0.01)
    assert recall == pooled_recall == 1
    assert precision > 0.8 and pooled_precision > 0.85


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED_ANSWERS)
def test_more_noise_costs_precision_before_recall(name):
    levels = np.array([noisy(name, noise) for noise in (0.0, 0.01, 0.02, 0.03)])
    assert (np.diff(levels[:, 0]) <= 0).all()
    assert levels[-1, 0] > 0.5 and levels[-1, 1] > 0.95


def test_what_noise_adds_to_a_carried_word_is_real():
    """Exchanging the echo alone costs what its share says, prompt by prompt."""
    for seed in range(3):
        one, found = case("carried", 0.02, seed), traced("carried", 0.02, seed)
        shares = share_of(found, "0.2")
        assert np.abs(shares).max() > 0.05
        assert np.abs(shares - exchange(one, ["0.2"])).max() < 0.02


def test_noise_is_reproducible_and_leaves_prompts_alone():
    first, again, clean = planted_answer("sum", 0.05), planted_answer("sum", 0.05), case("sum")
    ends = [logits(one.model, one.batch.tokens, one.batch.last) for one in (first, again, clean)]
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])
    assert torch.equal(first.batch.tokens, clean.batch.tokens)
    pd.testing.assert_frame_equal(first.truth, clean.truth)


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="no planted answer called 'x': choose among carried"):
        planted_answer("x")
    with pytest.raises(ValueError, match="prompts at least 1"):
        planted_answer("sum", prompts=0)
    unit = Unit(0, (("token", "a"), ("position", 1)), ("said", "a"))
    with pytest.raises(ValueError, match="an MLP has room for 32 units, not for 33"):
        handwritten_model([Head(0, 0, ())], ["a"], units=[unit] * 33)
