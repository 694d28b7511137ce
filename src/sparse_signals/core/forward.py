"""One forward pass, step by step, for models of which something is removed or switched.

Why not TransformerLens' own hooks? `hook_q_input`, `hook_k_input`, `hook_v_input` (which need
`use_split_qkv_input`) and `hook_mlp_in` do replace inputs before the normalisation, at the same
cost, and the tests compare with them. But heads that share a key get one input together, the
normalisation behind a split input cannot divide by the scale of another run (it has no hook), and
the bridge has to be switched over and everything that components write collected, for each pass.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_signals.core.model import Model, logits, once_per_model, qk_weights
from sparse_signals.core.prompts import Batch
from sparse_signals.core.rotary import rotate, rotation
from sparse_signals.core.run import KEPT, Outputs, Run

PIECES = 6  # layers whose gaps lie in arrays of their own: each costs a product, joining a copy


def logit_difference(
    model: Model, batch: Batch, hooks: Collection[tuple[str, Callable[..., Any]]] = ()
) -> Float[Tensor, "prompt"]:
    """logit(IO) − logit(S) at the last token, of the model with TransformerLens hooks."""
    found = logits(model, batch.tokens, batch.last, hooks)
    answers = batch.answers("the logit difference").to(found.device)
    return found.gather(1, answers) @ found.new_tensor([1.0, -1.0])


# --- steps of a forward pass ---------------------------------------------------------------------


def embedded(
    model: Model, tokens: Int[Tensor, "prompt pos"], start: int = 0
) -> Float[Tensor, "prompt pos component d"]:
    """What the components before the first layer write: embedding and, if learned, position.

    `start` is the position of the first of the tokens.
    """
    words = model.bridge.embed.W_E[tokens]
    if model.rotary:
        return words.unsqueeze(2)
    places = model.bridge.pos_embed.W_pos[start : start + tokens.shape[1]]
    return torch.stack([words, places.expand_as(words)], dim=2)


def norm_scale(model: Model, x: Float[Tensor, "... d"]) -> Float[Tensor, "..."]:
    """What a normalisation divides by: √(mean square + ε), of x less its mean for LayerNorm."""
    square = x.square().mean(-1)
    if not model.rms:
        square = square - x.mean(-1).square()
    return (square + model.bridge.cfg.eps).sqrt()


def normalise(
    model: Model,
    norm: Any,  # a part of the bridge, whose weights are found by name
    x: Float[Tensor, "... d"],
    scale: Float[Tensor, "..."] | None = None,
) -> Float[Tensor, "... d"]:
    """A normalisation of the model, dividing by the scale of x or by a given one."""
    scale = (norm_scale(model, x) if scale is None else scale).unsqueeze(-1)
    if model.rms:
        return x / scale * norm.w
    return (x - x.mean(-1, keepdim=True)) / scale * norm.w + norm.b


def folded(
    W: Float[Tensor, "layer head d r"],
    b: Float[Tensor, "layer head r"],
    gain: Float[Tensor, "layer d"],
    shift: Float[Tensor, "layer d"],
    centred: bool,
) -> Float[Tensor, "layer head d1 r"]:
    """Weights that read [x / scale ; 1] instead of the normalised x: centring, gain, shift, bias.

    The last row is the bias. `centred` says that the normalisation takes the mean from x.
    """
    rows = gain[:, None, :, None] * W
    if centred:
        rows = rows - rows.mean(dim=-2, keepdim=True)
    bias = torch.einsum("ld,lhdr->lhr", shift, W) + b
    return torch.cat([rows, bias.unsqueeze(-2)], dim=-2)


@once_per_model
def projections(model: Model) -> dict[str, Float[Tensor, "layer head d1 r"]]:
    """The `folded` weights of queries, keys and values (without their bias), in the model's dtype.

    Keys and values have as many heads as the model keeps of them.
    """
    w, groups = qk_weights(model), model.n_heads // model.n_kv_heads
    W_V = torch.stack([block.attn.W_V for block in model.bridge.blocks]).double()
    weights = {
        "q": (w.W_Q, w.b_Q),
        "k": (w.W_K[:, ::groups], w.b_K[:, ::groups]),
        "v": (W_V, torch.zeros_like(W_V[:, :, 0])),
    }
    return {
        name: folded(W, b, w.gain, w.shift, w.centred).to(model.dtype)
        for name, (W, b) in weights.items()
    }


def project(
    model: Model,
    layer: int,
    name: str,
    x: Float[Tensor, "prompt pos input d"],
    scale: Float[Tensor, "prompt pos input"],
    start: int = 0,
    own: Float[Tensor, "prompt head pos"] | None = None,
) -> tuple[Float[Tensor, "prompt head pos r"], Float[Tensor, "prompt head pos"]]:
    """Queries or keys as they enter the score, or values ("q", "k", "v"), of every query head.

    And what heads divide them by: a given scale, or their `own`; 1 where they do not normalise.

    From a stream and what its normalisation divides by: one for all heads, one for each, or one for
    each group that shares keys and values. Values are without their bias, which is part of the
    output bias. `start` is the position of the first of the tokens.
    """
    W = projections(model)[name][layer]
    if x.shape[2] > len(W):
        W = W.repeat_interleave(model.n_heads // len(W), dim=0)
    y = torch.einsum("pthd,hdr->phtr", x, W[:, :-1])
    y = y / scale.transpose(1, 2).unsqueeze(-1) + W[:, None, -1]
    y, own = normalised_in_head(model, layer, name, y, own)
    if model.rotary and name != "v":
        y = rotate(y, *(table[start : start + y.shape[2]] for table in angles(model)))
    groups = model.n_heads // len(W)
    return y.repeat_interleave(groups, dim=1), own.repeat_interleave(groups, dim=1)


def normalised_in_head(
    model: Model,
    layer: int,
    name: str,
    y: Float[Tensor, "prompt head pos r"],
    scale: Float[Tensor, "prompt heads pos"] | None = None,
) -> tuple[Float[Tensor, "prompt head pos r"], Float[Tensor, "prompt head pos"]]:
    """Queries or keys after the normalisation inside heads, if there is one, and its scale (or 1).

    `scale`: that of every query head, instead of that of y.
    """
    if name not in model.head_gains:
        return y, y.new_ones(()).expand(y.shape[:-1])
    scale = norm_scale(model, y) if scale is None else scale[:, :: scale.shape[1] // y.shape[1]]
    return y / scale.unsqueeze(-1) * model.head_gains[name][layer], scale


@once_per_model
def angles(model: Model) -> tuple[Float[Tensor, "pos r"], Float[Tensor, "pos r"]]:
    """cos and sin of the rotary angles at every position, in the model's dtype."""
    cos, sin = rotation(model, torch.arange(model.n_ctx, device=model.device))
    return cos.to(model.dtype), sin.to(model.dtype)


