"""Chapter 6: circuits run alone, with all that is outside them taken from counterfactual prompts.

Every prompt has a counterfactual of the same length. Two kinds of circuits are run on the prompts:

* of edges, from a component to the query, key or value of a head, to an MLP or to the read-out, the
  same for all tokens and prompts. An edge outside the circuit carries what the component wrote at
  that token of the counterfactual (Mueller et al. 2025, MIB).
* of nodes, components at the tokens of one role. A node outside the circuit writes, for all that
  read it, the mean over counterfactuals of what it writes at such a token (Wang et al. 2023).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_signals.core.forward import Gates, Pass, forward
from sparse_signals.core.model import BIAS_ROW, Model, head_name, once_per_model
from sparse_signals.core.objective import Objective, aligned_objective, first_change
from sparse_signals.core.prompts import Batch, PromptError
from sparse_signals.core.run import fitting_rows, runs
from sparse_signals.tracing.roots import logit_attribution, position_of
from sparse_signals.tracing.trace import Trace

FIXED = ("position", "bias")  # components that write the same in aligned runs
CIRCUIT_BYTES = 2**27  # what all components of a chunk of prompts wrote, at all tokens


@dataclass(frozen=True)
class AlignedPrompts:
    """Prompts, their counterfactuals of the same lengths, and what is asked of the model.

    Raises PromptError where they are not aligned, or the objective is of other prompts.
    """

    model: Model
    batch: Batch
    counterfactual: Batch
    objective: Objective

    def __post_init__(self) -> None:
        aligned_objective(self.model, self.batch, self.counterfactual, self.objective)


@dataclass(frozen=True)
class Answered:
    """What prompts answer under several circuits: F, P(answer), whether the answer comes first."""

    F: Float[Tensor, "circuit prompt"]
    probability: Float[Tensor, "circuit prompt"]
    first: Bool[Tensor, "circuit prompt"]


# --- edges ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edges:
    """All edges of a model in one order; a circuit is a boolean, a ranking a value for each.

    Upstream is a component that may differ between aligned runs: the embedding, a head or an MLP.
    Downstream is the query of a head, the key or value of a group of heads that share them, an MLP
    or the read-out, as in MIB. `place` is where edges lie in all gates, laid end to end.

    >>> edges = Edges.of(model)
    >>> values = edges.flat({"out": torch.ones(len(model.components) - 1)})
    >>> int(values.sum()) == int((edges.table()["input"] == "out").sum())
    True
    """

    model: Model
    place: Int[Tensor, "edge"]

    @classmethod
    def of(cls, model: Model) -> "Edges":
        """The edges of a model."""
        return _edges_of(model)

    def __len__(self) -> int:
        return len(self.place)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of the gates of every input: those of `Gates`, without rows."""
        model, size = self.model, len(self.model.components) - 1
        shapes = {"q": (model.n_layers, model.n_heads, size)}
        shapes |= dict.fromkeys("kv", (model.n_layers, model.n_kv_heads, size))
        return shapes | {"mlp": (model.n_layers, size), "out": (size,)}

    @cached_property
    def layer(self) -> Int[Tensor, "edge"]:
        """The layer that each edge leads into, for the read-out one after the last."""
        n, parts = self.model.n_layers, []
        for name, shape in self.shapes.items():
            at = torch.tensor([n]) if name == "out" else torch.arange(n)
            parts.append(at.repeat_interleave(torch.Size(shape).numel() // len(at)))
        return torch.cat(parts)[self.place]

    def flat(self, values: Mapping[str, Float[Tensor, "..."]]) -> Float[Tensor, "edge"]:
        """Values of all edges in their order, from arrays of those into q, k, v, mlp and out.

        Arrays are indexed as shares are, and those of a group's heads are added; without rows:
        sum over them. Inputs that are missing have 0. Raises ValueError for other shapes.
        """
        wide = self.shapes | dict.fromkeys("kv", self.shapes["q"])
        parts = []
        for name, shape in wide.items():
            value = values[name].cpu().double() if name in values else torch.zeros(shape).double()
            if value.shape != shape:
                raise ValueError(f"values of {name} are {tuple(value.shape)}, not {shape}")
            if name in "kv":
                value = value.unflatten(1, (self.model.n_kv_heads, -1)).sum(2)
            parts.append(value.flatten())
        return torch.cat(parts)[self.place]

    def gates(self, circuit: Bool[Tensor, "edge"]) -> dict[str, Float[Tensor, "row ..."]]:
        """Gates in one row: 1 in the circuit, 0 elsewhere."""
        sizes = [torch.Size(shape).numel() for shape in self.shapes.values()]
        every = torch.zeros(sum(sizes), dtype=self.model.dtype)
        every[self.place] = circuit.cpu().to(every)
        parts = zip(self.shapes.items(), every.to(self.model.device).split(sizes), strict=True)
        return {name: part.view(1, *shape) for (name, shape), part in parts}

    def table(self) -> pd.DataFrame:
        """One row per edge: upstream, downstream, input, layer, head (the first of a group; or −1).

        downstream is a head, an MLP or "read-out"; input "q", "k", "v", "mlp" or "out".
        """
        names = self.model.components["component"].to_numpy()
        pieces, start, groups = [], 0, self.model.n_heads // self.model.n_kv_heads
        for name, shape in self.shapes.items():
            here = self.place - start
            here = here[(here >= 0) & (here < torch.Size(shape).numel())].numpy()
            place = np.unravel_index(here, shape)
            nowhere = np.full_like(here, -1)
            layer = nowhere if name == "out" else place[0]
            head = place[1] * (groups if name in "kv" else 1) if name in "qkv" else nowhere
            table = pd.DataFrame({"input": name, "layer": layer, "head": head})
            down = {"mlp": "MLP " + table["layer"].astype(str), "out": "read-out"}
            table["downstream"] = down.get(name, head_name(table["layer"], table["head"]))
            table["upstream"] = names[place[-1]]
            pieces.append(table)
            start += torch.Size(shape).numel()
        columns = ["upstream", "downstream", "input", "layer", "head"]
        return pd.concat(pieces, ignore_index=True)[columns]


@once_per_model
def _edges_of(model: Model) -> Edges:
    table = model.components[:-1]
    writes = torch.tensor((~table["kind"].isin(FIXED)).tolist())
    layer, heads = torch.tensor(table["layer"].tolist()), torch.tensor(table["kind"].eq("head"))
    at = torch.arange(model.n_layers)[:, None]
    before = (layer < at) & writes
    into_mlp = before if model.parallel else before | ((layer == at) & heads)
    into_heads = (
        before[:, None].expand(-1, n, -1) for n in (model.n_heads, *[model.n_kv_heads] * 2)
    )
    exists = torch.cat([x.flatten() for x in (*into_heads, into_mlp, writes)])
    return Edges(model, exists.nonzero().flatten())


@torch.no_grad()
def run_edges(prompts: AlignedPrompts, circuits: Bool[Tensor, "circuit edge"]) -> Answered:
    """Run circuits of `Edges` one after another, in chunks of prompts that fit into memory.

    An input of a circuit reads Σ_c x_c over its edges and Σ_c x′_c over all others: x_c is what c
    writes in this very run, x′_c what it wrote at this token of the counterfactual. All edges give
    the run of the prompts, none that of the counterfactuals. Each costs about three forward passes
    of the tokens from the first on that differs, less the layers that no edge is closed into before
    any other one; so prompts are best sorted by where that token is.
    """
    model, edges, pieces = prompts.model, Edges.of(prompts.model), []
    closed = edges.layer.masked_fill(circuits.cpu(), model.n_layers)
    same = closed.amin(1).tolist()  # layers below that are those of the model
    for rows in fitting_rows(model, prompts.batch, CIRCUIT_BYTES):
        batch, other = prompts.batch.rows(rows), prompts.counterfactual.rows(rows)
        start, stop = first_change(batch, other), int(batch.last.max()) + 1
        front = forward(model, batch.positions(0, start)).run if start else None
        batch, other = (x.positions(start, stop) for x in (batch, other))
        reference = forward(model, other, front=front).run.outputs.flatten(0, 1)
        place = torch.arange(len(reference), device=model.device).view(other.tokens.shape)
        row, asked = torch.zeros_like(place), prompts.objective.rows(rows)
        opened, found = forward(model, batch, front=front), []
        for circuit, known in zip(circuits, same, strict=True):
            gates = Gates(row, reference, place, **edges.gates(circuit))
            found.append(forward(model, batch, gates=gates, front=front, known=(opened, known)))
        pieces.append(_answers(asked, found))
    return _joined_prompts(pieces)


def _answers(asked: Objective, passes: Iterable[Pass]) -> tuple[Tensor, ...]:
    """What the passes of some prompts answer."""
    asks = (asked.value, asked.probability, asked.comes_first)
    each = [[ask(found.logits).cpu() for ask in asks] for found in passes]
    return tuple(torch.stack(column) for column in zip(*each, strict=True))


def _joined_prompts(pieces: Sequence[tuple[Tensor, ...]]) -> Answered:
    return Answered(*(torch.cat(column, dim=1) for column in zip(*pieces, strict=True)))


# --- nodes ---------------------------------------------------------------------------------------


def role_rows(batch: Batch, roles: Sequence[str]) -> Int[Tensor, "prompt pos"]:
    """The row of every token: 1, 2, … for the roles, 0 for all others; of several, the last one.

    Raises PromptError for a role that the prompts do not have.
    """
    row = torch.zeros_like(batch.tokens)
    for n, role in enumerate(roles, 1):
        row.scatter_(1, position_of(batch, role)[:, None], n)
    return row


def template_places(batches: Sequence[Batch]) -> list[Int[Tensor, "prompt pos"]]:
    """A number for every template and position, alike in all batches; −1 for padding.

    Raises PromptError for prompts without a column "template".
    """
    length, keys = max(batch.tokens.shape[1] for batch in batches), []
    for batch in batches:
        if "template" not in batch.table:
            raise PromptError("places are positions in a template: the prompts need that column")
        template = torch.tensor(batch.table["template"].tolist())
        key = template[:, None] * length + torch.arange(batch.tokens.shape[1])
        keys.append(key.masked_fill(~batch.mask, -1))
    known = torch.cat([key.flatten() for key in keys]).unique()
    known = known[known >= 0]
    return [torch.searchsorted(known, key).masked_fill(key < 0, -1) for key in keys]


@torch.no_grad()
def run_nodes(
    prompts: AlignedPrompts,
    circuits: Bool[Tensor, "circuit row component"],
    row: Int[Tensor, "prompt pos"],
    reference: Batch,
) -> Answered:
    """Run circuits of nodes: components at the tokens of a row, which write what they compute.

    For all that read it, what is outside a circuit writes the mean of what it writes at the same
    position of the same template in the `reference`, such as many counterfactuals.
    Raises PromptError where the reference lacks a template, or prompts have none.
    """
    model, pieces = prompts.model, []
    place, known = template_places([prompts.batch, reference])
    if lacking := sorted(set(place.flatten().tolist()) - set(known.flatten().tolist()) - {-1}):
        n = int((place == lacking[0]).any(1).nonzero()[0])
        raise PromptError(f"no prompt of the reference has the template and length of prompt {n}")
    means = _mean_outputs(model, reference, known, int(known.max()) + 1)
    row, place = row.to(model.device), place.clamp(min=0).to(model.device)
    for rows in fitting_rows(model, prompts.batch, CIRCUIT_BYTES):
        batch, at = prompts.batch.rows(rows), (row[rows], means, place[rows])
        every = (Gates(*at, written=circuit.to(means)) for circuit in circuits)
        found = (forward(model, batch, gates=gates) for gates in every)
        pieces.append(_answers(prompts.objective.rows(rows), found))
    return _joined_prompts(pieces)


# --- rankings ------------------------------------------------------------------------------------


def best_edges(
    values: Float[Tensor, "edge"], shares: Sequence[float], seed: int = 0
) -> Bool[Tensor, "size edge"]:
    """Circuits of the edges of largest |value|, some shares of all edges; ties in random order."""
    return _largest(values, [round(share * len(values)) for share in shares], seed)


def best_nodes(
    model: Model,
    values: Float[Tensor, "row component"],
    sizes: Sequence[int],
    kinds: Sequence[str] = ("head",),
    seed: int = 0,
) -> Bool[Tensor, "size row component"]:
    """Circuits of the nodes of largest |value|, and of all components of other kinds.

    Kinds are "head", "MLP" and "embedding"; only nodes of these are ablated outside a circuit.
    """
    nodes = torch.tensor(model.components[:-1]["kind"].isin(kinds).tolist())
    chosen = _largest(values.cpu()[:, nodes].flatten(), sizes, seed)
    circuits = torch.ones(len(sizes), *values.shape, dtype=torch.bool)
    circuits[:, :, nodes] = chosen.view(len(sizes), len(values), -1)
    return circuits


def _largest(values: Float[Tensor, "n"], sizes: Sequence[int], seed: int) -> Bool[Tensor, "size n"]:
    shuffled = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    order = shuffled[values.cpu().abs()[shuffled].argsort(descending=True, stable=True)]
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    return rank < torch.tensor(sizes)[:, None]


def traced_edges(traced: Trace, column: str = "share") -> Float[Tensor, "edge"]:
    """How strong the edges of `Edges` are in a trace of scores: the mean of a column over prompts.

    Several firings of a head in a prompt count with the sum of their sizes. Scores depend on
    queries and keys alone. To make it a circuit, edges into a key count for the value too, since a
    head moves what stands where it looks, and those of the roots into the read-out count 1.
    """
    model, table = traced.model, traced.edges
    table = table[~table["kind"].isin([*FIXED, BIAS_ROW])]
    names = pd.Index(model.components["component"])
    upstream = names.get_indexer(pd.Index(table["upstream"]))
    place = [torch.tensor(x.tolist()) for x in (table["layer"], table["head"], upstream)]
    sizes = torch.tensor(table[column].abs().to_numpy()).double()
    values, shape = {}, Edges.of(model).shapes["q"]
    for name, side in (("q", "dest"), ("k", "src")):
        here = torch.tensor((table["side"] == side).tolist())
        found = torch.zeros(shape, dtype=torch.float64)
        found.index_put_(tuple(x[here] for x in place), sizes[here], accumulate=True)
        values[name] = found / len(traced.batch.tokens)
    out = torch.zeros(shape[-1], dtype=torch.float64)
    out[names.get_indexer(pd.Index([root.name for root in traced.roots]))] = 1
    return Edges.of(model).flat(values | {"v": values["k"], "out": out})


def direct_edges(prompts: AlignedPrompts) -> Float[Tensor, "edge"]:
    """Edges in the order of direct attribution: what a component writes into F itself, in size.

    An edge comes with the better of its two ends, then by the other one (of the heads of a group,
    the best; the read-out is never the worse end), as in `head_value`; values say the order alone.
    Source: Wang et al. 2023 (of heads).
    """
    model, edges = prompts.model, Edges.of(prompts.model)
    total = torch.zeros(len(model.components) - 1, dtype=torch.float64)
    for rows, part in runs(model, prompts.batch, CIRCUIT_BYTES):
        found = logit_attribution(part, prompts.objective.rows(rows))[0]
        total += found[:, :-1].double().sum(0).cpu()
    rank, table = total.abs().argsort().argsort(), edges.table()
    names = pd.Index(model.components["component"][:-1])
    up, down = (
        torch.tensor(names.get_indexer(pd.Index(table[end]))) for end in ("upstream", "downstream")
    )
    into = rank[down].where(down >= 0, -1)
    heads = rank[model.is_head[:-1].cpu()].view(model.n_layers, model.n_kv_heads, -1).amax(2)
    layer, head = (torch.tensor(table[name].tolist()) for name in ("layer", "head"))
    group = head // (model.n_heads // model.n_kv_heads)
    shared = torch.tensor(table["input"].isin(["k", "v"]).tolist())
    into[shared] = heads[layer[shared], group[shared]]
    best, other = torch.maximum(rank[up], into), torch.minimum(rank[up], into)
    other = other.where(down >= 0, len(rank))
    return (best * (len(rank) + 1) + other + 1).double()


def _mean_outputs(
    model: Model, reference: Batch, place: Int[Tensor, "ref refpos"], places: int
) -> Float[Tensor, "place component d"]:
    """The mean of what components write over the reference tokens of every place; −1 is none."""
    total: Tensor | float = 0.0
    place = place.to(model.device)
    count = torch.bincount(place[place >= 0], minlength=places).to(model.dtype)
    for rows, part in runs(model, reference, CIRCUIT_BYTES):
        known = place[rows] >= 0
        zeros = part.outputs.new_zeros(places, *part.outputs.shape[2:])
        total = total + zeros.index_add(0, place[rows][known], part.outputs[known])
    return total / count[:, None, None]
