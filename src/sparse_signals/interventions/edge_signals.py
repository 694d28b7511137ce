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

from sparse_signals.core.model import Model, activations
from sparse_signals.core.prompts import Batch, roles_of
from sparse_signals.core.rotary import rotation, unrotate
from sparse_signals.core.run import BIAS_ROW, chunk_rows, writers
from sparse_signals.signals.firings import Pairs
from sparse_signals.signals.slices import by_head
from sparse_signals.tracing.circuit import KEY, labelled
from sparse_signals.tracing.contributions import SIDES, Weights
from sparse_signals.tracing.trace import Trace

KINDS = ("embedding", "position", "head", "bias", "MLP")


@dataclass(frozen=True)
class PathQuirks:
    """What the released code of Franco and Crovella 2024 does when it intervenes, for comparison.

    keep_constant: the signal is V_S V_Sᵀ [x_a ; 1], so that the constant of the bias row stays in.
    patch_qkv: a local intervention changes query, key and value of the head, not one of them.
    """

    keep_constant: bool = False
    patch_qkv: bool = False


@dataclass(frozen=True)
class Readers:
    """How heads read, destination sides first: head h reads as h at its query, H + h at its key.

    `raw` takes the stream to queries or keys (the last row is the bias), `basis` spans what is
    read. A reader at a token is a combination; `inward` takes the query or key before any rotation
    to its coordinates, `outward` takes coordinates back to `basis`.
    """

    raw: Float[Tensor, "layer reader d1 r"]
    basis: Float[Tensor, "layer reader d2 r"]
    inward: Float[Tensor, "1 combination r r"]
    outward: Float[Tensor, "1 combination r r"]


@dataclass(frozen=True)
class Signals:
    """Edges, and the signal δ of each: one row per edge everywhere.

    edges: columns of the trace, edge (number), control ("signal" or what replaces it), repeat.
    `reader` and `combination` are places in `readers`, `scale` is s_t, `written` is x_a(t) (0 for
    the bias row), `heard` its image in queries or keys times s_t, `chosen` is the support.
    """

    edges: pd.DataFrame
    readers: Readers
    reader: Int[Tensor, "edge"]
    combination: Int[Tensor, "edge"]
    scale: Float[Tensor, "edge"]
    written: Float[Tensor, "edge d"]
    heard: Float[Tensor, "edge r"]
    chosen: Bool[Tensor, "edge r"]
    delta: Float[Tensor, "edge d"]

    def __len__(self) -> int:
        return len(self.edges)

    def __getitem__(self, keep: Int[Tensor, "kept"] | Bool[Tensor, "edge"]) -> "Signals":
        edges = self.edges.iloc[keep.cpu().numpy()].reset_index(drop=True)
        rest = [getattr(self, x.name)[keep] for x in fields(self)[2:]]
        return Signals(edges, self.readers, *rest)


def read_signals(
    weights: Weights,
    batch: Batch,
    traced: Trace,
    edges: pd.DataFrame | None = None,
    quirks: PathQuirks | None = None,
) -> Signals:
    """The signals of the edges of a trace, or of some of them. One run of the model, in chunks.

    δ = M (MᵀM)⁺ (1_S ∘ Mᵀ x_a), in float64. Without rotation and biases it is the projection
    V_S V_Sᵀ x_a (destination: U_S U_Sᵀ x_a) of Franco and Crovella 2024, section 6.
    """
    quirks, model = quirks or PathQuirks(), weights.model
    edges = (traced.edges if edges is None else edges).reset_index(drop=True)
    edges = edges.assign(edge=range(len(edges)), control="signal", repeat=0)
    layer, token = (column(edges, name, model.device) for name in ("layer", "token"))
    side = torch.tensor((edges["side"] == SIDES[1]).to_numpy(bool), device=model.device)
    reader = column(edges, "head", model.device) + model.n_heads * side
    kinds = torch.stack([layer, reader, token * model.rotary], dim=1)
    kinds, combination = kinds.unique(dim=0, return_inverse=True)
    readers = _read(weights, kinds, quirks.keep_constant)
    written, scale = _written(weights, batch, edges)
    heard = by_reader(written.double(), readers.raw[:, :, :-1], layer, reader)
    bias = readers.raw[layer, reader, -1]
    is_bias = torch.tensor((edges["upstream"] == BIAS_ROW).to_numpy(bool), device=model.device)
    constant = is_bias * scale + quirks.keep_constant * ~is_bias
    heard = heard + constant[:, None] * bias
    chosen = _supports(traced, edges, model.d_head).to(model.device)
    signals = Signals(edges, readers, reader, combination, scale, written, heard, chosen, written)
    return replace(signals, delta=solve(signals, chosen))


def solve(signals: Signals, chosen: Bool[Tensor, "edge r"]) -> Float[Tensor, "edge d"]:
    """The smallest δ with the coordinates of what upstream wrote where chosen, zero elsewhere."""
    readers, combination = signals.readers, signals.combination
    first = torch.zeros_like(combination)
    target = by_reader(signals.heard, readers.inward, first, combination) * chosen
    inside = by_reader(target, readers.outward, first, combination)
    layer = column(signals.edges, "layer", combination.device)
    delta = by_reader(inside, readers.basis.mT, layer, signals.reader)
    return delta[:, : signals.written.shape[1]].to(signals.written.dtype)


