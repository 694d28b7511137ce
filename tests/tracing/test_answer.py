"""What the answer hears of a score is what it moves by when the score is moved."""

import pytest
import torch

from gated import KINDS, batch_of
from sparse_signals.core.forward import logit_difference
from sparse_signals.core.model import load_model
from sparse_signals.core.prompts import PromptError, encode, ioi_prompts
from sparse_signals.core.run import run
from sparse_signals.tracing.answer import score_gradients
from sparse_signals.tracing.contributions import Settings
from sparse_signals.tracing.roots import strongest_roots
from sparse_signals.tracing.trace import trace, trace_prompts


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_scores_moved_by_hand(kind, request):
    model, batch = request.getfixturevalue(kind), batch_of(6)
    found, step = score_gradients(model, batch), 0.05
    seen = 0
    for layer, head, back in ((0, 1, 0), (1, 0, 1), (2, 3, 0), (2, 2, 0)):
        dest, src = int(batch.last.min()) - back, 2
        moved = []
        for sign in (-1, 1):

            def move(weights, hook, sign=sign, place=(head, dest), src=src):
                row = weights[:, place[0], place[1]].clone()
                row[:, src] *= torch.exp(torch.tensor(sign * step))
                weights[:, place[0], place[1]] = row / row.sum(-1, keepdim=True)
                return weights

            hooks = [(f"blocks.{layer}.attn.hook_pattern", move)]
            moved.append(logit_difference(model, batch, hooks))
        expected = (moved[1] - moved[0]) / (2 * step)
        ours = found[layer, :, head, dest, src]
        torch.testing.assert_close(ours, expected, atol=1e-8, rtol=2e-3)
        seen += (expected.abs() > 1e-4).sum()
    assert seen > 5


def test_gradients_do_not_depend_on_the_pieces(tiny_gpt2, monkeypatch):
    batch = batch_of(6)
    whole = score_gradients(tiny_gpt2, batch)
    monkeypatch.setattr("sparse_signals.tracing.answer.CHUNK_BYTES", 16)  # a prompt at a time
    torch.testing.assert_close(score_gradients(tiny_gpt2, batch), whole)


def test_prompts_without_names_have_no_answer(tiny_gpt2, batch):
    with pytest.raises(PromptError, match="gradient of the answer needs prompts with two"):
        score_gradients(tiny_gpt2, batch)


def test_edges_weighed_by_the_answer_are_the_same_edges(monkeypatch):
    model = load_model("gpt2-ioi", device="cpu", dtype=torch.float64)
    batch = encode(model, ioi_prompts(12, seed=4, tokenizer=model.tokenizer))
    roots = strongest_roots(model, batch)
    plain = trace(run(model, batch), roots)
    monkeypatch.setattr("sparse_signals.core.run.CHUNK_PROMPTS", 5)
    heard = trace_prompts(model, batch, roots, Settings(weighting="answer"))
    place = ["prompt", "upstream", "layer", "head", "side", "dest", "src"]
    edges = plain.edges.merge(heard.edges, on=place, suffixes=("", "_heard"))
    assert len(edges) == len(plain.edges) == len(heard.edges)
    at = tuple(edges[["layer", "prompt", "head", "dest", "src"]].to_numpy().T)
    expected = edges["weight"] * score_gradients(model, batch).numpy()[at]
    assert edges["weight_heard"].to_numpy() == pytest.approx(expected.to_numpy(), abs=1e-9)
    assert (edges["weight_heard"] < 0).any() and (edges["weight_heard"] > 0.1).any()
    assert heard.firings["error"].max() < 1e-9
