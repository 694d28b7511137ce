"""Knocked-out paths: the run without signals is the model's own, and planted backups take over."""

import pytest
import torch

from gated import KINDS, TOLERANCE, batch_of
from sparse_signals.core.forward import forward
from sparse_signals.core.run import run
from sparse_signals.interventions.changes import clean_run
from sparse_signals.interventions.edge_signals import read_signals
from sparse_signals.interventions.intervene import intervene_on
from sparse_signals.interventions.knockouts import knock_out, takeover
from sparse_signals.planted.circuits import planted
from sparse_signals.tracing.contributions import Settings
from sparse_signals.tracing.roots import Root, TraceError
from sparse_signals.tracing.trace import Trace, trace_chunk


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def model(kind, request):
    return request.getfixturevalue(kind)


@pytest.fixture(scope="module")
def batch():
    return batch_of(6)


@pytest.mark.parametrize("freeze", [False, True])
def test_a_removed_signal_is_a_global_ablation(kind, model, batch, freeze):
    """As `intervene_on` has it, on an edge into a head of the last layer at the last token."""
    settings = Settings(level=0.5, context=True, fraction=1.0)
    roots = [Root(2, head, "end") for head in range(model.n_heads)]
    tables = trace_chunk(run(model, batch), roots, settings)
    traced = Trace(model, batch, tuple(roots), settings, *tables)
    edges = traced.edges[traced.edges["layer"] == 2]
    edges = edges[edges["kind"].isin(["head", "MLP"])].iloc[:1]
    signals = read_signals(traced, edges)
    expected = intervene_on(
        clean_run(model, batch), signals, scopes=["global"], modes=["ablate"], freeze_norms=freeze
    )
    with torch.no_grad():
        clean = forward(model, batch)
    edge, removed = edges.iloc[0], torch.zeros_like(clean.run.outputs)
    place = model.components["component"].tolist().index(edge["upstream"])
    removed[edge["prompt"], edge["token"], place] = signals.delta[0]
    with torch.no_grad():
        found = forward(model, batch, removed=removed, like=clean.scales if freeze else None)
    assert abs(found.difference[edge["prompt"]] - expected["F"].item()) < TOLERANCE
    assert abs(expected["F_change"].item()) > 2 * TOLERANCE


@pytest.fixture(scope="module")
def known():
    return planted("redundant", prompts=8)


def test_the_planted_backup_takes_over(known):
    """Scales frozen: without 1.0 all is well, 1.1 carries all; without both the answer is lost."""
    root = Root(2, 0, "end", "IO")
    table = knock_out(known.model, known.batch, root, freeze_norms=True)
    rounds = [group for _, group in table.groupby("round")]
    assert [len(group) for group in rounds] == [8, 8, 8]
    assert set(rounds[0]["path"]) == {"2.0 ← 1.0 ← embedding"}
    assert set(rounds[1]["path"]) == {"2.0 ← 1.1 ← embedding"}
    assert rounds[0]["product"].to_numpy() == pytest.approx(0.5, abs=1e-3)
    assert rounds[1]["product"].to_numpy() == pytest.approx(1, abs=1e-3)
    assert rounds[1]["F"].to_numpy() == pytest.approx(rounds[0]["F"].to_numpy(), rel=1e-3)
    assert (rounds[1]["attention"] > 0.99).all() and (rounds[2]["attention"] < 0.01).all()
    assert rounds[2]["F"].abs().max() < 0.01
    # what is left of the score is rounding, whatever its sign, and has no path
    assert rounds[2][["path", "product", "carried"]].isna().all(axis=None)
    assert rounds[1]["score"].to_numpy() == pytest.approx(rounds[1]["expected"].to_numpy())


def test_only_rescaling_brings_score_back(known):
    root = Root(2, 0, "end", "IO")
    returned = {}
    for freeze in (False, True):
        rounds = knock_out(known.model, known.batch, root, number=1, freeze_norms=freeze)
        table = takeover(rounds)
        row = table[(table["measure"] == "returned")].iloc[0]
        assert row["low"] <= row["value"] <= row["high"] and row["firings"] == 8
        returned[freeze] = row["value"]
    assert abs(returned[True]) < 1e-9 and returned[False] > 0.02


def test_a_root_must_be_a_head(known):
    with pytest.raises(TraceError, match="no head"):
        knock_out(known.model, known.batch, Root(9, 0))
