"""Chapter 5: a model with a switch at every edge into a query or a key.

An edge leads from an upstream component to the query ("dest") or key ("src") input of a head, at
the tokens of one role. Open, it carries what the component writes in this very run, downstream of
whatever was changed; closed, it carries what the component wrote at such a token of reference
prompts. Only attention is switched: values, MLPs and the read-out always see the residual stream of
the run, so what is tested is *where heads look*, and all that follows from it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_signals.core.forward import Gates, forward
from sparse_signals.core.model import Model
from sparse_signals.core.prompts import INTACT, Batch, PromptError, role_numbers, token_roles
from sparse_signals.core.run import fitting_rows, runs

ABLATIONS = ("mean", "resample")
GATED_BYTES = 2**26  # what all components of a chunk of prompts wrote; a gradient keeps many copies


@dataclass(frozen=True)
class Switchboard:
    """A model, the prompts it runs on, and what its closed edges carry.

    A token has one role here, its set of roles ("IO+1, S1-1"); `role` numbers them. Role 0 is
    "intact": the first token, to which no firing is traced, and padding. A closed edge carries
    `ablated[row]` of its token.
    """

    model: Model
    batch: Batch
    roles: tuple[str, ...]
    role: Int[Tensor, "prompt pos"]
    ablated: Float[Tensor, "row component d"]
    row: Int[Tensor, "prompt pos"]


@dataclass(frozen=True)
class Answers:
    """logit(IO) − logit(S) at the last token, and where every head looked."""

    difference: Float[Tensor, "prompt"]
    pattern: Float[Tensor, "layer prompt head dest src"]


def switchboard(
    model: Model,
    batch: Batch,
    reference: Batch,
    ablation: str = "mean",
    seed: int = 0,
) -> Switchboard:
    """Run the reference prompts, and keep what closed edges carry.

    "mean": the mean over all reference tokens of the same role, which keeps what the role alone
    implies. "resample": what was written at one such token, drawn for every token of the batch,
    which may contradict what the open edges say. A "third" name in the reference (nobody is
    repeated) stands in for S2. Source: Wang et al. 2023, section 4 (mean).
    Raises PromptError where names are not known, or where the reference lacks a role.
    """
    if ablation not in ABLATIONS:
        raise ValueError(f"ablation must be one of {ABLATIONS}, not {ablation!r}")
    batch.answers("running a circuit")  # now, not after the reference
    roles = (INTACT, *sorted({name for row in token_roles(batch) for name in row} - {INTACT}))
    role, of = (role_numbers(prompts, roles).to(model.device) for prompts in (batch, reference))
    for n in range(len(roles)):
        if not (of == n).any():
            raise PromptError(f"no token of the reference prompts has role {roles[n]!r}")
    if ablation == "mean":
        ablated, row = mean_outputs(model, reference, of, len(roles)), role
    else:
        ablated, row = _drawn(model, reference, of, role, seed)
    return Switchboard(model, batch, roles, role, ablated, row)


def mean_outputs(
    model: Model, reference: Batch, place: Int[Tensor, "ref refpos"], places: int
) -> Float[Tensor, "place component d"]:
    """The mean of what components write over the reference tokens of every place; −1 is none."""
    total: Tensor | float = 0.0
    place = place.to(model.device)
    count = torch.bincount(place[place >= 0], minlength=places).to(model.dtype)
    for rows, part in runs(model, reference, GATED_BYTES):
        known = place[rows] >= 0
        zeros = part.outputs.new_zeros(places, *part.outputs.shape[2:])
        total = total + zeros.index_add(0, place[rows][known], part.outputs[known])
    return total / count[:, None, None]


def _drawn(
    model: Model,
    reference: Batch,
    of: Int[Tensor, "ref refpos"],
    role: Int[Tensor, "prompt pos"],
    seed: int,
) -> tuple[Float[Tensor, "row component d"], Int[Tensor, "prompt pos"]]:
    """For every token a random one of the same role, and what was written there."""
    noise = torch.rand(role.shape, generator=torch.Generator().manual_seed(seed)).to(role.device)
    order = of.flatten().argsort(stable=True)
    start = torch.searchsorted(of.flatten()[order], role)
    count = torch.searchsorted(of.flatten()[order], role, right=True) - start
    drawn = order[start + (noise * count).long()]
    used, row = drawn.unique(return_inverse=True)
    length, pieces = of.shape[1], []
    for rows, part in runs(model, reference, GATED_BYTES):
        here = used[(used >= rows.start * length) & (used < rows.stop * length)]
        pieces.append(part.outputs.flatten(0, 1)[here - rows.start * length])
    return torch.cat(pieces), row


# --- running -------------------------------------------------------------------------------------


def run_switched(
    board: Switchboard, gate: Float[Tensor, "role layer head side component"]
) -> Answers:
    """Run all prompts. The input of head h's query at a token is Σ_c g·x_c + (1 − g)·ablated_c.

    g is the gate of (role of the token, h, "dest", c), x_c what c writes in this run. Keys are
    alike. With all gates 1 this is the model as it is. Costs about a forward pass.
    """
    with torch.no_grad():
        pieces = [
            run_rows(board, gate, rows)
            for rows in fitting_rows(board.model, board.batch, GATED_BYTES)
        ]
    difference = torch.cat([piece.difference for piece in pieces])
    return Answers(difference, torch.cat([piece.pattern for piece in pieces], dim=1))


def run_rows(
    board: Switchboard, gate: Float[Tensor, "role layer head side component"], rows: slice
) -> Answers:
    """As `run_switched`, for some of the prompts; can be differentiated with respect to gates."""
    gate = torch.cat([torch.ones_like(gate[:1]), gate[1:]])
    queries, keys = gate.unbind(3)
    gates = Gates(board.role[rows], board.ablated, board.row[rows], q=queries, k=keys)
    found = forward(board.model, board.batch.rows(rows), gates=gates)
    return Answers(found.difference, found.run.pattern)
