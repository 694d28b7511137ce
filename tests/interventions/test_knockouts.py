"""Knocked-out paths: the run without signals is the model's own, and planted backups take over."""

import pytest
import torch

from gated import KINDS, TOLERANCE, batch_of
from sparse_signals.core.forward import run_without
from sparse_signals.core.run import run_model
from sparse_signals.interventions.changes import clean_run, read_layers
from sparse_signals.interventions.edge_signals import read_signals
from sparse_signals.interventions.intervene import intervene
from sparse_signals.interventions.knockouts import Rounds, knock_out, takeover
from sparse_signals.planted.circuits import planted
from sparse_signals.tracing.contributions import Settings, read_weights
from sparse_signals.tracing.roots import Root, TraceError
from sparse_signals.tracing.trace import trace_run


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def weights(kind, request):
    return read_weights(request.getfixturevalue(kind))


@pytest.fixture(scope="module")
def batch():
    return batch_of(6)


def nothing(weights, batch):
    size = len(weights.components) - 1
    return torch.zeros(*batch.tokens.shape, size, weights.model.d_model, dtype=weights.model.dtype)


@pytest.mark.parametrize("freeze", [False, True])
def test_without_anything_removed_it_is_the_model(kind, weights, batch, freeze):
    removed = nothing(weights, batch)
    with torch.no_grad():
        run, streams, _ = run_without(weights, batch, removed)
        run, _, F = run_without(weights, batch, removed, streams if freeze else None)
    expected = run_model(weights.model, batch.tokens, batch.mask)
    for name in ("outputs", "scale", "v"):
        gap = (getattr(run, name) - getattr(expected, name)).abs().max()
        assert gap < TOLERANCE[kind], name
    for name in ("q", "k", "pattern"):
        gap = (getattr(run.attention, name) - getattr(expected.attention, name)).abs().max()
        assert gap < TOLERANCE[kind], name
    assert (F - difference(weights.model, batch)).abs().max() < TOLERANCE[kind]


def difference(model, batch):
    clean = clean_run(model, batch)
    final = model.bridge.ln_final(clean.final[:, None])[:, 0] @ model.bridge.unembed.W_U
    return final.gather(1, clean.answers) @ torch.tensor([1.0, -1.0], dtype=model.dtype)


@pytest.mark.parametrize("freeze", [False, True])
def test_a_removed_signal_is_a_global_ablation(kind, weights, batch, freeze):
    """As `paths.intervene` has it, on an edge into a head of the last layer at the last token."""
    model, settings = weights.model, Settings(level=0.5, context=True)
    roots = [Root(2, head, "end") for head in range(model.n_heads)]
    run = run_model(model, batch.tokens, batch.mask)
    traced = trace_run(weights, run, batch, roots, settings)
    edges = traced.edges[traced.edges["downstream"].str.startswith("2.")]
    edges = edges[edges["upstream"].str.match("[0-9]|MLP")].iloc[:1]
    signals = read_signals(weights, batch, traced, edges)
    clean = clean_run(model, batch)
    expected = intervene(
        read_layers(model),
        clean,
        signals,
        scopes=["global"],
        modes=["ablate"],
        freeze_norms=freeze,
    )
    edge, removed = edges.iloc[0], nothing(weights, batch)
    place = weights.components["component"].tolist().index(edge["upstream"])
    removed[edge["prompt"], edge["token"], place] = signals.delta[0]
    with torch.no_grad():
        _, streams, _ = run_without(weights, batch, nothing(weights, batch))
        _, _, F = run_without(weights, batch, removed, streams if freeze else None)
    assert abs(F[edge["prompt"]] - expected["F"].item()) < TOLERANCE[kind]
    assert abs(expected["F_change"].item()) > 2 * TOLERANCE[kind]


@pytest.fixture(scope="module")
def known():
    circuit = planted("redundant", prompts=8)
    return circuit, read_weights(circuit.model)


def test_the_planted_backup_takes_over(known):
    """Scales frozen: without 1.0 all is well, 1.1 carries all; without both the answer is lost."""
    circuit, weights = known
    root = Root(2, 0, "end", "IO")
    table = knock_out(weights, circuit.batch, root, rounds=Rounds(freeze_norms=True))
    rounds = [group for _, group in table.groupby("round")]
    assert [len(group) for group in rounds] == [8, 8, 8]
    assert set(rounds[0]["path"]) == {"2.0 ← 1.0 ← embedding"}
    assert set(rounds[1]["path"]) == {"2.0 ← 1.1 ← embedding"}
    assert rounds[0]["product"].to_numpy() == pytest.approx(0.5, abs=1e-3)
    assert rounds[1]["product"].to_numpy() == pytest.approx(1, abs=1e-3)
    assert rounds[1]["F"].to_numpy() == pytest.approx(rounds[0]["F"].to_numpy(), rel=1e-3)
    assert (rounds[1]["attention"] > 0.99).all() and (rounds[2]["attention"] < 0.01).all()
    assert rounds[2]["F"].abs().max() < 0.01
    assert rounds[1]["score"].to_numpy() == pytest.approx(rounds[1]["expected"].to_numpy())


def test_only_rescaling_brings_score_back(known):
    circuit, weights = known
    root = Root(2, 0, "end", "IO")
    returned = {}
    for freeze in (False, True):
        table = takeover(
            knock_out(weights, circuit.batch, root, rounds=Rounds(1, freeze_norms=freeze))
        )
        row = table[(table["measure"] == "returned")].iloc[0]
        assert row["low"] <= row["value"] <= row["high"] and row["firings"] == 8
        returned[freeze] = row["value"]
    assert abs(returned[True]) < 1e-9 and returned[False] > 0.02


def test_knocking_out_a_whole_path_takes_what_backups_share(known):
    """Both informants listen to 0.0 at S2; a path to the key of 1.0 leads through it."""
    circuit, weights = known
    rounds = Rounds(1, side="src", depth=None)
    table = knock_out(weights, circuit.batch, Root(1, 0, "end", "S2"), rounds=rounds)
    assert set(table.loc[table["round"] == 0, "path"]) == {"1.0 ← 0.0 ← embedding"}
    assert (table.loc[table["round"] == 1, "F"] < 1).all()


def test_a_root_must_be_a_head(known):
    circuit, weights = known
    with pytest.raises(TraceError, match="no head"):
        knock_out(weights, circuit.batch, Root(9, 0))
