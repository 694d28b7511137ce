"""A rotary model in float64 computes in float64 everywhere."""

import numpy as np
import pytest
import torch

from random_models import ROPES, ROTARY, save_random_model
from sparse_signals.attribution.record import record
from sparse_signals.core.model import activations, load_model, logits
from sparse_signals.core.rotary import rotation

TOKENS = torch.randint(0, 50, (5, 9), generator=torch.Generator().manual_seed(0))
KINDS = ("llama", "mistral", "qwen2", "qwen3")


@pytest.fixture(scope="module", params=KINDS)
def directory(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / request.param
    return save_random_model(folder, request.param, **ROTARY, head_dim=8)


def test_nothing_at_a_hook_is_rounded_to_float32(directory):
    """Neither its type nor its values, but for the embedding, which was stored so."""
    model = load_model(directory, "cpu", torch.float64)
    _, cache = model.bridge.run_with_cache(TOKENS)
    words = model.bridge.embed.W_E[TOKENS]
    seen = {name: x for name, x in cache.items() if x.is_floating_point()}
    seen = {name: x for name, x in seen.items() if not torch.equal(x, words)}
    assert {"rotary_emb.hook_cos", "blocks.1.attn.hook_pattern", "ln_final.hook_out"} <= set(seen)
    assert {x.dtype for x in seen.values()} == {torch.float64}
    assert not [name for name, x in seen.items() if torch.equal(x.float().double(), x)]


def test_activations_agree_with_a_pass_of_the_book(directory):
    model = load_model(directory, "cpu", torch.float64)
    kept = activations(model, TOKENS, ("pattern", "resid_post", "scale"))
    last = torch.full((5,), 8)
    with torch.no_grad():
        ours = record(model, model.bridge.embed.W_E[TOKENS], last)
    for layer, part in enumerate(ours.layers[:-1]):
        pattern = part.log_weights.exp()
        torch.testing.assert_close(pattern, kept["pattern"][layer], atol=1e-14, rtol=0)
        torch.testing.assert_close(part.scale, kept["scale"][layer], atol=0, rtol=1e-13)
    torch.testing.assert_close(ours.x, kept["resid_post"][-1, :, -1], atol=0, rtol=1e-11)
    final = ours.x / ours.scale[:, None] * model.bridge.ln_final.w
    found = final @ model.bridge.unembed.W_U
    torch.testing.assert_close(logits(model, TOKENS), found, atol=1e-12, rtol=1e-12)


def test_angles_are_those_of_the_formula(directory):
    """angle = position · theta^(−2n/r), to the last bits of float64."""
    model = load_model(directory, "cpu", torch.float64)
    theta = model.bridge.rotary_emb.original_component.config.rope_parameters["rope_theta"]
    places = np.arange(32)
    angle = places[:, None] * np.float64(theta) ** (-np.arange(0, 8, 2) / 8)
    cos, sin = rotation(model, torch.arange(32))
    for found, function in ((cos, np.cos), (sin, np.sin)):
        np.testing.assert_allclose(found, np.tile(function(angle), 2), rtol=0, atol=1e-14)


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_frequencies_are_scaled_as_by_transformers(tmp_path, rope):
    directory = save_random_model(tmp_path, "llama", **ROTARY, rope_parameters=rope)
    single, double = (load_model(directory, "cpu", d) for d in (torch.float32, torch.float64))
    plain, exact = (m.bridge.rotary_emb.original_component for m in (single, double))
    assert exact.inv_freq.dtype == torch.float64 and plain.inv_freq.dtype == torch.float32
    assert exact.attention_scaling == plain.attention_scaling
    gap = (exact.inv_freq / plain.inv_freq.double() - 1).abs().max()
    assert 0 < gap < 3e-7
    for ours, theirs in zip(
        *(rotation(m, torch.arange(32)) for m in (double, single)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
