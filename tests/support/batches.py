"""Prompts of tokens alone: without text, roles or names."""

from dataclasses import replace

import pandas as pd
import torch

from sparse_signals.core.prompts import Batch


def plain_batch(tokens: torch.Tensor, mask: torch.Tensor) -> Batch:
    """Tokens as prompts, of which only the padding is known."""
    table = pd.DataFrame({"text": [""] * len(tokens)})
    labels = [["?"] * int(length) for length in mask.sum(1)]
    return Batch(table, tokens, mask, labels, {}, None, None)


def with_roles(batch: Batch, templates: int = 3) -> Batch:
    """The prompts as if they said "Mary John Mary", tokens 1 to 3, then words; with templates."""
    prompts = len(batch.tokens)
    columns = {"text": "", "io": "John", "s": "Mary"}
    table = pd.DataFrame(columns, index=range(prompts))
    places = {"S1": 1, "IO": 2, "S1+1": 2, "S2": 3}
    roles = {role: torch.full((prompts,), place) for role, place in places.items()}
    said = {1: " Mary", 2: " John", 3: " Mary"}
    labels = [[said.get(n, f" word{n}") for n in range(len(row))] for row in batch.labels]
    return replace(
        batch,
        table=table.assign(template=[n % templates for n in range(prompts)]),
        roles=roles | {"end": batch.last},
        labels=labels,
    )
