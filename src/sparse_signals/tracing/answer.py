"""Chapter 4: what the answer hears of every score."""

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_signals.core.forward import (
    attend,
    embedded,
    norm_scale,
    normalise,
    project,
    read_out,
)
from sparse_signals.core.model import Model
from sparse_signals.core.prompts import Batch
from sparse_signals.core.run import CHUNK_BYTES, fitting_rows

GRAPH = 16  # about how much more memory a pass to differentiate takes than a run


def score_gradients(model: Model, batch: Batch) -> Float[Tensor, "layer prompt head dest src"]:
    """∂F/∂a_ij of every score, F = logit(IO) − logit(S): one pass forward and one backward.

    With g = ∂F/∂A, that is A_ij (g_ij − Σ_j' A_ij' g_ij'): 0 where the row rests on one token, or
    where it moves the same from all. Raises PromptError where the prompts have no names.
    """
    pieces = fitting_rows(model, batch, CHUNK_BYTES // GRAPH)
    return torch.cat([_gradients(model, batch.rows(rows)) for rows in pieces], dim=1)


@torch.enable_grad()
def _gradients(model: Model, batch: Batch) -> Float[Tensor, "layer prompt head dest src"]:
    answers = batch.answers("the gradient of the answer").to(model.device)
    x = embedded(model, batch.tokens.to(model.device)).sum(2).requires_grad_()
    patterns = []
    for layer, block in enumerate(model.bridge.blocks):
        read = x.unsqueeze(2), norm_scale(model, x).unsqueeze(2)
        q, k, v = (project(model, layer, name, *read)[0] for name in "qkv")
        patterns.append(attend(model, layer, q, k))
        moved = torch.einsum("phtr,hrd->ptd", patterns[-1] @ v, model.writers.W_O[layer])
        after = x + moved + model.writers.bias[layer]
        x = after + block.mlp(normalise(model, block.ln2, x if model.parallel else after))
    last = batch.last.to(x.device)
    io, s = read_out(model, x[torch.arange(len(x), device=x.device), last], answers).T
    heard = torch.stack(torch.autograd.grad((io - s).sum(), patterns))
    weights = torch.stack(patterns).detach()
    return weights * (heard - (weights * heard).sum(-1, keepdim=True))
