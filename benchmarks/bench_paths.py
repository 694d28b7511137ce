"""Chapter 5: what interventions on all edges cost, against full forward passes."""

from dataclasses import replace

import torch

from bench_tracing import random_batch
from common import LENGTH, clock, load_random, ratios
from sparse_signals.core.model import logits
from sparse_signals.core.prompts import roles_of
from sparse_signals.core.run import run
from sparse_signals.interventions.intervene import intervene
from sparse_signals.signals.firings import find_firings
from sparse_signals.tracing.circuit import KEY, labelled
from sparse_signals.tracing.contributions import Settings
from sparse_signals.tracing.roots import Root
from sparse_signals.tracing.trace import trace_prompts

SETTINGS = Settings(level=2.5, context=True)
ROOT_LAYERS = (9, 10)  # those of the published roots
VARIANTS = 4  # global and local, ablate and boost
TARGETS = {
    "full pass for each edge and variant / sweep over all edges": (">=", 10),
    "an intervention of the sweep / forward pass of its prompt in a batch": ("<=", 0.33),
}


def three_roots(model, batch):
    """The three heads of the published roots' layers that fire most often from the last token."""
    pairs = find_firings(run(model, batch), SETTINGS.level, SETTINGS.context)
    table = pairs[pairs.dest == LENGTH - 1].table()
    table = table[table["layer"].isin(ROOT_LAYERS)]
    counts = table.groupby(["layer", "head"]).size().nlargest(3)
    return [Root(int(layer), int(head)) for layer, head in counts.index]


def full_pass(model, tokens, layer):
    """A forward pass with a hook that adds to the residual stream, all logits read out."""

    def add(value, hook):
        value[:, -1] += 1
        return value

    with torch.no_grad():
        return model.bridge.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.hook_in", add)])


def measure(prompts=48):
    """One row per ratio."""
    model = load_random()
    numbers = torch.arange(prompts)
    batch = replace(random_batch(prompts), io=numbers + 10, s=numbers + 1000)
    traced = trace_prompts(model, batch, three_roots(model, batch), SETTINGS)
    swept, table = clock(lambda: intervene(traced), repeats=2)
    pooled = labelled(traced.edges, roles_of(batch)).groupby(KEY)["prompt"].nunique()
    sizes = pooled.value_counts()  # a pass takes the prompts that have the edge
    full = sum(
        count * clock(lambda n=size: full_pass(model, batch.tokens[:n], 6), repeats=2)[0]
        for size, count in sizes.items()
    )
    forward, _ = clock(lambda: logits(model, batch.tokens, torch.full((prompts,), LENGTH - 1)))
    passes = len(pooled) * VARIANTS
    seconds = [(full * VARIANTS, swept), (swept / len(table), forward / prompts)]
    notes = [
        f"{passes} passes of {pooled.mean():.1f} prompts; each size timed, times its number",
        (
            f"{len(table)} interventions, {len(traced.edges)} edges in {prompts} prompts; the "
            f"sweep takes {swept / forward:.0f} forward passes of all prompts, without vocabulary"
        ),
    ]
    return ratios(TARGETS, seconds, notes)
