"""Circuits of edges and nodes run alone: what hooks of TransformerLens do, whatever the model."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from aligned import aligned
from gated import KINDS, TOLERANCE
from hooked import hooked, ungrouped
from sparse_signals.core.forward import Gates
from sparse_signals.core.model import logits, wrap_model
from sparse_signals.core.objective import Objective
from sparse_signals.core.prompts import PromptError
from sparse_signals.core.run import run
from sparse_signals.interventions import aligned_circuits as module
from sparse_signals.interventions.aligned_circuits import (
    AlignedPrompts,
    Edges,
    best_edges,
    best_nodes,
    direct_edges,
    role_rows,
    run_edges,
    run_nodes,
    template_places,
    traced_edges,
)
from sparse_signals.tracing.contributions import Settings
from sparse_signals.tracing.roots import Root, logit_attribution
from sparse_signals.tracing.trace import Trace

TEMPLATES = [0, 1, 0, 1, 0, 1, 0, 1]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def model(kind, request):
    return request.getfixturevalue(kind)


@pytest.fixture(scope="module")
def pair(tokens, mask):
    return aligned(tokens, mask)


@pytest.fixture
def prompts(model, pair):
    return AlignedPrompts(model, *pair, Objective.of_names(pair[0]))


def gap(a, b):
    return float((a - b).abs().max())


def some(edges, seed=0, share=0.5):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(len(edges), generator=generator) < share


# --- edges ---------------------------------------------------------------------------------------


def test_all_edges_are_the_model_and_none_the_counterfactual(kind, model, prompts):
    edges = Edges.of(model)
    found = run_edges(prompts, torch.tensor([[True], [False]]).expand(2, len(edges)))
    for n, batch in enumerate((prompts.batch, prompts.counterfactual)):
        expected = logits(model, batch.tokens, batch.last)
        asked = prompts.objective
        assert gap(found.F[n], asked.value(expected)) < TOLERANCE
        assert gap(found.probability[n], asked.probability(expected)) < TOLERANCE
        assert torch.equal(found.first[n], asked.comes_first(expected))
    assert gap(found.F[0], found.F[1]) > 1e-3


def of_inputs(edges):
    """A third of inputs open to all, a third to none, a third to some."""
    third = torch.tensor(edges.table().groupby(["input", "downstream"]).ngroup().to_numpy()) % 3
    return (third == 0) | ((third == 1) & some(edges))


CIRCUITS = {
    "any edges": some,
    "all below the last layer": lambda edges: (edges.layer < 2) | some(edges),
    "whole inputs": of_inputs,
}


@pytest.mark.parametrize("chosen", CIRCUITS)
def test_a_circuit_is_hooks_at_all_inputs(kind, model, prompts, tiny_directories, chosen):
    """Edges of the table, one by one, as gates of a model whose heads share nothing."""
    edges, groups = Edges.of(model), model.n_heads // model.n_kv_heads
    circuit, size = CIRCUITS[chosen](edges), len(model.components) - 1
    heads = (1, model.n_layers, model.n_heads, size)
    shapes = dict.fromkeys("qkv", heads) | {"mlp": (1, model.n_layers, size), "out": (1, size)}
    values = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    names = model.components["component"].tolist()
    for edge in edges.table()[circuit.numpy()].itertuples():
        layer, up = edge.layer, names.index(edge.upstream)
        if edge.input in "qkv":
            shared = groups if edge.input in "kv" else 1
            values[edge.input][0, layer, edge.head : edge.head + shared, up] = 1
        elif edge.input == "mlp":
            values["mlp"][0, layer, up] = 1
        else:
            values["out"][0, up] = 1
    reference = run(model, prompts.counterfactual).outputs.flatten(0, 1)
    place = torch.arange(len(reference)).view(prompts.batch.tokens.shape)
    gates = Gates(torch.zeros_like(place), reference, place, **values)
    plain = wrap_model(ungrouped(tiny_directories[kind.removeprefix("tiny_")]), kind)
    found = run_edges(prompts, circuit[None]).F[0]
    assert gap(found, hooked(plain, prompts.batch, gates)) < TOLERANCE
    ends = run_edges(prompts, torch.tensor([[True], [False]]).expand(2, len(edges))).F
    assert all(gap(found, end) > 1e-4 for end in ends)


def test_layers_of_edges_are_those_of_the_table(model):
    edges = Edges.of(model)
    layer = edges.table()["layer"].replace(-1, model.n_layers)
    assert edges.layer.tolist() == layer.tolist()


def test_chunks_of_prompts_change_nothing(tiny_llama, pair, monkeypatch):
    prompts = AlignedPrompts(tiny_llama, *pair, Objective.log_probability([[3, 4]] * 8))
    circuits = torch.stack([some(Edges.of(tiny_llama), seed) for seed in range(3)])
    whole = run_edges(prompts, circuits)
    monkeypatch.setattr(module, "CIRCUIT_BYTES", 1)
    found = run_edges(prompts, circuits)
    assert gap(found.F, whole.F) < 3e-6 and torch.equal(found.first, whole.first)
    assert gap(whole.F.exp(), whole.probability) < 1e-6


def test_edges_are_those_of_mib(model):
    """Into queries, into keys and values of groups, MLPs and the read-out, from all before."""
    before = [1 + layer * (model.n_heads + 1) for layer in range(model.n_layers)]
    into_heads = (model.n_heads + 2 * model.n_kv_heads) * sum(before)
    into_mlps = sum(before) + (0 if model.parallel else model.n_layers * model.n_heads)
    out = 1 + model.n_layers * (model.n_heads + 1)
    table = Edges.of(model).table()
    assert len(Edges.of(model)) == len(table) == into_heads + into_mlps + out
    assert not table.duplicated().any()
    assert not table["upstream"].str.contains("bias|position").any()


def test_values_of_a_group_are_added(tiny_llama):
    edges, size = Edges.of(tiny_llama), len(tiny_llama.components) - 1
    shape = (tiny_llama.n_layers, tiny_llama.n_heads, size)
    k = torch.arange(3 * 4 * size, dtype=torch.float64).view(shape)
    found = edges.table().assign(value=edges.flat({"k": k}).numpy())
    row = found.query("input == 'k' and layer == 2 and head == 2 and upstream == '0.1'")
    up = tiny_llama.components["component"].tolist().index("0.1")
    assert row["value"].item() == k[2, 2, up] + k[2, 3, up]
    assert not found.query("input != 'k'")["value"].any()
    with pytest.raises(ValueError, match="values of mlp are"):
        edges.flat({"mlp": k})


def test_prompts_must_be_aligned(tiny_gpt2, pair):
    asked = Objective.of_names(pair[0])
    with pytest.raises(PromptError, match="both must be alike"):
        AlignedPrompts(tiny_gpt2, pair[0], pair[1].rows(slice(4)), asked)
    with pytest.raises(PromptError, match="of 2 prompts"):
        AlignedPrompts(tiny_gpt2, *pair, asked.rows(slice(2)))


# --- nodes ---------------------------------------------------------------------------------------


@pytest.fixture
def placed(prompts):
    """The prompts with templates, as long as one another."""
    table = pd.DataFrame({"text": [""] * 8, "template": TEMPLATES})
    everywhere = torch.ones_like(prompts.batch.mask)
    of = {"table": table, "mask": everywhere, "roles": {"S2": torch.full((8,), 7)}}
    batch, other = (replace(x, **of) for x in (prompts.batch, prompts.counterfactual))
    return replace(prompts, batch=batch, counterfactual=other)


@pytest.mark.parametrize("component", ["1.2", "MLP 1"])
def test_a_node_outside_writes_its_mean(kind, model, placed, component):
    """By a hook, at the one token, with the mean over the prompts of each template."""
    row = role_rows(placed.batch, ["S2", "end"])
    place = model.components["component"].tolist().index(component)
    circuits = torch.ones(2, 3, len(model.components) - 1, dtype=torch.bool)
    circuits[0, 1, place] = False
    found = run_nodes(placed, circuits, row, placed.counterfactual)
    name = "blocks.1.attn.hook_z" if component == "1.2" else "blocks.1.hook_mlp_out"
    at = (7, 2) if component == "1.2" else (7,)
    kept = []
    keep = (name, lambda value, hook: kept.append(value[(slice(None), *at)]))
    logits(model, placed.counterfactual.tokens, None, [keep])
    means = [kept[0][torch.tensor(TEMPLATES) == template].mean(0) for template in TEMPLATES]

    def replaced(value, hook):
        value = value.clone()
        value[(slice(None), *at)] = torch.stack(means)
        return value

    clean = placed.objective.value(logits(model, placed.batch.tokens))
    hooks = [(name, replaced)]
    expected = placed.objective.value(logits(model, placed.batch.tokens, None, hooks))
    assert gap(found.F[0], expected) < TOLERANCE
    assert gap(found.F[1], clean) < TOLERANCE
    assert gap(expected, clean) > 3 * TOLERANCE


def test_rows_are_roles(placed):
    row = role_rows(placed.batch, ["S2", "end"])
    assert row[0].tolist() == [0] * 7 + [1, 0, 0, 0, 2]
    with pytest.raises(PromptError, match="no role 'S9'"):
        role_rows(placed.batch, ["S9"])


def test_places_are_positions_in_templates(placed, prompts):
    shorter = placed.batch.positions(0, 5)
    mask = shorter.mask.clone()
    mask[0, 4] = False
    ours, theirs = template_places([placed.batch, replace(shorter, mask=mask)])
    assert torch.equal(ours[:, :4], theirs[:, :4]) and theirs[0, 4] == -1
    assert torch.equal(ours[0], ours[2]) and len(ours.unique()) == 24
    with pytest.raises(PromptError, match="need that column"):
        template_places([prompts.batch])


def test_a_reference_has_all_templates(placed):
    row = role_rows(placed.batch, ["end"])
    circuits = torch.ones(1, 2, len(placed.model.components) - 1, dtype=torch.bool)
    with pytest.raises(PromptError, match="template and length of prompt 1"):
        run_nodes(placed, circuits, row, placed.counterfactual.rows(slice(1)))


# --- rankings ------------------------------------------------------------------------------------


def test_the_largest_come_first_and_ties_at_random():
    values = torch.tensor([0.5, -3.0, 0.0, 2.0] + [0.0] * 96)
    found = best_edges(values, (0.0, 0.01, 0.02, 0.03, 0.5, 1.0))
    assert found.sum(1).tolist() == [0, 1, 2, 3, 50, 100]
    assert found[3].nonzero().flatten().tolist() == [0, 1, 3]
    assert found[1].nonzero().item() == 1
    assert (found[1:] >= found[:-1]).all()
    assert not torch.equal(found[4], best_edges(values, (0.5,), seed=1)[0])
    assert torch.equal(found[4], best_edges(values, (0.5,))[0])


def test_only_nodes_of_some_kinds_are_chosen(tiny_gpt2):
    table = tiny_gpt2.components[:-1]
    values = torch.arange(2 * len(table), dtype=torch.float64).view(2, -1)
    found = best_nodes(tiny_gpt2, values, (0, 1, 3))
    heads = torch.tensor((table["kind"] == "head").tolist())
    assert found[:, :, ~heads].all()
    assert found[:, :, heads].sum((1, 2)).tolist() == [0, 1, 3]
    assert found[1, 1, table["component"].tolist().index("2.3")]
    found = best_nodes(tiny_gpt2, values, (0,), ("head", "MLP"))
    assert sorted(set(table["kind"][found[0, 0].numpy()])) == ["bias", "embedding", "position"]


def test_a_trace_has_values_for_its_edges(tiny_llama, pair):
    """Firings add up; keys share their values; a root is read out; biases are no edges."""
    rows = [
        ("0.1", "head", 1, 2, "dest", 0, 0.4),
        ("0.1", "head", 1, 2, "dest", 0, 0.8),
        ("0.1", "head", 1, 2, "dest", 3, 0.6),
        ("embedding", "embedding", 1, 3, "src", 3, -0.5),
        ("bias 0", "bias", 1, 2, "dest", 3, 0.9),
        ("bias row", "bias row", 1, 2, "dest", 3, 0.9),
    ]
    columns = ["upstream", "kind", "layer", "head", "side", "prompt", "share"]
    table = pd.DataFrame(rows, columns=columns)
    traced = Trace(tiny_llama, pair[0], (Root(1, 2),), Settings(), pd.DataFrame(), table)
    found = (
        Edges.of(tiny_llama).table().assign(value=traced_edges(traced).numpy()).query("value > 0")
    )
    assert found[["upstream", "input", "downstream", "value"]].values.tolist() == [
        ["0.1", "q", "1.2", pytest.approx(1.8 / 8)],
        ["embedding", "k", "1.2", 0.5 / 8],
        ["embedding", "v", "1.2", 0.5 / 8],
        ["1.2", "out", "read-out", 1.0],
    ]


def test_edges_come_by_the_better_of_their_ends(model, prompts):
    table = Edges.of(model).table().assign(value=direct_edges(prompts).numpy())
    table = table.sort_values("value", ascending=False, kind="stable")
    written = logit_attribution(run(model, prompts.batch))[0].mean(0)[:-1].abs()
    best = model.components["component"][int(written.argmax())]
    assert table["upstream"].iloc[0] == best and table["downstream"].iloc[0] == "read-out"
    touches = (table["upstream"] == best) | (table["downstream"] == best)
    assert touches[: touches.sum()].all() or model.n_kv_heads < model.n_heads
