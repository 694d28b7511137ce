"""Chapter 5: how much of the answer a circuit gives alone, and who finds the smaller circuit.

A circuit is a set of edges of a `Switchboard`, given as places in its flattened gates. It is run
with all other edges closed. Methods rank the edges of positive value; curves compare equal numbers.
"""

from collections.abc import Mapping, Sequence
from functools import reduce

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from sparse_signals.core.model import BIAS_ROW
from sparse_signals.core.prompts import role_numbers
from sparse_signals.core.run import fitting_rows, runs
from sparse_signals.core.stats import DRAWS, bounds, resample
from sparse_signals.interventions.gated_model import (
    GATED_BYTES,
    Answers,
    Switchboard,
    run_rows,
    run_switched,
)
from sparse_signals.tracing.contributions import SIDES
from sparse_signals.tracing.roots import logit_attribution
from sparse_signals.tracing.trace import Trace

Gate = Float[Tensor, "role layer head side component"]


# --- edges ---------------------------------------------------------------------------------------


def switchable(board: Switchboard) -> Bool[Tensor, "role layer head side component"]:
    """Which switches are edges: upstream components that differ between prompts, real roles.

    Output biases write the same everywhere: closing them would change nothing, they are no edges.
    """
    model, table = board.model, board.model.components[:-1]
    layer = torch.tensor(table["layer"].tolist())
    upstream = layer < torch.arange(model.n_layers)[:, None]
    upstream &= torch.tensor((table["kind"] != "bias").tolist())
    real = torch.arange(len(board.roles)) > 0
    shape = (len(board.roles), model.n_layers, model.n_heads, len(SIDES), len(table))
    return (real[:, None, None, None, None] & upstream[:, None, None]).expand(shape).clone()


def gates(board: Switchboard, edges: Int[Tensor, "edge"], others: bool = False) -> Gate:
    """1 where a switch is open: only the given edges, or with `others` all edges but them."""
    shape = switchable(board).shape
    size, device = shape.numel(), board.model.device
    value = torch.full((size,), float(others), dtype=board.model.dtype, device=device)
    value[edges.to(device)] = float(not others)
    return value.view(shape)


# --- rankings ------------------------------------------------------------------------------------


def ranked(board: Switchboard, value: Gate) -> Int[Tensor, "edge"]:
    """The edges of positive value, largest first; equal ones keep their order."""
    value = (value.cpu() * switchable(board)).flatten()
    order = value.argsort(descending=True, stable=True)
    return order[value[order] > 0]


def traced_value(board: Switchboard, traced: Trace) -> Gate:
    """How strong edges are in a trace: the sum over its P prompts of their mean share, over P.

    So it is the share of prompts with the edge times its mean there. Edges of several firings are
    one here if head, side and role of the receiving token agree.
    """
    numbers = role_numbers(traced.batch, board.roles)
    table = traced.edges[traced.edges["kind"] != BIAS_ROW]
    names = pd.Index(board.model.components["component"])
    places = (
        numbers.numpy()[table["prompt"], table["token"]],
        table["layer"].to_numpy(),
        table["head"].to_numpy(),
        table["side"].map({side: n for n, side in enumerate(SIDES)}).to_numpy(int),
        names.get_indexer(pd.Index(table["upstream"])),
    )
    known = places[0] >= 0
    shape = switchable(board).shape
    place = np.ravel_multi_index([index[known] for index in places], shape)
    mean = table[known].groupby([place, table["prompt"][known]])["share"].mean()
    value = torch.zeros(shape.numel(), dtype=torch.float64)
    pooled = mean.groupby(level=0).sum() / len(traced.batch.tokens)
    value[torch.tensor(pooled.index)] = torch.tensor(pooled.to_numpy())
    return value.view(shape)


def edge_attribution(board: Switchboard, steps: int = 5) -> Gate:
    """Edge attribution with integrated gradients: what opening each edge adds to F.

    The mean of ∂F/∂g over `steps` points g = α between all edges closed (0) and all open (1), with
    F the mean logit difference: (x_c − ablated_c) · ∂F/∂(input), summed over the tokens of a role.
    Over all edges it sums to F(open) − F(closed) as steps grow. Source: Syed et al. 2023; Hanna et
    al. 2024, who move the embeddings along the path where this moves the edges.
    """
    total = torch.zeros(switchable(board).shape, dtype=torch.float64)
    for step in range(steps):
        gate = torch.full(total.shape, (step + 0.5) / steps, dtype=board.model.dtype)
        gate = gate.to(board.model.device).requires_grad_()
        for rows in fitting_rows(board.model, board.batch, GATED_BYTES):
            with torch.enable_grad():
                difference = run_rows(board, gate, rows).difference.sum()
                total += torch.autograd.grad(difference, gate)[0].double().cpu()
    return total * switchable(board) / (steps * len(board.batch.tokens))


