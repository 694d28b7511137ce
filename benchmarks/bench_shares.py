"""Chapter 6: what exact shares cost, in forward passes."""

from dataclasses import replace
from functools import partial

import pandas as pd
import torch

from common import LENGTH, clock_in_turn, load_random, ratios
from sparse_signals.attribution.shares import edge_shares, node_shares
from sparse_signals.core.model import load_model, logits
from sparse_signals.core.prompts import Batch

TARGETS = {
    "{}: two runs and one pass backward / forward pass": ("<=", 3.5),
    "{}: and all edges, a prompt / forward pass": ("<=", 5),
    "{}: and all edges, a token's role / forward pass": ("<=", 5),
}
ROLES = 9
PLACES = [2, 4, 9]  # where counterfactuals have other tokens


def aligned(model, prompts):
    """Random tokens, and the same with others at some places. IO and S are any two."""
    generator = torch.Generator().manual_seed(0)
    words = len(model.bridge.embed.W_E)
    tokens, other = (
        torch.randint(1, words, (prompts, LENGTH), generator=generator) for _ in range(2)
    )
    tokens[:, 4] = tokens[:, 2] % (words - 1) + 1  # S is never IO
    table = pd.DataFrame({"text": [""] * prompts})
    everywhere = torch.ones_like(tokens, dtype=torch.bool)
    batch = Batch(table, tokens, everywhere, [], {}, tokens[:, 2], tokens[:, 4])
    changed = tokens.index_copy(1, torch.tensor(PLACES), other[:, PLACES])
    return batch, replace(batch, tokens=changed)


def measure(prompts=256):
    """One row per ratio: of the shipped model, and of GPT-2 small's size for fewer prompts."""
    targets, seconds, notes = {}, [], []
    for name, model in (("gpt2-ioi", load_model("gpt2-ioi")), ("GPT-2 small", load_random())):
        some = prompts if name == "gpt2-ioi" else max(1, prompts // 8)
        pair = aligned(model, some)
        row = (torch.arange(LENGTH) % ROLES).expand(some, LENGTH)
        forward = partial(logits, model, pair[0].tokens)
        works = [partial(work, model, *pair) for work in (node_shares, edge_shares)]
        works.append(partial(edge_shares, model, *pair, row=row))
        for (words, target), work in zip(TARGETS.items(), works, strict=True):
            under, over, _ = clock_in_turn(forward, work, repeats=3)
            targets[words.format(name)] = target
            seconds.append((over, under))
            notes.append(f"{some} prompts of {LENGTH} tokens")
    return ratios(targets, seconds, notes)