def by_reader(
    x: Float[Tensor, "edge n"],
    maps: Float[Tensor, "layer reader n m"],
    layer: Int[Tensor, "edge"],
    reader: Int[Tensor, "edge"],
) -> Float[Tensor, "edge m"]:
    """Every row times the map of its reader."""
    empty = torch.zeros_like(layer)
    none = x.new_zeros(len(x))
    return by_head(x, maps, Pairs(layer, empty, reader, empty, empty, none, none))


def column(edges: pd.DataFrame, name: str, device: torch.device) -> Int[Tensor, "edge"]:
    """A column of numbers as a tensor."""
    return torch.tensor(edges[name].to_numpy("int64", copy=True), device=device)


def _read(weights: Weights, kinds: Int[Tensor, "combination 3"], constant: bool) -> Readers:
    forms, maps, model = weights.forms, weights.maps, weights.model
    raw = torch.cat([forms.A, forms.B], dim=1)
    basis, R = torch.linalg.qr(raw if constant else raw[:, :, :-1])
    layer, reader, token = kinds.T
    inward = torch.cat([maps.dest, maps.src], dim=1)[layer, reader]
    if model.rotary:
        cos, sin = (x[:, None].expand_as(inward) for x in rotation(model, token))
        rows = (x.flatten(0, 1) for x in (inward.mT, cos, sin))
        inward = unrotate(*rows).view(inward.shape).mT
    outward = torch.linalg.pinv(R[layer, reader] @ inward)
    return Readers(raw, basis, inward[None], outward[None])


def _written(
    weights: Weights, batch: Batch, edges: pd.DataFrame
) -> tuple[Float[Tensor, "edge d"], Float[Tensor, "edge"]]:
    """What the upstream component of every edge wrote at its token, and the scale there."""
    model, device = weights.model, weights.model.device
    layer, prompt, token = (column(edges, x, device) for x in ("layer", "prompt", "token"))
    written = torch.zeros(len(edges), model.d_model, dtype=model.dtype, device=device)
    scale = torch.zeros(len(edges), dtype=torch.float64, device=device)
    upstream = weights.components.set_index("component").loc[edges["upstream"]]
    for rows in chunk_rows(model, batch):
        here = ((prompt >= rows.start) & (prompt < rows.stop)).nonzero().flatten()
        if not len(here):
            continue
        run = activations(model, batch.tokens[rows], ("z", "mlp_out", "scale"))
        place = prompt[here] - rows.start, token[here]
        scale[here] = run["scale"][layer[here], *place].double()
        part = upstream.iloc[here.cpu().numpy()]
        tokens = batch.tokens.to(device)[prompt[here], token[here]]
        written[here] = _outputs(model, run, part, *place, tokens)
    return written, scale


def _outputs(
    model: Model,
    run: dict[str, Tensor],
    upstream: pd.DataFrame,
    prompt: Int[Tensor, "edge"],
    pos: Int[Tensor, "edge"],
    token: Int[Tensor, "edge"],
) -> Float[Tensor, "edge d"]:
    """What components wrote, as in `residual.run_model`, at one place each; 0 for the bias row."""
    out, kind = writers(model), upstream["kind"].to_numpy()
    layer, head = (column(upstream, name, prompt.device) for name in ("layer", "head"))
    wrote = run["mlp_out"].new_zeros(len(kind), model.d_model)
    of = {name: torch.tensor((kind == name).nonzero()[0], device=prompt.device) for name in KINDS}
    wrote[of["embedding"]] = model.bridge.embed.W_E[token[of["embedding"]]]
    if not model.rotary:
        wrote[of["position"]] = model.bridge.pos_embed.W_pos[pos[of["position"]]]
    wrote[of["bias"]] = out.bias[layer[of["bias"]]]
    mlps, heads = of["MLP"], of["head"]
    wrote[mlps] = run["mlp_out"][layer[mlps], prompt[mlps], pos[mlps]]
    moved = run["z"][layer[heads], prompt[heads], head[heads], pos[heads]]
    moved = moved - out.b_V[layer[heads], head[heads]]
    wrote[heads] = by_reader(moved, out.W_O, layer[heads], head[heads])
    return wrote


def _supports(traced: Trace, edges: pd.DataFrame, rank: int) -> Bool[Tensor, "edge r"]:
    place = pd.Index(traced.firings["firing"]).get_indexer(edges["firing"])
    vectors = traced.firings["vectors"].iloc[place].tolist()
    chosen = torch.zeros(len(edges), rank, dtype=torch.bool)
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
    names, prompts = _names(signals.edges), signals.edges["prompt"]
    draws = [
        np.random.default_rng([seed, repeat, prompt, name]).random(signals.chosen.shape[1])
        for name, prompt in zip(names, prompts, strict=True)
    ]
    noise = torch.from_numpy(np.array(draws).reshape(signals.chosen.shape)).to(signals.heard)
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
    names, prompts = _names(signals.edges), signals.edges["prompt"].to_numpy()
    place = pd.Index(signals.edges["edge"])
    for labels in group.values():
        members = place.get_indexer(edges.loc[labels, "edge"])
        members = members[np.lexsort((names[members], prompts[members]))]
        for edge in members:
            others = members[prompts[members] != prompts[edge]]
            if len(others):
                rng = np.random.default_rng([seed, prompts[edge], names[edge]])
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


def _names(edges: pd.DataFrame) -> np.ndarray:
    """A number for every edge that depends on what it connects."""
    columns = ["upstream", "downstream", "side", "dest", "src"]
    rows = edges[columns].astype(str).agg("|".join, axis=1) if len(edges) else []
    return np.array([crc32(row.encode()) for row in rows], dtype=np.int64)
