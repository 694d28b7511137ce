"""Speed of the method as ratios measured in one run, on a GPT-2-small-sized random model.

    python benchmarks/bench.py [--prompts 256] [--growth]

Naive code is timed on a sample and scaled; the table says how large the sample was.
"""

import argparse
import resource

import pandas as pd
import torch

import bench_paths
import bench_shares
import bench_tracing
from common import LENGTH, clock, load_random, ratios
from sparse_signals.core.model import logits
from sparse_signals.core.run import run
from sparse_signals.heads.svd import head_svd, qk_forms
from sparse_signals.signals.firings import find_firings
from sparse_signals.signals.slices import slices, support

TARGETS = {
    "dense SVD of 144 heads / thin-QR SVD": (">=", 20),
    "loop over pairs and vectors / batched firings, slices, supports": (">=", 100),
    "firings, slices, supports / forward pass": ("<=", 0.25),
}


def find_everything(run):
    """What chapter 3 computes for a batch of prompts."""
    pairs = find_firings(run)
    parts = slices(run, pairs)
    return pairs, parts, support(parts)


def loop(run, prompts):
    """The same, one prompt, head, pair of tokens and singular vector at a time."""
    sizes = []
    layers, _, heads, length = run.q.shape[:4]
    for prompt in range(prompts):
        for layer in range(layers):
            for head in range(heads):
                for i in range(length):
                    sizes += [
                        _loop_pair(run, prompt, layer, head, i, j)
                        for j in range(1, i + 1)
                        if run.pattern[layer, prompt, head, i, j] >= 0.5
                    ]
    return sizes


def _loop_pair(run, prompt, layer, head, i, j):
    svd = head_svd(run.model)
    q = run.q[layer, prompt, head, i].double()
    k = run.k[layer, prompt, head, j].double()
    parts = []
    for n in range(len(q)):
        left = q @ svd.dest_map[layer, head, :, n]
        right = k @ svd.src_map[layer, head, :, n]
        parts.append((svd.S[layer, head, n] * left * right / svd.divisor[layer]).item())
    total, reached, size = sum(parts), 0.0, 0
    for value in sorted(parts, reverse=True):
        if reached > total or value <= 0:
            break
        reached, size = reached + value, size + 1
    return size


def measure(prompts):
    """One row per ratio."""
    model = load_random()
    tokens = bench_tracing.random_batch(prompts).tokens
    last = torch.full((prompts,), LENGTH - 1)

    forms = qk_forms(model)
    thin, _ = clock(lambda: head_svd(forms))
    dense, _ = clock(lambda: torch.linalg.svd(forms.A[0, :4] @ forms.B[0, :4].mT), repeats=1)
    forward, _ = clock(lambda: logits(model, tokens, last))
    ran = run(model, bench_tracing.random_batch(prompts))
    batched, (pairs, _, _) = clock(lambda: find_everything(ran))
    sample = max(1, prompts // 64)
    looped, sizes = clock(lambda: loop(ran, sample), repeats=1)
    seconds = [(dense * 36, thin), (looped * prompts / sample, batched), (batched, forward)]
    notes = [
        "4 heads timed, scaled to 144",
        f"{sample} prompts timed, scaled to {prompts}; {len(sizes)} pairs",
        f"{prompts} prompts of {LENGTH} tokens, {len(pairs)} firings",
    ]
    return ratios(TARGETS, seconds, notes)


def show(table):
    """Print a table in full."""
    with pd.option_context("display.width", 200, "display.max_colwidth", 80):
        print(table.rename(columns={"over": "over (s)", "under": "under (s)"}).round(3).to_string())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--growth", action="store_true", help="traces of 64 to 4,096 prompts")
    options = parser.parse_args()
    if options.growth:
        show(bench_tracing.growth())
    else:
        tables = [measure(options.prompts), bench_tracing.measure(options.prompts)]
        tables.append(bench_paths.measure())
        show(pd.concat([*tables, bench_shares.measure(options.prompts)]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory {peak:.1f} GiB, {torch.get_num_threads()} threads")
