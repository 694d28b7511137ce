"""The tables of a trace from the answer, for prompts that fit into memory together."""

import re
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_signals.attribution.aligned import AlignedRuns, ShareError, changing
from sparse_signals.attribution.graph import (
    READ_OUT,
    TokenEdges,
    carried,
    change_of,
    find_edges,
    first_head,
    ranks,
)
from sparse_signals.attribution.inputs import Heads
from sparse_signals.attribution.paths import Ways, find_paths
from sparse_signals.attribution.readers import Node, Readers
from sparse_signals.attribution.signals import compare_heads
from sparse_signals.core.model import Model
from sparse_signals.core.prompts import Batch, roles_of
from sparse_signals.tracing.roots import position_of

CHANNELS = ("query", "key", "value", "MLP", "direct")
ANSWER = "answer"
SMALLEST_GRAPH, STEP = 8, 1.5  # edges of the first graph that is tried, and how it grows


@dataclass(frozen=True)
class AnswerSettings:
    """How much of ΔF a graph is to carry, and what is looked at.

    part: edges are taken, the strongest first, until they alone carry this part of ΔF, up to as
    much more or less as is left. least: shares of |ΔF| below it are not looked at. beam, paths: how
    many ways are followed for each prompt, and how many whole paths are kept.
    """

    part: float = 0.8
    least: float = 0.002
    beam: int = 64
    paths: int = 20

    def __post_init__(self) -> None:
        if not 0 < self.part < 1:
            raise ValueError("part must be above 0 and below 1")
        if not 0 <= self.least < 1:
            raise ValueError("least must be at least 0 and below 1")
        if self.beam < 1 or self.paths < 1:
            raise ValueError("beam and paths must be at least 1")


@dataclass(frozen=True)
class Asked:
    """A node to ask about instead of the answer: "2.4", "MLP 3" or "stream 3", at a role or place.

    "stream 3" is the sum of all that was written in front of layer 3. `direction`: what of it is
    asked, one vector for all prompts; None: what the answer hears of it, so that F is its share.

    >>> str(Asked("2.4", "end"))
    '2.4 at end'
    """

    component: str
    token: str | int
    direction: Float[Tensor, "d"] | None = None

    def __str__(self) -> str:
        return f"{self.component} at {self.token}"


def node_of(runs: AlignedRuns, asked: Asked, found: Readers) -> Node:
    """The node that is asked about. Raises ShareError for what the model has not."""
    model = runs.model
    match = re.fullmatch(r"(MLP|stream) (\d+)|(\d+)\.(\d+)", asked.component)
    if match is None:
        raise ShareError(f"{asked.component!r} is no node: write 2.4, MLP 2 or stream 2")
    layer, part = int(match[2] or match[3]), {"MLP": "mlp"}.get(match[1], match[1])
    part = int(match[4]) if part is None else part
    if layer > model.n_layers - (part != "stream") or part == model.n_heads:
        raise ShareError(f"{model.name} has no {asked.component}")
    if isinstance(part, int) and part >= model.n_heads:
        raise ShareError(f"{model.name} has no head {asked.component}")
    place = position_of(runs.batch, asked.token).to(runs.last.device) - runs.start
    late = layer + (part != "stream") >= model.n_layers
    if late and bool((place != runs.last).any()):
        raise ShareError(f"{asked}: of the last layer, only what it does at the last token counts")
    if bool((place < 0).any()):
        raise ShareError(f"{asked}: nothing differs that early")
    if asked.direction is None:
        return Node(layer, part, place, _heard(runs, found, layer, part, place))
    direction = asked.direction.to(runs.ends[0].x).expand(len(place), -1)
    return Node(layer, part, place, direction)


def _heard(
    runs: AlignedRuns, found: Readers, layer: int, part: int | str, place: Int[Tensor, "prompt"]
) -> Float[Tensor, "prompt d"]:
    """What F hears of a head or an MLP at a token."""
    if part == "stream":
        raise ShareError("say along which direction a stream is asked about")
    readers, prompt = found.layers[layer], torch.arange(len(place), device=place.device)
    many = readers.written.shape[1] > 1
    here = place if many else torch.zeros_like(place)
    written = readers.written[prompt, here]
    beside = part == "mlp" or runs.model.parallel
    return written if beside else written + readers.mlp[prompt, here]


