"""Every way in which a checkpoint cannot be read has one clear line."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from random_models import NEOX, ROTARY, SIZES, save_random_model
from sparse_signals.core import checkpoints
from sparse_signals.core.checkpoints import GPT2_SMALL, ModelError
from sparse_signals.core.model import load_model, logits
from sparse_signals.core.names import MODEL_NAMES


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small GPT-2 directory that a test may damage."""
    return save_random_model(tmp_path / "damaged", "gpt2", **SIZES)


def error_of(name: object, **options: object) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(name, **{"device": "cpu", **options})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(directory: Path, **changes: torch.Tensor | None) -> None:
    path = directory / "model.safetensors"
    weights = {**load_file(path), **{f"transformer.{k}": v for k, v in changes.items()}}
    save_file({k: v for k, v in weights.items() if v is not None}, path, {"format": "pt"})


def test_an_unknown_name_lists_the_known_ones():
    message = error_of("gpt-5")
    assert "'gpt-5'" in message and "directory" in message
    assert all(name in message for name in MODEL_NAMES)


def test_files_and_empty_directories_are_refused(tmp_path, checkpoint):
    assert "is not a directory" in error_of(checkpoint / "config.json")
    assert "has no config.json" in error_of(tmp_path)


def test_broken_configurations_are_refused(checkpoint):
    write_config(checkpoint, n_head=5)
    assert "divisible" in error_of(checkpoint)
    (checkpoint / "config.json").write_text("{}")
    assert "model_type" in error_of(checkpoint)
    (checkpoint / "config.json").write_text("{")
    assert "cannot read" in error_of(checkpoint)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("mamba", "no attention"),
        ("bloom", "added to the scores"),
        ("t5", "added to the scores"),
        ("gemma2", "the sum of what the heads of a layer write, and caps scores and logits"),
        ("gemma3_text", "the sum of what the heads of a layer write"),
        ("unheard-of", "not been checked"),
    ],
)
def test_other_architectures_are_refused(checkpoint, kind, reason):
    write_config(checkpoint, model_type=kind)
    message = error_of(checkpoint)
    assert repr(kind) in message and reason in message and "llama" in message


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("scale_attn_weights", False),
        ("reorder_and_upcast_attn", True),
        ("add_cross_attention", True),
        ("is_causal", False),
        ("partial_rotary_factor", 0.5),
        ("rope_parameters", {"partial_rotary_factor": 0.5}),
        ("rope_scaling", {"partial_rotary_factor": 0.5}),
    ],
)
def test_settings_that_change_the_score_are_refused(checkpoint, setting, value):
    write_config(checkpoint, **{setting: value})
    [(name, refused)] = (value if isinstance(value, dict) else {setting: value}).items()
    assert f"its {name} is {json.dumps(refused)}, not " in error_of(checkpoint)


def test_fused_weights_without_biases_are_refused(tmp_path):
    directory = save_random_model(tmp_path / "fused", "gpt_neox", **NEOX, attention_bias=False)
    assert "its attention_bias is false, not true" in error_of(directory)


def test_files_of_pythia_are_read_as_they_are_published(tmp_path):
    """Their rotation under older names, and buffers that are no longer weights."""
    directory = save_random_model(tmp_path / "pythia", "gpt_neox", **NEOX)
    expected = load_model(directory, "cpu")
    write_config(directory, rope_parameters=None, rotary_pct=0.5, rotary_emb_base=10000)
    path = directory / "model.safetensors"
    weights = load_file(path)
    name = "gpt_neox.layers.0.attention."
    weights |= {name + "bias": torch.ones(1, 1, 32, 32).bool(), name + "masked_bias": torch.ones(1)}
    save_file(weights | {name + "rotary_emb.inv_freq": torch.ones(2)}, path, {"format": "pt"})
    model, tokens = load_model(directory, "cpu"), torch.arange(9)[None]
    assert "embed_out.weight" in weights
    torch.testing.assert_close(logits(model, tokens), logits(expected, tokens))
    write_config(directory, rotary_pct=1.0)
    assert not torch.allclose(logits(load_model(directory, "cpu"), tokens), logits(model, tokens))


def test_cross_attention_with_its_weights_is_refused(tmp_path):
    directory = save_random_model(tmp_path / "both", "gpt2", **SIZES, add_cross_attention=True)
    assert "its add_cross_attention is true, not false" in error_of(directory)


