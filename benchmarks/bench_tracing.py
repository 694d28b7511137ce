"""Chapter 4: what contributions and traces cost, against a loop and against the forward pass."""

import resource

import pandas as pd
import torch

from common import LENGTH, clock, clock_in_turn, load_random, ratios
from sparse_signals.core.model import logits
from sparse_signals.core.prompts import Batch
from sparse_signals.core.run import run
from sparse_signals.signals.firings import find_firings
from sparse_signals.signals.slices import coordinates, support
from sparse_signals.tracing.contributions import Settings, contributions, reading_vectors
from sparse_signals.tracing.roots import Root
from sparse_signals.tracing.trace import trace_prompts

TARGETS = {
    "trace beyond its forward pass / forward pass": ("<=", 0.25),
    "loop over firings and heads / batched contributions": (">=", 300),
}
SETTINGS = Settings(level=2.5, context=True)  # so that heads of all layers fire from the end


def random_batch(prompts):
    """Random tokens, without names."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(50257, (prompts, LENGTH), generator=generator)
    table = pd.DataFrame({"text": [""] * prompts})
    return Batch(table, tokens, torch.ones_like(tokens, dtype=torch.bool), [], {}, None, None)


def highest_roots(run, n=3):
    """The heads of the highest layers that fire from the last token: the deepest traces."""
    pairs = find_firings(run, SETTINGS.level, SETTINGS.context)
    table = pairs[pairs.dest == LENGTH - 1].table().sort_values("layer", ascending=False)
    heads = table[["layer", "head"]].drop_duplicates().head(n).to_numpy()
    return [Root(int(layer), int(head)) for layer, head in heads]


def loop(run, pairs):
    """Contributions as the released code computes them: a firing and an upstream head at a time,
    with the head's output made anew for the whole batch."""
    coords, model = coordinates(run, pairs), run.model
    chosen = support(coords.slices)
    read, W_O = reading_vectors(run, pairs, coords, chosen), model.writers.W_O
    pattern, found = run.pattern, []
    for n in range(len(pairs)):
        prompt, layer = pairs.prompt[n], int(pairs.layer[n])
        for up in range(layer):
            for head in range(model.n_heads):
                out = pattern[up, :, head] @ run.v[up, :, head] @ W_O[up, head]
                for side, token in enumerate((pairs.dest[n], pairs.src[n])):
                    weight = out[prompt, token].double() @ read[n, side, :-1]
                    found.append(weight / run.scale[layer, prompt, token])
    return torch.stack(found)


def measure(prompts=256):
    """One row per ratio."""
    model = load_random()
    batch = random_batch(prompts)
    last = torch.full((prompts,), LENGTH - 1)
    part = batch.rows(slice(0, 32))
    ran = run(model, part)
    roots, pairs = highest_roots(ran), find_firings(ran)
    forward, total, traced = clock_in_turn(
        lambda: logits(model, batch.tokens, last),
        lambda: trace_prompts(model, batch, roots, SETTINGS),
    )
    batched, found = clock(lambda: contributions(ran, pairs), 9)
    few = pairs[torch.arange(0, len(pairs), max(1, len(pairs) // 12))]
    looped, _ = clock(lambda: loop(ran, few), repeats=1)
    notes = [
        f"{prompts} prompts, {len(traced.firings)} firings reached, {len(traced.edges)} edges",
        f"{len(pairs)} firings; {len(few)} looped, scaled; worst error {found.error().max():.0e}",
    ]
    seconds = [(total - forward, forward), (looped * len(pairs) / len(few), batched)]
    return ratios(TARGETS, seconds, notes)


def growth(sizes=(64, 256, 1024, 4096)):
    """Time and peak memory of a trace against the number of prompts. One row per size."""
    model, rows = load_random(), []
    roots = highest_roots(run(model, random_batch(32)))
    for prompts in sizes:
        batch = random_batch(prompts)
        seconds, traced = clock(lambda b=batch: trace_prompts(model, b, roots, SETTINGS), repeats=1)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        rows.append((prompts, seconds, 1000 * seconds / prompts, len(traced.edges), peak))
    columns = ["prompts", "seconds", "ms a prompt", "edges", "peak GiB so far"]
    return pd.DataFrame(rows, columns=columns)
