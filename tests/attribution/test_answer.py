"""Traces from the answer: exact, edge by edge and path by path, from any node."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from aligned import aligned
from shipped import CARRIERS, MOVERS
from sparse_signals.attribution import answer as tracing
from sparse_signals.attribution import signals as module
from sparse_signals.attribution.aligned import AlignedRuns, ShareError
from sparse_signals.attribution.answer import reference_mean, trace_answer, vocabulary_mean
from sparse_signals.attribution.graph import carried, change_of, find_edges, ranks
from sparse_signals.attribution.inputs import INPUTS, Heads
from sparse_signals.attribution.paths import find_paths
from sparse_signals.attribution.shares import edge_shares, node_shares
from sparse_signals.attribution.signals import (
    compare_heads,
    edge_sides,
    head_sides,
)
from sparse_signals.attribution.tables import (
    AnswerSettings,
    Asked,
    _names,
    node_of,
    place_name,
    role_names,
    values_of,
)
from sparse_signals.core.model import load_model
from sparse_signals.core.prompts import encode, ioi_prompts
from sparse_signals.core.stats import random_rotation

NODES = (None, Asked("1.2", 8), Asked("MLP 1", 8), Asked("2.1", "end"), Asked("MLP 2", "end"))
STREAMS = (Asked("stream 1", 8, torch.ones(32).double()), Asked("stream 3", "end", torch.ones(32)))


@pytest.fixture(params=("gpt2", "llama", "qwen2", "qwen3", "gpt_neox"))
def runs(request, tokens, mask):
    model = request.getfixturevalue(f"tiny_{request.param}")
    return AlignedRuns.of(model, *aligned(tokens[4:], mask[4:], places=(3, 5)))


def started(runs, asked):
    found = next(runs.readers())
    if asked is not None:
        found = runs.readers_of(node_of(runs, asked, found))
    return found, change_of(runs, found.node)


def close(a, b, tolerance=1e-11):
    return float((a - b).abs().max()) < tolerance * float(b.abs().max())


# --- edges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [*NODES, *STREAMS], ids=str)
def test_all_edges_together_carry_the_whole_difference(runs, asked):
    found, whole = started(runs, asked)
    edges = find_edges(runs, found)
    assert float(whole.abs().min()) > 1e-8
    assert close(carried(runs, found, edges), whole)
    some = edges[torch.arange(len(edges)) % 3 > 0]
    assert not close(carried(runs, found, some), whole, 1e-2)


@pytest.mark.parametrize("asked", STREAMS, ids=str)
def test_a_stream_along_a_direction_has_values_of_its_own(runs, asked):
    found, whole = started(runs, asked)
    first, second = values_of(runs, found.node)
    assert close(first - second, whole) and float(first.abs().min()) > 1e-3
    nodes = (started(runs, x)[0].node for x in (None, Asked("1.2", 8)))
    assert all(values_of(runs, node) is runs.values for node in nodes)


def test_edges_are_those_of_edge_shares_split_by_destination(runs):
    batch, tokens = runs.batch, runs.batch.tokens
    rows = torch.arange(tokens.numel()).view(tokens.shape)
    found = edge_shares(runs.model, batch, runs.counterfactual, row=rows)
    edges = find_edges(runs, next(runs.readers()))
    names, _ = _names(runs.model)
    place = {name: n for n, name in enumerate(runs.model.components["component"])}
    number = torch.tensor([place.get(name, -1) for name in names])
    row = rows[edges.prompt, edges.token + runs.start]
    heads = runs.model.n_heads + 1
    layer, head = (edges.down - 1) // heads, (edges.down - 1) % heads
    for kind, name in enumerate(INPUTS[:4]):
        mine = edges.kind == kind
        expected = getattr(found, name)
        total = torch.zeros_like(expected)
        index = (row, layer, *([] if name == "mlp" else [head]), number[edges.up])
        total.index_put_(tuple(x[mine] for x in index), edges.value[mine], accumulate=True)
        assert close(total, expected), name


def test_nothing_below_the_limit_is_looked_at_and_edges_hang_together(runs):
    found = next(runs.readers())
    every, edges = (find_edges(runs, found, least=least) for least in (0.0, 0.02))
    part = edges.value.abs() / runs.difference.abs()[edges.prompt]
    assert 10 < len(edges) < len(every) / 4
    assert float(part.min()) >= 0.02
    assert bool((edges.strength <= part).all())
    there = set(zip(*(x.tolist() for x in (edges.prompt, edges.up, edges.token)), strict=True))
    inner = edges.down >= 0
    below = zip(*(x[inner].tolist() for x in (edges.prompt, edges.down, edges.dest)), strict=True)
    assert {*below} <= there


def test_ranks_count_within_groups():
    group, value = torch.tensor([1, 0, 1, 0, 1]), torch.tensor([3.0, 1, 5, 2, 3])
    assert ranks(group, value).tolist() == [1, 1, 0, 0, 2]


# --- paths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [None, Asked("1.2", "end"), Asked("MLP 1", "end")], ids=str)
def test_all_paths_together_are_the_whole_difference(request, asked, tokens):
    """Where the last token alone differs there are few enough to find them all."""
    for kind in ("gpt2", "llama"):
        model = request.getfixturevalue(f"tiny_{kind}")
        pair = aligned(tokens[:2], torch.ones(2, 12, dtype=torch.bool), places=(11,))
        runs = AlignedRuns.of(model, *pair)
        found, whole = started(runs, asked)
        ways, ends = find_paths(runs, found, beam=10**6)
        total = torch.zeros_like(whole).index_add(0, ways.prompt[ends], ways.value[ends])
        assert len(ends) > 20
        assert close(total, whole)


def test_a_path_has_what_its_edges_alone_carry(runs):
    found = next(runs.readers())
    edges, (ways, ends) = find_edges(runs, found), find_paths(runs, found, beam=64)
    assert len(ends) > 64
    for end in ends[torch.linspace(0, len(ends) - 1, 12).long()].tolist():
        step, chosen = end, torch.zeros(len(edges), dtype=torch.bool)
        while int(ways.before[step]) >= 0 or int(ways.number[step]) >= 0:
            below = int(ways.before[step])
            match = edges.prompt == ways.prompt[step]
            for name, x in (("up", "number"), ("token", "token"), ("kind", "kind")):
                match &= getattr(edges, name) == getattr(ways, x)[step]
            match &= (edges.down == ways.number[below]) & (edges.dest == ways.token[below])
            assert int(match.sum()) == 1
            chosen |= match
            step = below
        alone = carried(runs, found, edges[chosen])[ways.prompt[end]]
        assert close(alone, ways.value[end])


def test_the_beam_keeps_the_largest(runs):
    found = next(runs.readers())
    (wide, every), (narrow, few) = (find_paths(runs, found, beam=beam) for beam in (5000, 50))
    for prompt in range(len(runs.last)):
        first, second = (
            float(ways.value[ends][ways.prompt[ends] == prompt].abs().max())
            for ways, ends in ((wide, every), (narrow, few))
        )
        assert second <= first * (1 + 1e-12)  # which is the same but for rounding
        assert first == pytest.approx(second, rel=0.5)


# --- signals of differences -----------------------------------------------------------------------


def test_comparisons_are_what_queries_and_keys_carry(runs, monkeypatch):
    monkeypatch.setattr(module, "STRONGEST_SOURCES", 99)
    found = next(runs.readers())
    edges = find_edges(runs, found)
    first, heads = 1 + (runs.model.n_heads + 1), runs.model.n_heads  # layer 1
    mine = edges[(edges.down >= first) & (edges.down < first + heads) & (edges.kind < 2)]
    columns = torch.stack([mine.down, mine.prompt, mine.dest]).unique(dim=1)
    nodes = Heads(1, columns[1], columns[0] - first, columns[2])
    table = compare_heads(runs, found, [nodes])
    assert len(table) > 100
    src = torch.tensor(table["src"].to_numpy())
    row = [table[name].to_numpy() for name in ("prompt", "head", "dest")]
    some = Heads(1, *(torch.tensor(x) for x in (row[0], row[1], row[2] - runs.start)))
    change, score = head_sides(runs, some, src)
    parts = change.slices
    assert close(parts.sum(1), torch.tensor(table["change"].to_numpy()))
    q, k = (getattr(runs.ends[0].layers[1], name) for name in "qk")
    groups = heads // runs.model.n_kv_heads
    pairs = q[some.prompt, some.head, some.dest], k[some.prompt, some.head // groups, src]
    expected = torch.linalg.vecdot(*pairs) / float(runs.model.divisor[1])
    assert close(score.slices.sum(1), expected)
    whole = table.groupby(["prompt", "head", "dest"])["value"].sum()
    for (prompt, head, dest), value in whole.iloc[:10].items():
        match = (mine.prompt == prompt) & (mine.down == first + head)
        match &= mine.dest == dest - runs.start
        assert value == pytest.approx(float(mine.value[match].sum()), abs=1e-13)


@pytest.mark.parametrize("layer", [1, 2])
def test_slices_of_edges_sum_to_their_shares(runs, layer):
    found = next(runs.readers())
    edges, first = find_edges(runs, found), 1 + layer * (runs.model.n_heads + 1)
    mine = edges[(edges.down >= first) & (edges.down < first + runs.model.n_heads)]
    mine = mine[mine.kind < 2]
    sides = edge_sides(runs, found, layer, mine)
    parts = sides.slices
    assert len(mine) > 100
    assert close(parts.sum(1), mine.value)
    other = sides.turned(random_rotation(runs.model.d_head, 0)).slices
    assert close(other.sum(1), mine.value)
    assert not close(other, parts, 1e-2)


# --- traces ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    model = load_model("gpt2-ioi", dtype=torch.float64)
    batch = encode(model, ioi_prompts(12, seed=3, tokenizer=model.tokenizer))
    flip = replace(
        batch, tokens=batch.tokens.scatter(1, batch.roles["S2"][:, None], batch.io[:, None])
    )
    return model, batch, flip


@pytest.fixture(scope="module")
def traced(shipped):
    return trace_answer(*shipped)


def test_a_graph_carries_the_part_that_was_asked_for(traced, shipped):
    assert traced.prompts["explained"].between(0.8, 1.2).all()
    assert traced.prompts["edges"].equals(traced.edges.groupby("prompt")["graph"].sum())
    more = trace_answer(*shipped, settings=AnswerSettings(part=0.95))
    assert (more.prompts["edges"] >= traced.prompts["edges"]).all()
    assert more.prompts["explained"].between(0.95, 1.05).all()


def test_tokens_that_do_not_differ_have_nothing(traced, shipped):
    _, batch, _ = shipped
    s2 = traced.tokens.merge(traced.prompts[["prompt"]].assign(pos=batch.roles["S2"].numpy()))
    assert s2["share"].to_numpy() == pytest.approx(np.ones(12))
    assert float(traced.tokens["value"].abs().sum()) == pytest.approx(
        float(traced.prompts["difference"].abs().sum())
    )


def test_the_answer_is_written_by_the_movers_and_carriers(traced):
    pooled = traced.pool()
    writers = pooled[(pooled["downstream"] == "answer") & (pooled["share"] > 0.08)]["upstream"]
    assert {"2.4", "1.0"} <= set(writers) <= {*MOVERS, *CARRIERS, "MLP 1"}
    assert (pooled["low"] <= pooled["share"]).all() and (pooled["share"] <= pooled["high"]).all()


def test_pooled_shares_add_up(shipped):
    traced = trace_answer(*shipped, settings=AnswerSettings(least=0.0))
    pooled = traced.pool()
    assert pooled[pooled["downstream"] == "answer"]["share"].sum() == pytest.approx(1)
    assert pooled[pooled["upstream"] == "embedding"]["share"].sum() == pytest.approx(1, abs=2)
    tokens = traced.pooled_tokens()
    assert tokens["role"].tolist() == ["S2"]
    assert tokens["share"].tolist() == pytest.approx([1])


def test_clusters_widen_intervals(traced):
    few = traced.pool(clusters=[n // 6 for n in range(12)])
    assert (few["high"] - few["low"]).mean() != (
        traced.pool()["high"] - traced.pool()["low"]
    ).mean()
    one = traced.pool(clusters=[0] * 12)
    assert ((one["high"] - one["low"]).abs() < 1e-12).all()


def test_a_head_can_be_asked_about(shipped, traced):
    model, batch, flip = shipped
    asked = trace_answer(model, batch, flip, asked=Asked("2.4", "end"))
    shares = node_shares(model, batch, flip)
    place = model.components["component"].tolist().index("2.4")
    own = shares[torch.arange(12), batch.last, place]
    assert torch.allclose(torch.tensor(asked.prompts["difference"].to_numpy()), own)
    assert set(asked.edges["downstream"]) >= {"2.4"}
    assert asked.facts["asked"] == "2.4 at end"
    into = traced.edges.query("downstream == '2.4'").groupby("prompt")["value"].sum()
    whole = float(traced.prompts["difference"].abs().mean())
    assert into.to_numpy() == pytest.approx(own.numpy()[into.index], abs=0.03 * whole)


@pytest.mark.slow
def test_chunks_change_nothing(shipped, traced, monkeypatch):
    monkeypatch.setattr("sparse_signals.attribution.aligned.RUNS_BYTES", 1)
    again = trace_answer(*shipped)
    assert again.edges["prompt"].is_monotonic_increasing
    assert again.pool()["share"].to_numpy() == pytest.approx(traced.pool()["share"].to_numpy())


def test_without_a_counterfactual_the_mean_of_the_form_is_one(shipped):
    model, _, _ = shipped
    prompts = ioi_prompts(40, seed=5, tokenizer=model.tokenizer)
    batch = encode(model, prompts[prompts["template"] == prompts["template"][0]])
    mean = reference_mean(model, batch)
    traced = trace_answer(model, batch, mean)
    tokens = traced.tokens[traced.tokens["value"].abs() > 0]
    roles = role_names(batch)[tokens["prompt"], tokens["pos"]]
    assert not {"end", "S1+1"} & set(roles)  # what they have in common
    assert traced.prompts["explained"].notna().all()


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (Asked("head 3", "end"), "no node"),
        (Asked("9.1", "end"), "has no 9.1"),
        (Asked("1.99", "end"), "has no head 1.99"),
        (Asked("3.1", "S2"), "last token"),
        (Asked("stream 1", "end"), "along which direction"),
        (Asked("1.1", "IO-1"), "nothing differs that early"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_is_said(shipped, asked, words):
    with pytest.raises(ShareError, match=words):
        trace_answer(*shipped, asked=asked)


def test_an_answer_that_does_not_change_is_said(shipped):
    model, batch, _ = shipped
    with pytest.raises(ShareError, match="hardly differs"):
        trace_answer(model, batch, batch)


def test_a_prompt_that_does_not_change_is_named_and_the_others_go_on(shipped):
    model, batch, flip = shipped
    tokens = flip.tokens.clone()
    tokens[4] = batch.tokens[4]
    traced = trace_answer(model, batch, replace(flip, tokens=tokens))
    assert traced.prompts.query("flat")["prompt"].tolist() == [4]
    assert 4 not in traced.edges["prompt"].tolist()
    assert traced.pool()["share"].notna().all()
    two = replace(
        traced,
        batch=batch.rows(slice(3, 5)),
        prompts=traced.prompts.query("prompt > 2"),
        edges=traced.edges.query("prompt == 3").assign(prompt=0),
    )
    two = replace(two, prompts=two.prompts.head(2).assign(prompt=range(2)))
    pooled = two.pool()  # a flat prompt beside another one is not drawn, or ΔF could be 0
    assert (pooled["low"] == pooled["high"]).all()
    assert pooled["share"].to_numpy() == pytest.approx(pooled["low"].to_numpy())


def test_pooled_paths_and_comparisons_add_up_over_prompts(traced):
    whole = traced.prompts["difference"].sum()
    paths = traced.pooled_paths()
    assert paths["share"].abs().is_monotonic_decreasing and paths["text"].is_unique
    first = paths.iloc[0]
    mine = traced.paths[traced.paths["roles"] == first["text"]]
    assert first["share"] == pytest.approx(mine["value"].sum() / whole)
    assert first["prompts"] == mine["prompt"].nunique() > 1
    assert first["text"].startswith("embedding at S2 → ")
    assert first["low"] <= first["share"] <= first["high"]
    heads, roles = traced.pooled_comparisons(), role_names(traced.batch)
    best, table = heads.iloc[0], traced.comparisons
    here = (table["name"] == best["name"]) & (
        roles[table["prompt"], table["dest"]] == best["dest_role"]
    )
    here &= roles[table["prompt"], table["src"]] == best["src_role"]
    assert best["share"] == pytest.approx(table.loc[here, "value"].sum() / whole)
    assert best["attention"] == pytest.approx(table.loc[here, "attention"].mean())


def test_a_path_is_told_by_tokens_and_by_roles(traced):
    row = traced.paths.query("steps == 2").iloc[0]
    label = place_name(traced.batch, int(row["prompt"]), int(row["pos"]))
    assert row["text"].startswith(f"embedding at {label} → ")
    assert row["text"].endswith(" → answer") and row["text"].count("→") == row["steps"]
    assert row["text"].replace(label, "S2").split(" → ")[0] == row["roles"].split(" → ")[0]


def test_finished_chunks_are_kept_and_read_again(traced, shipped, tmp_path, monkeypatch):
    first = trace_answer(*shipped, folder=tmp_path)
    monkeypatch.setattr(tracing, "tables_of", None)
    again = trace_answer(*shipped, folder=tmp_path)
    for name in ("prompts", "edges", "tokens", "paths"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(first, name))
        pd.testing.assert_frame_equal(
            getattr(first, name), getattr(traced, name), check_dtype=False, rtol=1e-4, atol=1e-4
        )


def test_a_prompt_alone_is_compared_with_the_mean_word(shipped):
    model, batch, _ = shipped
    words, vectors = model.bridge.embed.W_E, vocabulary_mean(model, batch)
    assert torch.equal(vectors[:, 0], words[batch.tokens[:, 0]])
    assert torch.allclose(vectors[:, 1:], words.mean(0).expand_as(vectors[:, 1:]))


def test_one_of_a_form_has_no_mean(shipped):
    model, batch, _ = shipped
    with pytest.raises(ShareError, match="only one of its form"):
        reference_mean(model, batch.rows(slice(1)))


@pytest.mark.parametrize("wrong", [{"part": 1.0}, {"least": -1.0}, {"beam": 0}, {"paths": 0}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match="must be"):
        AnswerSettings(**wrong)


def test_pooled_intervals_do_not_depend_on_how_many_edges_fit(runs, monkeypatch):
    traced = trace_answer(runs.model, runs.batch, runs.counterfactual)
    whole = traced.pool(draws=20)
    monkeypatch.setattr(tracing, "ENTRIES", 21 * 5)  # five edges at once
    pd.testing.assert_frame_equal(traced.pool(draws=20), whole)
    assert len(whole) > 5 and (whole["low"] < whole["high"]).any()
