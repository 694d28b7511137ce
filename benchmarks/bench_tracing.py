"""Chapter 4: what contributions and traces cost, against a loop and against the forward pass."""

import resource

import pandas as pd
import torch

from common import LENGTH, clock, clock_in_turn, load_random, ratios
from sparse_signals.core.model import logits
from sparse_signals.core.prompts import Batch
from sparse_signals.core.run import run_model, writers
from sparse_signals.signals.firings import find_firings
from sparse_signals.signals.slices import coordinates, support
from sparse_signals.tracing.contributions import Settings, contributions, read_weights, readers
from sparse_signals.tracing.roots import Root
from sparse_signals.tracing.trace import trace

TARGETS = {
    "trace beyond its forward pass / forward pass": ("<=", 0.5),
    "loop over firings and heads / batched contributions": (">=", 300),
}


def random_batch(prompts):
    """Random tokens, without names."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(50257, (prompts, LENGTH), generator=generator)
    table = pd.DataFrame({"text": [""] * prompts})
    return Batch(table, tokens, torch.ones_like(tokens, dtype=torch.bool), [], {}, None, None)


def highest_roots(run, n=3):
    """The heads of the highest layers that fire from the last token: the deepest traces."""
    pairs = find_firings(run.attention)
    table = pairs[pairs.dest == LENGTH - 1].table().sort_values("layer", ascending=False)
    return [Root(*map(int, name.split("."))) for name in table["name"].unique()[:n]]


def loop(model, weights, run, pairs):
    """Contributions as the released code computes them: a firing and an upstream head at a time,
    with the head's output made anew for the whole batch."""
    coords = coordinates(weights.maps, run.attention, pairs)
    chosen = support(coords.slices)
    read, W_O = readers(weights, pairs, coords, chosen), writers(model).W_O
    pattern, found = run.attention.pattern, []
    for n in range(len(pairs)):
        prompt, layer = pairs.prompt[n], int(pairs.layer[n])
        for up in range(layer):
            for head in range(model.n_heads):
                out = pattern[up, :, head] @ run.v[up, :, head] @ W_O[up, head]
                for side, token in enumerate((pairs.dest[n], pairs.src[n])):
                    heard = out[prompt, token].double() @ read[n, side, :-1]
                    found.append(heard / run.scale[layer, prompt, token])
    return torch.stack(found)


def measure(prompts=256):
    """One row per ratio."""
    model = load_random()
    weights, batch = read_weights(model), random_batch(prompts)
    last = torch.full((prompts,), LENGTH - 1)
    part = batch.rows(slice(0, 32))
    run = run_model(model, part.tokens, part.mask)
    roots, pairs = highest_roots(run), find_firings(run.attention)
    forward, total, traced = clock_in_turn(
        lambda: logits(model, batch.tokens, last),
        lambda: trace(model, batch, roots, weights=weights),
    )
    batched, found = clock(lambda: contributions(weights, run, pairs, Settings()), 9)
    few = pairs[torch.arange(0, len(pairs), max(1, len(pairs) // 12))]
    looped, _ = clock(lambda: loop(model, weights, run, few), repeats=1)
    notes = [
        f"{prompts} prompts, {prompts / 32 * len(pairs):.0f} firings, {len(traced.edges)} edges",
        f"{len(pairs)} firings; {len(few)} looped, scaled; worst error {found.error().max():.0e}",
    ]
    seconds = [(total - forward, forward), (looped * len(pairs) / len(few), batched)]
    return ratios(TARGETS, seconds, notes)


def growth(sizes=(64, 256, 1024, 4096)):
    """Time and peak memory of a trace against the number of prompts. One row per size."""
    model, rows = load_random(), []
    weights = read_weights(model)
    part = random_batch(32)
    roots = highest_roots(run_model(model, part.tokens, part.mask))
    for prompts in sizes:
        batch = random_batch(prompts)
        seconds, traced = clock(lambda b=batch: trace(model, b, roots, weights=weights), repeats=1)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        rows.append((prompts, seconds, 1000 * seconds / prompts, len(traced.edges), peak))
    columns = ["prompts", "seconds", "ms a prompt", "edges", "peak GiB so far"]
    return pd.DataFrame(rows, columns=columns)
