"""Chapter 6: how much of an answer circuits of every size give, and which ranking is better.

Faithfulness is f = (F(circuit) − F(closed)) / (F(open) − F(closed)), each F a mean over prompts:
"open" is the model, "closed" the circuit of nothing. A ranking is tested on other prompts than it
was made of, several times (draws), and intervals resample templates, which all draws share.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sparse_signals.core.prompts import Batch, PromptError
from sparse_signals.core.stats import DRAWS, bounds, group_bootstrap, resample
from sparse_signals.interventions.aligned_circuits import (
    AlignedPrompts,
    Answered,
    best_edges,
    run_edges,
)

SHARES_OF_EDGES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # those of MIB
AREAS = ("CPR", "CMD", "log CPR", "log CMD")


# --- what every prompt answers -------------------------------------------------------------------


def edge_answers(
    prompts: AlignedPrompts,
    rankings: Mapping[str, Float[Tensor, "edge"]],
    sizes: Sequence[float] = SHARES_OF_EDGES,
    *,
    draw: int = 0,
) -> pd.DataFrame:
    """Run the best edges of every ranking, some shares of all edges: one row a prompt.

    Columns: method, draw, size, prompt, template (−1 where prompts have none), F, P (of the
    answer), first (whether it comes first), closed and open (F of nothing and of the model).
    Ties of a ranking are in random order, another in every draw.
    """
    partial = [size for size in sizes if size < 1]
    circuits = {name: best_edges(value, partial, draw) for name, value in rankings.items()}
    number = len(next(iter(rankings.values())))
    ends = torch.tensor([[False], [True]]).expand(2, number)
    found = run_edges(prompts, torch.cat([ends, *circuits.values()]))
    return circuit_answers(prompts.batch, found, dict.fromkeys(rankings, partial), draw)


def circuit_answers(
    batch: Batch,
    found: Answered,
    sizes: Mapping[str, Sequence[float] | Sequence[int]],
    draw: int = 0,
) -> pd.DataFrame:
    """The table of `edge_answers` from what was found: closed, open, then the sizes by method.

    The open circuit is every method's at size 1, or where sizes are numbers of nodes, at infinity.
    """
    prompts = len(batch.tokens)
    template = batch.table["template"] if "template" in batch.table else pd.Series([-1] * prompts)
    shared = {"prompt": range(prompts), "template": template.to_numpy()}
    closed, opened = found.F[0].numpy(), found.F[1].numpy()
    pieces, at = [], 2
    for method, each in sizes.items():
        whole = np.inf if all(isinstance(size, int) for size in each) else 1.0
        for size, place in [*zip(each, range(at, at + len(each)), strict=True), (whole, 1)]:
            named = {"method": method, "draw": draw, "size": size} | shared
            values = {
                "F": found.F[place].numpy(),
                "P": found.probability[place].numpy(),
                "first": found.first[place].numpy(),
            }
            pieces.append(pd.DataFrame(named | values | {"closed": closed, "open": opened}))
        at += len(each)
    return pd.concat(pieces, ignore_index=True)


def check_difference(answers: pd.DataFrame, draws: int = DRAWS) -> None:
    """Raise PromptError where F(open) − F(closed) is not larger than its own uncertainty.

    That is where its 95 % interval, over templates, is not above 0: f would divide by noise.
    """
    one = answers.drop_duplicates(["draw", "prompt"])
    whole = (one["open"] - one["closed"]).to_numpy()
    cluster = np.unique(one["template"], return_inverse=True)[1]
    draw, names = pd.factorize(one["draw"])
    times = resample(int(cluster.max()) + 1, draws)
    value, low, high = group_bootstrap(whole, draw, cluster, times, len(names), np.ones(len(one)))
    for n in np.flatnonzero(~(low > 0)).tolist():
        raise PromptError(
            f"F of prompts and closed circuits differs by {value[n]:.2g} [{low[n]:.2g}, "
            f"{high[n]:.2g}] in draw {names[n]}, so no part of it can be measured: take more "
            "prompts, other counterfactuals, or prompts that the model answers"
        )


# --- curves and areas ----------------------------------------------------------------------------


def curve_table(
    answers: pd.DataFrame,
    by: Sequence[str] = ("method", "draw", "size"),
    draws: int = DRAWS,
    seed: int = 0,
) -> pd.DataFrame:
    """f with its 95 % interval over templates, F, P(answer) and top-1 share of groups of answers.

    Without "draw" in `by`, draws are pooled. One row a group: f, low, high, F, P, top1.
    Raises PromptError where F(open) − F(closed) is too small (`check_difference`).
    """
    check_difference(answers, draws)
    cluster = np.unique(answers["template"], return_inverse=True)[1]
    grouped = answers.groupby(list(by), sort=False)
    times = resample(int(cluster.max()) + 1, draws, seed)
    part, whole = ((answers[x] - answers["closed"]).to_numpy(float) for x in ("F", "open"))
    group = grouped.ngroup().to_numpy()
    f, low, high = group_bootstrap(part, group, cluster, times, grouped.ngroups, whole)
    means = grouped[["F", "P", "first"]].mean().rename(columns={"first": "top1"})
    found = means.reset_index()
    for n, (name, values) in enumerate({"f": f, "low": low, "high": high}.items()):
        found.insert(len(by) + n, name, values)
    return found


def area_table(
    answers: pd.DataFrame, against: str | None = None, draws: int = DRAWS, seed: int = 0
) -> pd.DataFrame:
    """Areas of the curves of every method with 95 % intervals over templates; means over draws.

    CPR: ∫ f dk over the share of edges k; CMD: ∫ |1 − f| dk, by the trapezoidal rule over the
    sizes that were run. "log CPR" and "log CMD" are means over ln k, in which small circuits count.
    `against`: the areas less those of one method, over the same resampled templates.
    One row a method and measure: value, low, high. Sizes that are numbers of nodes have no areas.
    Source: Mueller et al. 2025, MIB (CPR, CMD). Raises PromptError as `curve_table` does.
    """
    check_difference(answers, draws)
    methods, sizes, f = _sampled(answers, draws, seed)
    values = np.stack([_area(x, sizes, log) for log in (False, True) for x in (f, np.abs(1 - f))])
    values = values.mean(-1)  # over draws
    if against is not None:
        if against not in methods:
            raise ValueError(f"no method {against!r}: choose among {', '.join(methods)}")
        base = methods.index(against)
        values = np.delete(values - values[..., [base]], base, axis=-1)
        methods = [method for method in methods if method != against]
    low, high = map(np.asarray, bounds(values[:, 1:], axis=1))
    rows = [
        {"method": method, "measure": measure, "value": values[m, 0, n]}
        | {"low": low[m, n], "high": high[m, n]}
        for n, method in enumerate(methods)
        for m, measure in enumerate(AREAS)
    ]
    return pd.DataFrame(rows)


def _sampled(
    answers: pd.DataFrame, draws: int, seed: int
) -> tuple[list[str], Float[np.ndarray, "size"], Float[np.ndarray, "sample method draw size"]]:
    """f of every method, draw and size, of the data itself and of resampled templates."""
    keys = [pd.factorize(answers[name], sort=name == "size") for name in ("method", "draw", "size")]
    place, names = zip(*keys, strict=True)
    shape = tuple(map(len, names))
    if not (names[2].min() > 0 and names[2].max() == 1):
        raise ValueError("areas are over shares of edges, up to all of them")
    group = np.ravel_multi_index(place, shape)
    cluster = np.unique(answers["template"], return_inverse=True)[1]
    clusters, groups = int(cluster.max()) + 1, int(np.prod(shape))
    times = resample(clusters, draws, seed)
    part, whole = (
        times
        @ np.bincount(
            cluster * groups + group,
            (answers[name] - answers["closed"]).to_numpy(float),
            clusters * groups,
        ).reshape(clusters, groups)
        for name in ("F", "open")
    )
    f = np.divide(part, whole, out=np.full_like(part, np.nan), where=whole > 0)
    return names[0].tolist(), names[2].to_numpy(float), f.reshape(-1, *shape)


def _area(
    f: Float[np.ndarray, "... size"], sizes: Float[np.ndarray, "size"], log: bool
) -> Float[np.ndarray, "..."]:
    """∫ f dk from the smallest to the largest size, or the mean over ln k."""
    k = np.log(sizes) if log else sizes
    area = ((f[..., 1:] + f[..., :-1]) / 2) @ np.diff(k)
    return area / (k[-1] - k[0]) if log else area
