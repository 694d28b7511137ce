"""Chapter 5: a model with a switch at every edge into a query or a key.

An edge leads from an upstream component to the query ("dest") or key ("src") input of a head, at
the tokens of one role. Open, it carries what the component writes in this very run, downstream of
whatever was changed; closed, it carries what the component wrote at such a token of reference
prompts. Only attention is switched: values, MLPs and the read-out always see the residual stream of
the run, so what is tested is *where heads look*, and all that follows from it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_signals.core.forward import (
    attend,
    embedded,
    name_difference,
    norm_scale,
    queries_and_keys,
    values,
)
from sparse_signals.core.model import Model
from sparse_signals.core.prompts import INTACT, Batch, PromptError, role_numbers, token_roles
from sparse_signals.core.run import Writers, component_table, fitting_rows, run_model, writers
from sparse_signals.heads.svd import QKForms, qk_forms

ABLATIONS = ("mean", "resample")
CHUNK_BYTES = 2**26  # what all components of a chunk of prompts wrote; a gradient keeps many copies
PIECES = 6  # layers whose gaps lie in arrays of their own: each costs a product, joining a copy


@dataclass(frozen=True)
class Switchboard:
    """A model, the prompts it runs on, and what its closed edges carry.

    A token has one role here, its set of roles ("IO+1, S1-1"); `role` numbers them. Role 0 is
    "intact": the first token, to which no firing is traced, and padding. A closed edge carries
    `ablated[row]` of its token. `scale` divides the inputs of queries and keys; None: recomputed.
    """

    model: Model
    forms: QKForms
    out: Writers
    components: pd.DataFrame
    batch: Batch
    roles: tuple[str, ...]
    role: Int[Tensor, "prompt pos"]
    ablated: Float[Tensor, "row component d"]
    row: Int[Tensor, "prompt pos"]
    scale: Float[Tensor, "layer prompt pos"] | None


@dataclass(frozen=True)
class Outcome:
    """logit(IO) − logit(S) at the last token, and where every head looked."""

    difference: Float[Tensor, "prompt"]
    pattern: Float[Tensor, "layer prompt head dest src"]


def switchboard(
    model: Model,
    batch: Batch,
    reference: Batch,
    ablation: str = "mean",
    freeze_norms: bool = False,
    seed: int = 0,
) -> Switchboard:
    """Run the reference prompts, and keep what closed edges carry.

    "mean": the mean over all reference tokens of the same role, which keeps what the role alone
    implies. "resample": what was written at one such token, drawn for every token of the batch,
    which may contradict what the open edges say. A "third" name in the reference (nobody is
    repeated) stands in for S2.
    With `freeze_norms`, inputs of queries and keys are divided by the scale of the unchanged run
    instead of their own. Source: Wang et al. 2023, section 4 (mean).
    Raises PromptError where names are not known, or where the reference lacks a role.
    """
    if ablation not in ABLATIONS:
        raise ValueError(f"ablation must be one of {ABLATIONS}, not {ablation!r}")
    if batch.io is None or batch.s is None:
        raise PromptError("running a circuit needs prompts with two names, IO and S")
    roles = (INTACT, *sorted({name for row in token_roles(batch) for name in row} - {INTACT}))
    role, of = (role_numbers(prompts, roles).to(model.device) for prompts in (batch, reference))
    for n in range(len(roles)):
        if not (of == n).any():
            raise PromptError(f"no token of the reference prompts has role {roles[n]!r}")
    if ablation == "mean":
        ablated, row = _means(model, reference, of, len(roles)), role
    else:
        ablated, row = _drawn(model, reference, of, role, seed)
    forms, out = qk_forms(model), writers(model)
    A, B = (x.to(model.device, model.dtype) for x in (forms.A, forms.B))
    scale = _scales(model, batch) if freeze_norms else None
    table = component_table(model)[:-1]
    return Switchboard(
        model, QKForms(A, B, forms.scale), out, table, batch, roles, role, ablated, row, scale
    )


def _written(model: Model, batch: Batch) -> Iterator[tuple[slice, Tensor]]:
    for rows in fitting_rows(model, batch, CHUNK_BYTES):
        yield rows, run_model(model, batch.tokens[rows], batch.mask[rows]).outputs


def _means(
    model: Model, reference: Batch, role: Int[Tensor, "ref refpos"], roles: int
) -> Float[Tensor, "role component d"]:
    total: Tensor | float = 0.0
    count = torch.bincount(role[role >= 0], minlength=roles).to(model.dtype)
    for rows, outputs in _written(model, reference):
        known = role[rows] >= 0
        zeros = outputs.new_zeros(roles, *outputs.shape[2:])
        total = total + zeros.index_add(0, role[rows][known], outputs[known])
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
    for rows, outputs in _written(model, reference):
        here = used[(used >= rows.start * length) & (used < rows.stop * length)]
        pieces.append(outputs.flatten(0, 1)[here - rows.start * length])
    return torch.cat(pieces), row


def _scales(model: Model, batch: Batch) -> Float[Tensor, "layer prompt pos"]:
    rows = fitting_rows(model, batch, CHUNK_BYTES)
    return torch.cat([run_model(model, batch.tokens[r], batch.mask[r]).scale for r in rows], dim=1)


# --- running -------------------------------------------------------------------------------------


def run_switched(
    board: Switchboard, gate: Float[Tensor, "role layer head side component"]
) -> Outcome:
    """Run all prompts. The input of head h's query at a token is Σ_c g·x_c + (1 − g)·ablated_c.

    g is the gate of (role of the token, h, "dest", c), x_c what c writes in this run. Keys are
    alike. With all gates 1 this is the model as it is. Costs about a forward pass.
    """
    with torch.no_grad():
        outcomes = [
            run_rows(board, gate, rows)
            for rows in fitting_rows(board.model, board.batch, CHUNK_BYTES)
        ]
    difference = torch.cat([outcome.difference for outcome in outcomes])
    return Outcome(difference, torch.cat([outcome.pattern for outcome in outcomes], dim=1))


def run_rows(
    board: Switchboard, gate: Float[Tensor, "role layer head side component"], rows: slice
) -> Outcome:
    """As `run_switched`, for some of the prompts; can be differentiated with respect to gates."""
    model, role, row = board.model, board.role[rows], board.row[rows]
    gate = torch.cat([torch.ones_like(gate[:1]), gate[1:]])
    parts = [embedded(model, board.batch.tokens[rows].to(model.device))]
    x, before, gaps, patterns = parts[0].sum(2), 0, [], []
    closed = torch.zeros_like(x)
    for layer, block in enumerate(model.bridge.blocks):
        ablated = board.ablated[:, before : before + parts[-1].shape[2]][row]
        gaps.append(parts[-1] - ablated)
        if len(gaps) > PIECES:
            gaps = [torch.cat(gaps, dim=2)]
        closed, before = closed + ablated.sum(2), before + ablated.shape[2]
        inputs = _mixed(gate[:, layer, ..., :before][role], gaps, closed)
        scale = norm_scale(model, inputs)
        if board.scale is not None:
            scale = board.scale[layer, rows][:, :, None, None].expand_as(scale)
        q, k = queries_and_keys(model, board.forms, layer, inputs, scale)
        patterns.append(attend(q, k, board.forms.scale[layer]))
        z = patterns[-1] @ values(model, layer, block.ln1(x))
        heads = torch.einsum("phtr,hrd->pthd", z, board.out.W_O[layer])
        bias = board.out.bias[layer].expand_as(x)
        x = x + heads.sum(2) + bias
        mlp = block.mlp(block.ln2(x))
        x = x + mlp
        parts.append(torch.cat([heads, bias.unsqueeze(2), mlp.unsqueeze(2)], dim=2))
    final = model.bridge.ln_final(x)
    return Outcome(name_difference(model, board.batch.rows(rows), final), torch.stack(patterns))


def _mixed(
    gate: Float[Tensor, "prompt pos head side component"],
    gaps: list[Float[Tensor, "prompt pos _ d"]],
    closed: Float[Tensor, "prompt pos d"],
) -> Float[Tensor, "prompt pos head side d"]:
    """What queries and keys read: all edges closed, plus the gap of every open one."""
    rows = gate.flatten(0, 1).flatten(1, 2)
    mixed = closed.flatten(0, 1).unsqueeze(1).expand(-1, rows.shape[1], -1)
    shares = rows.split([gap.shape[2] for gap in gaps], dim=-1)
    for share, gap in zip(shares, gaps, strict=True):
        mixed = torch.baddbmm(mixed, share, gap.flatten(0, 1))
    return mixed.view(*gate.shape[:4], -1)