def head_value(board: Switchboard, seed: int = 0) -> Gate:
    """Edges into and out of the heads that write most of logit(IO) − logit(S), best heads first.

    Heads are ordered by |mean direct logit attribution|. An edge comes with the better one of its
    ends, then by the other one; what is left equal is in random order. Source: Wang et al. 2023.
    """
    model = board.model
    pieces = (part for _, part in runs(model, board.batch, GATED_BYTES))
    shares = reduce(torch.add, (logit_attribution(part)[0].sum(0).cpu() for part in pieces))
    heads = model.is_head.cpu()[:-1]
    place = torch.full((len(heads),), int(heads.sum()))
    place[heads] = shares[:-1][heads].abs().argsort(descending=True).argsort()
    down = place[heads].view(1, model.n_layers, model.n_heads, 1, 1)
    first, second = torch.minimum(place, down), torch.maximum(place, down)
    key = first * len(heads) + second + random_value(board, seed)
    return key.max() + 1 - key


def random_value(board: Switchboard, seed: int = 0) -> Gate:
    """A random value in (0, 1) for every edge: the ranking that knows nothing."""
    shape, generator = switchable(board).shape, torch.Generator().manual_seed(seed)
    return 1 - torch.rand(shape, generator=generator, dtype=torch.float64)


# --- curves --------------------------------------------------------------------------------------


def curves(
    board: Switchboard,
    rankings: Mapping[str, Sequence[Int[Tensor, "edge"]]],
    sizes: Sequence[int],
    *,
    draws: int = DRAWS,
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Run the first edges of every ranking, and the model without them. One row a method and size.

    faithfulness: (F(circuit) − F(closed)) / (F(open) − F(closed)) with F the mean of logit(IO) −
    logit(S). completeness: 1 minus the same for all edges but the circuit, so 1 says that nothing
    works without it. Both with 95 % bootstrap intervals over prompts (and over rankings, where a
    method has several, as "random" should). difference: F(circuit); accuracy: how often IO beats S.
    A ranking that has fewer edges than a size is run whole. Source: Wang et al. 2023, section 4.
    """
    nothing = torch.zeros(0, dtype=torch.long)
    closed, opened = (run_switched(board, gates(board, nothing, x)) for x in (False, True))
    rows, times = [], resample(len(closed.difference), draws, seed)
    for method, ranking in tqdm(rankings.items(), disable=not progress, unit="method"):
        longest = max(map(len, ranking))
        for size in sorted({min(size, longest) for size in sizes}):
            alone, rest = (
                [run_switched(board, gates(board, edges[:size], others)) for edges in ranking]
                for others in (False, True)
            )
            row = {"method": method, "size": size}
            row |= _summary("faithfulness", *_shares(alone, closed, opened, times))
            row |= _summary("completeness", *_shares(rest, opened, closed, times))
            difference = torch.stack([run.difference for run in alone])
            row |= {"difference": float(difference.mean())}
            row |= {"accuracy": float((difference > 0).double().mean())}
            rows.append(row)
    return pd.DataFrame(rows)


def _shares(
    found: Sequence[Answers], zero: Answers, one: Answers, times: Float[np.ndarray, "sample prompt"]
) -> tuple[float, Float[np.ndarray, "drawn"]]:
    """Where the mean of runs lies between those of two others: the mean over runs, and samples."""
    low, high = (times @ x.difference.double().cpu().numpy() for x in (zero, one))
    totals = np.array([times @ run.difference.double().cpu().numpy() for run in found])
    shares = (totals - low) / (high - low)
    return float(shares[:, 0].mean()), shares[:, 1:].flatten()


def _summary(name: str, value: float, samples: Float[np.ndarray, "drawn"]) -> dict[str, float]:
    low, high = bounds(samples)
    return {name: value, f"{name}_low": float(low), f"{name}_high": float(high)}


def edges_needed(table: pd.DataFrame, level: float = 0.8) -> pd.DataFrame:
    """The size from which on each method is as faithful as `level`, NaN where it never is.

    That is |faithfulness − 1| ≤ 1 − level, at this and all larger sizes: a circuit that overshoots
    is not the model, and one that is faithful by luck does not stay so. One row a method: edges,
    and the sizes from which on the interval overlaps this range (fewest) and lies in it (most).
    """
    table = table.sort_values("size", ascending=False, kind="stable")
    low, high = table["faithfulness_low"], table["faithfulness_high"]
    within = {
        "edges": table["faithfulness"].between(level, 2 - level),
        "fewest": (low <= 2 - level) & (high >= level),
        "most": (low >= level) & (high <= 2 - level),
    }
    methods = pd.Index(table["method"].unique(), name="method").sort_values()
    found = {}
    for name, inside in within.items():
        stays = inside.groupby(table["method"]).cummin().astype(bool)
        found[name] = table[stays].groupby("method")["size"].min().reindex(methods)
    return pd.DataFrame(found).reset_index()
