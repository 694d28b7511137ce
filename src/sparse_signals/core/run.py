"""Chapter 4: the residual stream of a model as an exact sum of what its components wrote.

x_t = embedding + position + Σ heads + Σ output biases + Σ MLPs. A value bias passes through
attention unchanged, because the weights of a row sum to 1: it counts as an output bias, and a head
is what it moved. Components are ordered so that those before any layer come first.
"""

from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_signals.core.model import Model, activations, score_divisors
from sparse_signals.core.prompts import Batch

BIAS_ROW = "bias row"
CHUNK_BYTES = 2**29  # what all components write on the prompts of one chunk


@dataclass(frozen=True)
class Attention:
    """What the heads of a model did on a batch of prompts (queries and keys rotated, if rotary)."""

    q: Float[Tensor, "layer prompt head pos r"]
    k: Float[Tensor, "layer prompt head pos r"]
    pattern: Float[Tensor, "layer prompt head dest src"]
    mask: Bool[Tensor, "prompt pos"]
    scale: Float[Tensor, "layer"]


def read_attention(
    model: Model,
    tokens: Int[Tensor, "prompt pos"],
    mask: Bool[Tensor, "prompt pos"],
    progress: bool = False,
) -> Attention:
    """Run the model and keep the queries, keys and attention weights of every head."""
    cache = activations(model, tokens, ("q", "k", "pattern"), progress=progress)
    mask = mask.to(model.device)
    return Attention(cache["q"], cache["k"], cache["pattern"], mask, score_divisors(model))


@dataclass(frozen=True)
class Run:
    """What a model did on a batch: attention of its heads, and what every component wrote.

    `scale` is what each layer's normalisation divided by; values are without their bias.
    """

    tokens: Int[Tensor, "prompt pos"]
    attention: Attention
    outputs: Float[Tensor, "prompt pos component d"]
    scale: Float[Tensor, "layer prompt pos"]
    v: Float[Tensor, "layer prompt head pos r"]


@dataclass(frozen=True)
class Writers:
    """Output weights of every head (values repeated per query head), and the output biases."""

    W_O: Float[Tensor, "layer head r d"]
    b_V: Float[Tensor, "layer head r"]
    bias: Float[Tensor, "layer d"]


def component_table(model: Model) -> pd.DataFrame:
    """The components in order: component, kind, layer, head (−1 where there is none), height.

    `height` is where a chart draws it. The last one, "bias row", is no part of the residual
    stream: it is the constant 1 of x̃, through which query, key and normalisation biases act.
    """
    rows = [("embedding", "embedding", -1, -1, -1.0)]
    if not model.rotary:
        rows.append(("position", "position", -1, -1, -1.0))
    for layer in range(model.n_layers):
        heads = range(model.n_heads)
        rows += [(f"{layer}.{head}", "head", layer, head, float(layer)) for head in heads]
        rows.append((f"bias {layer}", "bias", layer, -1, layer + 0.3))
        rows.append((f"MLP {layer}", "MLP", layer, -1, layer + 0.5))
    rows.append((BIAS_ROW, "bias row", -1, -1, -1.0))
    return pd.DataFrame(rows, columns=["component", "kind", "layer", "head", "height"])


def fitting_rows(model: Model, batch: Batch, limit: int) -> list[slice]:
    """Prompts in chunks: all outputs of the components of a chunk fit into `limit` bytes."""
    prompts, length = batch.tokens.shape
    components = len(component_table(model)) - 1
    step = max(1, limit // (length * components * model.d_model * model.dtype.itemsize))
    return [slice(start, min(start + step, prompts)) for start in range(0, prompts, step)]


def writers(model: Model) -> Writers:
    """How heads write, in the dtype of the model. b_V W_O is part of the bias of the layer."""
    blocks = [block.attn for block in model.bridge.blocks]
    groups = model.n_heads // model.n_kv_heads
    W_O = torch.stack([attn.W_O for attn in blocks])
    b_V = W_O.new_zeros(model.n_layers, model.n_kv_heads, model.d_head)
    if blocks[0].b_V is not None:
        b_V = torch.stack([attn.b_V for attn in blocks])
    b_V = b_V.repeat_interleave(groups, dim=1)
    bias = torch.einsum("lhr,lhrd->ld", b_V, W_O)
    if blocks[0].b_O is not None:
        bias = bias + torch.stack([attn.b_O for attn in blocks])
    return Writers(W_O, b_V, bias)


def new_outputs(model: Model, prompts: int, length: int) -> Float[Tensor, "prompt pos component d"]:
    """Space for `Run.outputs`, components first in memory: each is written where it belongs."""
    components = len(component_table(model)) - 1
    size = components, prompts, length, model.d_model
    return torch.empty(size, dtype=model.dtype, device=model.device).movedim(0, 2)


def run_model(
    model: Model,
    tokens: Int[Tensor, "prompt pos"],
    mask: Bool[Tensor, "prompt pos"],
    space: Float[Tensor, "some pos component d"] | None = None,
) -> Run:
    """Run the model once; split what it wrote into components. Head outputs cost P·T·L·H·r·d.

    `space` (from `new_outputs`, for at least as many prompts) spares the time that the operating
    system takes for new memory; the next run that uses it overwrites the outputs of this one.
    """
    cache = activations(model, tokens, ("q", "k", "v", "z", "pattern", "mlp_out", "scale"))
    mask, tokens = mask.to(model.device), tokens.to(model.device)
    attention = Attention(cache["q"], cache["k"], cache["pattern"], mask, score_divisors(model))
    out = writers(model)
    outputs = new_outputs(model, *tokens.shape) if space is None else space[: len(tokens)]
    z, v = (cache[name] - out.b_V[:, None, :, None] for name in ("z", "v"))
    _write(outputs, model, tokens, out, z, cache["mlp_out"])
    return Run(tokens, attention, outputs, cache["scale"], v)


def _write(
    outputs: Float[Tensor, "prompt pos component d"],
    model: Model,
    tokens: Int[Tensor, "prompt pos"],
    out: Writers,
    z: Float[Tensor, "layer prompt head pos r"],
    mlp: Float[Tensor, "layer prompt pos d"],
) -> None:
    layers, heads, length = len(z), z.shape[2], z.shape[3]
    written = outputs.movedim(2, 0)
    first = len(written) - layers * (heads + 2)
    written[0] = model.bridge.embed.W_E[tokens]
    if not model.rotary:
        written[1] = model.bridge.pos_embed.W_pos[:length]
    each = written[first:].unflatten(0, (layers, heads + 2))
    for layer in range(layers):
        rows = z[layer].transpose(0, 1).flatten(1, 2)
        torch.matmul(rows, out.W_O[layer], out=each[layer, :heads].flatten(1, 2))
        each[layer, heads] = out.bias[layer]
        each[layer, heads + 1] = mlp[layer]


def chunk_rows(model: Model, batch: Batch) -> list[slice]:
    """Prompts that are traced together."""
    return fitting_rows(model, batch, CHUNK_BYTES)
