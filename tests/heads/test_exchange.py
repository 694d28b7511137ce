from dataclasses import replace

import pandas as pd
import pytest
import torch

import sparse_signals as ss
from batches import plain_batch
from sparse_signals.heads.exchange import (
    exchange_effects,
    head_effects,
    repetition_verdict,
    share_that_follow,
)

FIRST, SECOND, LAST = 0, 1, 4
N = 12  # pairs of prompts, each of its own template


@pytest.fixture
def ran(tiny_gpt2, tokens):
    """Sixteen prompts: the IO is first in half of the pairs; attention is set by the tests."""
    order = ["ABBA", "BABA"] * (N // 2)
    other = ["BABA", "ABBA"] * (N // 2)
    table = pd.DataFrame({"order": order + other, "template": [*range(N)] * 2})
    first = torch.tensor((table["order"] == "ABBA").to_numpy())
    roles = {"IO": (~first).long(), "S1": first.long(), "end": torch.full((2 * N,), LAST)}
    prompts = torch.cat([tokens] * 3)[:, : LAST + 1]
    mask = torch.ones_like(prompts, dtype=torch.bool)
    batch = replace(plain_batch(prompts, mask), table=table, roles=roles)
    ran = ss.run(tiny_gpt2, batch)
    ran.pattern[:] = 0
    return ran


def look(ran, layer, head, place, attention):
    ran.pattern[layer, torch.arange(2 * N), head, LAST, place] = torch.as_tensor(attention).double()


def test_a_head_that_follows_repetition_and_one_that_follows_the_place(ran):
    look(ran, 0, 0, ran.batch.roles["IO"], 0.75)
    look(ran, 1, 1, FIRST, 0.5)
    effects = exchange_effects(ran).set_index("name")
    assert (effects.loc["0.0", ["repetition", "place"]] == [0.75, 0]).all(axis=None)
    assert (effects.loc["1.1", ["repetition", "place"]] == [0, 0.5]).all(axis=None)
    assert effects.loc["0.0", "follows"].all() and not effects.loc["1.1", "follows"].any()


def test_heads_are_tested_over_templates(ran):
    look(ran, 0, 0, ran.batch.roles["IO"], 0.75)
    look(ran, 1, 1, SECOND, 0.5)
    alternating = [0.75, 0.0] * N  # half of the templates the IO, half of them nothing…
    look(ran, 2, 2, ran.batch.roles["IO"], alternating)
    look(ran, 2, 2, ran.batch.roles["S1"], alternating[::-1])  # … but the repeated name
    heads = head_effects(exchange_effects(ran)).set_index("name")
    assert heads["moves"]["0.0"] == "repetition"
    assert heads["moves"]["1.1"] == "place" and heads["place"]["1.1"] == -0.5
    assert heads["moves"]["2.2"] == heads["moves"]["0.1"] == "neither"


def test_share_that_follows_has_an_interval_over_templates(ran):
    follows = torch.tensor([1.0, 1, 1, 0] * (N // 2))
    look(ran, 0, 0, ran.batch.roles["IO"], follows)
    effects = exchange_effects(ran).query("name == '0.0'")
    found = share_that_follow(effects).loc["follows"]
    assert found["value"] == 0.75 and found["low"] < 0.6 and found["high"] == 1


@pytest.mark.parametrize(("low", "high", "words"), [
    (0.51, 0.9, "decides"), (0.2, 0.49, "does not decide"), (0.4, 0.6, "may or may not decide"),
])  # fmt: skip
def test_the_verdict_needs_the_whole_interval_on_one_side_of_a_half(low, high, words):
    row = {"value": (low + high) / 2, "low": low, "high": high}
    assert repetition_verdict(pd.DataFrame({"follows": row}).T) == words
