"""Classes of heads by rules: planted edges are found, and what cannot be seen is said."""

import pandas as pd
import pytest

from shipped import MOVERS, shipped
from sparse_signals.attribution.head_classes import (
    CLASSES,
    LEAST_SHARE,
    PAIRS,
    classes_found,
    mean_attention,
)
from sparse_signals.core.prompts import encode, ioi_prompts
from sparse_signals.core.run import run
from sparse_signals.tracing.roots import position_of

EDGES = [  # upstream, role, channel, downstream, share
    ("9.9", "end", "direct", "answer", 0.3),
    ("9.8", "end", "direct", "answer", 0.2),  # looks elsewhere
    ("10.7", "end", "direct", "answer", -0.1),
    ("8.6", "end", "query", "9.9", 0.2),
    ("5.5", "S2+1, S2", "value", "8.6", 0.1),
    ("0.1", "S2", "value", "8.6", LEAST_SHARE / 2),  # too small
    ("MLP 0", "S2", "value", "8.6", 0.5),
    ("4.1", "S2", "value", "7.0", 0.5),  # into no such head
]


def edge_table(rows):
    table = pd.DataFrame(rows, columns=["upstream", "role", "channel", "downstream", "share"])
    return table.assign(low=table["share"] - 0.004, high=table["share"] + 0.004)


@pytest.fixture
def looks():
    names = ["9.9", "9.8", "10.7", "8.6", "5.5", "0.1", "4.1", "2.2"]
    table = pd.DataFrame(0.05, index=names, columns=["→".join(pair) for pair in PAIRS])
    for name, pair in {"9.9": "end→IO", "9.8": "end→S1", "10.7": "end→IO", "8.6": "end→S2"}.items():
        table.loc[name, pair] = 0.6
    table.loc[["5.5", "4.1"], "S2→S1+1"] = 0.6
    table.loc["0.1", "S2→S1"] = 0.6
    table.loc["2.2", "S1+1→S1"] = 0.6
    return table.rename_axis("name").reset_index()


def test_heads_are_found_by_edge_and_look(looks):
    found = classes_found(edge_table(EDGES), looks).set_index("class")
    assert found["heads"].map(list).to_dict() == {
        "name mover": ["9.9"], "negative name mover": ["10.7"], "S-inhibition": ["8.6"],
        "duplicate token": [], "induction": ["5.5"], "previous token": [],
    }  # fmt: skip
    assert found.loc["duplicate token", "outcome"] == "not found"
    assert found.loc["previous token", "outcome"] == "not testable here"
    assert found.loc["name mover", "share"] == 0.3
    assert "against it" in found.loc["negative name mover", "rule"]


def test_what_differs_earlier_can_be_tested(looks):
    more = [*EDGES, ("2.2", "S1+1", "key", "5.5", 0.05)]
    found = classes_found(edge_table(more), looks).set_index("class")
    assert found.loc["previous token", "heads"] == ["2.2"]
    assert found.loc["previous token", "outcome"] == "present"


def test_a_share_that_may_be_nothing_is_not_there(looks):
    edges = edge_table(EDGES).assign(low=-0.5, high=0.5)
    assert not classes_found(edges, looks)["outcome"].eq("present").any()


def test_every_class_names_its_source_among_what_it_is_compared_with():
    assert all(each.source in each.rivals for each in CLASSES)


def test_attention_is_the_mean_over_prompts_that_have_the_pair():
    model = shipped("gpt2-ioi")
    batch = encode(model, ioi_prompts(6, seed=0))
    found = mean_attention(model, batch).set_index("name")
    pattern = run(model, batch).pattern
    layer, head = map(int, MOVERS[0].split("."))
    for pair in (("end", "IO"), ("S1+1", "IO")):
        dest, src = (position_of(batch, role) for role in pair)
        weights = [float(pattern[layer, n, head, dest[n], src[n]]) for n in range(6)]
        seen = [w for w, i, j in zip(weights, dest, src, strict=True) if j <= i]
        assert found.loc[MOVERS[0], "→".join(pair)] == pytest.approx(sum(seen) / len(seen))
    assert found.loc[MOVERS[0], "end→IO"] > 0.3
