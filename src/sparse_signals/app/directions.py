"""A direction from a file, in the place of an answer: F = w·x."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sparse_signals.app.errors import UsageError
from sparse_signals.core.model import Model

ALONG = "the last stream at the last token along"  # F in words; the name of the file follows


def read_direction(path: Path, model: Model) -> Float[Tensor, "d"]:
    """The vector of a .npy file, or the only one of a .safetensors file, of d_model numbers.

    Raises UsageError for a file that is not there or cannot be read, for other shapes, and for
    numbers that are not finite or all 0.
    """
    if path.suffix not in (".npy", ".safetensors"):
        raise UsageError(f"--direction is a .npy or .safetensors file, not {path.name}")
    try:
        if path.suffix == ".npy":
            found = [torch.from_numpy(np.asarray(np.load(path, allow_pickle=False)))]
        else:
            found = list(load_file(path).values())
    except (OSError, ValueError, TypeError, EOFError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"--direction: {path} cannot be read: {reason}") from error
    if len(found) != 1:
        raise UsageError(f"--direction: {path.name} has {len(found)} tensors: leave one in it")
    direction = found[0]
    if direction.shape != (model.d_model,):
        raise UsageError(
            f"--direction: {path.name} has the shape {tuple(direction.shape)}: {model.name} needs "
            f"({model.d_model},), a number for each dimension of its stream"
        )
    if direction.is_complex() or not bool(direction.isfinite().all()):
        raise UsageError(f"--direction: {path.name} has numbers that are not real and finite")
    if not bool(direction.any()):
        raise UsageError(f"--direction: {path.name} is 0 everywhere: then F is 0 too")
    return direction.double()
