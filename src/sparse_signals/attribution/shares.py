"""Chapter 6: F(x) − F(x′) of two aligned runs, split exactly over all edges of a model.

One pass backward through the secants of both runs gives a reader at every input: the vector whose
product with a difference of streams is what F hears of it there. The share of an edge from a
component c to an input is Δx_c · reader. Shares into a node add up to the node's own share, shares
into the read-out to F(x) − F(x′), and so do the shares of the embeddings of all tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_signals.attribution.aligned import (
    COMPLETE,
    AlignedRuns,
    Counterfactual,
    ShareError,
    changing,
    in_front_of_mlp,
)
from sparse_signals.attribution.readers import Readers
from sparse_signals.attribution.record import reading_weights
from sparse_signals.attribution.rules import SECANT, Rule
from sparse_signals.attribution.secants import Norm
from sparse_signals.core.model import Model, head_name
from sparse_signals.core.objective import Objective
from sparse_signals.core.prompts import Batch

SMALLEST = 1e-30  # so that nothing divided by nothing is nothing


@dataclass(frozen=True)
class Gaps:
    """By how much shares miss what they add up to, at worst, over the sum of their sizes.

    That sum counts as at least what rounding the logits of F may be of the limit.

    At the read-out and at the embeddings they miss F(x) − F(x′), at heads and MLPs the node's own
    share. The sum of sizes is that of the shares into the node, or into the read-out if it is more:
    a node of which F hears next to nothing has a share made of rounding.
    """

    read_out: float
    nodes: float
    embeddings: float

    @property
    def worst(self) -> float:
        """The largest of them."""
        return max(self.read_out, self.nodes, self.embeddings)


@dataclass(frozen=True)
class Shares:
    """The share of every edge in F(x) − F(x′), summed over the tokens that belong to a row.

    An edge leads from a component upstream (of `Model.components`, without the bias row) to the
    query, key or value of a head, an MLP or the read-out, at the token of that input; edges that
    are not there have 0. `nodes`: what components have themselves, at the token where they write.
    `difference` is F(x) − F(x′). The indices of edges are those of `core.forward.Gates`.
    """

    q: Float[Tensor, "row layer head component"]
    k: Float[Tensor, "row layer head component"]
    v: Float[Tensor, "row layer head component"]
    mlp: Float[Tensor, "row layer component"]
    out: Float[Tensor, "row component"]
    nodes: Float[Tensor, "row component"]
    difference: Float[Tensor, "prompt"]
    gaps: Gaps


@torch.no_grad()
def edge_shares(
    model: Model,
    batch: Batch,
    counterfactual: Counterfactual,
    *,
    objective: Objective | None = None,
    row: Int[Tensor, "prompt pos"] | None = None,
    rule: Rule = SECANT,
) -> Shares:
    """Split F(x) − F(x′) over all edges, for prompts x of a batch and their counterfactuals x′.

    Edge c → input at token t: Δx_c(t) · reader(t), through the secants of both runs.
    F is the `objective` at the last token; None: logit(IO) − logit(S) of the batch.
    `row` numbers the rows over whose tokens shares are summed; None: one for every prompt.
    `rule`: secants, which are exact, `rules.gradients`, `rules.integrated` or `rules.RELP`, of
    which the gaps say by how much they miss what they should add up to.
    Costs about four forward passes of each prompt, in chunks that fit into memory; what
    prompts have in front of the first token that differs is run once.
    Raises ShareError for batches that are not aligned, and for exact shares that do not add up;
    PromptError where no answer is given and prompts have no names.

    >>> from dataclasses import replace
    >>> io_twice = batch.tokens.scatter(1, batch.roles["S2"][:, None], batch.io[:, None])
    >>> found = edge_shares(model, batch, replace(batch, tokens=io_twice))
    >>> found.q.shape[:3] == (len(batch.tokens), model.n_layers, model.n_heads)
    True
    >>> torch.allclose(found.out.sum(1), found.difference, rtol=1e-3)
    True
    """
    if row is None:
        row = torch.arange(len(batch.tokens))[:, None].expand(batch.tokens.shape)
    whole = AlignedRuns.of(model, batch, counterfactual, objective)
    if row.shape != batch.tokens.shape or int(row.min()) < 0:
        raise ShareError("every token of the prompts belongs to a row, numbered from 0")
    total = _Total(model, int(row.max()) + 1)
    for rows, chunk in whole.chunks():
        total.add_chunk(chunk, row[rows, : chunk.stop].to(model.device), rule)
    return total.finished(rule.exact)


@torch.no_grad()
def node_shares(
    model: Model,
    batch: Batch,
    counterfactual: Counterfactual,
    *,
    objective: Objective | None = None,
) -> Float[Tensor, "prompt pos component"]:
    """What every component has of F(x) − F(x′) at every token: Δx_c(t) · reader(t).

    Those of `edge_shares`, for less: about two forward passes and one backward. Embeddings sum to
    F(x) − F(x′). A head's share is what it hears through query, key and value, passed on.
    Raises ShareError and PromptError as `edge_shares` does.
    """
    pieces, gaps = [], []
    for _, chunk in AlignedRuns.of(model, batch, counterfactual, objective).chunks():
        values = [_node_values(chunk, found) for found in chunk.readers()]
        around = (0, 0, chunk.start, batch.tokens.shape[1] - chunk.stop)
        pieces += [torch.nn.functional.pad(x, around) for x in values]
        embedding = values[-1][:, :, 0]
        size = torch.maximum(embedding.abs().sum(1), chunk.rounding)
        gaps.append(_gap(embedding.sum(1), chunk.difference, size).max())
    _refuse_above(float(torch.stack(gaps).max()), model)
    return torch.cat(pieces)


def largest_shares(model: Model, found: Shares, n: int = 20) -> pd.DataFrame:
    """The `n` edges of the largest |share|: row, upstream, downstream, input, layer, head, share.

    input is "q", "k", "v", "mlp" or "out"; downstream a head, an MLP or "read-out".
    """
    inputs = {name: getattr(found, name) for name in ("q", "k", "v", "mlp", "out")}
    values = torch.cat([value.flatten() for value in inputs.values()])
    order = values.abs().argsort(descending=True, stable=True)[:n].cpu()
    names, start, pieces = model.components["component"].to_numpy(), 0, []
    for name, value in inputs.items():
        rank = ((order >= start) & (order < start + value.numel())).nonzero().flatten()
        place = torch.unravel_index(order[rank] - start, value.shape)
        nowhere = torch.full_like(rank, -1)
        layer = place[1] if name != "out" else nowhere
        head = place[2] if name in "qkv" else nowhere
        table = pd.DataFrame({"rank": rank, "row": place[0], "layer": layer, "head": head})
        table["upstream"], table["input"] = names[place[-1].numpy()], name
        down = {"mlp": "MLP " + table["layer"].astype(str), "out": "read-out"}
        table["downstream"] = down.get(name, head_name(table["layer"], table["head"]))
        table["share"] = value.flatten()[(order[rank] - start).to(value.device)].cpu().numpy()
        pieces.append(table)
        start += value.numel()
    ranked = pd.concat(pieces).sort_values("rank").reset_index(drop=True)
    return ranked[["row", "upstream", "downstream", "input", "layer", "head", "share"]]


def _gap(
    found: Float[Tensor, "*shape"], expected: Float[Tensor, "*shape"], size: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """|found − expected| / size, and 0 of nothing."""
    return (found - expected).abs() / size.clamp_min(SMALLEST)


def _refuse_above(worst: float, model: Model) -> None:
    """Raise ShareError for a gap that rounding does not explain."""
    limit = COMPLETE[model.dtype]
    if not worst <= limit:
        raise ShareError(
            f"shares miss what they add up to by {worst:.0e} of their size, more than {limit:.0e}: "
            f"the two runs may be too alike for {model.dtype}"
        )


class _Total:
    """Shares of all chunks, as they come in, and by how much they miss what they add up to."""

    def __init__(self, model: Model, rows: int) -> None:
        size, heads = len(model.components) - 1, (model.n_layers, model.n_heads)
        kind = {"dtype": model.dtype, "device": model.device}
        self.model, self.differences, self.gaps = model, [], []
        self.edges = {name: torch.zeros(rows, *heads, size, **kind) for name in "qkv"}
        self.edges["mlp"] = torch.zeros(rows, model.n_layers, 1, size, **kind)
        self.edges["out"] = torch.zeros(rows, 1, 1, size, **kind)
        self.nodes = torch.zeros(rows, size, **kind)
        self.places = changing(model)

    def add_chunk(self, chunk: AlignedRuns, row: Int[Tensor, "prompt pos"], rule: Rule) -> None:
        """Add the mean over all passes backward, and note by how much it misses."""
        row = row[:, chunk.start :]
        weight, whole = 1 / len(rule.points or (1,)), bool((row == row[:, :1]).all())
        # the read-out, the embeddings, then heads and MLP of every layer
        own = chunk.difference.new_zeros(len(row), 1 + len(self.places))
        into, size = torch.zeros_like(own), torch.zeros_like(own)
        for found in chunk.readers(rule):
            nodes = weight * _node_values(chunk, found)
            self.nodes.index_add_(0, row.flatten(), nodes.flatten(0, 1))
            own[:, 1:] += nodes.sum(1)[:, self.places]
            size[:, 1] += nodes[:, :, 0].abs().sum(1)
            for name, layer, values in _edge_values(chunk, found, whole):
                start = 2 + layer * (self.model.n_heads + 1)
                start = {"mlp": start + self.model.n_heads, "out": 0}.get(name, start)
                node, values = slice(start, start + values.shape[1]), weight * values
                each = values.unflatten(0, (len(row), -1))
                into[:, node] += each.sum((1, 3))
                size[:, node] += each.abs().sum((1, 3))
                self._put(self.edges[name][:, layer], values, chunk.rows_of(row, each.shape[1]))
        into[:, 1] = own[:, 1]
        own[:, :2] = chunk.difference[:, None]
        least = torch.maximum(size[:, :1], chunk.rounding[:, None])
        gap = _gap(into, own, torch.maximum(size, least))
        self.gaps.append(torch.stack([gap[:, 0].max(), gap[:, 2:].max(), gap[:, 1].max()]))
        self.differences.append(chunk.difference)

    def _put(
        self,
        total: Float[Tensor, "row reader component"],
        values: Float[Tensor, "token reader upstream"],
        rows: Int[Tensor, "token"],
    ) -> None:
        """Add to the rows of tokens, in the places of components that differ between runs."""
        wide = values.new_zeros(*values.shape[:2], total.shape[2])
        wide[:, :, self.places[: values.shape[2]]] = values
        total.index_add_(0, rows, wide)

    def finished(self, exact: bool) -> Shares:
        """All shares; if they are to be exact, raise ShareError where they do not add up."""
        gaps = Gaps(*torch.stack(self.gaps).amax(0).tolist())
        if exact:
            _refuse_above(gaps.worst, self.model)
        edges = {name: self.edges[name] for name in "qkv"}
        edges |= {"mlp": self.edges["mlp"][:, :, 0], "out": self.edges["out"][:, 0, 0]}
        return Shares(**edges, nodes=self.nodes, difference=torch.cat(self.differences), gaps=gaps)


# --- one pass backward ---------------------------------------------------------------------------


def _edge_values(
    chunk: AlignedRuns, found: Readers, whole: bool
) -> Iterator[tuple[str, int, Float[Tensor, "token reader upstream"]]]:
    """The shares of all edges: input, layer, values at every token (or `whole`: every prompt)."""
    model, (tokens, ends) = chunk.model, chunk.changes
    heads, groups = model.n_heads, model.n_heads // model.n_kv_heads
    # readers of queries, keys and values together: few rows make a slow product
    space = tokens.new_empty(3 * heads, *tokens.shape[1:])
    for layer, part in enumerate(found.layers):
        upstream, final = 1 + layer * (heads + 1), layer == model.n_layers - 1
        dest = ends if final else tokens
        W_Q, *shared = reading_weights(model, layer)
        W_K, W_V = (W.repeat_interleave(groups, 0) if groups > 1 else W for W in shared)
        parts = [(part.k, W_K), (part.v, W_V)]
        if final:
            vectors = space.new_empty(heads, *ends.shape[1:])
            _spell(chunk.at_last(part.norm), part.q, W_Q, vectors)
            yield "q", layer, _products(vectors, ends[:upstream], whole)
        else:
            parts.append((part.q, W_Q))
        vectors = space[: len(parts) * heads]
        for (y, W), out in zip(parts, vectors.split(heads), strict=True):
            _spell(part.norm, y, W, out)
        values = _products(vectors, tokens[:upstream], whole).split(heads, dim=1)
        for name, each in zip("kvq", values, strict=False):
            yield name, layer, each
        before = dest[: in_front_of_mlp(model, layer)]
        yield "mlp", layer, _products(part.mlp.unsqueeze(0), before, whole)
    yield "out", 0, _products(found.out[None, :, None], ends, whole)


def _spell(
    norm: Norm,
    y: Float[Tensor, "prompt head some r"],
    W: Float[Tensor, "head d r"],
    out: Float[Tensor, "head prompt some d"],
) -> None:
    """Readers in the stream, before the normalisation: J̄ᵀ W_h y_h of every head and token."""
    y = y.transpose(0, 1) * norm.inverse.unsqueeze(-1)
    torch.bmm(y.flatten(1, 2), W.mT, out=out.flatten(1, 2))
    norm.pulled(out)


def _products(
    readers: Float[Tensor, "reader prompt some d"],
    changes: Float[Tensor, "upstream prompt some d"],
    whole: bool,
) -> Float[Tensor, "token reader upstream"]:
    """Δx_c · reader at every token, or summed over those of a prompt."""
    if whole:
        rows = (x.transpose(0, 1).flatten(2) for x in (readers, changes))
    else:
        rows = (x.flatten(1, 2).transpose(0, 1) for x in (readers, changes))
    left, right = rows
    return torch.bmm(left, right.mT)


def _node_values(chunk: AlignedRuns, found: Readers) -> Float[Tensor, "prompt pos component"]:
    """What components have themselves, where they write: Δx_c · (what F hears of the stream)."""
    x, other = chunk.ends
    tokens, ends = [], []
    tokens.append(torch.linalg.vecdot(x.embedding - other.embedding, found.embedding))
    for a, b, part in zip(x.layers, other.layers, found.layers, strict=True):
        into = ends if part is found.layers[-1] else tokens
        into += torch.linalg.vecdot(a.z - b.z, part.z).unbind(1)
        into.append(torch.linalg.vecdot(a.mlp - b.mlp, part.written))
    places = changing(chunk.model)
    size = len(chunk.model.components) - 1
    values = tokens[0].new_zeros(*tokens[0].shape, size)
    values[:, :, places[: len(tokens)]] = torch.stack(tokens, dim=-1)
    last = torch.zeros_like(values[:, 0])
    last[:, places[len(tokens) :]] = torch.cat(ends, dim=1)
    values[torch.arange(len(last), device=last.device), chunk.last] += last
    return values
