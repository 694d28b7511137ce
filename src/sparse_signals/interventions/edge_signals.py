"""Chapter 5: the signal of an edge, what upstream wrote that the support of the firing hears.

Coordinates of a head's slices are linear in the residual stream at the token: c = M_tᵀ x / s_t. The
signal of an edge is the smallest part δ of what the upstream component wrote there with exactly its
coordinates in the support S, and none outside: M_tᵀ δ = 1_S ∘ M_tᵀ x_a.
"""

from dataclasses import dataclass, fields, replace
from zlib import crc32

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_signals.core.matmul import grouped_matmul
from sparse_signals.core.model import BIAS_ROW, Model, once_per_model
from sparse_signals.core.prompts import Batch, roles_of
from sparse_signals.core.rotary import rotation, unrotate
from sparse_signals.core.run import Run, runs
from sparse_signals.heads.svd import qk_forms
from sparse_signals.signals.slices import model_basis
from sparse_signals.tracing.circuit import KEY, labelled
from sparse_signals.tracing.contributions import SIDES
from sparse_signals.tracing.trace import Trace


@dataclass(frozen=True)
class HeadReaders:
    """How heads read, destination sides first: head h reads as h at its query, H + h at its key.

    `raw` takes the stream to queries or keys (the last row is the bias), `basis` spans what is
    read. A reader at a token is a combination; `inward` takes the query or key before any rotation
    to its coordinates, `outward` takes coordinates back to `basis`.
    """

    raw: Float[Tensor, "layer reader d1 r"]
    basis: Float[Tensor, "layer reader d r"]
    inward: Float[Tensor, "1 combination r r"]
    outward: Float[Tensor, "1 combination r r"]


@dataclass(frozen=True)
class Signals:
    """Edges, and the signal δ of each: one row per edge everywhere.

    edges: columns of the trace, edge (number), control ("signal" or what replaces it), repeat.
    `reader` and `combination` are places in `readers`, `scale` is s_t, `written` is x_a(t) (0 for
    the bias row), `image` is its part in the query or key times s_t, `chosen` is the support.
    """

    edges: pd.DataFrame
    readers: HeadReaders
    reader: Int[Tensor, "edge"]
    combination: Int[Tensor, "edge"]
    scale: Float[Tensor, "edge"]
    written: Float[Tensor, "edge d"]
    image: Float[Tensor, "edge r"]
    chosen: Bool[Tensor, "edge r"]
    delta: Float[Tensor, "edge d"]

    def __len__(self) -> int:
        return len(self.edges)

    def __getitem__(self, keep: Int[Tensor, "kept"] | Bool[Tensor, "edge"]) -> "Signals":
        edges = self.edges.iloc[keep.cpu().numpy()].reset_index(drop=True)
        rest = [getattr(self, x.name)[keep] for x in fields(self)[2:]]
        return Signals(edges, self.readers, *rest)


def read_signals(
    traced: Trace, edges: pd.DataFrame | None = None, run: Run | None = None
) -> Signals:
    """The signals of the edges of a trace, or of some of them.

    What components wrote is read from a run, if given, whose prompts are then those of the edges;
    otherwise the model runs on the traced prompts, a chunk at a time.
    δ = M (MᵀM)⁺ (1_S ∘ Mᵀ x_a), in float64. Without rotation and biases it is the projection
    V_S V_Sᵀ x_a (destination: U_S U_Sᵀ x_a) of Franco and Crovella 2024, section 6.
    """
    model, device = traced.model, traced.model.device
    edges = (traced.edges if edges is None else edges).reset_index(drop=True)
    edges = edges.assign(edge=range(len(edges)), control="signal", repeat=0)
    layer, token = (column(edges, name, device) for name in ("layer", "token"))
    at_source = torch.tensor((edges["side"] == SIDES[1]).to_numpy(bool), device=device)
    reader = column(edges, "head", device) + model.n_heads * at_source
    places = torch.stack([layer, reader, token * model.rotary], dim=1)
    places, combination = places.unique(dim=0, return_inverse=True)
    readers = _head_readers(model, places)
    written, scale = _writes(traced, edges, run)
    image = by_reader(written.double(), readers.raw[:, :, :-1], layer, reader)
    constant = scale * torch.tensor((edges["kind"] == BIAS_ROW).to_numpy(bool), device=device)
    image = image + constant[:, None] * readers.raw[layer, reader, -1]
    chosen = _supports(traced, edges).to(device)
    signals = Signals(edges, readers, reader, combination, scale, written, image, chosen, written)
    return replace(signals, delta=solve(signals, chosen))


