"""Pooling counts prompts once, the released code's quirks are what they say, files lose nothing."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from sparse_signals.core.prompts import Batch, roles_of
from sparse_signals.tracing.circuit import (
    KEY,
    Circuit,
    Quirks,
    pool,
    to_graph,
)

PLACES = {"IO": 1, "S1": 3, "S2": 6, "end": 9}  # one word between the names: IO+1 is S1-1
COLUMNS = ["firing", "prompt", "upstream", "downstream", "side", "dest", "src", "weight", "visits"]


def edge_table(rows):
    table = pd.DataFrame(rows, columns=COLUMNS)
    return table.assign(share=0.5, up_layer=0.0, down_layer=1.0)


def batch_of(prompts):
    roles = {role: torch.full((prompts,), place) for role, place in PLACES.items()}
    mask = torch.ones(prompts, 10, dtype=torch.bool)
    table = pd.DataFrame({"text": [""] * prompts})
    return Batch(table, mask.long(), mask, [[*"abcdefghij"]] * prompts, roles, None, None)


@pytest.fixture
def batch():
    return batch_of(4)


@pytest.fixture
def edges():
    return edge_table(
        [
            (0, 0, "0.1", "1.0", "dest", 9, 1, 2.0, 1),
            (1, 1, "0.1", "1.0", "dest", 9, 1, 4.0, 3),
            (2, 1, "0.1", "1.0", "src", 9, 9, 7.0, 1),
            (3, 2, "MLP 0", "1.0", "src", 9, 1, 1.0, 2),
            (4, 2, "MLP 0", "1.0", "src", 9, 1, 3.0, 1),
            (5, 3, "0.2", "1.1", "src", 9, 2, 5.0, 1),
        ]
    )


def row(table, upstream, side, src_role):
    found = table[(table["upstream"] == upstream) & (table["side"] == side)]
    return found[found["src_role"] == src_role].iloc[0]


def test_an_edge_counts_each_prompt_once(edges, batch):
    table = pool(edges, batch)
    first = row(table, "0.1", "dest", "IO")
    assert (first["prompts"], first["weight"], first["spread"]) == (2, 3.0, 1.0)
    assert first["role"] == "end" and first["of"] == 4
    assert row(table, "MLP 0", "src", "IO")["prompts"] == 1
    assert row(table, "MLP 0", "src", "IO")["weight"] == 2.0  # the mean within its prompt


def test_a_token_with_several_roles_counts_in_each(edges, batch):
    roles = roles_of(batch)
    assert set(roles.query("prompt == 0 and pos == 2")["role"]) == {"IO+1", "S1-1"}
    table = pool(edges, batch)
    assert set(table[table["upstream"] == "0.2"]["role"]) == {"IO+1", "S1-1"}
    assert (roles.query("pos == 8")["role"] == "other").all()


def test_last_role_keeps_one_role_a_token(edges, batch):
    assert roles_of(batch).duplicated(["prompt", "pos"]).any()
    assert not pool(edges, batch, Quirks(last_role=True)).duplicated(["upstream", "side"]).any()


def test_double_count_counts_paths_in_all_but_the_first_prompt(edges, batch):
    plain, quirky = pool(edges, batch), pool(edges, batch, Quirks(double_count=True))
    assert row(quirky, "0.1", "dest", "IO")["prompts"] == 1 + 3
    assert row(quirky, "0.1", "dest", "IO")["weight"] == (2 + 3 * 4) / 4
    assert row(quirky, "MLP 0", "src", "IO")["prompts"] == 1
    assert len(plain) == len(quirky)


def test_first_writer_merges_sides_and_source_roles(edges, batch):
    table = pool(edges, batch, Quirks(first_writer=True))
    merged = table[(table["upstream"] == "0.1") & (table["role"] == "end")]
    assert len(merged) == 1
    assert merged["side"].item() == "dest" and merged["prompts"].item() == 2
    assert len(pool(edges, batch)) > len(table)


def test_intervals_hold_the_mean_and_shrink_with_agreement(batch):
    rng = np.random.default_rng(0)
    rows = [(n, n, "0.1", "1.0", "dest", 9, 1, 1 + rng.normal(), 1) for n in range(4)]
    rows += [(4 + n, n, "0.2", "1.0", "dest", 9, 1, 1.0, 1) for n in range(4)]
    table = pool(edge_table(rows), batch).set_index("upstream")
    assert (table["low"] <= table["weight"]).all() and (table["weight"] <= table["high"]).all()
    assert table.loc["0.1", "low"] < table.loc["0.1", "high"]
    assert table.loc["0.2", "low"] == table.loc["0.2", "high"] == 1
    assert (table["prompts_low"] == 4).all()  # in every prompt, so in every resample


def test_intervals_resample_the_clusters_that_are_given(batch):
    rows = [(n, n, "0.1", "1.0", "dest", 9, 1, float(n // 2), 1) for n in range(4)]
    table = edge_table(rows)
    alone, paired = pool(table, batch).iloc[0], pool(table, batch, clusters=[7, 7, 3, 3]).iloc[0]
    assert (alone["weight"], alone["prompts"]) == (paired["weight"], paired["prompts"]) == (0.5, 4)
    # two clusters: in a quarter of the draws both are the first one, in a quarter the second one
    assert (paired["low"], paired["high"]) == (0, 1)
    other = pool(table, batch, clusters=[0, 1, 0, 1]).iloc[0]  # every cluster has the mean weight
    assert other["low"] == other["high"] == 0.5


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(1)
    rows = [
        (n, n % 40, f"0.{n // 40}", "1.0", "dest", 9, 1, rng.normal(), 1) for n in range(40 * 60)
    ]
    table = pool(edge_table(rows), batch_of(40))
    inside = ((table["low"] <= 0) & (table["high"] >= 0)).mean()
    assert len(table) == 60 and 0.85 <= inside < 1


def test_prompts_without_names_have_end_and_others(batch):
    roles = roles_of(replace(batch, roles={}))
    assert set(roles["role"]) == {"end", "other"}
    assert (roles.query("role == 'end'")["pos"] == 9).all() and len(roles) == 40


def test_pooling_does_not_depend_on_the_order_of_edges(edges, batch):
    one, other = pool(edges, batch), pool(edges.iloc[::-1], batch)
    pd.testing.assert_frame_equal(one, other)


@pytest.mark.parametrize("suffix", [".graphml", ".json", ".parquet"])
def test_files_are_read_back_without_loss(edges, batch, tmp_path, suffix):
    circuit = Circuit(pool(edges, batch), {"model": 'a "<&> model', "level": "0.5"})
    path = circuit.save(tmp_path / f"circuit{suffix}")
    back = Circuit.load(path)
    pd.testing.assert_frame_equal(back.edges, circuit.edges, check_exact=True)
    assert back.facts == circuit.facts
    assert list(tmp_path.iterdir()) == [path]


def test_a_circuit_is_saved_as_a_page_that_cannot_be_read_back(edges, batch, tmp_path):
    path = Circuit(pool(edges, batch), {"model": "tiny"}).save(tmp_path / "circuit.html")
    text = path.read_text(encoding="utf-8")
    assert "A circuit of tiny" in text and "MLP 0" in text
    with pytest.raises(ValueError, match=r"not as '\.html'"):
        Circuit.load(path)


def test_graph_joins_what_a_head_reads_to_what_it_writes(edges, batch):
    graph = to_graph(Circuit(pool(edges, batch), {}))
    assert graph.nodes["1.0@end"] == {"component": "1.0", "role": "end", "height": 1.0}
    assert graph.has_edge("0.1@end", "1.0@end") and graph.has_edge("MLP 0@IO", "1.0@end")
    assert graph.number_of_edges() == len(pool(edges, batch))


def test_other_formats_are_refused(edges, batch, tmp_path):
    with pytest.raises(ValueError, match=r"not as '\.gml'"):
        Circuit(pool(edges, batch), {}).save(tmp_path / "circuit.gml")
    assert set(KEY) <= set(pool(edges, batch).columns)
