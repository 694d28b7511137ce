"""Prompts for models of which something is gated or removed."""

import pandas as pd
import torch

from sparse_signals.core.prompts import Batch

KINDS = ("tiny_gpt2", "tiny_llama", "tiny_qwen2", "tiny_qwen3", "tiny_gpt_neox")
TOLERANCE = 1e-9
LENGTH = 9


def batch_of(prompts, seed=0, length=LENGTH):
    """Random words after the same first token; names stand at 2, 4 and 6 in every prompt."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 50, (prompts, length), generator=generator)
    tokens[:, 0] = 0
    at = {"IO": 2, "S1": 4, "S2": 6, "end": length - 1}
    roles = {role: torch.full((prompts,), pos) for role, pos in at.items()}
    table = pd.DataFrame({"text": [""] * prompts})
    labels = [["?"] * length] * prompts
    everywhere = torch.ones(prompts, length, dtype=torch.bool)
    return Batch(table, tokens, everywhere, labels, roles, tokens[:, 2], tokens[:, 4])
