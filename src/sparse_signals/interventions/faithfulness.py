"""Chapter 5: how much of the answer a circuit gives alone, and who finds the smaller circuit.

A circuit is a set of edges of a `Switchboard`, given as places in its flattened gates. It is run
with all other edges closed. Methods rank the edges of positive value; curves compare equal numbers.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from sparse_signals.core.prompts import Batch, role_numbers
from sparse_signals.core.run import fitting_rows, run_model
from sparse_signals.core.stats import DRAWS, bounds, resample
from sparse_signals.interventions.gated_model import (
    CHUNK_BYTES,
    Outcome,
    Switchboard,
    run_rows,
    run_switched,
)
from sparse_signals.tracing.contributions import SIDES
from sparse_signals.tracing.roots import logit_attribution

EDGE = ("upstream", "downstream", "side", "role")
Gate = Float[Tensor, "role layer head side component"]


# --- edges ---------------------------------------------------------------------------------------


def switchable(board: Switchboard) -> Bool[Tensor, "role layer head side component"]:
    """Which switches are edges: upstream components that differ between prompts, real roles.

    Output biases write the same everywhere: closing them would change nothing, they are no edges.
    """
    model, table = board.model, board.components
    layer = torch.tensor(table["layer"].tolist())
    upstream = layer < torch.arange(model.n_layers)[:, None]
    upstream &= torch.tensor((table["kind"] != "bias").tolist())
    real = torch.arange(len(board.roles)) > 0
    shape = (len(board.roles), model.n_layers, model.n_heads, len(SIDES), len(table))
    return (real[:, None, None, None, None] & upstream[:, None, None]).expand(shape).clone()


def edge_table(board: Switchboard, edges: Int[Tensor, "edge"]) -> pd.DataFrame:
    """Edges, given as places in the flattened `switchable`, in words: upstream, downstream, …"""
    places = torch.unravel_index(edges.cpu(), switchable(board).shape)
    role, layer, head, side, component = (place.numpy() for place in places)
    columns = {
        "upstream": board.components["component"].to_numpy()[component],
        "downstream": [f"{l}.{h}" for l, h in zip(layer, head, strict=True)],
        "side": [SIDES[n] for n in side],
        "role": [board.roles[n] for n in role],
    }
    return pd.DataFrame({"edge": edges.cpu().numpy()} | columns)


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


def traced_value(board: Switchboard, edges: pd.DataFrame, batch: Batch, by: str = "share") -> Gate:
    """How strong edges are in a trace of `batch`: the sum over prompts of their mean share / P.

    So it is the share of prompts with the edge times its mean there. `by` may be "weight". Edges
    of several firings are one here if head, side and role of the receiving token agree.
    """
    numbers = role_numbers(batch, board.roles)
    component = pd.Series(board.components.index, index=board.components["component"])
    table = edges[edges["upstream"].isin(component.index)]
    places = (
        numbers.numpy()[table["prompt"], table["token"]],
        table["layer"].to_numpy(),
        table["head"].to_numpy(),
        table["side"].map({side: n for n, side in enumerate(SIDES)}).to_numpy(int),
        component[table["upstream"].astype(str)].to_numpy(),
    )
    known = places[0] >= 0
    shape = switchable(board).shape
    place = np.ravel_multi_index([index[known] for index in places], shape)
    mean = table[known].groupby([place, table["prompt"][known]])[by].mean()
    value = torch.zeros(shape.numel(), dtype=torch.float64)
    pooled = mean.groupby(level=0).sum() / len(batch.tokens)
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
        for rows in fitting_rows(board.model, board.batch, CHUNK_BYTES):
            with torch.enable_grad():
                difference = run_rows(board, gate, rows).difference.sum()
                total += torch.autograd.grad(difference, gate)[0].double().cpu()
    return total * switchable(board) / (steps * len(board.batch.tokens))


def head_value(board: Switchboard, seed: int = 0) -> Gate:
    """Edges into and out of the heads that write most of logit(IO) − logit(S), best heads first.

    Heads are ordered by |mean direct logit attribution|. An edge comes with the better one of its
    ends, then by the other one; what is left equal is in random order. Source: Wang et al. 2023.
    """
    table, model = board.components, board.model
    shares: Tensor | float = 0.0
    for rows in fitting_rows(model, board.batch, CHUNK_BYTES):
        part = board.batch.rows(rows)
        run = run_model(model, part.tokens, part.mask)
        shares = shares + logit_attribution(model, run, part)[0].sum(0).cpu()
    heads = torch.tensor((table["kind"] == "head").tolist())
    place = torch.full((len(table),), int(heads.sum()))
    place[heads] = shares[:-1][heads].abs().argsort(descending=True).argsort()
    down = place[heads].view(1, model.n_layers, model.n_heads, 1, 1)
    first, second = torch.minimum(place, down), torch.maximum(place, down)
    key = first * len(table) + second + random_value(board, seed)
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
    roots: pd.DataFrame | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Run the first edges of every ranking, and the model without them. One row a method and size.

    faithfulness: (F(circuit) − F(closed)) / (F(open) − F(closed)) with F the mean of logit(IO) −
    logit(S). completeness: 1 minus the same for all edges but the circuit, so 1 says that nothing
    works without it. Both with 95 % bootstrap intervals over prompts (and over rankings, where a
    method has several, as "random" should). difference: F(circuit); accuracy: how often IO beats
    S; attention: mean weight at the firings `roots` (prompt, layer, head, dest, src).
    A ranking that has fewer edges than a size is run whole. Source: Wang et al. 2023, section 4.
    """
    closed, opened = (run_switched(board, gates(board, _none(), x)) for x in (False, True))
    rows, times = [], resample(len(closed.difference), draws, seed)
    for method, ranking in tqdm(rankings.items(), disable=not progress, unit="method"):
        longest = max(map(len, ranking))
        for size in sorted({min(size, longest) for size in sizes}):
            runs, rest = (
                [run_switched(board, gates(board, edges[:size], others)) for edges in ranking]
                for others in (False, True)
            )
            row = {"method": method, "size": size}
            row |= _summary("faithfulness", *_shares(runs, closed, opened, times))
            row |= _summary("completeness", *_shares(rest, opened, closed, times))
            difference = torch.stack([run.difference for run in runs])
            row |= {"difference": float(difference.mean())}
            row |= {"accuracy": float((difference > 0).double().mean())}
            if roots is not None:
                row["attention"] = float(np.mean([_attention(run, roots) for run in runs]))
            rows.append(row)
    return pd.DataFrame(rows)


