"""What all benchmarks share: a clock, a model of GPT-2 small's size, a table of ratios."""

import tempfile
import time

import pandas as pd
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from sparse_signals.models import load_model

LENGTH = 17


def clock(function, repeats=3):
    """Best wall time of a few calls, and the last result."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - start)
    return min(times), result


def load_random():
    """GPT-2 small's size, random weights, queries and keys sharp enough for many firings."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config())
    width = model.config.n_embd
    for block in model.transformer.h:
        block.attn.c_attn.weight.data[:, : 2 * width] *= 1.6
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return load_model(directory)


def ratios(targets, seconds, notes):
    """One row per ratio: over and under in seconds, the ratio, its target, a note."""
    table = pd.DataFrame(seconds, columns=["over", "under"], index=list(targets))
    table["ratio"] = table["over"] / table["under"]
    table["target"] = [f"{sign} {value}" for sign, value in targets.values()]
    return table.assign(note=notes)