def solve(signals: Signals, chosen: Bool[Tensor, "edge r"]) -> Float[Tensor, "edge d"]:
    """The smallest δ with the coordinates of what upstream wrote where chosen, zero elsewhere."""
    readers, combination = signals.readers, signals.combination
    first = torch.zeros_like(combination)
    target = by_reader(signals.image, readers.inward, first, combination) * chosen
    inside = by_reader(target, readers.outward, first, combination)
    layer = column(signals.edges, "layer", combination.device)
    return by_reader(inside, readers.basis.mT, layer, signals.reader).to(signals.written.dtype)


def by_reader(
    x: Float[Tensor, "edge n"],
    maps: Float[Tensor, "layer reader n m"],
    layer: Int[Tensor, "edge"],
    reader: Int[Tensor, "edge"],
) -> Float[Tensor, "edge m"]:
    """Every row times the map of its reader."""
    return grouped_matmul(x, maps.flatten(0, 1), layer * maps.shape[1] + reader)


def column(edges: pd.DataFrame, name: str, device: torch.device) -> Int[Tensor, "edge"]:
    """A column of numbers as a tensor."""
    return torch.tensor(edges[name].to_numpy("int64", copy=True), device=device)


@once_per_model
def _input_maps(
    model: Model,
) -> tuple[Float[Tensor, "layer reader d1 r"], Float[Tensor, "layer reader d r"], Tensor]:
    """`HeadReaders.raw`, and its rows but the bias as `HeadReaders.basis` times an r×r matrix."""
    forms = qk_forms(model)
    raw = torch.cat([forms.A, forms.B], dim=1)
    return raw, *torch.linalg.qr(raw[:, :, :-1])


def _head_readers(model: Model, places: Int[Tensor, "combination 3"]) -> HeadReaders:
    """Readers at tokens: of each combination the layer, reader and token (0 if not rotary)."""
    (raw, basis, R), maps = _input_maps(model), model_basis(model)
    layer, reader, token = places.T
    inward = torch.cat([maps.dest, maps.src], dim=1)[layer, reader]
    if model.rotary:
        inward = unrotate(inward.mT, *(x[:, None] for x in rotation(model, token))).mT
    outward = torch.linalg.pinv(R[layer, reader] @ inward)
    return HeadReaders(raw, basis, inward[None], outward[None])


def _writes(
    traced: Trace, edges: pd.DataFrame, run: Run | None
) -> tuple[Float[Tensor, "edge d"], Float[Tensor, "edge"]]:
    """What the upstream component of every edge wrote at its token, and the scale there."""
    model, device = traced.model, traced.model.device
    layer, prompt, token = (column(edges, x, device) for x in ("layer", "prompt", "token"))
    names = pd.Index(model.components["component"])
    component = torch.from_numpy(names.get_indexer(pd.Index(edges["upstream"]))).to(device)
    in_stream = component < len(names) - 1  # the bias row, the last one, is not
    written = torch.zeros(len(edges), model.d_model, dtype=model.dtype, device=device)
    scale = torch.zeros(len(edges), dtype=torch.float64, device=device)
    pieces = runs(model, traced.batch) if run is None else [(slice(0, len(run)), run)]
    for rows, part in pieces:
        here = (prompt >= rows.start) & (prompt < rows.stop)
        scale[here] = part.scale[layer[here], prompt[here] - rows.start, token[here]].double()
        here &= in_stream
        place = prompt[here] - rows.start, token[here], component[here]
        written[here] = part.outputs[place]
    return written, scale


