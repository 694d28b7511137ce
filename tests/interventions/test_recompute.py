"""The suffix recomputation agrees with full forward passes, whatever is changed."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from full_pass import changes_of, full_pass
from sparse_signals.core.model import load_model
from sparse_signals.core.prompts import Batch, PromptError
from sparse_signals.interventions import recompute as suffix
from sparse_signals.interventions.changes import MID, PRE, K, Probes, Q, V, clean_run
from sparse_signals.interventions.recompute import recompute

KINDS = ("tiny_gpt2", "tiny_llama", "tiny_qwen2", "tiny_qwen3", "tiny_gpt_neox")
TOLERANCE = 1e-9
STREAM = (PRE, MID)


@pytest.fixture(scope="module")
def batch(tokens, mask):
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


def random_probes(model, batch, prompt, seed=0):
    """A probe of every row."""
    generator = torch.Generator().manual_seed(seed)
    probes = []
    for row, p in enumerate(prompt.tolist()):
        dest = int(torch.randint(int(batch.mask[p].sum()), (1,), generator=generator))
        src = int(torch.randint(dest + 1, (1,), generator=generator))
        probes.append((row, row % model.n_layers, row % model.n_heads, dest, src))
    return probes


def recomputed(model, batch, prompt, changes, probes=(), **options):
    parts = (
        changes_of([c for c in changes if c[2] in STREAM], model.d_model),
        changes_of([c for c in changes if c[2] not in STREAM], model.d_head),
        Probes(*torch.tensor(probes, dtype=torch.long).view(-1, 5).T),
    )
    return recompute(clean_run(model, batch), prompt, *parts, **options)


def gap(model, batch, prompt, changes, probes=(), freeze_norms=False):
    """Largest difference from full passes, of logits (relative), scores and attention weights."""
    outcome = recomputed(model, batch, prompt, changes, probes, freeze_norms=freeze_norms)
    worst = []
    for row, p in enumerate(prompt.tolist()):
        mine = [c[1:] for c in changes if c[0] == row]
        place = probes[row][1:] if probes else None
        tokens = batch.tokens[p][batch.mask[p]]
        every, score, weight = full_pass(model, tokens, mine, place, freeze_norms)
        expected = every[-1, [batch.io[p], batch.s[p]]]
        size = expected.abs().max().clamp_min(1)  # frozen scales can blow the stream up
        worst.append((outcome.logits[row] - expected).abs().max() / size)
        if probes:
            worst += [abs(outcome.score[row] - score), abs(outcome.attention[row] - weight)]
    return float(torch.stack(worst).max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("site", [PRE, MID, Q, K, V])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_one_change(request, batch, kind, site, layer):
    model = request.getfixturevalue(kind)
    prompt, changes = random_changes(model, batch, 40, most=1)
    changes = [(row, layer, *rest) for row, _, *rest in changes if rest[0] == site]
    rows = {change[0]: n for n, change in enumerate(changes)}
    prompt = prompt[list(rows)]
    changes = [(rows[row], *rest) for row, *rest in changes]
    probes = random_probes(model, batch, prompt)
    assert gap(model, batch, prompt, changes, probes) < TOLERANCE


@pytest.mark.parametrize("freeze_norms", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:A forward hook edited")
def test_several_changes(request, batch, kind, freeze_norms):
    model = request.getfixturevalue(kind)
    prompt, changes = random_changes(model, batch, 40, seed=1, most=4)
    probes = random_probes(model, batch, prompt, seed=2)
    worst = gap(model, batch, prompt, changes, probes, freeze_norms)
    assert worst < TOLERANCE * (3 if freeze_norms else 1)


def test_in_float32(tiny_directories, batch):
    for kind in ("gpt2", "llama"):
        model = load_model(tiny_directories[kind], device="cpu")
        prompt, changes = random_changes(model, batch, 40, seed=3)
        assert gap(model, batch, prompt, changes) < 1e-5


@pytest.mark.parametrize("limit", ["TOKENS", "WAVE", "KEYS"])
def test_limits_do_not_matter(tiny_gpt2, batch, monkeypatch, limit):
    prompt, changes = random_changes(tiny_gpt2, batch, 40)
    expected = recomputed(tiny_gpt2, batch, prompt, changes)
    monkeypatch.setattr(suffix, limit, 7)
    found = recomputed(tiny_gpt2, batch, prompt, changes)
    assert (found.logits - expected.logits).abs().max() < 1e-12


def test_no_change_is_the_clean_run(tiny_gpt2, batch):
    prompt = torch.arange(len(batch.tokens))
    assert gap(tiny_gpt2, batch, prompt, [], random_probes(tiny_gpt2, batch, prompt)) < 1e-12


def test_some_prompts_of_a_batch(tiny_gpt2, batch):
    whole, part = clean_run(tiny_gpt2, batch), clean_run(tiny_gpt2, batch, slice(3, 6))
    assert part.first_prompt == 3 and part.end.tolist() == whole.end[3:6].tolist()
    assert (part.final - whole.final[3:6]).abs().max() < 1e-12


def test_refusals(tiny_gpt2, batch):
    with pytest.raises(PromptError, match="two names"):
        clean_run(tiny_gpt2, replace(batch, io=None))
    late = (0, 0, PRE, 0, int(batch.mask[0].sum()), torch.zeros(32, dtype=torch.float64))
    with pytest.raises(ValueError, match="after the last token"):
        recomputed(tiny_gpt2, batch, torch.tensor([0]), [late])