@pytest.mark.parametrize("setting", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "longrope", "short_factor": 4 * [1.0], "long_factor": 4 * [2.0]},
        {"type": "su"},
        {"rope_type": "proportional"},
        {"rope_type": None},
        {"full_attention": {"rope_type": "longrope"}},
    ],
)
def test_rotations_that_are_not_modelled_are_refused(tmp_path, setting, rope):
    directory = save_random_model(tmp_path / "rotary", "llama", **ROTARY)
    write_config(directory, **{"rope_parameters": None, "rope_scaling": None, setting: rope})
    message = error_of(directory)
    assert "the rotations that are modelled are default, linear, dynamic, yarn, llama3" in message


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gpt2", {"return_dict": False}),
        ("gpt2", {"num_key_value_heads": 2}),
        ("gpt2", {"sliding_window": "wide"}),
        ("gpt2", {"layer_types": 3 * ["sliding_attention"]}),
        ("mistral", {"sliding_window": 0}),
        ("qwen2", {"layer_types": 3 * ["chunked_attention"]}),
        ("llama", {"rope_parameters": [1]}),
    ],
)
def test_odd_settings_are_refused_before_they_are_met(tmp_path, kind, changes):
    sizes = SIZES if kind == "gpt2" else ROTARY
    directory = save_random_model(tmp_path / "odd", kind, **sizes)
    write_config(directory, **changes)
    assert str(directory) in error_of(directory)


def test_a_model_that_is_run_otherwise_than_by_transformers_is_refused(checkpoint, monkeypatch):
    monkeypatch.setattr(checkpoints, "USUAL", {})
    write_config(checkpoint, is_causal=False)
    assert "a setting in config.json makes it another model" in error_of(checkpoint)


def test_pickled_weights_are_refused(checkpoint):
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    assert "no *.safetensors" in error_of(checkpoint)


@pytest.mark.parametrize("size", [0, 5, 1000, -1])
def test_truncated_weights_are_refused(checkpoint, size):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert "cannot read the weights" in error_of(checkpoint)


def test_weights_that_do_not_fit_are_refused(checkpoint):
    weights = checkpoint / "model.safetensors"
    good = weights.read_bytes()
    for changes, problem in (
        ({"h.1.ln_1.weight": None, "h.1.ln_1.bias": None}, "incomplete, without: .* and 1 more"),
        ({"wpe.weight": torch.zeros(31, 32)}, r"do not fit config.json, in shape: .*wpe"),
        ({"h.3.ln_1.weight": torch.ones(32)}, r"which has no: transformer.h.3"),
        ({"wte.weight": torch.full((50, 32), torch.nan)}, "not finite"),
    ):
        weights.write_bytes(good)
        change_weights(checkpoint, **changes)
        with pytest.raises(ModelError, match=problem):
            load_model(checkpoint, device="cpu")


def test_masks_stored_by_old_checkpoints_are_ignored(checkpoint):
    change_weights(checkpoint, **{"h.0.attn.bias": torch.ones(1, 1, 32, 32)})
    assert load_model(checkpoint, device="cpu").name == "damaged"


def test_a_broken_tokenizer_is_refused(checkpoint):
    (checkpoint / "tokenizer.json").write_text("{")
    assert "cannot read the tokenizer" in error_of(checkpoint)


def save_tokenizer(directory: Path, bos: bool) -> None:
    from tokenizers import Tokenizer, models, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<s>": 0, "a": 1}, "a"))
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>").save_pretrained(directory)


def test_the_tokenizer_says_whether_prompts_start_with_bos(checkpoint):
    assert load_model(checkpoint, "cpu").tokenizer is None
    for bos in (False, True):
        save_tokenizer(checkpoint, bos)
        assert load_model(checkpoint, "cpu").bos is bos


def test_gpt2_small_comes_from_the_cache_at_its_revision(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo, revision = GPT2_SMALL
    message = error_of("gpt2-small")
    assert f"hf download {repo}" in message and revision in message
    snapshot = tmp_path / "models--openai-community--gpt2" / "snapshots" / revision
    save_random_model(snapshot, "gpt2", **SIZES)
    save_tokenizer(snapshot, bos=True)
    model = load_model("gpt2-small", "cpu")
    assert (model.name, model.bos, model.n_layers) == ("gpt2-small", False, 3)


def test_the_missing_shipped_model_says_how_to_train_it(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoints, "files", lambda package: tmp_path)
    assert "train_gpt2_ioi.py" in error_of("gpt2-ioi")
