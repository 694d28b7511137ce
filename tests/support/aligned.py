"""Prompts and counterfactuals of the same lengths, of random tokens."""

import torch

from traced import random_batch


def aligned(tokens: torch.Tensor, mask: torch.Tensor, places=(2, 3, 7), seed=5):
    """Batches that differ at some places; IO and S are any two tokens."""
    generator = torch.Generator().manual_seed(seed)
    other = tokens.clone()
    other[:, list(places)] = torch.randint(1, 50, (len(tokens), len(places)), generator=generator)
    return random_batch(tokens, mask), random_batch(other, mask)