def _none() -> Int[Tensor, "0"]:
    return torch.zeros(0, dtype=torch.long)


def _shares(
    runs: Sequence[Outcome], zero: Outcome, one: Outcome, times: Float[np.ndarray, "sample prompt"]
) -> tuple[float, Float[np.ndarray, "drawn"]]:
    """Where the mean of runs lies between those of two others: the mean over runs, and samples."""
    low, high = (times @ x.difference.double().cpu().numpy() for x in (zero, one))
    totals = np.array([times @ run.difference.double().cpu().numpy() for run in runs])
    shares = (totals - low) / (high - low)
    return float(shares[:, 0].mean()), shares[:, 1:].flatten()


def _summary(name: str, value: float, samples: Float[np.ndarray, "drawn"]) -> dict[str, float]:
    low, high = bounds(samples)
    return {name: value, f"{name}_low": float(low), f"{name}_high": float(high)}


def _attention(run: Outcome, roots: pd.DataFrame) -> float:
    where = [torch.tensor(roots[name].tolist()) for name in ("layer", "prompt", "head", "dest")]
    return float(run.pattern[(*where, torch.tensor(roots["src"].tolist()))].mean())


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


def minimality(
    board: Switchboard,
    edges: Int[Tensor, "edge"],
    by: Sequence[str] = EDGE,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> pd.DataFrame:
    """What a circuit loses with each of its edges, or groups of edges that agree in `by`.

    One row a group, largest loss first: the columns `by`, edges (how many), drop (of
    faithfulness) with its 95 % bootstrap interval over prompts, drop_low and drop_high. Costs one
    run a group. Source: Wang et al. 2023, section 4.
    """
    closed, opened = (run_switched(board, gates(board, _none(), x)) for x in (False, True))
    times = resample(len(closed.difference), draws, seed)
    whole = run_switched(board, gates(board, edges)).difference
    rows = []
    for key, group in edge_table(board, edges).groupby(list(by), sort=False):
        kept = edges[~torch.isin(edges, torch.tensor(group["edge"].tolist()))]
        lost = whole - run_switched(board, gates(board, kept)).difference
        # a drop is a difference of faithfulness: measured from closed, it is one of F
        shifted = Outcome(closed.difference + lost, closed.pattern)
        drop = _summary("drop", *_shares([shifted], closed, opened, times))
        rows.append(dict(zip(by, key, strict=True)) | {"edges": len(group)} | drop)
    return pd.DataFrame(rows).sort_values("drop", ascending=False, ignore_index=True)
