"""What all benchmarks share: a clock, a model of GPT-2 small's size, a table of ratios."""

import tempfile
import time

import pandas as pd
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from sparse_signals.core.model import load_model

LENGTH = 17
AWAKE, SHARPNESS, REST = 4, 2.05, 0.5


def clock(function, repeats=3):
    """Best wall time of a few calls, and the last result."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - start)
    return min(times), result


def clock_in_turn(first, second, repeats=5):
    """Best wall times of two functions, called in turn, and the last result of the second."""
    pairs = [(clock(first, 1)[0], *clock(second, 1)) for _ in range(repeats)]
    return min(p[0] for p in pairs), min(p[1] for p in pairs), pairs[-1][2]


def load_random():
    """GPT-2 small's size, random weights, made to fire about as often as GPT-2 does on IOI prompts.

    Queries and keys are sharp, and all but `AWAKE` heads of each layer rest at the first token.
    """
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config())
    first = model.transformer.wpe.weight.data[0]
    first *= 10
    for block in model.transformer.h:
        weight, bias = block.attn.c_attn.weight.data, block.attn.c_attn.bias.data
        width = len(weight)
        weight[:, : 2 * width] *= SHARPNESS
        asleep = slice(AWAKE * 64, width)
        weight[:, width:][:, asleep] += first[:, None] / first.norm() / 10
        bias[asleep] += REST
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return load_model(directory)


def ratios(targets, seconds, notes):
    """One row per ratio: over and under in seconds, the ratio, its target, a note."""
    table = pd.DataFrame(seconds, columns=["over", "under"], index=list(targets))
    table["ratio"] = table["over"] / table["under"]
    table["target"] = [f"{sign} {value}" for sign, value in targets.values()]
    return table.assign(note=notes)
