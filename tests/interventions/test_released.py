"""The way of the released code, against its definitions written out."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from reproduced import ioi_batch, loaded, save_published_size
from sparse_signals.core.forward import logit_difference
from sparse_signals.core.model import activations
from sparse_signals.core.prompts import roles_of
from sparse_signals.core.run import run
from sparse_signals.heads.svd import head_svd, qk_forms
from sparse_signals.interventions.edge_signals import read_signals
from sparse_signals.interventions.released import (
    RELEASED,
    between,
    edges_on_firings,
    graph_sizes,
    released_effects,
    released_firings,
    released_graph,
    released_roles,
    released_roots,
    released_signals,
)
from sparse_signals.signals.firings import find_firings
from sparse_signals.tracing.trace import Trace, trace

PROMPTS = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return loaded(save_published_size(tmp_path_factory.mktemp("released") / "gpt2"))


@pytest.fixture(scope="module")
def batch(model):
    return released_roles(ioi_batch(model, PROMPTS))


@pytest.fixture(scope="module")
def ran(model, batch):
    return run(model, batch)


@pytest.fixture(scope="module")
def firings(ran):
    return released_firings(ran).rename_axis("firing").reset_index()


@pytest.fixture(scope="module")
def graph(ran, firings, batch):
    end, io = (batch.roles[role].numpy()[firings["prompt"]] for role in ("end", "IO"))
    at = (firings["dest"] == end) & (firings["src"] == io) & (firings["score"] >= 0)
    roots = released_roots(firings.loc[at & (firings["layer"] > 3), "name"].unique().tolist()[-2:])
    return released_graph(trace(ran, roots, RELEASED), range(PROMPTS))


@pytest.fixture(scope="module")
def every(model, batch, firings, graph):
    """The first edges of the graph on all firings."""
    fired = firings[firings["score"] >= 0]
    edges = edges_on_firings(graph[graph["role"].isin(["end", "S2"])], fired, batch)
    edges = edges.groupby("prompt").head(8).reset_index(drop=True)
    return Trace(model, batch, (), RELEASED, firings, edges)


def test_the_last_role_of_a_token_counts(batch):
    roles = roles_of(batch).groupby(["prompt", "pos"])["role"].last()
    rows = zip(batch.table.to_dict("records"), batch.labels, strict=True)
    seen = 0
    for n, (row, labels) in enumerate(rows):
        if labels[int(batch.roles["IO"][n]) :][1:2] != [" and"] or row["order"] != "ABBA":
            continue
        seen += 1  # "IO and S": the token between is IO+1, and then S1-1
        assert roles[n, int(batch.roles["IO"][n]) + 1] == "S1-1"
        assert roles[n, len(labels) - 1] == "end" and roles[n, int(batch.roles["S1"][n])] == "S1"
    assert seen > 0
    verb, punct = batch.roles["verb"], batch.roles["punct"]
    for n, labels in enumerate(batch.labels):
        given = [m for m, x in enumerate(labels) if x in (" gave", " give")]
        assert int(verb[n]) == (given or [int(batch.roles["S2"][n]) + 1])[-1]
        stops = [m for m, x in enumerate(labels) if x == "."] or [
            m for m, x in enumerate(labels) if x == ","
        ]
        assert int(punct[n]) == (stops[-1] if stops else -1)


def test_firings_are_counted_with_scores_of_any_sign(ran, firings):
    strict = find_firings(ran).table()
    assert len(firings) > len(strict) > 100
    ours = firings[firings["score"] >= 0]
    places = ["layer", "prompt", "head", "dest", "src"]
    assert set(map(tuple, ours[places].to_numpy())) == set(map(tuple, strict[places].to_numpy()))
    assert (firings["size"] == firings["vectors"].map(len)).all() and (firings["size"] > 0).all()


def test_the_graph_has_inputs_of_heads_as_nodes():
    rows = [
        ("0.0", "1.0", "S2"),
        ("0.1", "1.0", "S2"),
        ("0.0", "1.0", "end"),
        ("1.0", "2.0", "end"),
    ]
    graph = pd.DataFrame(rows, columns=["upstream", "downstream", "role"])
    assert graph_sizes(graph) == {"nodes": 7, "edges": 7, "contribution_edges": 4, "heads": 4}
    assert between(graph, [(None, "1.0", "S2")]).tolist() == [True, True, False, False]
    assert between(graph, [("0.0", None, None), ("0.1", None, None)]).tolist() == [True] * 3 + [
        False
    ]


def test_edges_into_tokens_without_a_role_are_left_out(graph):
    assert len(graph) > 100 and "other" not in set(graph["role"])
    assert not graph.duplicated(["upstream", "downstream", "role"]).any()


def test_delta_is_the_projection_of_what_was_written_and_of_a_one(model, every):
    signals = read_signals(every)
    found = released_signals(model, signals)
    svd, forms = head_svd(model), qk_forms(model)
    for n in range(0, len(signals), max(1, len(signals) // 12)):
        edge = signals.edges.iloc[n]
        omega = forms.A[edge.layer, edge["head"]] @ forms.B[edge.layer, edge["head"]].mT
        left, _, right = torch.linalg.svd(omega)
        V = (left if edge.side == "dest" else right.mT)[:, : model.d_head]
        P = V[:, signals.chosen[n]] @ V[:, signals.chosen[n]].mT
        expected = (P @ torch.cat([signals.written[n], torch.ones(1).double()]))[:-1]
        torch.testing.assert_close(found.delta[n], expected - expected.mean())
    assert len(signals) > 25 and svd.S.shape[-1] == model.d_head


def test_single_ablations_equal_hooks(model, batch, every):
    alone = pd.Series(True, every.edges.index)
    singles, _ = released_effects(every, slice(0, PROMPTS), alone, ~alone)
    signals = released_signals(model, read_signals(every))
    clean = logit_difference(model, batch)
    scale = activations(model, batch.tokens, ("scale",))["scale"]
    for n in range(0, len(signals), max(1, len(signals) // 6)):
        edge = signals.edges.iloc[n]
        delta, up = signals.delta[n], int(edge.upstream.split(".")[0])

        def write(value, hook, edge=edge, delta=delta):
            value[edge.prompt, edge.token] -= delta
            return value

        changed = logit_difference(model, batch, [(f"blocks.{up}.hook_attn_out", write)])
        x = delta / scale[edge.layer, edge.prompt, edge.token]
        local = []
        for name in "qkv":
            block = model.bridge.blocks[edge.layer]
            W = getattr(block.attn, f"W_{name.upper()}")[edge["head"]]
            change = (x - x.mean()) * block.ln1.w @ W

            def read(value, hook, edge=edge, change=change):
                value[edge.prompt, edge.token, edge["head"]] -= change
                return value

            local.append((f"blocks.{edge.layer}.attn.hook_{name}", read))
        expected = {
            "global": (changed - clean)[edge.prompt],
            "local": (logit_difference(model, batch, local) - clean)[edge.prompt],
        }
        role = every.edges["role"].iloc[n]
        place = [edge.prompt, edge.upstream, edge.downstream, role]
        same = (singles[["prompt", "upstream", "downstream", "role"]] == place).all(axis=1)
        ours = singles[same].groupby("scope")["F_change"].agg(list)
        for scope, value in expected.items():
            assert min(abs(x - float(value)) for x in ours[scope]) < 1e-8
    assert singles["F_change"].abs().max() > 1e-3


def test_random_vectors_stand_beside_signals_where_asked(every):
    alone = pd.Series(True, every.edges.index)
    few = every.edges["prompt"] < 5
    singles, _ = released_effects(every, slice(0, PROMPTS), alone, few)
    random = singles[singles["control"] == "random"]
    assert len(random) > 0 and random["prompt"].max() < 5 < singles["prompt"].max()
    assert len(singles) - len(random) == 2 * len(every.edges)


def test_sets_of_edges_are_ablated_together(model, batch, firings, graph):
    fired = firings[firings["score"] >= 0]
    ends = [("0.11", None, None), ("0.9", None, None)]
    edges = edges_on_firings(graph[between(graph, ends)], fired, batch)
    traced = Trace(model, batch, (), RELEASED, firings, edges)
    none = pd.Series(False, edges.index)
    _, sets = released_effects(traced, slice(4, PROMPTS), none, none)
    sets = sets[sets["key"] == "K"]
    assert sets["prompt"].between(4, PROMPTS - 1).all()
    signals = released_signals(model, read_signals(traced))
    prompt = int(sets["prompt"].iloc[0])
    here = (signals.edges["prompt"] == prompt).to_numpy()

    def write(value, hook):
        for n in here.nonzero()[0]:
            value[prompt, signals.edges["token"].iloc[n]] -= signals.delta[n]
        return value

    after = logit_difference(model, batch, [("blocks.0.hook_attn_out", write)])
    expected = float((after - logit_difference(model, batch))[prompt])
    ours = sets[(sets["prompt"] == prompt) & (sets["scope"] == "global")].set_index("set")
    assert ours.loc["together", "F_change"] == pytest.approx(expected, abs=1e-10)
    assert here.sum() > 3 and abs(expected) > 1e-6


def test_nothing_to_ablate_gives_empty_tables(every):
    empty = replace(every, edges=every.edges.head(0))
    none = pd.Series(False, empty.edges.index)
    singles, sets = released_effects(empty, slice(0, PROMPTS), none, none)
    assert len(singles) == len(sets) == 0 and "F_change" in singles and "scope" in sets
