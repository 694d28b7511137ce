"""Chapter 5: what an intervention is, and the clean run that it starts from.

An intervention is a row: a prompt and some changes, each added to the residual stream or to the
query, key or value of one head, at one token. `recompute.recompute` says what comes of it.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_signals.core.forward import attention_weights, normalise
from sparse_signals.core.model import IN_HEADS, Model, activations, once_per_model
from sparse_signals.core.prompts import Batch

# Sites, in order of computation: the stream before attention, inputs of a head, the stream after.
PRE, Q, K, V, MID = range(5)


@dataclass(frozen=True)
class Layers:
    """The attention weights of a model, one matrix for queries, keys and values, by layer."""

    W_in: Float[Tensor, "layer d qkv"]
    b_in: Float[Tensor, "layer qkv"]
    W_out: Float[Tensor, "layer z d"]
    b_out: Float[Tensor, "layer d"]


@dataclass(frozen=True)
class Clean:
    """What a run without interventions left behind, for some prompts of a batch.

    pre, mid: the residual stream before and after the attention of each layer; final: after the
    last layer, at `end`. Queries and keys as they enter the score, and what heads divided them by
    (1 where they do not). `answers` are the tokens IO, S.
    """

    model: Model
    first_prompt: int
    end: Int[Tensor, "prompt"]
    answers: Int[Tensor, "prompt 2"]
    pre: Float[Tensor, "layer prompt pos d"]
    mid: Float[Tensor, "layer prompt pos d"]
    final: Float[Tensor, "prompt d"]
    q: Float[Tensor, "layer prompt head pos r"]
    k: Float[Tensor, "layer prompt head pos r"]
    v: Float[Tensor, "layer prompt head pos r"]
    q_scale: Float[Tensor, "layer prompt head pos"]
    k_scale: Float[Tensor, "layer prompt head pos"]

    @property
    def in_mlp(self) -> Float[Tensor, "layer prompt pos d"]:
        """The residual stream that the MLP of each layer reads."""
        return self.pre if self.model.parallel else self.mid


@dataclass(frozen=True)
class Changes:
    """Additions, in any order: `factor` times row `which` of `values`, in row `row`.

    `site` is one of PRE, Q, K, V and MID; `head` counts for queries, keys and values alone, which
    are changed for this query head only, even where heads share keys.
    """

    row: Int[Tensor, "change"]
    layer: Int[Tensor, "change"]
    site: Int[Tensor, "change"]
    head: Int[Tensor, "change"]
    token: Int[Tensor, "change"]
    factor: Float[Tensor, "change"]
    which: Int[Tensor, "change"]
    values: Float[Tensor, "value width"]

    def __getitem__(self, keep: Tensor) -> "Changes":
        kept = {x.name: getattr(self, x.name)[keep] for x in fields(self) if x.name != "values"}
        return Changes(**kept, values=self.values)

    def added(self) -> Float[Tensor, "change width"]:
        """The vector that every change adds."""
        return self.values[self.which] * self.factor[:, None]


@dataclass(frozen=True)
class Probes:
    """Scores to report: of which row, head, destination and source."""

    row: Int[Tensor, "probe"]
    layer: Int[Tensor, "probe"]
    head: Int[Tensor, "probe"]
    dest: Int[Tensor, "probe"]
    src: Int[Tensor, "probe"]

    def __getitem__(self, keep: Tensor) -> "Probes":
        return Probes(*(getattr(self, x.name)[keep] for x in fields(self)))


@once_per_model
def attention_layers(model: Model) -> Layers:
    """Attention weights as the recomputation wants them, in the dtype of the model."""
    blocks = [block.attn for block in model.bridge.blocks]

    def flat(W: Tensor) -> Tensor:
        return W.movedim(0, 1).flatten(1)

    def bias(attn: Any, name: str, size: int) -> Tensor:
        found = getattr(attn, name)
        return attn.W_Q.new_zeros(size) if found is None else found.flatten()

    W_in = [torch.cat([flat(a.W_Q), flat(a.W_K), flat(a.W_V)], dim=1) for a in blocks]
    sizes = [("b_Q", model.n_heads), ("b_K", model.n_kv_heads), ("b_V", model.n_kv_heads)]
    b_in = [torch.cat([bias(a, name, n * model.d_head) for name, n in sizes]) for a in blocks]
    return Layers(
        torch.stack(W_in),
        torch.stack(b_in),
        torch.stack([a.W_O.flatten(0, 1) for a in blocks]),
        torch.stack([bias(a, "b_O", model.d_model) for a in blocks]),
    )


def clean_run(model: Model, batch: Batch, rows: slice | None = None) -> Clean:
    """Run some prompts (all, without `rows`) and keep what interventions on them start from.

    Raises PromptError where the prompts have no names.
    """
    rows = rows or slice(0, len(batch.tokens))
    part = batch.rows(rows)
    answers, end = part.answers("an intervention").to(model.device), part.last.to(model.device)
    heads = ("q", "k", "v", *IN_HEADS)
    kept = activations(model, part.tokens, ("resid_pre", "attn_out", *heads))
    pre, mid = kept["resid_pre"], kept["resid_pre"] + kept["attn_out"]
    at_end = -1, torch.arange(len(end), device=end.device), end
    block, read = model.bridge.blocks[-1], (pre if model.parallel else mid)[at_end]
    final = mid[at_end] + block.mlp(normalise(model, block.ln2, read[:, None]))[:, 0]
    return Clean(model, rows.start, end, answers, pre, mid, final, *(kept[name] for name in heads))


def clean_scores(
    clean: Clean, prompt: Int[Tensor, "row"], probes: Probes
) -> tuple[Float[Tensor, "probe"], Float[Tensor, "probe"]]:
    """Score and attention weight of every probe in the clean run, `prompt` being that of rows."""
    of = prompt[probes.row]
    q = clean.q[probes.layer, of, probes.head, probes.dest].double()
    k = clean.k[probes.layer, of, probes.head].double()
    scores = (k @ q[..., None])[..., 0] / clean.model.divisor[probes.layer, None]
    past = torch.arange(k.shape[1], device=k.device) <= probes.dest[:, None]
    pattern = attention_weights(scores, past)
    row = torch.arange(len(of), device=of.device)
    return scores[row, probes.src], pattern[row, probes.src]
