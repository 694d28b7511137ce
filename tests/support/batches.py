"""Prompts of tokens alone: without text, roles or names."""

import pandas as pd
import torch

from sparse_signals.core.prompts import Batch


def plain_batch(tokens: torch.Tensor, mask: torch.Tensor) -> Batch:
    """Tokens as prompts, of which only the padding is known."""
    table = pd.DataFrame({"text": [""] * len(tokens)})
    labels = [["?"] * int(length) for length in mask.sum(1)]
    return Batch(table, tokens, mask, labels, {}, None, None)
