"""Parity with plain transformers, and what the cached activations are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from random_models import NEOX, ROPES, ROTARY, SIZES, save_random_model
from reference import centred_gap, plain_attention, plain_logits, projected, score_gap
from sparse_signals.core import model as models
from sparse_signals.core.checkpoints import ModelError
from sparse_signals.core.model import HOOKS, Model, activations, load_model, logits, qk_weights
from sparse_signals.core.rotary import rotate, rotation

KINDS = ("gpt2", "llama", "qwen2", "qwen3", "gpt_neox")
TOKENS = torch.randint(0, 50, (5, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of the size of GPT-2 small, but for its vocabulary."""
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    sizes |= {"vocab_size": 1000}
    return save_random_model(tmp_path_factory.mktemp("models") / "full-size", "gpt2", **sizes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_are_those_of_transformers(tiny_directories, kind, dtype):
    directory = tiny_directories[kind]
    at = torch.tensor([8, 3, 0, 5, 7])
    expected = plain_logits(directory, TOKENS, dtype)[torch.arange(5), at]
    model = load_model(directory, device="cpu", dtype=dtype)
    assert centred_gap(logits(model, TOKENS, at), expected) < 1e-6
    assert model.dtype == dtype and model.device == torch.device("cpu")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_is_that_of_transformers(tiny_directories, kind, dtype):
    expected = plain_attention(tiny_directories[kind], TOKENS, dtype)
    model = load_model(tiny_directories[kind], device="cpu", dtype=dtype)
    kept = activations(model, TOKENS, ("scores", "pattern"))
    torch.testing.assert_close(kept["pattern"], expected, rtol=0, atol=1e-6)
    log = kept["scores"].double().log_softmax(-1)  # scores but for what the row has in common
    torch.testing.assert_close(log.exp(), expected.double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_are_rebuilt_from_weights(tiny_directories, kind, dtype):
    absolute, relative = score_gap(load_model(tiny_directories[kind], "cpu", dtype), TOKENS)
    assert absolute < 1e-4
    assert dtype == torch.float32 or relative < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_what_their_names_say(request, kind):
    model = request.getfixturevalue(f"tiny_{kind}")
    kept = activations(model, TOKENS, HOOKS)
    x = kept["resid_pre"]
    if qk_weights(model).centred:
        x = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(x / kept["scale"].unsqueeze(-1), kept["normalized"])
    future = torch.ones(9, 9, dtype=torch.bool).triu(1)
    masked = kept["scores"].masked_fill(future, -torch.inf)
    torch.testing.assert_close(masked.softmax(-1), kept["pattern"], rtol=0, atol=1e-14)
    torch.testing.assert_close(kept["pattern"] @ kept["v"], kept["z"])
    written = kept["resid_pre"] + kept["attn_out"] + kept["mlp_out"]
    torch.testing.assert_close(written, kept["resid_post"])
    assert kept["k"].shape == kept["q"].shape == (3, 5, 4, 9, 8)
    assert kept["pattern"].shape == (3, 5, 4, 9, 9)


def test_rotation_keeps_the_score_of_a_token_with_itself(tiny_llama):
    kept = activations(tiny_llama, TOKENS, ("q", "k", "q_raw", "k_raw"))
    rotated, raw = (kept["q"] * kept["k"]).sum(-1), (kept["q_raw"] * kept["k_raw"]).sum(-1)
    torch.testing.assert_close(rotated, raw, rtol=1e-12, atol=1e-12)
    assert (kept["q"] - kept["q_raw"]).abs().max() > 0.1


def test_grouped_keys_are_repeated(tiny_llama):
    w = qk_weights(tiny_llama)
    assert torch.equal(w.W_K[:, 0], w.W_K[:, 1]) and not torch.equal(w.W_K[:, 1], w.W_K[:, 2])
    assert tiny_llama.n_kv_heads == 2 and w.W_K.shape == w.W_Q.shape
    assert not w.b_Q.any() and not w.shift.any() and not w.centred


def test_query_and_key_biases_are_read(tiny_qwen2, tiny_gpt2):
    for model in (tiny_qwen2, tiny_gpt2):
        w = qk_weights(model)
        assert w.b_Q.abs().min(-1).values.all() and w.b_K.abs().min(-1).values.all()
        assert w.W_Q.dtype == torch.float64


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("gpt2", {**SIZES, "scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", {**SIZES, "layer_norm_epsilon": 0.1}),
        ("llama", {**ROTARY, "head_dim": 12}),
        ("llama", {**ROTARY, "attention_bias": True, "rms_norm_eps": 0.1}),
        ("mistral", {**ROTARY, "sliding_window": 16}),
        ("gpt_neox", {**NEOX, "use_parallel_residual": False, "layer_norm_eps": 0.1}),
        ("gpt_neox", {**NEOX, "rotary_pct": 1.0}),
        ("qwen3", {**ROTARY, "head_dim": 12, "attention_bias": True, "rms_norm_eps": 0.1}),
        *(("llama", {**ROTARY, "rope_parameters": rope}) for rope in ROPES),
    ],
)
def test_variants_are_honoured(tmp_path, kind, config):
    directory = save_random_model(tmp_path, kind, **config)
    model = load_model(directory, "cpu", torch.float64)
    expected = plain_logits(directory, TOKENS, torch.float64)[:, -1]
    assert centred_gap(logits(model, TOKENS), expected) < 1e-6
    assert score_gap(model, TOKENS)[1] < 1e-9
    assert model.d_head == config.get("head_dim", 8)
    assert model.n_ctx == config.get("sliding_window", 32)


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_scores_follow_from_weights_and_positions_at_every_length(tmp_path, rope):
    """Also of a short prompt after a long one: the angles are the same."""
    directory = save_random_model(tmp_path, "llama", **ROTARY, rope_parameters=rope)
    model = load_model(directory, "cpu", torch.float64)
    for length in (5, 32, 5):
        tokens = torch.randint(0, 50, (3, length), generator=torch.Generator().manual_seed(0))
        kept = activations(model, tokens, ("normalized", "scores"))
        angles = rotation(model, torch.arange(length))
        q, k = (rotate(x, *angles) for x in projected(model, kept))
        rebuilt = q @ k.mT / model.divisor[:, None, None, None, None]
        torch.testing.assert_close(rebuilt.tril(), kept["scores"].tril(), rtol=0, atol=1e-9)


def test_scale_grows_with_the_layer_where_the_config_says_so(tmp_path):
    config = {**SIZES, "scale_attn_by_inverse_layer_idx": True}
    model = load_model(save_random_model(tmp_path, "gpt2", **config), "cpu")
    torch.testing.assert_close(
        qk_weights(model).divisor, 8**0.5 * torch.tensor([1, 2, 3], dtype=torch.float64)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_batching_change_nothing(request, kind, monkeypatch):
    model = request.getfixturevalue(f"tiny_{kind}")
    names = ("q", "k", "pattern")
    kept, at_end = activations(model, TOKENS, names), logits(model, TOKENS)
    monkeypatch.setattr(models, "TOKENS_PER_BATCH", 20)
    padded = torch.cat([TOKENS, torch.zeros(5, 4, dtype=torch.long)], dim=1)
    again = activations(model, padded, names, progress=True)
    torch.testing.assert_close(again["q"][..., :9, :], kept["q"])
    torch.testing.assert_close(again["pattern"][..., :9, :9], kept["pattern"])
    torch.testing.assert_close(logits(model, padded, torch.full((5,), 8)), at_end)


@pytest.mark.parametrize("kind", KINDS)
def test_threads_and_precision_drift_little(request, tiny_directories, kind):
    def scores(model: Model, threads: int) -> torch.Tensor:
        torch.set_num_threads(threads)
        return activations(model, TOKENS, ["scores"])["scores"].double().tril()

    double = request.getfixturevalue(f"tiny_{kind}")
    float32 = load_model(tiny_directories[kind], "cpu", torch.float32)
    before = torch.get_num_threads()
    try:
        one, two, single = (scores(m, n) for m, n in ((double, 1), (double, 2), (float32, 1)))
    finally:
        torch.set_num_threads(before)
    assert (one - two).abs().max() < 1e-12
    assert 0 < (one - single).abs().max() < 1e-5


def test_unknown_activations_and_long_prompts_are_refused(tiny_gpt2):
    with pytest.raises(ValueError, match=r"unknown activations \['query'\]: choose among"):
        activations(tiny_gpt2, TOKENS, ["query"])
    with pytest.raises(ValueError, match="prompts have 33 tokens; tiny-gpt2 takes 1 to 32"):
        logits(tiny_gpt2, torch.zeros(1, 33, dtype=torch.long))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_size_gpt2(full_size, dtype):
    tokens = torch.randint(0, 1000, (2, 17), generator=torch.Generator().manual_seed(0))
    model = load_model(full_size, "cpu", dtype)
    assert (model.n_layers, model.n_heads, model.d_head) == (12, 12, 64)
    assert centred_gap(logits(model, tokens), plain_logits(full_size, tokens, dtype)[:, -1]) < 1e-4
    absolute, relative = score_gap(model, tokens)
    assert absolute < 1e-4
    assert dtype == torch.float32 or relative < 1e-9


def test_the_environment_variable_is_the_default(monkeypatch, tiny_directories):
    monkeypatch.setenv("MODEL", str(tiny_directories["llama"]))
    assert load_model(device="cpu").name == "tiny-llama"


def test_half_precision_is_refused(tiny_directories):
    with pytest.raises(ModelError, match=r"choose torch.float32 or torch.float64"):
        load_model(tiny_directories["gpt2"], dtype=torch.float16)


@pytest.mark.slow
def test_the_hub_is_switched_off_before_transformers_is_imported(tiny_directories):
    code = (
        "import sys; from sparse_signals.core.model import load_model;"
        "assert not {'transformers', 'huggingface_hub'} & set(sys.modules);"
        f"load_model({str(tiny_directories['gpt2'])!r}, device='cpu');"
        "import huggingface_hub.constants as c; assert c.HF_HUB_OFFLINE"
    )
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