def tables_of(
    runs: AlignedRuns, asked: Asked | None, settings: AnswerSettings
) -> dict[str, pd.DataFrame]:
    """The tables of `AnswerTrace`, prompts numbered from 0."""
    found = next(runs.readers())
    if asked is not None:
        found = runs.readers_of(node_of(runs, asked, found))
    whole, edges = change_of(runs, found.node), find_edges(runs, found, settings.least)
    graph, explained = smallest_graph(runs, found, edges, settings.part)
    count = torch.bincount(edges.prompt[graph], minlength=len(whole))
    first, second = values_of(runs, found.node)
    prompts = {
        "prompt": torch.arange(len(whole)), "f": first, "counterfactual_f": second,
        "difference": whole, "flat": torch.bincount(edges.prompt, minlength=len(whole)) == 0,
        "edges": count, "explained": explained,
    }  # fmt: skip
    ways, ends = find_paths(runs, found, settings.beam, settings.least / 10)
    return {
        "prompts": pd.DataFrame({name: x.cpu().numpy() for name, x in prompts.items()}),
        "edges": _edge_table(runs, edges, graph, whole),
        "tokens": _token_table(runs, found, whole),
        "paths": _path_table(runs, ways, ends, whole, settings.paths),
        "comparisons": _comparison_table(runs, found, edges[graph], whole),
    }


def values_of(
    runs: AlignedRuns, node: Node
) -> tuple[Float[Tensor, "prompt"], Float[Tensor, "prompt"]]:
    """F of both runs: of a stream along a direction, or else of the answer."""
    if node.part != "stream" or node is runs.answer:
        return runs.values
    prompt = torch.arange(len(runs.last), device=runs.last.device)
    late = node.layer == runs.model.n_layers
    streams = (x.x if late else x.layers[node.layer].x[prompt, node.place] for x in runs.ends)
    first, second = (torch.linalg.vecdot(x, node.direction) for x in streams)
    return first, second


def smallest_graph(
    runs: AlignedRuns, found: Readers, edges: TokenEdges, part: float
) -> tuple[Bool[Tensor, "edge"], Float[Tensor, "prompt"]]:
    """Which edges are in the smallest graph of each prompt that carries a part of ΔF, and how much.

    The strongest edges come first. Where no graph does, it is the one of all edges.
    """
    whole = change_of(runs, found.node)
    rank = ranks(edges.prompt, edges.strength)
    chosen = torch.zeros_like(rank, dtype=torch.bool)
    explained, open_ = torch.full_like(whole, torch.nan), torch.ones_like(whole, dtype=torch.bool)
    size, largest = float(SMALLEST_GRAPH), int(rank.max()) + 1 if len(rank) else 0
    while largest and bool(open_.any()):
        last = size >= largest
        within = (rank < size) & open_[edges.prompt]
        share = carried(runs, found, edges[within]) / whole
        enough = open_ & (((share - 1).abs() <= 1 - part) | last)
        explained = torch.where(enough, share, explained)
        chosen |= within & enough[edges.prompt]
        open_ &= ~enough
        size *= STEP
    return chosen, explained


# --- tables --------------------------------------------------------------------------------------


def _names(model: Model) -> tuple[pd.Series, pd.Series]:
    """Names and heights of the components that can change, and of the answer as the last one."""
    table = model.components.iloc[changing(model).tolist()]
    names = [*table["component"], ANSWER]
    return pd.Series(names), pd.Series([*table["height"], float(model.n_layers)])


def _edge_table(
    runs: AlignedRuns,
    edges: TokenEdges,
    graph: Bool[Tensor, "edge"],
    whole: Float[Tensor, "prompt"],
) -> pd.DataFrame:
    names, heights = _names(runs.model)
    parts = {name: x.cpu().numpy() for name, x in vars(edges).items()}
    down = parts["down"] % len(names)  # READ_OUT is the last one
    table = pd.DataFrame(
        {
            "prompt": parts["prompt"],
            "upstream": names.to_numpy()[parts["up"]],
            "token": parts["token"] + runs.start,
            "channel": pd.Series(CHANNELS).to_numpy()[parts["kind"]],
            "downstream": names.to_numpy()[down],
            "dest": parts["dest"] + runs.start,
            "value": parts["value"],
            "share": (edges.value / whole[edges.prompt]).cpu().numpy(),
            "of_node": (edges.value / edges.size).cpu().numpy(),
            "strength": parts["strength"],
            "graph": graph.cpu().numpy(),
            "up_layer": heights.to_numpy()[parts["up"]],
            "down_layer": heights.to_numpy()[down],
        }
    )
    return table.sort_values(["prompt", "strength"], ascending=[True, False], kind="stable")