def attention_weights(
    scores: Float[Tensor, "... dest src"], past: Bool[Tensor, "... dest src"]
) -> Float[Tensor, "... dest src"]:
    """Softmax over the sources in the past."""
    return scores.masked_fill(~past, -torch.inf).softmax(-1)


def attend(
    model: Model,
    layer: int,
    q: Float[Tensor, "prompt head dest r"],
    k: Float[Tensor, "prompt head src r"],
) -> Float[Tensor, "prompt head dest src"]:
    """softmax_j q_i·k_j / divisor over j ≤ i; destinations are the last of the sources."""
    scores = q @ k.mT / model.divisor[layer].to(q)
    past = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
    past = past.tril(k.shape[2] - q.shape[2])
    return attention_weights(scores, past)


def read_out(
    model: Model,
    x: Float[Tensor, "row d"],
    answers: Int[Tensor, "row answer"],
    scale: Float[Tensor, "row"] | None = None,
) -> Float[Tensor, "row answer"]:
    """Logits of some tokens from the stream after the last layer, normalised as by `normalise`."""
    unembed = model.bridge.unembed
    final = normalise(model, model.bridge.ln_final, x, scale)
    return torch.einsum("nd,nad->na", final, unembed.W_U.T[answers]) + unembed.b_U[answers]


def last_logits(run: Run) -> Float[Tensor, "prompt word"]:
    """Logits of all words at the last token, from what the components of a run wrote there."""
    model, last = run.model, run.batch.last.to(run.tokens.device)
    prompts = torch.arange(len(last), device=last.device)
    written, slot = Outputs(run).at(prompts, last, model.n_layers)
    final = normalise(model, model.bridge.ln_final, written[slot].sum(1))
    return final @ model.bridge.unembed.W_U + model.bridge.unembed.b_U


# --- what is changed in a pass -------------------------------------------------------------------


@dataclass(frozen=True)
class Scales:
    """What the normalisations of a pass divide by.

    Before attention, inside heads (queries and keys), before the MLP, and at the end.
    """

    attention: Float[Tensor, "layer prompt pos"]
    q: Float[Tensor, "layer prompt head pos"]
    k: Float[Tensor, "layer prompt head pos"]
    mlp: Float[Tensor, "layer prompt pos"]
    out: Float[Tensor, "prompt"]


