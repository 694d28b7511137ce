"""Which nodes and edges carry F(x) − F(x′): the graph below the answer, token by token.

A node is a component at a token. An edge leads from what a component wrote at a token to an input
of a node: the query, key or value of a head at its destination, an MLP, or the read-out. Its share
is Δx_c · reader. The strength of an edge is the smallest |share| on the best way from it to the
answer, so the edges above any strength hang together.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_signals.attribution.aligned import (
    COMPLETE,
    AlignedRuns,
    ShareError,
    in_front_of_mlp,
)
from sparse_signals.attribution.inputs import (
    INPUTS,
    Heads,
    Inputs,
    MLPs,
    into_heads,
    into_mlps,
    into_stream,
    out_of_heads,
    out_of_mlps,
)
from sparse_signals.attribution.readers import Node, Readers
from sparse_signals.core.matmul import grouped_matmul
from sparse_signals.core.model import Model

READ_OUT = -1  # the number of what edges of kind "out" lead to
FLAT = 1e-3  # of the sizes of its parts: an F that changes by less does not change


@dataclass(frozen=True)
class TokenEdges:
    """Edges of some prompts; components numbered as in `AlignedRuns.changes`, tokens from start.

    `kind` numbers `INPUTS`. `token` is where `up` writes, `dest` where `down` does. `value` is the
    share in units of F, `size` the sum of |value| over all edges into the same node.
    """

    prompt: Int[Tensor, "edge"]
    up: Int[Tensor, "edge"]
    token: Int[Tensor, "edge"]
    down: Int[Tensor, "edge"]
    dest: Int[Tensor, "edge"]
    kind: Int[Tensor, "edge"]
    value: Float[Tensor, "edge"]
    size: Float[Tensor, "edge"]
    strength: Float[Tensor, "edge"]

    def __len__(self) -> int:
        return len(self.prompt)

    def __getitem__(self, chosen: Tensor | slice) -> "TokenEdges":
        return TokenEdges(*(x[chosen] for x in vars(self).values()))


def ranks(group: Int[Tensor, "row"], value: Float[Tensor, "row"]) -> Int[Tensor, "row"]:
    """The place of every row among those of its group, the largest value first, from 0."""
    order = value.argsort(descending=True, stable=True)
    order = order[group[order].argsort(stable=True)]
    start = torch.searchsorted(group[order], group[order])
    place = torch.arange(len(order), device=order.device) - start
    return torch.empty_like(order).index_copy_(0, order, place)


def first_head(model: Model, layer: int) -> int:
    """The number of the first head of a layer, which is how many components are in front of it."""
    return 1 + layer * (model.n_heads + 1)


def component_of(model: Model, node: Node) -> int:
    """The number of the head or MLP that a node is; `READ_OUT` of a stream."""
    if node.part == "stream":
        return READ_OUT
    return first_head(model, node.layer) + (model.n_heads if node.part == "mlp" else int(node.part))


@dataclass(frozen=True)
class _Nodes:
    """Nodes of one layer, or read-outs, with their own shares, and readers at their inputs."""

    prompt: Int[Tensor, "node"]
    number: Int[Tensor, "node"]
    dest: Int[Tensor, "node"]
    own: Float[Tensor, "node"]
    inputs: Inputs
    upstream: int


def change_of(runs: AlignedRuns, node: Node) -> Float[Tensor, "prompt"]:
    """ΔF of what F is: the direction times what differs there; of the answer, from logits."""
    return runs.difference if node is runs.answer else _parts_of(runs, node).sum(1)


def _parts_of(runs: AlignedRuns, node: Node) -> Float[Tensor, "prompt d"]:
    """ΔF of a node in parts, one for each number of what it writes."""
    prompt, (tokens, ends) = torch.arange(len(runs.last), device=runs.last.device), runs.changes
    number = component_of(runs.model, node)
    if number == READ_OUT:
        upstream, many = first_head(runs.model, node.layer), node.layer < runs.model.n_layers
        change = (tokens[:upstream, prompt, node.place] if many else ends[:, :, 0]).sum(0)
    else:
        many = number < len(tokens)
        change = tokens[number, prompt, node.place] if many else ends[number, :, 0]
    return node.direction * change


def find_edges(runs: AlignedRuns, found: Readers, least: float = 0.0) -> TokenEdges:
    """All edges that hang together with F by shares of at least `least` of |ΔF|.

    From the top: edges into a node are looked for where an edge out of it was found. Prompts whose
    F does not change have none. Raises ShareError where shares into a node miss its own.
    """
    tokens, ends = runs.changes
    whole, extent = change_of(runs, found.node), _parts_of(runs, found.node).abs().sum(1)
    scale = whole.abs().masked_fill(whole.abs() <= FLAT * extent, torch.inf)
    floor = torch.maximum(extent, runs.rounding)
    # READ_OUT, the number after all components, is the last one
    strength, pieces = tokens.new_zeros(len(whole), len(ends) + 1, tokens.shape[2]), []
    prompt = torch.arange(len(whole), device=whole.device)
    strength[prompt, component_of(runs.model, found.node), found.node.place] = torch.inf
    for nodes in _from_the_top(runs, found, strength):
        inputs = nodes.inputs
        prompt = nodes.prompt[inputs.node]
        values = upstream_values(runs, prompt, inputs, nodes.upstream)
        sums = values.new_zeros(len(nodes.prompt), 2)
        sums.index_add_(0, inputs.node, torch.stack([values.sum(1), values.abs().sum(1)], dim=1))
        total, size = sums.unbind(1)
        _check(runs.model, total - nodes.own, torch.maximum(size, floor[nodes.prompt]))
        part = values.abs() / scale[prompt, None]
        row, up = ((part >= least) & (values != 0)).nonzero(as_tuple=True)
        of, token = inputs.node[row], inputs.token[row]
        limit = strength[nodes.prompt[of], nodes.number[of], nodes.dest[of]]
        edges = TokenEdges(
            prompt[row], up, token, nodes.number[of], nodes.dest[of], inputs.kind[row],
            values[row, up], size[of], torch.minimum(part[row, up], limit),
        )  # fmt: skip
        place = (edges.prompt * strength.shape[1] + up) * strength.shape[2] + token
        strength.view(-1).scatter_reduce_(0, place, edges.strength, "amax")
        pieces.append(edges)
    return TokenEdges(
        *(torch.cat(parts) for parts in zip(*(vars(x).values() for x in pieces), strict=True))
    )


def _from_the_top(
    runs: AlignedRuns, found: Readers, strength: Float[Tensor, "prompt component pos"]
) -> Iterator[_Nodes]:
    """Nodes that edges lead out of: F if it is a stream, then MLP and heads of every layer."""
    model, node = runs.model, found.node
    if node.part == "stream":
        prompt = torch.arange(len(node.place), device=node.place.device)
        number, upstream = torch.full_like(prompt, READ_OUT), first_head(model, node.layer)
        own = change_of(runs, node)
        yield _Nodes(prompt, number, node.place, own, into_stream(node), upstream)
    for layer in reversed(range(node.layers)):
        first, readers = first_head(model, layer), found.layers[layer]
        a, b = (end.layers[layer] for end in runs.ends)
        prompt, dest = strength[:, first + model.n_heads].nonzero(as_tuple=True)
        here = dest if a.mlp.shape[1] > 1 else torch.zeros_like(dest)
        written, change = (x[prompt, here] for x in (readers.written, a.mlp - b.mlp))
        own = torch.linalg.vecdot(written, change)
        inputs = into_mlps(runs, MLPs(layer, prompt, dest), written)
        which = torch.full_like(prompt, first + model.n_heads)
        yield _Nodes(prompt, which, dest, own, inputs, in_front_of_mlp(model, layer))
        prompt, head, dest = strength[:, first : first + model.n_heads].nonzero(as_tuple=True)
        here = dest if a.z.shape[2] > 1 else torch.zeros_like(dest)
        z, change = (x[prompt, head, here] for x in (readers.z, a.z - b.z))
        inputs = into_heads(runs, Heads(layer, prompt, head, dest), z)
        own = torch.linalg.vecdot(z, change)
        yield _Nodes(prompt, first + head, dest, own, inputs, first)


def upstream_values(
    runs: AlignedRuns, prompt: Int[Tensor, "row"], inputs: Inputs, upstream: int
) -> Float[Tensor, "row upstream"]:
    """Δx_c · reader of all components in front."""
    tokens, ends = runs.changes
    if upstream > len(tokens):  # after the last attention, only the last token is known
        return grouped_matmul(inputs.reader, ends[:upstream, :, 0].permute(1, 2, 0), prompt)
    matrices = tokens[:upstream].flatten(1, 2).permute(1, 2, 0)
    return grouped_matmul(inputs.reader, matrices, prompt * tokens.shape[2] + inputs.token)


def _check(model: Model, gap: Float[Tensor, "node"], size: Float[Tensor, "node"]) -> None:
    worst = (
        float((gap.abs() / size.clamp_min(torch.finfo(size.dtype).tiny)).max()) if len(gap) else 0.0
    )
    if not worst <= COMPLETE[model.dtype]:
        raise ShareError(f"shares into a node miss its own by {worst:.0e} of their size")


# --- what a part of the graph carries ------------------------------------------------------------


def carried(runs: AlignedRuns, found: Readers, edges: TokenEdges) -> Float[Tensor, "prompt"]:
    """How much of ΔF comes along ways that lead from tokens to F by these edges alone.

    The differences of the embeddings go forward through the secants, along the edges. Over all
    edges it is ΔF.
    """
    model, node, (tokens, ends) = runs.model, found.node, runs.changes
    prompts = tokens.shape[1]
    change = tokens.new_zeros(len(ends) + 1, *tokens.shape[1:])
    change[0] = tokens[0]
    edges = edges[edges.down.argsort(stable=True)]  # READ_OUT comes first
    for layer in range(node.layers):
        first, last = first_head(model, layer), first_head(model, layer + 1) - 1
        bounds = edges.down.new_tensor([first, last, last + 1])
        heads_at, mlps_at, stop = torch.searchsorted(edges.down, bounds).tolist()
        if heads_at < mlps_at:
            (prompt, number, dest), read = _arriving(change, edges[heads_at:mlps_at])
            heads = Heads(layer, prompt, number - first, dest)
            change[number, prompt, dest] = out_of_heads(runs, heads, read)
        if mlps_at < stop:
            (prompt, number, dest), read = _arriving(change, edges[mlps_at:stop])
            change[number, prompt, dest] = out_of_mlps(runs, MLPs(layer, prompt, dest), read)
    mine = edges[edges.down == READ_OUT]
    rows = change[mine.up, mine.prompt, mine.token]
    change[READ_OUT].index_put_((mine.prompt, mine.dest), rows, accumulate=True)
    prompt = torch.arange(prompts, device=change.device)
    written = change[component_of(model, node), prompt, node.place]
    return torch.linalg.vecdot(written, node.direction)


def _arriving(
    change: Float[Tensor, "component prompt pos d"], edges: TokenEdges
) -> tuple[tuple[Tensor, Tensor, Tensor], Inputs]:
    """The nodes that edges lead to (prompt, number, token), and what they bring to each input."""
    size, _, length, _ = change.shape
    place = (edges.prompt * size + edges.down) * length + edges.dest
    place, node = place.unique(return_inverse=True)
    at = (node * len(INPUTS) + edges.kind) * length + edges.token
    at, into = at.unique(return_inverse=True)
    rows = change.new_zeros(len(at), change.shape[-1])
    rows.index_add_(0, into, change[edges.up, edges.prompt, edges.token])
    read = Inputs(at // (length * len(INPUTS)), at // length % len(INPUTS), at % length, rows)
    return (place // (length * size), place // length % size, place % length), read
