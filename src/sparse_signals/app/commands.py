"""What the command line does: find all firings, or trace circuits, and write files."""

import os
import shutil
import sys
import tempfile
import time
import warnings
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch

from sparse_signals.app.errors import PROGRAM, UsageError
from sparse_signals.app.notebook import edition
from sparse_signals.core.checkpoints import ModelError
from sparse_signals.core.model import Model, load_model
from sparse_signals.core.numbers import fmt
from sparse_signals.core.prompts import (
    Batch,
    PromptError,
    encode,
    ioi_prompts,
    read_texts,
    roles_of,
    with_names,
)
from sparse_signals.core.resume import chunked, run_key, stream_parquet, write_parquet
from sparse_signals.core.run import Attention, chunk_rows, read_attention
from sparse_signals.heads.svd import head_svd, qk_forms
from sparse_signals.signals.firings import find_firings
from sparse_signals.signals.slices import SliceMaps, coordinates, slice_maps, sparsity, support
from sparse_signals.tracing.circuit import FORMATS, Circuit, pool, write_circuit
from sparse_signals.tracing.contributions import Settings
from sparse_signals.tracing.roots import Root, TraceError, strongest_roots
from sparse_signals.tracing.trace import Trace, index_lists, trace

PARTIAL = ".partial"  # finished chunks of runs that are not
STRONGEST = ["upstream", "role", "downstream", "side", "dest_role", "src_role"]


@dataclass(frozen=True)
class Job:
    """A command line that has been understood: model, prompts, settings, folder for the files."""

    options: Namespace
    model: Model
    batch: Batch
    settings: Settings
    out: Path
    started: float

    @property
    def partial(self) -> Path:
        return self.out / PARTIAL / self.options.command


def run(options: Namespace, started: float) -> None:
    """Do what the command line says. Raises UsageError for bad input, in one line."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # or a failed download warns six times
    try:
        finish(prepare(options, started))
    except (ModelError, PromptError, TraceError, OSError) as error:
        raise UsageError(str(error)) from error


def finish(job: Job) -> None:
    """Run the command, and remove its finished chunks unless they are of use another time."""
    try:
        summary = run_signals(job) if job.options.command == "signals" else run_trace(job)
    except (PromptError, TraceError, UsageError):  # would come again
        remove_partial(job)
        raise
    remove_partial(job)
    if not job.options.quiet:
        print(summary)


def remove_partial(job: Job) -> None:
    """Remove the finished chunks of this command, but not those of the other one."""
    shutil.rmtree(job.partial, ignore_errors=True)
    with suppress(OSError):
        job.partial.parent.rmdir()


def prepare(options: Namespace, started: float) -> Job:
    """Load the model, read the prompts, open the folder."""
    settings = read_settings(options)
    model = load_model(options.model, dtype=getattr(torch, options.dtype))
    if model.tokenizer is None:
        raise UsageError(f"{model.name} has no tokenizer: put its tokenizer.json beside the model")
    table = prompt_table(options, model)
    batch = plain_batch(model, table, options)
    if options.command == "trace":
        batch = named_batch(model, table, batch, options)
    return Job(options, model, batch, settings, open_folder(options.out), started)


def read_settings(options: Namespace) -> Settings:
    """The settings of a run; those that a command does not have keep their defaults."""
    given = {key: value for key, value in vars(options).items() if key in vars(Settings())}
    try:
        return Settings(**given)
    except ValueError as error:
        raise UsageError(f"--{error}") from error


def open_folder(out: Path) -> Path:
    """Make the folder for the files, and see that it can be written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return out
    except OSError as error:
        reason = "it is a file" if out.is_file() else error.strerror.lower()
        raise UsageError(f"cannot write to {out} ({reason}): name a folder with --out") from error


# --- prompts -------------------------------------------------------------------------------------


