"""Charts of where heads look: they build from small frames, and their titles follow the data."""

import pandas as pd
import pytest

from sparse_signals.charts.attention import (
    attention_explorer,
    percent,
    role_attention,
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
    return " ".join(chart.to_dict()["title"]["text"]).replace("\u00a0", " ")


def test_tokens_are_labelled_with_place_text_and_roles(roles):
    labels = token_labels(roles)
    assert len(labels) == sum(LENGTHS)
    assert list(labels["label"][:3]) == ["0 <s>", "1 Mary (IO)", "2 and"]
    assert labels["label"].iloc[-1] == "4 John (S2, end)"


@pytest.mark.parametrize(("share", "words"), [(0.914, "91 %"), (0.0042, "0.4 %"), (1.0, "100 %")])
def test_percent_reads_like_a_sentence(share, words):
    assert percent(share).replace("\u00a0", " ") == words


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
