"""Tokenizers of every kind, and models that are nothing but a tokenizer."""

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sparse_signals.core.model import Model
from sparse_signals.core.sentences import NAMES


def model_with(
    tokenizer: PreTrainedTokenizerBase,
    *,
    bos: bool = False,
    n_ctx: int = 48,
    words: int | None = None,
) -> Model:
    """A model that can only be asked for tokens: `words` embeddings, all of them zero."""
    bridge = nn.Module()
    bridge.embed = nn.Module()
    bridge.embed.W_E = nn.Parameter(torch.zeros(words or len(tokenizer), 1))
    sizes = {"n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "d_model": 1, "d_head": 1}
    return Model("words", bridge, tokenizer, bos, **sizes, n_ctx=n_ctx, rotary=False)


def word_tokenizer(texts, without=()) -> PreTrainedTokenizerFast:
    """One token a word, with its space, for the words of `texts` and all names only."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text)}
    words |= {f"Ġ{name}" for name in NAMES}
    words -= {f"Ġ{name}" for name in without}
    vocabulary = ["<|endoftext|>", "<|unknown|>", *sorted(words)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, "<|unknown|>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    special = {"bos_token": "<|endoftext|>", "unk_token": "<|unknown|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def byte_tokenizer(words) -> PreTrainedTokenizerFast:
    """As that of GPT-2: bytes, joined to the given words, with and without a space before them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary, merges = _joined(alphabet, [w.replace(" ", "Ġ") for w in words], "<|endoftext|>")
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    special = {"bos_token": end, "eos_token": end, "unk_token": end}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def sentencepiece_tokenizer(words, legacy: bool) -> PreTrainedTokenizerFast:
    """As that of Llama 2 and Mistral 7B: a space is put before the text, then spaces are "▁".

    Legacy tokenizers do so before any text, also one that begins with a space.
    """
    alphabet = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", *sorted({*"".join(words)})]
    vocabulary, merges = _joined(alphabet, [f"▁{w}" for w in words], "<s>", "</s>", "<unk>")
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    if legacy:
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(steps)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def _joined(alphabet, words, *special) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary, and the merges that join each word from its beginning."""
    starts = [(word[:n], word[n]) for word in words for n in range(1, len(word))]
    merges = list(dict.fromkeys(starts))
    pieces = dict.fromkeys([*special, *alphabet, *("".join(pair) for pair in merges)])
    return {piece: n for n, piece in enumerate(pieces)}, merges