def prompt_table(options: Namespace, model: Model) -> pd.DataFrame:
    """The prompts that the command line asks for."""
    if options.prompt:
        return pd.DataFrame({"text": options.prompt})
    if options.prompts:
        return read_texts(options.prompts)
    return ioi_prompts(options.ioi, options.seed, tokenizer=model.tokenizer)


def plain_batch(model: Model, prompts: pd.DataFrame, options: Namespace) -> Batch:
    """Prompts as tokens; only "end" is known of them, whatever names they have."""
    with warnings.catch_warnings(record=True, action="always") as caught:
        batch = encode(model, prompts[["text"]], bos=options.bos)
    for warning in [] if options.quiet else caught:
        print(f"{PROGRAM}: {warning.message}", file=sys.stderr)
    return batch


def named_batch(model: Model, prompts: pd.DataFrame, plain: Batch, options: Namespace) -> Batch:
    """Prompts with the roles of their names, or the plain ones where nothing needs the names."""
    roots = [*options.root, *options.firing]
    places = {place for root in roots for place in root[2:]}
    try:
        with warnings.catch_warnings(action="ignore"):  # it has been said
            return encode(model, with_names(prompts), bos=options.bos)
    except PromptError as error:
        if not roots or any(isinstance(place, str) and place != "end" for place in places):
            raise UsageError(f"{error}; without names, say where to start: --root L.H") from error
        if not options.quiet:
            print(f"{PROGRAM}: no roles but end and other: {error}", file=sys.stderr)
        return plain


def describe_prompts(job: Job) -> str:
    """Where the prompts come from, for the facts of a circuit."""
    number = len(job.batch.tokens)
    if job.options.prompt:
        return f"{number} given"
    if job.options.prompts:
        return f"{number} from {job.options.prompts.name}"
    return f"{number} on IOI, seed {job.options.seed}"


# --- signals -------------------------------------------------------------------------------------


def run_signals(job: Job) -> str:
    """Write firings.parquet, a chunk of prompts at a time, and return a summary."""
    maps = slice_maps(head_svd(qk_forms(job.model)))

    def work(rows: slice) -> dict[str, pd.DataFrame]:
        attention = read_attention(job.model, job.batch.tokens[rows], job.batch.mask[rows])
        return {"firings": firing_table(maps, attention, job.settings, rows.start)}

    pieces = chunked(
        chunk_rows(job.model, job.batch),
        work,
        folder=job.partial / run_key(job.model, job.batch, job.settings),
        progress=not job.options.quiet,
    )
    path = job.out / "firings.parquet"
    stream_parquet((piece["firings"] for piece in pieces), path)
    errors = pd.read_parquet(path, columns=["error"])["error"]
    return _summary(job, f"{len(errors):,} firings", errors, [path])


def firing_table(
    maps: SliceMaps, attention: Attention, settings: Settings, first_prompt: int = 0
) -> pd.DataFrame:
    """All firings of a batch: where, how strong, which slices carry them, how few.

    Columns: prompt, layer, head, dest, src, attention, score, support (list of singular pairs),
    the measures of `signals.sparsity` with the size of the support as size, and error, the
    difference of the sum of slices from the score, relative to Σ|p|.
    """
    pairs = find_firings(attention, settings.level, settings.context)
    slices = coordinates(maps, attention, pairs).slices
    table = pairs.table()[["prompt", "layer", "head", "dest", "src", "attention", "score"]]
    table["prompt"] += first_prompt
    table["support"] = index_lists(support(slices, settings.fraction))
    measures = sparsity(slices, settings.fraction).rename(columns={"support": "size"})
    error = (slices.sum(-1) - pairs.score).abs() / slices.abs().sum(-1)
    return table.join(measures).assign(error=error.cpu().numpy())


# --- trace ---------------------------------------------------------------------------------------