def _supports(traced: Trace, edges: pd.DataFrame) -> Bool[Tensor, "edge r"]:
    place = pd.Index(traced.firings["firing"]).get_indexer(pd.Index(edges["firing"]))
    vectors = traced.firings["vectors"].iloc[place].tolist()
    chosen = torch.zeros(len(edges), traced.model.d_head, dtype=torch.bool)
    for row, which in zip(chosen, vectors, strict=True):
        row[list(which)] = True
    return chosen


# --- controls ------------------------------------------------------------------------------------


def random_signals(signals: Signals, repeat: int = 0, seed: int = 0) -> Signals:
    """A control: each edge's signal from as many singular vectors outside its support.

    They are drawn at random and scaled to the norm of the signal; where fewer are left, all are
    taken, and edges that have none left are dropped. The draw depends on the edge, `repeat` and
    `seed` alone, not on which other edges there are.
    """
    names, prompts = _edge_numbers(signals.edges), signals.edges["prompt"]
    draws = [
        np.random.default_rng([seed, repeat, prompt, name]).random(signals.chosen.shape[1])
        for name, prompt in zip(names, prompts, strict=True)
    ]
    noise = torch.from_numpy(np.array(draws).reshape(signals.chosen.shape)).to(signals.image)
    rank = noise.masked_fill(signals.chosen, 2).argsort(-1).argsort(-1)
    size = signals.chosen.sum(-1, keepdim=True)
    other = (rank < size) & ~signals.chosen
    return _replaced(signals, solve(signals, other), "random", repeat, chosen=other)


def other_signals(signals: Signals, batch: Batch, seed: int = 0) -> Signals:
    """A control: the signal of the same pooled edge in another prompt, scaled to the same norm.

    Edges that occur in no other prompt are dropped.
    """
    edges = labelled(signals.edges, roles_of(batch)).drop_duplicates("edge")
    group = edges.groupby(KEY)["edge"].groups if len(edges) else {}
    donor = np.full(len(signals), -1)
    names, prompts = _edge_numbers(signals.edges), signals.edges["prompt"].to_numpy()
    place = pd.Index(signals.edges["edge"])
    for labels in group.values():
        members = place.get_indexer(pd.Index(edges.loc[labels, "edge"]))
        members = members[np.lexsort((names[members], prompts[members]))]
        for edge in members:
            others = members[prompts[members] != prompts[edge]]
            if len(others):
                rng = np.random.default_rng([seed, int(prompts[edge]), int(names[edge])])
                donor[edge] = rng.choice(others)
    of = torch.from_numpy(donor).to(signals.reader)
    found = of >= 0
    delta = torch.where(found[:, None], signals.delta[of], 0)
    return _replaced(signals, delta, "other prompt", 0)


def _replaced(
    signals: Signals, delta: Float[Tensor, "edge d"], control: str, repeat: int, **rest: Tensor
) -> Signals:
    """The same edges with another δ of the same norm, without those where it is zero."""
    norm, size = (x.norm(dim=-1, keepdim=True) for x in (signals.delta, delta))
    edges = signals.edges.assign(control=control, repeat=repeat)
    scaled = torch.where(size > 0, delta * (norm / size), 0)
    return replace(signals, edges=edges, delta=scaled, **rest)[size[:, 0] > 0]


def _edge_numbers(edges: pd.DataFrame) -> np.ndarray:
    """A number for every edge that depends on what it connects."""
    columns = ["upstream", "downstream", "side", "dest", "src"]
    rows = edges[columns].astype(str).agg("|".join, axis=1) if len(edges) else []
    return np.array([crc32(row.encode()) for row in rows], dtype=np.int64)