def _token_table(runs: AlignedRuns, found: Readers, whole: Float[Tensor, "prompt"]) -> pd.DataFrame:
    """What the embedding of every token has, those of all tokens: they sum to ΔF."""
    value = torch.linalg.vecdot(runs.changes[0][0], found.embedding)
    value = torch.nn.functional.pad(value, (runs.start, 0))
    prompt, pos = runs.batch.mask.nonzero(as_tuple=True)
    value, share = value[prompt, pos], (value / whole[:, None])[prompt, pos]
    labels = [runs.batch.labels[p][t] for p, t in zip(prompt.tolist(), pos.tolist(), strict=True)]
    return pd.DataFrame(
        {"prompt": prompt, "pos": pos, "token": labels, "value": value.cpu(), "share": share.cpu()}
    )


def _path_table(
    runs: AlignedRuns, ways: Ways, ends: Int[Tensor, "path"], whole: Float[Tensor, "prompt"], n: int
) -> pd.DataFrame:
    """The largest paths of every prompt in words, from the token to the answer."""
    ends = ends[ranks(ways.prompt[ends], ways.value[ends].abs()) < n]
    (names, _), roles = _names(runs.model), role_names(runs.batch)
    rows, number, before = [], ways.number.tolist(), ways.before.tolist()
    token, kind = (ways.token + runs.start).tolist(), ways.kind.tolist()
    for end in ends.tolist():
        prompt, steps = int(ways.prompt[end]), [end]
        while (step := before[steps[-1]]) >= 0:
            steps.append(step)
        places = [token[step] for step in steps]
        labels = [place_name(runs.batch, prompt, pos) for pos in places]
        own = [roles[prompt, pos] for pos in places]
        components = [ANSWER if number[step] == READ_OUT else names[number[step]] for step in steps]
        channels = [CHANNELS[kind[step]] for step in steps[:-1]]
        texts = (in_words(components, channels, at) for at in (labels, own))
        rows.append((prompt, token[end], *texts, len(channels)))
    table = pd.DataFrame(rows, columns=["prompt", "pos", "text", "roles", "steps"])
    value = ways.value[ends]
    table["value"] = value.cpu().numpy()
    table["share"] = (value / whole[ways.prompt[ends]]).cpu().numpy()
    order = ["prompt", "share"]
    table = table.sort_values(order, ascending=[True, False], key=abs, kind="stable")
    return table.assign(path=table.groupby("prompt").cumcount())


def in_words(components: list[str], channels: list[str], places: list[str]) -> str:
    """A path: components at places, and what each one is for the next.

    >>> in_words(["embedding", "0.1", "answer"], ["query", "direct"], ["10 John", "14 to", "end"])
    'embedding at 10 John → query of 0.1 at 14 to → answer'
    """
    first, *later = (f"{name} at {at}" for name, at in zip(components, places, strict=True))
    steps = [
        ANSWER if channel == "direct" else f"{'' if channel == 'MLP' else f'{channel} of '}{name}"
        for channel, name in zip(channels, later, strict=True)
    ]
    return " → ".join([first, *steps])


def _comparison_table(
    runs: AlignedRuns, found: Readers, edges: TokenEdges, whole: Float[Tensor, "prompt"]
) -> pd.DataFrame:
    """What heads of a graph compare, where its edges lead into their queries and keys."""
    model, comparing = runs.model, edges[(edges.kind < CHANNELS.index("value"))]
    columns = torch.stack([comparing.down, comparing.prompt, comparing.dest]).unique(dim=1)
    nodes = []
    for layer in range(model.n_layers):
        first = first_head(model, layer)
        down, prompt, dest = columns[
            :, (columns[0] >= first) & (columns[0] < first + model.n_heads)
        ]
        if len(down):
            nodes.append(Heads(layer, prompt, down - first, dest))
    table = compare_heads(runs, found, nodes)
    share = table["value"] / whole.cpu().numpy()[table["prompt"]]
    return table.assign(share=share)


def role_names(batch: Batch) -> np.ndarray:
    """The roles of every token as one name, "IO+1, S1-1": an array of names [prompt, pos]."""
    joined = roles_of(batch).groupby(["prompt", "pos"])["role"].agg(lambda x: ", ".join(sorted(x)))
    prompts, length = batch.tokens.shape
    places = pd.MultiIndex.from_product([range(prompts), range(length)])
    return joined.reindex(places).to_numpy().reshape(prompts, length)


def place_name(batch: Batch, prompt: int, pos: int) -> str:
    """A token with its place, which tells it from others of the same word: "10 John"."""
    return f"{pos} {batch.labels[prompt][pos].strip()}"