def run_trace(job: Job) -> str:
    """Trace, write the edges and the pooled circuit, and return a summary."""
    roots = choose_roots(job)
    progress = not job.options.quiet
    traced = trace(job.model, job.batch, roots, job.settings, folder=job.partial, progress=progress)
    if traced.edges.empty:
        raise UsageError("no head is upstream of these roots: choose roots of a later layer")
    facts = {
        "model": job.model.name,
        "prompts": describe_prompts(job),
        "roots": ", ".join(map(str, roots)),
        "settings": describe_settings(job),
        "version": edition()["sparse-signals"],
    }
    circuit = Circuit(pool(traced.edges, job.batch), facts)
    paths = write_trace(job, traced, circuit)
    found = f"{len(traced.firings):,} firings and {len(traced.edges):,} edges from {facts['roots']}"
    errors = traced.firings.get("error", pd.Series(dtype=float))
    return f"{_summary(job, found, errors, paths)}\n{strongest_edges(circuit)}"


def choose_roots(job: Job) -> list[Root]:
    """The roots of the command line, or the heads that write most of the answer themselves."""
    if given := [*job.options.root, *job.options.firing]:
        return [Root(*parts) for parts in dict.fromkeys(given)]
    return strongest_roots(job.model, job.batch, job.options.top or 3, job.settings)


def describe_settings(job: Job) -> str:
    """The settings in words, those that are off left out."""
    given = {**asdict(job.settings), "dtype": job.options.dtype}
    return ", ".join(f"{name} {value}" for name, value in given.items() if value is not False)


def edge_table(traced: Trace, batch: Batch) -> pd.DataFrame:
    """The edges of a trace for a file: roles beside positions, the support of the firing."""
    roles = roles_of(batch).groupby(["prompt", "pos"])["role"].agg(", ".join)
    edges = traced.edges.astype({"upstream": str, "side": str})
    for end in ("dest", "src", "token"):
        places = pd.MultiIndex.from_frame(edges[["prompt", end]])
        edges[f"{end}_roles"] = roles.reindex(places).to_numpy()
    vectors = traced.firings["vectors"].iloc[edges["firing"]]
    edges["vectors"] = vectors.reset_index(drop=True)
    return edges[
        ["prompt", "firing", "upstream", "layer", "head", "side", "dest", "src", "token",
         "dest_roles", "src_roles", "token_roles", "weight", "share", "vectors"]
    ]  # fmt: skip


def write_trace(job: Job, traced: Trace, circuit: Circuit) -> list[Path]:
    """Write all files of a trace, and return their paths."""
    from sparse_signals.app.page import write_page  # the charts behind it take seconds to import

    edges, page = job.out / "edges.parquet", job.out / "circuit.html"
    write_parquet(edge_table(traced, job.batch), edges)
    circuits = [write_circuit(circuit, job.out / f"circuit{suffix}") for suffix in FORMATS]
    write_page(page, circuit.edges, title=f"A circuit of {job.model.name}", facts=circuit.facts)
    return [edges, *circuits, page]


# --- summaries -----------------------------------------------------------------------------------


def _summary(job: Job, found: str, errors: pd.Series, paths: Sequence[Path]) -> str:
    seconds, n = time.perf_counter() - job.started, len(job.batch.tokens)
    prompts = f"{n:,} prompt{'s' if n > 1 else ''}"
    lines = [f"{job.model.name}, {prompts}: {found}, in {seconds:.1f} s"]
    if len(errors):
        lines.append(f"worst error of the sums: {errors.max():.1e}, relative")
    return "\n".join([*lines, "written:", *(f"  {path}" for path in paths)])


def strongest_edges(circuit: Circuit, n: int = 10) -> str:
    """The first edges of a circuit as text."""
    table = circuit.edges.head(n)
    counts = table["prompts"].astype(str) + "/" + table["of"].astype(str)
    numbers = table[["weight", "share"]].map(fmt)
    text = table[STRONGEST].assign(prompts=counts).join(numbers).to_string(index=False)
    return f"strongest edges:\n{text}"
