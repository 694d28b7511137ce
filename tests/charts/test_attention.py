"""Charts of chapter 1: they build from small frames, and their titles follow the data."""

import numpy as np
import pandas as pd
import pytest

from drawing import title
from sparse_signals.charts.attention import (
    attention_explorer,
    giver_effects,
    log_odds,
    pair_share,
    part_shares,
    role_attention,
    softmax_bars,
    token_labels,
)

WORDS = [" <s>", " Mary", " and", " John", " John", " to"]
ROLE = ["", "IO", "IO+1", "S1", "S2", "end"]
LENGTHS = (6, 5)


@pytest.fixture
def roles() -> pd.DataFrame:
    """Two prompts; the second is a token shorter, and its end has another role as well."""
    rows = [(0, pos, WORDS[pos], ROLE[pos]) for pos in range(6)]
    rows += [(1, pos, WORDS[pos], ROLE[pos]) for pos in range(4)]
    rows += [(1, 4, " John", "S2"), (1, 4, " John", "end")]
    return pd.DataFrame(rows, columns=["prompt", "pos", "token", "role"])


def attention(favourite: int) -> pd.DataFrame:
    """Two layers of two heads; head 1.`favourite` looks at the IO (position 1), others at 0."""
    rows = [
        (layer, prompt, head, dest, src, float(src == (layer == 1 and head == favourite)))
        for layer in range(2)
        for prompt in range(2)
        for head in range(2)
        for dest in range(6)
        for src in range(6)
    ]
    return pd.DataFrame(rows, columns=["layer", "prompt", "head", "dest", "src", "attention"])


def text(chart) -> str:
    """The title of a chart in one line."""
    return title(chart).replace("\u00a0", " ")


def test_tokens_are_labelled_with_place_text_and_roles(roles):
    labels = token_labels(roles)
    assert len(labels) == sum(LENGTHS)
    assert list(labels["label"][:3]) == ["0 <s>", "1 Mary (IO)", "2 and"]
    assert labels["label"].iloc[-1] == "4 John (S2, end)"


@pytest.mark.parametrize(("favourite", "share"), [(0, "0.0 %"), (1, "100 %")])
def test_explorer_opens_on_the_given_head_and_says_what_it_does(roles, favourite, share):
    chart = attention_explorer(attention(favourite), roles, "1.1")
    spec = chart.to_dict()
    assert f"head 1.1 gives the indirect object {share}" in text(chart)
    assert spec["description"]
    chosen = next(p for p in spec["params"] if p["name"] == "chosen_name")
    assert chosen["value"] == [{"name": "1.1"}]
    assert chosen["bind"]["name"]["input"] == "select"


def test_explorer_packs_visible_pairs_of_real_tokens_only(roles):
    spec = attention_explorer(attention(1), roles, "1.1").to_dict()
    packed = [row for rows in spec["datasets"].values() for row in rows if "packed" in row]
    assert len(packed) == 2 * 2 * 2
    for row in packed:
        length = LENGTHS[row["prompt"]]
        assert len(row["packed"].split()) == length * (length + 1) // 2


def by_role(strong: str) -> pd.DataFrame:
    """Attention between two pairs of roles; head `strong` has most of it in the first pair."""
    rows = [
        (pair, 0, head, prompt, order, 0.9 if (pair, f"0.{head}") == ("end → IO", strong) else 0.1)
        for pair in ("end → IO", "end → S2")
        for head in range(2)
        for prompt, order in enumerate(["ABBA", "BABA"])
    ]
    return pd.DataFrame(rows, columns=["pair", "layer", "head", "prompt", "order", "attention"])


@pytest.mark.parametrize("strong", ["0.0", "0.1"])
def test_role_chart_names_the_strongest_head_of_each_pair(strong):
    chart = role_attention(by_role(strong))
    spec = chart.to_dict()
    assert f"end → IO: {strong} (90 %)" in text(chart)
    assert "end → S2: 0.0 (10 %)" in text(chart)
    assert spec["description"]
    inputs = [str(p.get("bind")) for p in spec["params"]]
    assert sum("select" in bind for bind in inputs) == 2


