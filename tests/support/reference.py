"""Second opinions for the tests: plain transformers, and scores rebuilt from the weights."""

from pathlib import Path

import torch

from sparse_signals.core.model import Model, activations, qk_weights


def plain_logits(directory: Path, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Logits of every position, from transformers alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    with torch.no_grad():
        return model(tokens).logits


def plain_attention(directory: Path, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Attention weights of all layers, from transformers alone."""
    from transformers import AutoModelForCausalLM

    options = {"dtype": dtype, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(directory, **options)
    with torch.no_grad():
        return torch.stack(model(tokens, output_attentions=True).attentions)


def centred_gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference of two sets of logits once each row has mean zero."""
    gap = (a - a.mean(-1, keepdim=True)) - (b - b.mean(-1, keepdim=True))
    return gap.abs().max().item()


def projected(model: Model, kept: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys before any rotation, from x̂ and the weights."""
    w = qk_weights(model)
    x = kept["normalized"].double() * w.gain[:, None, None] + w.shift[:, None, None]
    q = torch.einsum("lpid,lhdr->lphir", x, w.W_Q) + w.b_Q[:, None, :, None]
    k = torch.einsum("lpid,lhdr->lphir", x, w.W_K) + w.b_K[:, None, :, None]
    return q, k


def score_gap(model: Model, tokens: torch.Tensor) -> tuple[float, float]:
    """Largest difference between rebuilt and cached scores, absolute and relative.

    Without rotation scores are rebuilt from x̂ and the weights; with it, queries and keys are,
    and the scores from the rotated ones.
    """
    kept = activations(model, tokens, ("normalized", "q", "k", "q_raw", "k_raw", "scores"))
    q, k = projected(model, kept)
    gaps = [(q - kept["q_raw"], q), (k - kept["k_raw"], k)]
    if model.rotary:
        q, k = kept["q"].double(), kept["k"].double()
    rebuilt = (q @ k.mT / qk_weights(model).divisor[:, None, None, None, None]).tril()
    gaps.append((rebuilt - kept["scores"].tril(), rebuilt))
    absolute = [gap.abs().max().item() for gap, _ in gaps]
    relative = [(gap.abs().max() / size.abs().max()).item() for gap, size in gaps]
    return max(absolute), max(relative)
