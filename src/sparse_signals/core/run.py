"""Chapter 4: what a model did on some prompts, and the residual stream as an exact sum.

x_t = embedding + position + Σ heads + Σ output biases + Σ MLPs. A value bias passes through
attention unchanged, because the weights of a row sum to 1: it counts as an output bias, and a head
is what it moved. Components are ordered so that those before any layer come first.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_signals.core.model import IN_HEADS, Model, activations
from sparse_signals.core.prompts import Batch, PromptError

CHUNK_BYTES = 2**29  # what a run of the prompts of one chunk takes
CHUNK_PROMPTS = 128  # at most: what an interrupted run may lose
# second dimension: prompts
KEPT = ("q", "k", "v", "z", "pattern", "mlp", "scale", "q_scale", "k_scale")


@dataclass(frozen=True)
class Run:
    """What a model did on a batch of prompts.

    Queries and keys as they enter the score (rotated, if rotary); values and z, what heads moved,
    without the value bias, all of them repeated per query head; `mlp` what MLPs wrote; `scale`
    what each layer's first normalisation divided by; `q_scale`, `k_scale`: what heads divided
    queries and keys by, 1 where they do not normalise them. `space` is memory for `outputs`, if
    given; `removed` was taken from what components wrote, where the model ran without a part of it.
    `start`: how many tokens were in front, whose keys and values are not kept again.
    """

    model: Model
    batch: Batch
    q: Float[Tensor, "layer prompt head pos r"]
    k: Float[Tensor, "layer prompt head pos r"]
    v: Float[Tensor, "layer prompt head pos r"]
    z: Float[Tensor, "layer prompt head pos r"]
    pattern: Float[Tensor, "layer prompt head pos src"]
    mlp: Float[Tensor, "layer prompt pos d"]
    scale: Float[Tensor, "layer prompt pos"]
    q_scale: Float[Tensor, "layer prompt head pos"]
    k_scale: Float[Tensor, "layer prompt head pos"]
    space: Float[Tensor, "some pos component d"] | None = None
    removed: Float[Tensor, "prompt pos component d"] | None = None
    start: int = 0

    def __len__(self) -> int:
        return len(self.batch.tokens)

    @cached_property
    def tokens(self) -> Int[Tensor, "prompt pos"]:
        """The tokens of the prompts, where the model is."""
        return self.batch.tokens.to(self.model.device)

    @cached_property
    def mask(self) -> Bool[Tensor, "prompt pos"]:
        """Which tokens are no padding, where the model is."""
        return self.batch.mask.to(self.model.device)

    def rows(
        self, rows: slice, space: Float[Tensor, "some pos component d"] | None = None
    ) -> "Run":
        """The same run, of some of the prompts."""
        parts = {name: getattr(self, name)[:, rows] for name in KEPT}
        removed = None if self.removed is None else self.removed[rows]
        batch, start = self.batch.rows(rows), self.start
        return Run(self.model, batch, **parts, space=space, removed=removed, start=start)

    def chunks(self) -> Iterator[tuple[slice, "Run"]]:
        """The run in pieces whose outputs fit in memory; each takes the memory of the one before.

        So the outputs of a piece are gone when the next one is there.
        """
        chunks = fitting_rows(self.model, self.batch)
        space = new_outputs(self.model, chunks[0].stop, self.tokens.shape[1])
        for rows in chunks:
            yield rows, self.rows(rows, space)

    @cached_property
    def outputs(self) -> Float[Tensor, "prompt pos component d"]:
        """What every component of `Model.components` wrote, but for the bias row.

        Head outputs cost P·T·L·H·r·d multiplications, the first time.
        """
        prompts, length = self.tokens.shape
        space = self.space
        outputs = new_outputs(self.model, prompts, length) if space is None else space[:prompts]
        place = torch.arange(prompts * length, device=self.tokens.device)
        self.write(outputs.movedim(2, 0).flatten(1, 2), place // length, place % length)
        return outputs

    def write(
        self,
        written: Float[Tensor, "component place d"],
        prompt: Int[Tensor, "place"],
        pos: Int[Tensor, "place"],
    ) -> None:
        """Fill in what components wrote at some tokens: the first components, or all of them."""
        model, before = self.model, self.model.components_below(0)
        written[0] = model.bridge.embed.W_E[self.tokens[prompt, pos]]
        if not model.rotary:
            written[1] = model.bridge.pos_embed.W_pos[self.start + pos]
        each = written[before:].unflatten(0, (-1, model.n_heads + 2))
        for layer, out in enumerate(each):
            rows = self.z[layer, prompt, :, pos].transpose(0, 1)
            torch.matmul(rows, model.writers.W_O[layer], out=out[: model.n_heads])
            out[-2] = model.writers.bias[layer]
            out[-1] = self.mlp[layer, prompt, pos]
        if self.removed is not None:
            written -= self.removed[prompt, pos, : len(written)].transpose(0, 1)


class Outputs:
    """What components wrote at the tokens of a run that somebody asks for, kept for the next time.

    A token is computed for the components below the layer that asks. So whoever asks from the top
    layer down has each token computed once.
    """

    def __init__(self, run: Run) -> None:
        """Nothing is known yet."""
        self.run, self.used = run, 0
        self.slot = torch.full_like(run.tokens, -1)
        self.depth = torch.full_like(run.tokens, -1)
        self.written = _component_first(run.model, 0)

    def at(
        self, prompt: Int[Tensor, "..."], pos: Int[Tensor, "..."], layer: int
    ) -> tuple[Float[Tensor, "slot component d"], Int[Tensor, "..."]]:
        """The outputs of all components below a layer, and in which slot those of each token are.

        Slots of other tokens may hold anything.
        """
        asked = torch.zeros_like(self.slot, dtype=torch.bool)
        asked[prompt, pos] = True
        new = (asked & (self.depth < layer)).nonzero(as_tuple=True)
        start, self.used = self.used, self.used + len(new[0])
        self.slot[new] = torch.arange(start, self.used, device=self.slot.device)
        self.depth[new] = layer
        if self.used > self.written.shape[1]:
            more = _component_first(self.run.model, 2 * self.used)
            more[:, :start] = self.written[:, :start]
            self.written = more
        below = self.run.model.components_below(layer)
        if self.used > start:
            self.run.write(self.written[:below, start : self.used], *new)
        return self.written[:below, : self.used].transpose(0, 1), self.slot[prompt, pos]


def _component_first(model: Model, places: int) -> Float[Tensor, "component place d"]:
    return new_outputs(model, places, 1)[:, 0].transpose(0, 1)


def run(
    model: Model,
    batch: Batch,
    *,
    space: Float[Tensor, "some pos component d"] | None = None,
    progress: bool = False,
) -> Run:
    """Run a model on a batch of prompts, and keep what its heads and MLPs did.

    `space` (from `new_outputs`, for at least as many prompts) spares the time that the operating
    system takes for new memory; the next run that uses it overwrites the outputs of this one.

    >>> ran = ss.run(model, batch)
    >>> len(ran), tuple(ran.q.shape[:2]) == (model.n_layers, len(ran))
    (8, True)
    >>> stream = ran.outputs.sum(2)  # what all components wrote is the residual stream at the end
    >>> stream.shape == (*batch.tokens.shape, model.d_model)
    True
    """
    check_memory(model, batch.tokens.shape[1])
    names = ("q", "k", "v", "z", "pattern", "mlp_out", "scale")
    cache = activations(model, batch.tokens, (*names, *IN_HEADS), progress=progress)
    b_V = model.writers.b_V[:, None, :, None]
    return Run(
        model,
        batch,
        cache["q"],
        cache["k"],
        cache["v"].sub_(b_V),
        cache["z"].sub_(b_V),
        cache["pattern"],
        cache["mlp_out"],
        cache["scale"],
        cache["q_scale"],
        cache["k_scale"],
        space,
    )


def runs(model: Model, batch: Batch, limit: int | None = None) -> Iterator[tuple[slice, Run]]:
    """A run of every chunk of prompts that fits into `limit` bytes (`CHUNK_BYTES`), in turn.

    As for `Run.chunks`, the outputs of one are gone when the next one is there.
    """
    chunks = fitting_rows(model, batch, limit)
    space = new_outputs(model, chunks[0].stop, batch.tokens.shape[1])
    for rows in chunks:
        yield rows, run(model, batch.rows(rows), space=space)


def fitting_rows(model: Model, batch: Batch, limit: int | None = None) -> list[slice]:
    """Prompts in chunks: a run of a chunk fits into `limit` bytes (`CHUNK_BYTES`)."""
    limit = limit or CHUNK_BYTES
    prompts, length = batch.tokens.shape
    step = max(1, min(CHUNK_PROMPTS, limit // run_bytes(model, length)))
    return [slice(start, min(start + step, prompts)) for start in range(0, prompts, step)]


def run_bytes(model: Model, length: int) -> int:
    """About how much memory the run of one prompt takes: outputs, and weights of all pairs."""
    written = length * (len(model.components) - 1) * model.d_model
    pairs = 2 * model.n_layers * model.n_heads * length**2  # a copy is made where they are compared
    return (written + pairs) * model.dtype.itemsize


def check_memory(model: Model, length: int) -> None:
    """Raise PromptError where the run of one prompt needs more memory than is free."""
    needed, free = run_bytes(model, length), free_memory(model.device)
    if free is not None and needed > free:
        raise PromptError(
            f"a prompt of {length:,} tokens needs about {needed / 2**30:.1f} GiB in {model.name}, "
            f"and {free / 2**30:.1f} GiB are free: shorten the prompts"
        )


def free_memory(device: torch.device) -> int | None:
    """The bytes that can still be had on a device, None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        # what files are cached in can be had too, which the number of free pages leaves out
        available = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
        if available:
            return int(available[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def new_outputs(model: Model, prompts: int, length: int) -> Float[Tensor, "prompt pos component d"]:
    """Space for `Run.outputs`, components first in memory: each is written where it belongs."""
    size = len(model.components) - 1, prompts, length, model.d_model
    return torch.empty(size, dtype=model.dtype, device=model.device).movedim(0, 2)
