"""Prompts that are tokens and nothing else."""

import pandas as pd
import torch

from sparse_signals.core.prompts import Batch


def plain_batch(tokens: torch.Tensor, mask: torch.Tensor) -> Batch:
    """A batch of prompts without text, roles or names."""
    table = pd.DataFrame({"text": [""] * len(tokens)})
    labels = [["?"] * int(length) for length in mask.sum(1)]
    return Batch(table, tokens, mask, labels, {}, None, None)