@pytest.mark.parametrize(("scores", "found"), [
    ([0.0, 2.0, 1.0], "“b” 67 % of its attention, with a score 1.0 above"),
    ([9.0, 2.0, 1.0], "“a” 100 % of its attention, with a score 7.0 above"),
])  # fmt: skip
def test_softmax_bars_name_the_favourite(scores, found):
    chart = softmax_bars(pd.DataFrame({"label": ["a", "b", "c"], "score": scores}), "2.3")
    assert found in text(chart) and "own scores: head 2.3" in text(chart)
    spec = chart.to_dict()
    assert spec["description"]
    assert {"token", "extra"} <= {p["name"] for p in spec["params"]}


def points(factor: float) -> pd.DataFrame:
    difference = np.linspace(-3, 3, 7)
    return pd.DataFrame({
        "layer": 0, "head": 1, "difference": difference, "odds": np.exp(factor * difference),
    })  # fmt: skip


def test_log_odds_says_whether_the_points_are_on_the_line():
    assert "All 7 pairs lie on the line" in text(log_odds(points(1)))
    off = text(log_odds(points(1.1)))
    assert "on the line" not in off and "within 0.3 of the line" in off
    assert log_odds(points(1)).to_dict()["description"]


def parts(content: float) -> pd.DataFrame:
    rows = [
        (scope, part, 0, head, share)
        for scope in ("within a softmax row", "over all pairs")
        for part, share in (("content", content), ("source", 1 - content),
                            ("destination", 0.0), ("constant", 0.0))
        for head in range(3)
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["scope", "part", "layer", "head", "share"])


def test_parts_chart_says_which_parts_are_nothing():
    chart = part_shares(parts(0.75))
    assert "content 75 %, source 25 %" in text(chart)
    assert "destination and constant exactly nothing" in text(chart)
    assert "source, destination and constant exactly nothing" in text(part_shares(parts(1)))
    assert chart.to_dict()["description"]


def shares(mine: list[float]) -> pd.DataFrame:
    rows = [
        (kind, f"0.{head}", share, share - 0.05, share + 0.05)
        for kind, all_shares in (("this head", mine), ("sources shuffled", [0.9, 0.9]))
        for head, share in enumerate(all_shares)
    ]
    return pd.DataFrame(rows, columns=["kind", "name", "share", "low", "high"])


@pytest.mark.parametrize(("mine", "half", "found"), [
    ([0.6, 0.7], ["more", "more"], ("more than half of the variation in all 2 heads, clearly less "
     "in none of the 2 heads (medians: this head: 65 %")),
    ([0.2, 0.52], ["less", "undecided"], ("more than half of the variation in none of the 2 heads, "
     "clearly less in 1 of the 2 heads (medians: this head: 36 %")),
])  # fmt: skip
def test_pair_chart_counts_heads_by_their_verdicts(mine, half, found):
    chart = pair_share(shares(mine), pd.DataFrame({"half": half}), "0.1")
    assert found in text(chart)
    assert "sources shuffled: 90 %" in text(chart)
    assert chart.to_dict()["description"]


def test_pair_chart_puts_each_kind_in_its_own_order_and_labels_one_head():
    spec = pair_share(shares([0.2, 0.7]), pd.DataFrame({"half": ["less", "more"]}), "0.0").to_dict()
    rows = [row for table in spec["datasets"].values() for row in table if "rank" in row]
    ranks = {row["name"]: row["rank"] for row in rows if row["kind"] == "this head"}
    assert ranks == {"0.1": 1, "0.0": 2}
    assert {row["name"] for row in rows if row["label"]} == {"0.0"}


@pytest.mark.parametrize(("moves", "found"), [
    (["repetition", "both", "neither"], ("attention of 2 of the 3 heads (most: head 0.1), which "
     "name comes first that of 1 of the 3 heads")),
    (["neither"] * 3, ("attention of none of the 3 heads (most: head 0.1), which name comes first "
     "that of none of the 3 heads")),
])  # fmt: skip
def test_giver_chart_counts_what_moves_heads(moves, found):
    columns = {"name": ["0.0", "0.1", "0.2"], "repetition": [0.2, -0.5, 0.0], "place": 0.1}
    chart = giver_effects(pd.DataFrame(columns).assign(moves=moves), "0.0")
    assert found in text(chart)
    assert text(chart) in chart.to_dict()["description"]
