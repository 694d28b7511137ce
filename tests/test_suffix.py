"""The suffix recomputation agrees with full forward passes, whatever is changed."""

import pandas as pd
import pytest
import torch

from full_pass import changes_of, full_pass
from sparse_signals import suffix
from sparse_signals.interventions import (
    MID,
    PRE,
    K,
    Probes,
    Q,
    V,
    clean_run,
    read_layers,
)
from sparse_signals.prompts import Batch

KINDS = ("tiny_gpt2", "tiny_llama", "tiny_qwen2")
# In float64 rotary models still take angles, softmax and the last normalisation in float32.
TOLERANCE = {"tiny_gpt2": 1e-9, "tiny_llama": 3e-6, "tiny_qwen2": 3e-6}
STREAM = (PRE, MID)


@pytest.fixture(scope="module")
def batch(tokens, mask):
    return random_batch(tokens, mask)


def random_batch(tokens, mask):
    """Random tokens as prompts; IO and S are any two tokens."""
    table = pd.DataFrame({"text": [""] * len(tokens)})
    labels = [["?"] * int(n) for n in mask.sum(1)]
    numbers = torch.arange(len(tokens))
    return Batch(table, tokens, mask, labels, {}, 3 + numbers, 20 + numbers)


def random_changes(model, batch, rows, seed=0, most=3):
    """`rows` rows of up to `most` changes: prompt of each row, changes (row, layer, …, vector)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return int(torch.randint(n, (1,), generator=generator))

    prompt, changes = [], []
    for row in range(rows):
        prompt.append(draw(len(batch.tokens)))
        length = int(batch.mask[prompt[-1]].sum())
        for _ in range(draw(most) + 1):
            site = draw(5)
            width = model.d_model if site in STREAM else model.d_head
            vector = torch.randn(width, generator=generator, dtype=torch.float64)
            place = draw(model.n_layers), site, draw(model.n_heads), draw(length)
            changes.append((row, *place, vector))
    return torch.tensor(prompt), changes


def split(model, changes):
    """The changes of the stream and those of the heads."""
    stream = [c for c in changes if c[2] in STREAM]
    heads = [c for c in changes if c[2] not in STREAM]
    return changes_of(stream, model.d_model), changes_of(heads, model.d_head)


def probes_of(rows):
    return Probes(*torch.tensor(rows, dtype=torch.long).view(-1, 5).T)


def gap(model, batch, prompt, changes, probes=(), **options):
    """Largest difference from full passes, in logits, scores and attention weights."""
    clean, layers = clean_run(model, batch), read_layers(model)
    parts = split(model, changes)
    outcome = suffix.recompute(layers, clean, prompt, *parts, probes_of(probes), **options)
    worst = 0.0
    for row, p in enumerate(prompt.tolist()):
        mine = [c[1:] for c in changes if c[0] == row]
        tokens = batch.tokens[p][batch.mask[p]]
        of_row = [(n, probe[1:]) for n, probe in enumerate(probes) if probe[0] == row]
        for n, probe in of_row or [(None, None)]:
            every, score, weight = full_pass(model, tokens, mine, probe)
            expected = every[-1, [batch.io[p], batch.s[p]]]
            worst = max(worst, float((outcome.logits[row] - expected).abs().max()))
            if probe:
                worst = max(worst, abs(float(outcome.score[n]) - score))
                worst = max(worst, abs(float(outcome.attention[n]) - weight))
    return worst


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("site", [PRE, MID, Q, K, V])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_one_change(request, batch, kind, site, layer):
    model = request.getfixturevalue(kind)
    prompt, changes = random_changes(model, batch, 60, most=1)
    changes = [(row, layer, *rest) for row, _, *rest in changes if rest[0] == site]
    assert gap(model, batch, prompt, changes) < TOLERANCE[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_several_changes_and_probes(request, batch, kind):
    model = request.getfixturevalue(kind)
    prompt, changes = random_changes(model, batch, 40, seed=1, most=4)
    generator = torch.Generator().manual_seed(2)
    probes = []
    for row in range(40):
        dest = int(torch.randint(int(batch.mask[prompt[row]].sum()), (1,), generator=generator))
        src = int(torch.randint(dest + 1, (1,), generator=generator))
        probes.append((row, row % model.n_layers, row % model.n_heads, dest, src))
    assert gap(model, batch, prompt, changes, probes) < TOLERANCE[kind]
