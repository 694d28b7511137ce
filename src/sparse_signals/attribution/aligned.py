"""Two aligned runs, of prompts and of their counterfactuals, and what differs between them."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_signals.attribution.readers import (
    LayerSecants,
    Node,
    Readers,
    layer_secants,
    norm_secant,
    readers,
)
from sparse_signals.attribution.record import Record, record
from sparse_signals.attribution.rules import SECANT, Rule
from sparse_signals.attribution.secants import LAST_PLACES, LogProbability, Norm, ReadOut
from sparse_signals.core.forward import normalise
from sparse_signals.core.model import Model, once_per_model
from sparse_signals.core.objective import Objective, aligned_objective, first_change
from sparse_signals.core.prompts import Batch
from sparse_signals.core.run import fitting_rows

RUNS_BYTES = 2**27  # what all components of a chunk of prompts wrote, in one of the runs
COMPLETE = {torch.float32: 1e-4, torch.float64: 1e-9}
# Parts of the logits of F: where shares sum to less, that much rounding is more than the limit.
LEAST = {kind: LAST_PLACES * torch.finfo(kind).eps / limit for kind, limit in COMPLETE.items()}


class ShareError(ValueError):
    """Shares that cannot be had, or that do not add up; the message is one line."""


Counterfactual = Batch | Float[Tensor, "prompt pos d"]


@dataclass(frozen=True)
class AlignedRuns:
    """Some prompts and their counterfactuals, what is asked, and both their runs.

    A counterfactual is what a prompt is compared with: other tokens, or vectors in the place of the
    embeddings of its tokens, such as their mean over prompts of the same form.
    """

    model: Model
    batch: Batch
    counterfactual: Counterfactual
    objective: Objective

    @classmethod
    def of(
        cls,
        model: Model,
        batch: Batch,
        counterfactual: Counterfactual,
        objective: Objective | None = None,
    ) -> "AlignedRuns":
        """Checked, before anything runs; without an objective it is logit(IO) − logit(S).

        Raises PromptError for batches that are not aligned, and an objective of other prompts;
        ShareError for vectors that are not as many as tokens.
        """
        if isinstance(counterfactual, Batch):
            objective = aligned_objective(model, batch, counterfactual, objective)
        else:
            objective = aligned_objective(model, batch, batch, objective)
            if counterfactual.shape != (shape := (*batch.tokens.shape, model.d_model)):
                raise ShareError(
                    f"vectors in the place of embeddings are {shape} numbers, "
                    f"not {tuple(counterfactual.shape)}"
                )
        return cls(model, batch, counterfactual, objective)

    def chunks(self) -> Iterator[tuple[slice, "AlignedRuns"]]:
        """The same in pieces that fit into memory, without the padding that none of them needs."""
        for rows in self.fitting():
            yield rows, self.rows(rows)

    def fitting(self) -> list[slice]:
        """Prompts that fit into memory together."""
        return fitting_rows(self.model, self.batch, RUNS_BYTES)

    def rows(self, rows: slice) -> "AlignedRuns":
        """The same of some of the prompts, without the padding that none of them needs."""
        stop, other = int(self.batch.last[rows].max()) + 1, self.counterfactual
        is_batch = isinstance(other, Batch)
        some = other.rows(rows).positions(0, stop) if is_batch else other[rows, :stop]
        batch = self.batch.rows(rows).positions(0, stop)
        return AlignedRuns(self.model, batch, some, self.objective.rows(rows))

    @property
    def stop(self) -> int:
        """Where the longest of the prompts ends."""
        return self.batch.tokens.shape[1]

    @cached_property
    def start(self) -> int:
        """The first token that differs in any of the prompts: nothing in front of it changes."""
        if isinstance(self.counterfactual, Batch):
            return first_change(self.batch, self.counterfactual)
        differ = (self._embedding(self.batch) != self.counterfactual).any(-1).cpu()
        first = (differ & self.batch.mask).any(0).nonzero().flatten().tolist()
        return min([*first[:1], int(self.batch.last.min())])

    @cached_property
    def last(self) -> Int[Tensor, "prompt"]:
        """The place of the last token, from the start."""
        return self.batch.last.to(self.model.device) - self.start

    @cached_property
    def front(self) -> Record | None:
        """The run of all that is in front of the start."""
        if not self.start:
            return None
        last = torch.full_like(self.last, self.start - 1)
        return record(self.model, self._embedding(self.batch)[:, : self.start], last)

    @cached_property
    def ends(self) -> tuple[Record, Record]:
        """The runs of x and x′ from the start, made together: what is the same is so to the bit."""
        pair = (self._embedding(x)[:, self.start :] for x in (self.batch, self.counterfactual))
        both = record(self.model, torch.cat(tuple(pair)), self.last.repeat(2), self.front)
        prompts = len(self.last)
        return both.rows(slice(prompts)), both.rows(slice(prompts, None))

    @cached_property
    def values(self) -> tuple[Float[Tensor, "prompt"], Float[Tensor, "prompt"]]:
        """F(x) and F(x′), from the logits."""
        first, second = (self.objective.value(self._logits(end)) for end in self.ends)
        return first, second

    @property
    def difference(self) -> Float[Tensor, "prompt"]:
        """F(x) − F(x′)."""
        return self.values[0] - self.values[1]

    @cached_property
    def rounding(self) -> Float[Tensor, "prompt"]:
        """The sum of sizes at which rounding the logits of F is a gap at the limit."""
        asked, extent = self.objective.to(self.difference), torch.zeros_like(self.difference)
        for end in self.ends:
            logits = self._logits(end).abs().gather(1, asked.tokens)
            extent += torch.linalg.vecdot(logits, asked.weights.abs())
        return extent * LEAST[self.model.dtype]

    @cached_property
    def changes(
        self,
    ) -> tuple[Float[Tensor, "upstream prompt pos d"], Float[Tensor, "component prompt 1 d"]]:
        """Δ of what components wrote before the last layer, at all tokens; of all at the last.

        Without positions and output biases, which do not change.
        """
        model, (x, other) = self.model, self.ends
        after, number = model.n_heads + 1, torch.arange(len(self.last), device=self.last.device)
        size = 1 + (model.n_layers - 1) * after
        tokens = x.embedding.new_empty(size, *x.embedding.shape)
        ends = x.embedding.new_empty(size + after, len(number), 1, model.d_model)
        torch.sub(x.embedding, other.embedding, out=tokens[0])
        for layer, (a, b) in enumerate(zip(x.layers, other.layers, strict=True)):
            start = 1 + layer * after
            if layer == model.n_layers - 1:
                ends[:size] = tokens[:, number, self.last].unsqueeze(2)
            into = ends if layer == model.n_layers - 1 else tokens
            moved = (a.z - b.z).transpose(0, 1).flatten(1, 2)
            heads = into[start : start + model.n_heads].flatten(1, 2)
            torch.bmm(moved, model.writers.W_O[layer], out=heads)
            torch.sub(a.mlp, b.mlp, out=into[start + model.n_heads])
        return tokens, ends

    def at_last(self, norm: Norm) -> Norm:
        """The secant of a normalisation at the last token alone."""
        return norm.at((torch.arange(len(self.last))[:, None], self.last[:, None]))

    def rows_of(self, row: Int[Tensor, "prompt pos"], tokens: int) -> Int[Tensor, "token"]:
        """The rows of all tokens, or of one in each prompt, the last."""
        return (row if tokens > 1 else row.gather(1, self.last[:, None])).flatten()

    @cached_property
    def secants(self) -> tuple[LayerSecants, ...]:
        """Those of all layers."""
        return layer_secants(self.model, *self.ends)

    @cached_property
    def answer(self) -> Node:
        """The node that F is: the last stream, along what F hears of it through both runs."""
        return self._answer(*self.ends)

    def readers_of(self, node: Node) -> Readers:
        """Through the secants of both runs, of a node in the place of the answer."""
        return readers(self.model, self.secants, node, self.last)

    def readers(self, rule: Rule = SECANT) -> Iterator[Readers]:
        """Through the secants of both runs, or what a rule has at points in between."""
        if rule.points is None:
            yield self.readers_of(self.answer)
            return
        x, other = self.ends
        known = {0.0: other, 1.0: x}
        for point in rule.points:
            between = torch.lerp(other.embedding, x.embedding, point)
            here = known.get(point) or record(self.model, between, self.last, self.front)
            local = layer_secants(self.model, here, here, rule.relevance)
            answer = self._answer(here, here, rule.relevance)
            yield readers(self.model, local, answer, self.last)

    def _answer(self, first: Record, second: Record, relevance: bool = False) -> Node:
        model, asked = self.model, self.objective.to(first.x)
        W_U, final = model.bridge.unembed.W_U, model.bridge.ln_final
        if asked.logarithm:
            log, other_log = (self._logits(end).log_softmax(-1) for end in (first, second))
            right = torch.zeros_like(log, dtype=torch.bool)
            right.scatter_(1, asked.tokens, asked.weights != 0)
            vector = LogProbability.between(log, other_log, right).vector @ W_U.T
        else:
            vector = torch.einsum("pk,pkd->pd", asked.weights, W_U.T[asked.tokens])
        ends = first.x, second.x, first.scale, second.scale
        read_out = ReadOut(norm_secant(model, final, *ends, relevance), vector)
        direction = read_out.transpose(torch.ones_like(first.scale))
        return Node(model.n_layers, "stream", self.last, direction)

    def _embedding(self, of: Counterfactual) -> Float[Tensor, "prompt pos d"]:
        if isinstance(of, Batch):
            return self.model.bridge.embed.W_E[of.tokens.to(self.model.device)]
        return of.to(self.model.device, self.model.dtype)

    def _logits(self, end: Record) -> Float[Tensor, "prompt vocab"]:
        unembed = self.model.bridge.unembed
        final = normalise(self.model, self.model.bridge.ln_final, end.x, end.scale)
        return final @ unembed.W_U + unembed.b_U


@once_per_model
def changing(model: Model) -> Int[Tensor, "changing"]:
    """The components that may differ in aligned runs: all but positions and output biases."""
    table = model.components[:-1]
    same = table["kind"].isin(["position", "bias"])
    return torch.tensor(table.index[~same].tolist(), device=model.device)


def in_front_of_mlp(model: Model, layer: int) -> int:
    """How many of the `changing` components the MLP of a layer reads; they are the first ones."""
    return 1 + layer * (model.n_heads + 1) + (0 if model.parallel else model.n_heads)
