"""Into one node at one token: what a head or an MLP hears at each of its inputs, token by token.

`shares` sums what the key or the value of a token hears over all destinations. Here a node is a
head at one destination: its query reads there, its keys and values at every source.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_signals.attribution.aligned import AlignedRuns
from sparse_signals.attribution.readers import Node
from sparse_signals.attribution.record import reading_weights
from sparse_signals.attribution.secants import Gated, Mixing, Norm, Pointwise, Score, Softmax
from sparse_signals.core.forward import angles
from sparse_signals.core.matmul import grouped_matmul
from sparse_signals.core.rotary import rotate, unrotate

INPUTS = ("q", "k", "v", "mlp", "out")


@dataclass(frozen=True)
class Heads:
    """Heads of one layer at some destinations; places are counted from the start of the runs."""

    layer: int
    prompt: Int[Tensor, "node"]
    head: Int[Tensor, "node"]
    dest: Int[Tensor, "node"]

    def __len__(self) -> int:
        return len(self.prompt)


@dataclass(frozen=True)
class MLPs:
    """MLPs of one layer at some tokens."""

    layer: int
    prompt: Int[Tensor, "node"]
    dest: Int[Tensor, "node"]

    def __len__(self) -> int:
        return len(self.prompt)


@dataclass(frozen=True)
class Inputs:
    """Readers in the stream at the inputs of nodes: a row for each node, kind and token read.

    `kind` numbers `INPUTS`.
    """

    node: Int[Tensor, "row"]
    kind: Int[Tensor, "row"]
    token: Int[Tensor, "row"]
    reader: Float[Tensor, "row d"]


@dataclass(frozen=True)
class Attending:
    """The secants of heads at their destinations, each with its own row of scores."""

    mixing: Mixing
    softmax: Softmax
    score: Score
    norm: Norm
    in_heads: dict[str, Norm]
    start: int

    @classmethod
    def of(cls, runs: AlignedRuns, nodes: Heads) -> "Attending":
        """From two aligned runs."""
        part = runs.secants[nodes.layer]
        mixing, softmax, score = part.mixing, part.softmax, part.score
        place = nodes.prompt, nodes.head
        row = *place, _index(nodes.dest, score.q.shape[2])
        return cls(
            Mixing(mixing.weights[row].unsqueeze(1), mixing.v[place]),
            Softmax(softmax.weight[row].unsqueeze(1)),
            Score(score.q[row].unsqueeze(1), score.k[place], score.divisor),
            part.norm,
            {n: x.at(row if n == "q" else place) for n, x in part.in_heads.items()},
            part.start,
        )

    def heard(self, z: Float[Tensor, "node r"]) -> tuple[Tensor, Tensor]:
        """Cotangents of the scores of the row and of the values, of those of what heads moved."""
        of_weights, of_v = self.mixing.transpose(z.unsqueeze(1))
        return self.softmax.transpose(of_weights), of_v

    def normalised(
        self,
        name: str,
        node: Int[Tensor, "row"],
        token: Int[Tensor, "row"],
        change: Float[Tensor, "row r"],
    ) -> Float[Tensor, "row r"]:
        """What changes of queries or keys at tokens become where heads normalise them."""
        if name not in self.in_heads:
            return change
        place = (node,) if name == "q" else (node, token)
        return self.in_heads[name].at(place).apply(change)


def _index(dest: Int[Tensor, "node"], size: int) -> Int[Tensor, "node"]:
    """Where destinations are in a record, which has the last token alone in the last layer."""
    return dest if size > 1 else torch.zeros_like(dest)


def into_stream(node: Node) -> Inputs:
    """The readers of what all components in front of a layer wrote together, such as of the answer.

    There is one node for each prompt.
    """
    number = torch.arange(len(node.place), device=node.place.device)
    kind = torch.full_like(number, INPUTS.index("out"))
    return Inputs(number, kind, node.place, node.direction)


def into_heads(runs: AlignedRuns, nodes: Heads, z: Float[Tensor, "node r"]) -> Inputs:
    """Readers at all inputs of heads, from what F hears of what they moved."""
    model, secants = runs.model, Attending.of(runs, nodes)
    of_scores, of_v = secants.heard(z)
    of_q, of_k = secants.score.transpose(of_scores)
    of_k, of_v = (y[:, secants.start :] for y in (of_k, of_v))  # what is in front never changes
    if model.rotary:
        cos, sin = (x[secants.start :] for x in angles(model))
        of_q = unrotate(of_q[:, 0], cos[nodes.dest], sin[nodes.dest]).unsqueeze(1)
        of_k = unrotate(of_k, cos[: of_k.shape[1]], sin[: of_k.shape[1]])
    if norms := secants.in_heads:
        of_q = norms["q"].transpose(of_q[:, 0]).unsqueeze(1)
        of_k = norms["k"].transpose(of_k)
    seen = torch.arange(of_k.shape[1], device=z.device) <= nodes.dest[:, None]
    node, token = seen.nonzero(as_tuple=True)
    number = torch.arange(len(nodes), device=z.device)
    pieces, groups = [], model.n_heads // model.n_kv_heads
    weights = reading_weights(model, nodes.layer)
    for kind, (y, W) in enumerate(zip((of_q[:, 0], of_k, of_v), weights, strict=True)):
        which, at, rows = (number, nodes.dest, y) if kind == 0 else (node, token, y[node, token])
        head = nodes.head[which] // (1 if kind == 0 else groups)
        rows = grouped_matmul(rows, W.mT, head)
        place = nodes.prompt[which], at
        rows = secants.norm.at(place).folded(rows)
        pieces.append((which, torch.full_like(which, kind), at, rows))
    return Inputs(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))


def into_mlps(runs: AlignedRuns, nodes: MLPs, written: Float[Tensor, "node d"]) -> Inputs:
    """The readers of MLPs, from what F hears of what they wrote."""
    mlp, (norm, secant) = runs.model.bridge.blocks[nodes.layer].mlp, _at(runs, nodes)
    y = secant.transpose(written @ mlp.W_out.T)
    y = y[0] @ mlp.W_gate.T + y[1] @ mlp.W_in.T if isinstance(y, tuple) else y @ mlp.W_in.T
    number = torch.arange(len(nodes), device=written.device)
    kind = torch.full_like(number, INPUTS.index("mlp"))
    return Inputs(number, kind, nodes.dest, norm.transpose(y))


def _at(runs: AlignedRuns, nodes: MLPs) -> tuple[Norm, Pointwise | Gated]:
    """The secants of MLPs at their tokens."""
    part = runs.secants[nodes.layer]
    place = nodes.prompt, _index(nodes.dest, part.middle.middle.shape[1])
    return part.middle.at(place), part.mlp.at(place)


# --- forward -------------------------------------------------------------------------------------


def out_of_heads(runs: AlignedRuns, nodes: Heads, read: Inputs) -> Float[Tensor, "node d"]:
    """What heads write more for changes of the stream at their inputs, `reader` in each row."""
    model, secants = runs.model, Attending.of(runs, nodes)
    sources, groups = secants.mixing.v.shape[1], model.n_heads // model.n_kv_heads
    changes = []
    for kind, W in enumerate(reading_weights(model, nodes.layer)):
        here = (read.kind == kind).nonzero().flatten()
        node, token = read.node[here], read.token[here]
        rows = secants.norm.at((nodes.prompt[node], token)).folded(read.reader[here])
        rows = grouped_matmul(rows, W, nodes.head[node] // (1 if kind == 0 else groups))
        if kind < 2:
            rows = secants.normalised("qk"[kind], node, token, rows)
        if model.rotary and kind < 2:
            rows = rotate(rows, *(x[secants.start + token] for x in angles(model)))
        total = rows.new_zeros(len(nodes), 1 if kind == 0 else sources, rows.shape[-1])
        place = torch.zeros_like(token) if kind == 0 else secants.start + token
        changes.append(total.index_put_((node, place), rows, accumulate=True))
    q, k, v = changes
    weights = secants.softmax.apply(secants.score.apply(q, k))
    z = secants.mixing.apply(weights, v)[:, 0]
    return grouped_matmul(z, model.writers.W_O[nodes.layer], nodes.head)


def out_of_mlps(runs: AlignedRuns, nodes: MLPs, read: Inputs) -> Float[Tensor, "node d"]:
    """What MLPs write more for changes of the stream in front of them, `reader` in each row."""
    mlp, (norm, secant) = runs.model.bridge.blocks[nodes.layer].mlp, _at(runs, nodes)
    change = read.reader.new_zeros(len(nodes), read.reader.shape[1])
    n = norm.apply(change.index_add_(0, read.node, read.reader))
    if isinstance(secant, Gated):
        return secant.apply(n @ mlp.W_gate, n @ mlp.W_in) @ mlp.W_out
    return secant.apply(n @ mlp.W_in) @ mlp.W_out
