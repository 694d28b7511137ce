"""Rotary positions: how queries and keys are turned, and turned back."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_signals.core.model import Model


def rotation(
    model: Model, positions: Int[Tensor, "row"]
) -> tuple[Float[Tensor, "row r"], Float[Tensor, "row r"]]:
    """cos and sin of the rotary angles at some positions, as the model rounds them, in float64."""
    dtype = torch.zeros(1, dtype=model.dtype, device=model.device)
    embed = model.bridge.rotary_emb.original_component
    cos, sin = embed(dtype, torch.arange(model.n_ctx, device=model.device)[None])
    return cos[0, positions].double(), sin[0, positions].double()


def unrotate(
    y: Float[Tensor, "... r"], cos: Float[Tensor, "... w"], sin: Float[Tensor, "... w"]
) -> Float[Tensor, "... r"]:
    """Rᵀy of each row, where a query or key of that token is turned to Rq by `rotate`."""
    return rotate(y, cos, -sin)


def rotate(
    x: Float[Tensor, "... r"], cos: Float[Tensor, "... w"], sin: Float[Tensor, "... w"]
) -> Float[Tensor, "... r"]:
    """Rx = x·cos + half(x)·sin with half([a, b]) = [−b, a]: how rotary models turn q and k.

    Coordinate n turns together with coordinate n + w/2; those from w on stay as they are.
    """
    turned, rest = x.tensor_split([cos.shape[-1]], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned
