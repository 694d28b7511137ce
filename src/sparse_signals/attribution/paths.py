"""Whole paths from a token to the answer, each with its exact share of F(x) − F(x′)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_signals.attribution.aligned import AlignedRuns, in_front_of_mlp
from sparse_signals.attribution.graph import (
    change_of,
    component_of,
    first_head,
    ranks,
    upstream_values,
)
from sparse_signals.attribution.inputs import (
    Heads,
    Inputs,
    MLPs,
    into_heads,
    into_mlps,
    into_stream,
)
from sparse_signals.attribution.readers import Readers
from sparse_signals.core.matmul import grouped_matmul

EMBEDDING = 0


@dataclass(frozen=True)
class Ways:
    """Ways from the answer down to what a component wrote at a token, one step longer each time.

    Numbered as in `graph.TokenEdges`; `kind` is the input that the last step came in by, `before`
    the way without that step (−1: the answer itself), `value` the share of all paths that go on
    from here, in units of F, and `heard` what F hears of the component along it.
    """

    prompt: Int[Tensor, "way"]
    number: Int[Tensor, "way"]
    token: Int[Tensor, "way"]
    kind: Int[Tensor, "way"]
    before: Int[Tensor, "way"]
    value: Float[Tensor, "way"]
    heard: Float[Tensor, "way d"]

    def __getitem__(self, chosen: Tensor) -> "Ways":
        return Ways(*(x[chosen] for x in vars(self).values()))

    def __add__(self, more: "Ways") -> "Ways":
        pairs = zip(vars(self).values(), vars(more).values(), strict=True)
        return Ways(*(torch.cat(pair) for pair in pairs))


def find_paths(
    runs: AlignedRuns, found: Readers, beam: int = 256, least: float = 0.0
) -> tuple[Ways, Int[Tensor, "path"]]:
    """The paths with the largest |share|: all ways, and which of them end at an embedding.

    A path has one node after the other: its share is Δ of the embedding times what F hears of it
    along this path alone. The shares of all paths sum to F(x) − F(x′). Ways are prolonged layer by
    layer, from the top: of each prompt the `beam` largest, of at least `least` of |ΔF|. The share
    of a way is the sum over all paths that go on from it, so those that cancel may be missed.
    """
    model, node = runs.model, found.node
    alive = torch.arange(len(runs.last), device=runs.last.device)
    whole, nothing = change_of(runs, node), torch.full_like(alive, -1)
    bounds = (beam, least * whole.abs())
    at = torch.full_like(alive, component_of(model, node))
    ways = Ways(alive, at, node.place, nothing, nothing, whole, node.direction)
    if node.part == "stream":
        upstream = first_head(model, node.layer)
        ways, alive = _prolonged(runs, ways, alive, alive, into_stream(node), upstream, bounds)
    for layer in reversed(range(node.layers)):
        first = first_head(model, layer)
        last = first + model.n_heads
        mine = alive[ways.number[alive] == last]
        nodes = MLPs(layer, ways.prompt[mine], ways.token[mine])
        inputs = into_mlps(runs, nodes, ways.heard[mine])
        upstream = in_front_of_mlp(model, layer)
        ways, alive = _prolonged(runs, ways, alive, mine, inputs, upstream, bounds)
        at = ways.number[alive]
        mine = alive[(at >= first) & (at < last)]
        head = ways.number[mine] - first
        z = grouped_matmul(ways.heard[mine], model.writers.W_O[layer].mT, head)
        inputs = into_heads(runs, Heads(layer, ways.prompt[mine], head, ways.token[mine]), z)
        ways, alive = _prolonged(runs, ways, alive, mine, inputs, first, bounds)
    return ways, alive[ways.value[alive].abs().argsort(descending=True)]


def _prolonged(
    runs: AlignedRuns,
    ways: Ways,
    alive: Int[Tensor, "alive"],
    mine: Int[Tensor, "node"],
    inputs: Inputs,
    upstream: int,
    bounds: tuple[int, Float[Tensor, "prompt"]],
) -> tuple[Ways, Int[Tensor, "kept"]]:
    """Ways that end at nodes are replaced by those one step longer, as far as these are large."""
    beam, least = bounds
    way = mine[inputs.node]
    prompt = ways.prompt[way]
    values = upstream_values(runs, prompt, inputs, upstream)
    large = values.abs() >= least[prompt, None]
    row, up = (large & (values != 0)).nonzero(as_tuple=True)
    others = alive[~torch.isin(alive, mine)]
    value = torch.cat([ways.value[others], values[row, up]])
    of = torch.cat([ways.prompt[others], prompt[row]])
    kept = ranks(of, value.abs()) < beam
    row, up = (x[kept[len(others) :]] for x in (row, up))
    longer = Ways(
        prompt[row], up, inputs.token[row], inputs.kind[row], way[row], values[row, up],
        inputs.reader[row],
    )  # fmt: skip
    new = len(ways.prompt) + torch.arange(len(row), device=row.device)
    return ways + longer, torch.cat([others[kept[: len(others)]], new])
