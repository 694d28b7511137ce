"""Firings, and pairs to compare them with, against a slow, obvious reference."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from batches import with_roles
from sparse_signals.core.prompts import PromptError
from sparse_signals.core.run import Run, run
from sparse_signals.core.stats import participation_ratio
from sparse_signals.heads.protagonist import template_of
from sparse_signals.signals.firings import (
    ELSEWHERE,
    ITSELF,
    find_firings,
    pairs_at,
    roles_joined,
    sample_silent,
    silent_partners,
    strongest_sources,
)

KINDS = ["tiny_gpt2", "tiny_llama", "tiny_qwen2", "tiny_qwen3", "tiny_gpt_neox"]
LEVEL = 0.25  # random models attend weakly: a lower bar gives enough pairs


@pytest.fixture(scope="module", params=KINDS)
def ran(request, batch):
    return run(request.getfixturevalue(request.param), with_roles(batch))


@pytest.fixture(scope="module")
def pairs(ran):
    return find_firings(ran, LEVEL)


def slow_firings(ran, level):
    """Every layer, prompt, head and pair, one at a time."""
    found = []
    L, P, H, T, _ = ran.pattern.shape
    for index in np.ndindex(L, P, H, T, T):
        layer, prompt, head, i, j = index
        if not 1 <= j <= i or not ran.mask[prompt, i]:
            continue
        score = ran.q[layer, prompt, head, i] @ ran.k[layer, prompt, head, j]
        if ran.pattern[index] >= level and score >= 0:
            found.append((*index, (score / ran.model.divisor[layer]).item()))
    return found


def test_firings_equal_the_slow_reference(ran, pairs):
    expected = slow_firings(ran, LEVEL)
    columns = (pairs.layer, pairs.prompt, pairs.head, pairs.dest, pairs.src)
    assert len(expected) > 20
    assert list(zip(*(c.tolist() for c in columns), strict=True)) == [row[:5] for row in expected]
    assert pairs.score.tolist() == pytest.approx([row[5] for row in expected])


def test_context_bar_falls_with_the_number_of_visible_tokens(ran):
    pairs = find_firings(ran, 1.5, context=True)
    assert (pairs.attention >= 1.5 / (pairs.dest + 1) - 1e-12).all()
    assert (pairs.attention < LEVEL).any()


def test_silent_pairs_match_the_firings_head_by_head(ran, pairs):
    silent = sample_silent(ran, pairs, LEVEL)
    assert (silent.attention < LEVEL).all() and (silent.src >= 1).all()
    assert (silent.src <= silent.dest).all()
    assert ran.mask[silent.prompt, silent.dest].all()
    counts = pairs.table()["name"].value_counts().sort_index()
    assert silent.table()["name"].value_counts().sort_index().equals(counts)
    assert torch.equal(sample_silent(ran, pairs, LEVEL).src, silent.src)


def test_padding_never_fires(ran, pairs):
    assert isinstance(ran, Run)
    assert ran.mask[pairs.prompt, pairs.dest].all()
    assert ran.mask[pairs.prompt, pairs.src].all()


def test_strongest_source_has_the_largest_weight_of_its_row(ran):
    pairs = strongest_sources(ran)
    assert len(pairs) == 3 * 4 * (ran.mask.sum() - len(ran.mask))
    rows = ran.pattern[pairs.layer, pairs.prompt, pairs.head, pairs.dest, 1:]
    torch.testing.assert_close(pairs.attention, rows.amax(-1))


def test_pairs_at_given_places(ran, pairs):
    places = (pairs.layer, pairs.prompt, pairs.head, pairs.dest, pairs.src)
    assert torch.equal(pairs_at(ran, *places).score, pairs.score)


def test_a_row_sets_its_own_bar(ran):
    """Two tokens that share the attention fire, one that rests at the first token does not."""
    rows = {3: [0.04, 0.48, 0, 0.48], 4: [0.7, 0.3, 0, 0, 0], 5: [0.1, 0, 0, 0, 0.9, 0]}
    pattern = torch.zeros_like(ran.pattern)
    for dest, row in rows.items():
        pattern[1, 7, 2, dest, : len(row)] = torch.tensor(row)
    flat = replace(ran, pattern=pattern, q=torch.ones_like(ran.q), k=torch.ones_like(ran.k))
    pairs = find_firings(flat, None)
    here = (pairs.attention > 0).nonzero().flatten()
    places = pairs[here].table()[["layer", "prompt", "head", "dest", "src"]].to_numpy().tolist()
    assert places == [[1, 7, 2, 3, 1], [1, 7, 2, 3, 3], [1, 7, 2, 5, 4]]


def test_the_bar_of_a_row_is_one_over_its_participation_ratio(ran):
    pairs = find_firings(ran, None)
    found = set(pairs.table()[["layer", "prompt", "head", "dest", "src"]].itertuples(index=False))
    assert len(found) > 20
    for layer, prompt, head in ((0, 0, 0), (1, 2, 3), (2, 5, 1)):
        for dest in range(1, int(ran.mask[prompt].sum())):
            row = ran.pattern[layer, prompt, head, dest, : dest + 1].double()
            bar = (1 / participation_ratio(row)).item()
            for src in range(1, dest + 1):
                score = ran.q[layer, prompt, head, dest] @ ran.k[layer, prompt, head, src]
                fires = row[src].item() >= bar - 1e-9 and score.item() >= 0
                assert ((layer, prompt, head, dest, src) in found) == fires


def test_pairs_are_called_by_the_roles_that_they_join(ran, pairs):
    joined, roles = roles_joined(pairs, ran.batch), ran.batch.roles
    for n in range(len(pairs)):
        prompt, dest, src = (int(x[n]) for x in (pairs.prompt, pairs.dest, pairs.src))
        if joined[n] in (ITSELF, ELSEWHERE):
            assert (dest == src) == (joined[n] == ITSELF)
            assert (dest, src) != (roles["S2"][prompt], roles["S1"][prompt])
        else:
            one, other = joined[n].split(" → ")
            assert (dest, src) == (roles[one][prompt], roles[other][prompt])
    assert len(set(joined)) >= 4


def test_roles_of_the_task_are_needed(ran, pairs):
    plain = replace(ran.batch, roles={"end": ran.batch.roles["end"]})
    with pytest.raises(PromptError, match="ioi_prompts"):
        roles_joined(pairs, plain)


@pytest.mark.parametrize("relative", [False, True])
def test_silent_partners_are_the_nearest_by_score(ran, pairs, relative):
    some = pairs[::19]
    matched, partners = silent_partners(ran, some, LEVEL, within=0.05, relative=relative)
    template = torch.tensor(template_of(ran.batch))
    score = ran.q @ ran.k.mT / ran.model.divisor[:, None, None, None, None]
    if relative:
        for i in range(1, score.shape[-1]):
            row = score[..., i, : i + 1].clone()
            score[..., i, : i + 1] = row - (row.sum(-1, keepdim=True) - row) / i
    assert 3 < len(matched) <= len(some) and len(partners) == len(matched)
    assert (partners.attention < LEVEL).all() and (partners.src < partners.dest).all()
    place = {int(n): k for k, n in enumerate(matched)}
    for n in range(len(some)):
        layer, prompt, head = int(some.layer[n]), int(some.prompt[n]), int(some.head[n])
        wanted = score[layer, prompt, head, int(some.dest[n]), int(some.src[n])]
        nearest = np.inf
        for p in (template == template[prompt]).nonzero().flatten().tolist():
            for i in range(2, int(ran.mask[p].sum())):
                quiet = ran.pattern[layer, p, head, i, 1:i] < LEVEL
                off = (score[layer, p, head, i, 1:i] - wanted).abs()[quiet]
                nearest = min([nearest, *off.tolist()])
        if n in place:
            k = place[n]
            assert (partners.layer[k], partners.head[k]) == (layer, head)
            assert template[partners.prompt[k]] == template[prompt]
            place_of = (int(getattr(partners, c)[k]) for c in ("prompt", "dest", "src"))
            p, i, j = place_of
            found = abs((score[layer, p, head, i, j] - wanted).item())
            assert found == pytest.approx(nearest, abs=1e-12)
        else:
            assert nearest > 0.05