@dataclass(frozen=True)
class Gates:
    """How much of what each component upstream writes now reaches each input; the rest is old.

    An input at a token reads Σ_c g·x_c + (1 − g)·old_c: x_c is what component c writes in this
    pass, old_c is `reference[place]` of the token, g is the gate in its `row`. There are gates of
    the query, key and value of every query head, of every MLP and of the read-out; None: all 1,
    which costs nothing. One row gates pairs of components; one for every role or token, each there.
    Instead of one input for each head there may be one for each group that shares keys and values,
    or one for all. Gates of components that do not come before an input are ignored.
    `written` gates what a component writes, for all that read it, at no cost.
    """

    row: Int[Tensor, "prompt pos"]
    reference: Float[Tensor, "place component d"]
    place: Int[Tensor, "prompt pos"]
    q: Float[Tensor, "row layer queries component"] | None = None
    k: Float[Tensor, "row layer keys component"] | None = None
    v: Float[Tensor, "row layer values component"] | None = None
    mlp: Float[Tensor, "row layer component"] | None = None
    out: Float[Tensor, "row component"] | None = None
    written: Float[Tensor, "row component"] | None = None

    @property
    def of_inputs(self) -> bool:
        """Whether any input has gates of its own."""
        return any(x is not None for x in (self.q, self.k, self.v, self.mlp, self.out))


@dataclass(frozen=True)
class Pass:
    """A run that was changed, what its streams were divided by, and the last normalised stream."""

    run: Run
    scales: Scales
    final: Float[Tensor, "prompt d"]

    @property
    def layers(self) -> list[tuple[Tensor, ...]]:
        """What every layer computed: all parts of the run, and both of its scales."""
        parts = [getattr(self.run, name) for name in KEPT]
        return list(zip(*parts, self.scales.mlp, strict=True))

    @cached_property
    def logits(self) -> Float[Tensor, "prompt vocab"]:
        """The logits of all tokens after the last one."""
        unembed = self.run.model.bridge.unembed
        return self.final @ unembed.W_U + unembed.b_U

    @property
    def difference(self) -> Float[Tensor, "prompt"]:
        """logit(IO) − logit(S). Raises PromptError where the prompts have no names."""
        answers = self.run.batch.answers("the logit difference").to(self.final.device)
        io, s = self.logits.gather(1, answers).unbind(1)
        return io - s


class _Stream:
    """The residual stream of a pass, and how components differ from the reference of gates."""

    def __init__(self, gates: Gates | None, removed: Tensor | None, x: Tensor) -> None:
        self.gates, self.removed, self.done = gates, removed, 0
        self.x, self.old = x, torch.zeros_like(x)
        self.gaps, self.new = [], []

    def write(self, parts: Float[Tensor, "prompt pos part d"], components: int) -> None:
        """Add what the next components write, each for itself or, where no gate asks, summed."""
        here = slice(self.done, self.done + components)
        self.done += components
        if self.removed is not None:
            taken = self.removed[:, :, here]
            each = parts.shape[2] == components
            parts = parts - (taken if each else taken.sum(2, keepdim=True))
        if self.gates is not None:
            old = self.gates.reference[:, here][self.gates.place]
            if self.gates.written is not None:
                share = self.gates.written[:, here][self.gates.row]
                parts = torch.lerp(old, parts, share.unsqueeze(-1))
            if self.gates.of_inputs:
                self.old = self.old + old.sum(2)
                self.new.append(parts - old)
        self.x = self.x + parts.sum(2)

    def mixed(self, *gates: Float[Tensor, "row _ component"]) -> Tensor:
        """What inputs read: the old stream, and as much of every gap as the gates let through.

        What is open to all reads the new stream, and what is open to none the old one.
        """
        every = torch.cat([gate[..., : self.done] for gate in gates], dim=1)
        if every.requires_grad:
            return self._through(every)
        opened, closed = ((every == x).all(-1).all(0) for x in (1, 0))
        found = torch.where(opened[:, None], self.x.unsqueeze(2), self.old.unsqueeze(2))
        partly = (~(opened | closed)).nonzero().flatten()
        if len(partly):
            found[:, :, partly] = self._through(every[:, partly])
        return found

    def _through(self, gates: Float[Tensor, "row input component"]) -> Tensor:
        assert self.gates is not None
        if self.new:
            self.gaps.append(torch.cat(self.new, dim=2))
            self.new = []
        if len(self.gaps) > PIECES:
            self.gaps = [torch.cat(self.gaps, dim=2)]
        rows = gates[self.gates.row]
        shape = (*rows.shape[:3], self.x.shape[-1])
        mixed = self.old.unsqueeze(2).expand(shape).flatten(0, 1)
        shares = rows.flatten(0, 1).split([gap.shape[2] for gap in self.gaps], dim=-1)
        for share, gap in zip(shares, self.gaps, strict=True):
            mixed = torch.baddbmm(mixed, share, gap.flatten(0, 1))
        return mixed.view(shape)


