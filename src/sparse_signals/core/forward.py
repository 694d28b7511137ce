"""One forward pass, step by step, for models whose inputs are changed."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparse_signals.core.model import Model, logits
from sparse_signals.core.prompts import Batch
from sparse_signals.core.rotary import rotate, rotation
from sparse_signals.core.run import Run

# --- steps of a forward pass ---------------------------------------------------------------------


def embedded(
    model: Model, tokens: Int[Tensor, "prompt pos"]
) -> Float[Tensor, "prompt pos component d"]:
    """What the components before the first layer write: embedding and, if learned, position."""
    words = model.bridge.embed.W_E[tokens]
    if model.rotary:
        return words.unsqueeze(2)
    places = model.bridge.pos_embed.W_pos[: tokens.shape[1]]
    return torch.stack([words, places.expand_as(words)], dim=2)


def norm_scale(model: Model, x: Float[Tensor, "... d"]) -> Float[Tensor, "..."]:
    """What a normalisation divides by: √(mean square + ε), of x less its mean for LayerNorm."""
    square = x.square().mean(-1)
    if not model.bridge.ln_final.uses_rms_norm:
        square = square - x.mean(-1).square()
    return (square + model.bridge.cfg.eps).sqrt()


def queries_and_keys(
    model: Model,
    forms: QKForms,
    layer: int,
    x: Float[Tensor, "prompt pos head side d"],
    scale: Float[Tensor, "prompt pos head side"],
) -> Float[Tensor, "side prompt head pos r"]:
    """Queries and keys, rotated if rotary, from an input of their own for every head and side."""
    factors = torch.stack([forms.A[layer], forms.B[layer]])
    y = torch.einsum("pthsd,shdr->sphtr", x, factors[:, :, :-1])
    y = y / scale.permute(3, 0, 2, 1).unsqueeze(-1) + factors[:, None, :, -1:]
    if model.rotary:
        cos, sin = rotation(model, torch.arange(x.shape[1], device=x.device))
        y = rotate(y, cos.to(y.dtype), sin.to(y.dtype))
    return y


def attend(
    q: Float[Tensor, "prompt head pos r"],
    k: Float[Tensor, "prompt head pos r"],
    divisor: Float[Tensor, ""],
) -> Float[Tensor, "prompt head dest src"]:
    """softmax_j q_i·k_j / √r over j ≤ i."""
    scores = q @ k.mT / divisor.to(q)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1)


def values(
    model: Model, layer: int, hidden: Float[Tensor, "prompt pos d"]
) -> Float[Tensor, "prompt head pos r"]:
    """Values of every query head, without their bias: that is part of the output bias."""
    W_V = model.bridge.blocks[layer].attn.W_V
    v = torch.einsum("ptd,hdr->phtr", hidden, W_V)
    return v.repeat_interleave(model.n_heads // len(W_V), dim=1)


def logit_difference(
    model: Model, batch: Batch, hooks: Collection[tuple[str, Callable[..., Any]]] = ()
) -> Float[Tensor, "prompt"]:
    """logit(IO) − logit(S) at the last token, of the model with TransformerLens hooks."""
    found = logits(model, batch.tokens, batch.last, hooks)
    answers = batch.answers("the logit difference").to(found.device)
    return found.gather(1, answers) @ found.new_tensor([1.0, -1.0])


def name_difference(
    model: Model, batch: Batch, final: Float[Tensor, "prompt pos d"]
) -> Float[Tensor, "prompt"]:
    """logit(IO) − logit(S) at the last token, from the output of the final normalisation."""
    unembed, device = model.bridge.unembed, final.device
    last = torch.arange(len(final), device=device), (batch.mask.sum(1) - 1).to(device)
    io, s = batch.io.to(device), batch.s.to(device)
    columns = unembed.W_U[:, io] - unembed.W_U[:, s]
    return (final[last] * columns.T).sum(-1) + unembed.b_U[io] - unembed.b_U[s]


@dataclass(frozen=True)
class Streams:
    """What the normalisations of a run read: before and after each attention, and at the end."""

    pre: Float[Tensor, "layer prompt pos d"]
    mid: Float[Tensor, "layer prompt pos d"]
    final: Float[Tensor, "prompt pos d"]


# --- a run without signals -----------------------------------------------------------------------


def run_without(
    weights: Weights,
    batch: Batch,
    removed: Float[Tensor, "prompt pos component d"],
    like: Streams | None = None,
) -> tuple[Run, Streams, Float[Tensor, "prompt"]]:
    """Run the model while something is taken from what its components write.

    Normalisations divide by their scale on the streams `like`, if given. Returns the run, its
    streams, and logit(IO) − logit(S).
    """
    model, out = weights.model, writers(weights.model)
    A, B = (x.to(model.device, model.dtype) for x in (weights.forms.A, weights.forms.B))
    forms = QKForms(A, B, weights.forms.scale)
    tokens = batch.tokens.to(model.device)
    parts = [embedded(model, tokens)]
    parts[0] = parts[0] - removed[:, :, : parts[0].shape[2]]
    x, kept = parts[0].sum(2), []
    for layer, block in enumerate(model.bridge.blocks):
        pre, done = x, sum(part.shape[2] for part in parts)
        seen, mid_seen = (pre, None) if like is None else (like.pre[layer], like.mid[layer])
        scale = norm_scale(model, seen)
        alike = (*x.shape[:2], model.n_heads, 2)
        inputs = x[:, :, None, None].expand(*alike, -1)
        q, k = queries_and_keys(model, forms, layer, inputs, scale[..., None, None].expand(alike))
        pattern = attend(q, k, forms.scale[layer])
        v = values(model, layer, _normalised(model, block.ln1, x, seen))
        heads = torch.einsum("phtr,hrd->pthd", pattern @ v, out.W_O[layer])
        written = torch.cat([heads, out.bias[layer].expand_as(x).unsqueeze(2)], dim=2)
        written = written - removed[:, :, done : done + written.shape[2]]
        mid = x + written.sum(2)
        mlp = block.mlp(_normalised(model, block.ln2, mid, mid if like is None else mid_seen))
        mlp = mlp - removed[:, :, done + written.shape[2]]
        x = mid + mlp
        parts.append(torch.cat([written, mlp.unsqueeze(2)], dim=2))
        kept.append((q, k, pattern, v, scale, pre, mid))
    q, k, pattern, v, scale, pre, mid = (torch.stack(each) for each in zip(*kept, strict=True))
    attention = Attention(q, k, pattern, batch.mask.to(x.device), forms.scale)
    final = _normalised(model, model.bridge.ln_final, x, x if like is None else like.final)
    run = Run(tokens, attention, torch.cat(parts, dim=2), scale, v)
    return run, Streams(pre, mid, x), name_difference(model, batch, final)


def _normalised(
    model: Model,
    norm: nn.Module,
    x: Float[Tensor, "prompt pos d"],
    like: Float[Tensor, "prompt pos d"],
) -> Float[Tensor, "prompt pos d"]:
    """A normalisation of the model, dividing by the scale of another stream."""
    scale = norm_scale(model, like).unsqueeze(-1)
    if norm.uses_rms_norm:
        return x / scale * norm.w
    return (x - x.mean(-1, keepdim=True)) / scale * norm.w + norm.b
