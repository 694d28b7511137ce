"""Rules: relevance patching is what autograd finds, and conserves what it should."""

import pytest
import torch

from aligned import aligned
from relevance_pass import relevance_readers
from sparse_signals.attribution.aligned import AlignedRuns
from sparse_signals.attribution.rules import RELP, SECANT, Rule, gradients, integrated
from sparse_signals.attribution.shares import edge_shares

KINDS = ("gpt2", "llama", "qwen2", "qwen3", "gpt_neox")


@pytest.fixture(params=KINDS)
def model(request):
    return request.getfixturevalue(f"tiny_{request.param}")


@pytest.fixture(scope="module")
def pair(tokens, mask):
    return aligned(tokens, mask)


def test_relevance_is_what_autograd_finds_with_constants_held(model, pair):
    batch, other = pair
    found = edge_shares(model, *pair, rule=RELP)
    prompt, length = 7, int(batch.mask[7].sum())
    io, s = batch.answers("a test")[prompt].tolist()
    direction = torch.zeros(50).double()
    direction[io], direction[s] = 1.0, -1.0
    ours, theirs = (
        relevance_readers(model, x.tokens[prompt, :length], direction) for x in (batch, other)
    )
    change = ours["wrote"] - theirs["wrote"]
    still = torch.tensor(model.components[:-1]["kind"].isin(["bias", "position"]).tolist())
    change[still] = 0
    layer = torch.tensor(model.components[:-1]["layer"].tolist())
    mlp = torch.tensor((model.components[:-1]["kind"] == "MLP").tolist())
    at = torch.arange(model.n_layers)[:, None]
    before, late = (layer < at).double(), ((layer == at) & ~mlp).double() * (not model.parallel)
    for name in "qkv":
        expected = torch.einsum("lhtd,ctd->lhc", ours[name], change) * before[:, None]
        torch.testing.assert_close(getattr(found, name)[prompt], expected, rtol=1e-9, atol=1e-12)
        assert float(expected.abs().max()) > 1e-4
    expected = torch.einsum("ltd,ctd->lc", ours["mlp"], change) * (before + late)
    torch.testing.assert_close(found.mlp[prompt], expected, rtol=1e-9, atol=1e-12)
    expected = torch.einsum("td,ctd->c", ours["out"], change)
    torch.testing.assert_close(found.out[prompt], expected, rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_relevance_is_conserved_where_there_are_no_biases(tiny_llama, pair):
    """What F hears of an MLP's output is what it hears of its input; a derivative is not that."""
    runs = AlignedRuns.of(tiny_llama, *pair)
    for rule, kept in ((RELP, True), (gradients(1.0), False)):
        (found,) = runs.readers(rule)
        for part, readers in zip(runs.ends[0].layers, found.layers, strict=True):
            out = torch.linalg.vecdot(readers.written, part.mlp)
            into = torch.linalg.vecdot(readers.mlp, part.mid)
            assert float(out.abs().max()) > 1e-4
            assert torch.allclose(into, out, rtol=1e-9, atol=1e-12) == kept


def test_relevance_takes_one_pass_at_the_prompts(tiny_llama, pair):
    runs = AlignedRuns.of(tiny_llama, *pair)
    (found,), (other,) = runs.readers(RELP), runs.readers(Rule((0.0,), relevance=True))
    assert not torch.allclose(found.embedding, other.embedding, rtol=1e-2)


def test_points_of_rules():
    assert integrated(4).points == (0.125, 0.375, 0.625, 0.875)
    assert [rule.exact for rule in (SECANT, RELP, gradients(0.0, 1.0))] == [True, False, False]


def test_rules_that_say_nothing_are_refused():
    with pytest.raises(ValueError, match="at one point or more"):
        gradients()
    with pytest.raises(ValueError, match="relevance is propagated at points"):
        Rule(relevance=True)
