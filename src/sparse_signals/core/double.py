"""Rotary models in float64 from end to end.

Whatever their dtype, transformers and TransformerLens take rotary angles, the softmax of attention
and RMSNorm in float32, which processors round differently: a model in float64 does without.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def compute_in_float64(bridge: Any) -> None:
    """Mend the bridge of a rotary model with float64 weights, so that no step drops to float32.

    The code of transformers stays, with all its ways to scale the frequencies of a rotation; the
    frequencies are computed afresh.
    """
    from transformer_lens.model_bridge.generalized_components import NormalizationBridge

    rotary = bridge.rotary_emb.original_component
    with _Float64():
        exact = type(rotary)(rotary.config).to(rotary.inv_freq.device)
    exact.forward = _in_float64(exact.forward)
    bridge.rotary_emb.set_original_component(exact)
    for part in bridge.modules():
        if isinstance(part, NormalizationBridge):
            norm: Any = part.original_component
            norm.forward = _in_float64(norm.forward)
    for block in bridge.blocks:
        block.attn._masked_softmax = _in_float64(block.attn._masked_softmax)


class _Float64(TorchFunctionMode):
    """Inside, whoever asks PyTorch for float32 gets float64."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        function = Tensor.double if function is Tensor.float else function
        named = {name: _wide(x) for name, x in (kwargs or {}).items()}
        return function(*map(_wide, args), **named)


def _wide(x: Any) -> Any:
    return torch.float64 if x is torch.float32 else x


def _in_float64(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def exact(*args: Any, **kwargs: Any) -> Any:
        with _Float64():
            return function(*args, **kwargs)

    return exact
