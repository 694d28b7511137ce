"""Planted circuits whose features are in superposition: more of them than dimensions."""

from dataclasses import replace
from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_signals.core.model import wrap_model
from sparse_signals.planted.circuits import CIRCUITS, Planted
from sparse_signals.planted.weights import D_MODEL, POSITIONS, handwritten_model

READ = ("c_attn.weight", "c_fc.weight")
WRITTEN = ("wte.weight", "wpe.weight", "lm_head.weight", "c_proj.weight")


def crowded_directions(
    features: int, fewer: int, seed: int = 0
) -> Float[Tensor, "feature feature"]:
    """Unit vectors, one a row, that span `fewer` dimensions less than there are of them.

    U = D P, P the projection onto a random subspace, and D makes rows as long as 1. Cosines UUᵀ
    are 1 on the diagonal; off it their root mean square is about √(m / (n − m) / n), n features
    and m dimensions fewer, near the least there can be (Welch 1974).
    Raises ValueError where no dimension would be left.
    """
    if not 0 <= fewer < features:
        raise ValueError(f"of {features} dimensions 0 to {features - 1} can go, not {fewer}")
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(features, features - fewer, generator=generator, dtype=torch.float64)
    Q = torch.linalg.qr(gaussian)[0]
    U = Q @ Q.T
    return U / U.norm(dim=1, keepdim=True)


def feature_count(name: str) -> int:
    """How many features a planted circuit has: words, places and messages."""
    circuit = CIRCUITS[name]()
    heads = [*(stage.head for stage in circuit.stages), *circuit.decoys]
    messages = {message for head in heads for _, message in head.send}
    return len(circuit.vocabulary) + POSITIONS + len(messages)


def superpose(case: Planted, fewer: int, seed: int = 0) -> Planted:
    """The circuit with feature n along row n of `crowded_directions`, written and read.

    A reader of feature n then hears every other feature m by the cosine of n and m. Prompts, roots
    and truth stay, weights have no noise. Raises ValueError as `crowded_directions` does.
    """
    circuit, features = CIRCUITS[case.name](), feature_count(case.name)
    heads = [*(stage.head for stage in circuit.stages), *circuit.decoys]
    hf_model = handwritten_model(heads, circuit.vocabulary)
    axes = torch.eye(D_MODEL).double()
    basis = ((axes[0::2] - axes[1::2]) / sqrt(2))[:features]  # as in weights.py
    turn = basis.T @ crowded_directions(features, fewer, seed) @ basis
    for name, weight in hf_model.named_parameters():
        if name.endswith(READ):
            weight.copy_(turn.T @ weight)
        elif name.endswith(WRITTEN):
            weight.copy_(weight @ turn)
    return replace(case, model=wrap_model(hf_model, f"superposed-{case.name}"))
