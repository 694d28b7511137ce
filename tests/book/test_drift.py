"""Why the notebooks run in float64: what chapter 3 prints, on one thread, on two, in float32."""

import pandas as pd
import pytest
import torch

from sparse_signals.core.model import load_model
from sparse_signals.core.numbers import fmt
from sparse_signals.core.prompts import encode, ioi_prompts
from sparse_signals.core.run import run
from sparse_signals.signals.firings import find_firings
from sparse_signals.signals.slices import slices, sparsity


def tables(dtype: torch.dtype, threads: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Firings per head and sparsity of every firing, as chapter 3 makes them, on 16 prompts."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = load_model("gpt2-ioi", device="cpu", dtype=dtype)
        table = ioi_prompts(16, seed=3, tokenizer=model.tokenizer)
        ran = run(model, encode(model, table))
        pairs = find_firings(ran)
        sparse = sparsity(slices(ran, pairs))
    finally:
        torch.set_num_threads(before)
    return pairs.table(), sparse


@pytest.fixture(scope="module")
def reference():
    return tables(torch.float64, 1)


@pytest.mark.slow
def test_two_threads_print_what_one_prints(reference):
    pairs, sparse = tables(torch.float64, 2)
    assert pairs.map(fmt).equals(reference[0].map(fmt))
    assert sparse.map(fmt).equals(reference[1].map(fmt))
    assert (pairs["score"] - reference[0]["score"]).abs().max() < 1e-12


def test_single_precision_drifts_and_stays_small(reference, record_property):
    pairs, sparse = tables(torch.float32, 1)
    place = ["layer", "prompt", "head", "dest", "src"]
    both = pairs.merge(reference[0], on=place, suffixes=("", "_64"))
    changed = len(pairs) + len(reference[0]) - 2 * len(both)
    drift = (both["score"] - both["score_64"]).abs().max()
    medians = (sparse.median() - reference[1].median()).abs() / reference[1].median()
    record_property("firings that appear or vanish in float32", changed)
    record_property("largest change of a score in float32", fmt(drift))
    print(f"float32: {changed} firings differ, scores drift by {fmt(drift)}")
    assert 0 < drift < 1e-3 and changed <= 0.001 * len(pairs)
    assert medians.max() < 0.01
