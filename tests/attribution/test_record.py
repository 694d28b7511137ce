"""What is recorded is what the model computes."""

from dataclasses import replace

import pytest
import torch

from aligned import aligned
from random_models import SIZES, save_random_model
from sparse_signals.attribution.record import nonlinearity, record
from sparse_signals.core.forward import norm_scale
from sparse_signals.core.model import activations, load_model
from sparse_signals.core.run import run


@pytest.fixture(params=("gpt2", "llama", "qwen2", "qwen3", "gpt_neox"))
def kind(request):
    return request.param


@pytest.fixture
def model(kind, request):
    return request.getfixturevalue(f"tiny_{kind}")


@pytest.fixture(scope="module")
def batch(tokens, mask):
    return aligned(tokens, mask)[0]


@torch.no_grad()
def recorded(model, batch):
    return record(model, model.bridge.embed.W_E[batch.tokens], batch.last)


def test_it_is_what_the_model_computes(kind, model, batch):
    found, expected = recorded(model, batch), run(model, batch)
    every = torch.arange(len(batch.last))
    groups = model.n_heads // model.n_kv_heads
    streams = activations(model, batch.tokens, ("resid_pre", "resid_post"))
    for layer, part in enumerate(found.layers):
        final = layer == model.n_layers - 1
        at = (every, slice(None), batch.last) if final else (slice(None),) * 3

        def dest(x, final=final, at=at):
            return x[at].unsqueeze(2) if final else x

        pairs = {
            "x": (part.x, streams["resid_pre"][layer]),
            "q": (part.q, dest(expected.q[layer])),
            "k": (part.k.repeat_interleave(groups, 1), expected.k[layer]),
            "v": (part.v.repeat_interleave(groups, 1), expected.v[layer]),
            "z": (part.z, dest(expected.z[layer])),
            "weights": (part.log_weights.exp(), dest(expected.pattern[layer])),
            "mlp": (part.mlp.unsqueeze(1), dest(expected.mlp[layer].unsqueeze(1))),
            "scale": (part.scale, expected.scale[layer]),
        }
        for name, (ours, theirs) in pairs.items():
            assert ours.shape == theirs.shape
            gap = float((ours - theirs).abs().max())
            assert gap <= 1e-12 * float(theirs.abs().max()), name
    last = streams["resid_post"][-1][every, batch.last]
    assert float((found.x - last).abs().max()) < 1e-12 * float(last.abs().max())
    assert torch.equal(found.scale, norm_scale(model, found.x))


def test_prompts_are_recorded_alone(model, batch):
    found = recorded(model, batch).rows(slice(2, 4)).layers[1]
    alone = recorded(model, batch.rows(slice(2, 4))).layers[1]
    for name in ("q", "log_weights", "pre", "mlp"):
        ours, theirs = getattr(found, name), getattr(alone, name)
        assert torch.allclose(ours.exp(), theirs.exp(), rtol=1e-12, atol=1e-14)


def test_a_run_can_go_on_from_another(model, batch):
    """Two sets of prompts that begin alike: what is in front is run once."""
    other = batch.tokens.clone()
    other[:, 4:] = other[:, 4:].flip(0)
    embedding = model.bridge.embed.W_E[torch.cat([batch.tokens, other])]
    last = batch.last.repeat(2)
    with torch.no_grad():
        whole = record(model, embedding, last)
        front = record(model, embedding[:8, :4], torch.full((8,), 3))
        found = record(model, embedding[:, 4:], last - 4, front)
    assert float((found.x - whole.x).abs().max()) < 1e-12
    for ours, theirs in zip(found.layers, whole.layers, strict=True):
        assert ours.start == 4 and theirs.start == 0
        assert float((ours.x - theirs.x[:, 4:]).abs().max()) < 1e-12
        for name in ("k", "v"):
            assert float((getattr(ours, name) - getattr(theirs, name)).abs().max()) < 1e-12
        weights = theirs.log_weights.exp()[:, :, -ours.log_weights.shape[2] :]
        assert float((ours.log_weights.exp() - weights).abs().max()) < 1e-12


def test_padding_changes_nothing(model, batch):
    other = replace(batch, tokens=torch.where(batch.mask, batch.tokens, 7))
    found = [recorded(model, x).x for x in (batch, other)]
    assert float((found[0] - found[1]).abs().max()) < 1e-13


@pytest.mark.parametrize("name", ["gelu_new", "gelu", "relu", "silu"])
def test_the_nonlinearity_is_that_of_the_model(name, tmp_path):
    path = save_random_model(tmp_path / name, "gpt2", **SIZES, activation_function=name)
    block = load_model(path, device="cpu", dtype=torch.float64).bridge.blocks[0]
    z = torch.linspace(-6, 6, 1000, dtype=torch.float64)
    ours, theirs = nonlinearity(block)(z), block.mlp.original_component.act(z)
    assert float((ours - theirs).abs().max()) < 1e-15 * 6