# --- the pass ------------------------------------------------------------------------------------


def forward(
    model: Model,
    batch: Batch,
    *,
    removed: Float[Tensor, "prompt pos component d"] | None = None,
    like: Scales | None = None,
    gates: Gates | None = None,
    front: Run | None = None,
    known: tuple[Pass, int] | None = None,
) -> Pass:
    """Run the model while something is taken from what components write, or inputs are gated.

    Normalisations divide by the scales `like`, if given, instead of their own. What an input reads
    through gates, it alone reads: the stream goes on as the sum of what is written. The run has
    the scales of that stream. Differentiable with respect to gates.
    `front`: a run of the tokens in front of those of the batch, from the first one on; heads look
    at them too. `known`: a pass that is the same below a layer, from which this one goes on.
    """
    start = 0 if front is None else front.tokens.shape[1]
    heads, out, kept, done = "pthd" if gates else "ptd", model.writers, [], 0
    if known is None:
        first = embedded(model, batch.tokens.to(model.device), start)
    else:
        before, done = known
        first = before.run.outputs[:, :, : model.components_below(done)]
        kept = before.layers[:done]
    stream = _Stream(gates, removed, torch.zeros_like(first[:, :, 0]))
    stream.write(first, first.shape[2])
    for layer in range(done, model.n_layers):
        scale = norm_scale(model, stream.x) if like is None else like.attention[layer]
        inputs = _inputs(model, stream, layer, scale, like is None)
        given = {} if like is None else {"q": like.q[layer], "k": like.k[layer]}
        (q, q_scale), (k, k_scale), (v, _) = (
            project(model, layer, name, *inputs[name], start, given.get(name)) for name in "qkv"
        )
        keys, values = k, v
        if front is not None:
            keys = torch.cat([front.k[layer], k], dim=2)
            values = torch.cat([front.v[layer], v], dim=2)
        pattern = attend(model, layer, q, keys)
        z = pattern @ values
        beside = _mlp_output(model, stream, layer, like) if model.parallel else None
        moved = torch.einsum(f"phtr,hrd->{heads}", z, out.W_O[layer])
        stream.write(moved if gates else moved.unsqueeze(2), model.n_heads)
        stream.write(out.bias[layer].expand_as(stream.x).unsqueeze(2), 1)
        mlp, mlp_scale = beside or _mlp_output(model, stream, layer, like)
        stream.write(mlp.unsqueeze(2), 1)
        kept.append((q, k, v, z, pattern, mlp, scale, q_scale, k_scale, mlp_scale))
    x = stream.x
    if gates and gates.out is not None:
        x = stream.mixed(gates.out.unsqueeze(1)).squeeze(2)
    x = x[torch.arange(len(x), device=x.device), batch.last.to(x.device)]
    out_scale = norm_scale(model, x) if like is None else like.out
    each = [torch.stack(values) for values in zip(*kept, strict=True)]
    *for_run, mlp_scale = each
    run = Run(model, batch, *for_run, removed=removed, start=start)
    final = normalise(model, model.bridge.ln_final, x, out_scale)
    scales = Scales(run.scale, run.q_scale, run.k_scale, mlp_scale, out_scale)
    return Pass(run, scales, final)


def _inputs(
    model: Model, stream: _Stream, layer: int, scale: Float[Tensor, "prompt pos"], own: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """What queries, keys and values of a layer read, and its scale: of its `own`, or that given."""
    inputs = dict.fromkeys("qkv", (stream.x.unsqueeze(2), scale.unsqueeze(2)))
    given = {name: getattr(stream.gates, name, None) for name in "qkv"}
    given = {name: gate[:, layer] for name, gate in given.items() if gate is not None}
    if given:
        mixed = stream.mixed(*given.values())
        scales = norm_scale(model, mixed) if own else scale.unsqueeze(2).expand(mixed.shape[:3])
        sizes = [gate.shape[1] for gate in given.values()]
        parts = zip(*(x.split(sizes, dim=2) for x in (mixed, scales)), strict=True)
        inputs |= dict(zip(given, parts, strict=True))
    return inputs


def _mlp_output(
    model: Model, stream: _Stream, layer: int, like: Scales | None
) -> tuple[Float[Tensor, "prompt pos d"], Float[Tensor, "prompt pos"]]:
    """What the MLP of a layer writes, and what the normalisation in front of it divides by."""
    x, gates, block = stream.x, stream.gates, model.bridge.blocks[layer]
    if gates and gates.mlp is not None:
        x = stream.mixed(gates.mlp[:, layer, None]).squeeze(2)
    scale = norm_scale(model, x) if like is None else like.mlp[layer]
    return block.mlp(normalise(model, block.ln2, x, scale)), scale
