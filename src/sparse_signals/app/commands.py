"""What the command line does: find all firings, or trace circuits, and write files."""

import json
import os
import re
import shutil
import sys
import tempfile
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, TypeVar

import pandas as pd
import torch

from sparse_signals.app.errors import PROGRAM, Stopped, UsageError
from sparse_signals.attribution.aligned import ShareError
from sparse_signals.attribution.tables import AnswerSettings
from sparse_signals.core.checkpoints import ModelError
from sparse_signals.core.model import Model, load_model
from sparse_signals.core.numbers import fmt
from sparse_signals.core.prompts import (
    Batch,
    PromptError,
    encode,
    ioi_prompts,
    roles_of,
)
from sparse_signals.core.reading import read_texts, with_names
from sparse_signals.core.resume import (
    alone_in,
    chunked,
    remove_leftovers,
    run_key,
    stream_parquet,
    write_parquet,
)
from sparse_signals.core.run import Run, fitting_rows, run
from sparse_signals.signals.firings import find_firings
from sparse_signals.signals.slices import slices, sparsity, support
from sparse_signals.tracing.circuit import FORMATS, Circuit
from sparse_signals.tracing.contributions import Settings
from sparse_signals.tracing.roots import Root, TraceError, TraceWarning, strongest_roots
from sparse_signals.tracing.trace import (
    Trace,
    check_attention,
    check_sums,
    index_lists,
    trace_prompts,
)

PARTIAL = ".partial"  # finished chunks of runs that are not
CHUNKS, ROOTS = "chunks", "roots"
CHUNK = "[0-9]" * 5
NO_MEMORY = re.compile("out of memory|(not|n't) (enough|allocate) memory", re.IGNORECASE)
FILES = {
    "signals": ["firings.parquet"],
    "trace": ["edges.parquet", *(f"circuit{suffix}" for suffix in FORMATS)],
    "answer": [
        *(f"{name}.parquet" for name in ("edges", "tokens", "paths")),
        *(f"circuit{suffix}" for suffix in FORMATS[:-1]),
        "answer.html",
    ],
}
STRONGEST = ["upstream", "role", "downstream", "side", "dest_role", "src_role"]
Chosen = TypeVar("Chosen", Settings, AnswerSettings)


@dataclass(frozen=True)
class Job(Generic[Chosen]):
    """A command line that has been understood: model, prompts, settings, folder for the files."""

    options: Namespace
    model: Model
    batch: Batch
    settings: Chosen
    out: Path
    started: float

    @property
    def partial(self) -> Path:
        """Where unfinished runs of this command keep what they have."""
        return self.out / PARTIAL / self.options.command

    @cached_property
    def folder(self) -> Path:
        """Where this run keeps what it has, and no run of other settings looks."""
        given = [vars(self.options).get(name) for name in ("root", "firing", "top", "pooled")]
        return self.partial / run_key(self.model, self.batch, (self.settings, self.chunks, given))

    @cached_property
    def chunks(self) -> list[slice]:
        """Prompts that fit into memory together."""
        return fitting_rows(self.model, self.batch)


def execute(options: Namespace, started: float) -> None:
    """Do what the command line says. Raises UsageError for bad input, in one line."""
    with in_one_line():
        work = run_signals if options.command == "signals" else run_trace
        carry_out(understand(options, started), work)


@contextmanager
def in_one_line() -> Iterator[None]:
    """Errors that users can do something about come as UsageError, in one line."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # or a failed download warns six times
    try:
        yield
    except (ModelError, PromptError, TraceError, ShareError, OSError) as error:
        raise UsageError(str(error)) from error
    except UnicodeError as error:
        raise UsageError(f"not text in UTF-8: {error}") from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not NO_MEMORY.search(str(error)):
            raise
        raise UsageError("out of memory: shorten the prompts, or take a smaller model") from error


def carry_out(job: Job, work: Callable[[Any], str]) -> None:
    """Run a command and print its summary; remove finished chunks unless they are of more use."""
    try:
        with alone_in(job.partial):
            remove_leftovers(job.out / name for name in FILES[job.options.command])
            summary = finished(job, work)
    finally:
        remove_empty(job.partial.parent)
    if not job.options.quiet:
        print(summary)


def finished(job: Job, work: Callable[[Any], str]) -> str:
    """Run the command and return its summary."""
    try:
        summary = work(job)
    except (PromptError, TraceError, ShareError, UsageError):  # would come again
        remove_partial(job)
        raise
    except KeyboardInterrupt:
        raise Stopped(f"stopped; {describe_kept(job)}") from None
    remove_partial(job)
    return summary


def describe_kept(job: Job) -> str:
    """What an interrupted run has kept, in words."""
    if kept := len(list((job.folder / CHUNKS).rglob(CHUNK))):
        of = f"{kept} of {len(job.chunks)} chunks of prompts"
        return f"{of} are kept, the same command goes on there"
    if list((job.folder / ROOTS).glob(CHUNK)):
        return "the roots are kept, the same command goes on there"
    return "nothing is kept"


def remove_partial(job: Job) -> None:
    """Remove the finished chunks of this command, but not those of the other one."""
    for folder in filter(Path.is_dir, job.partial.iterdir()):
        shutil.rmtree(folder, ignore_errors=True)


def remove_empty(folder: Path) -> None:
    """Remove all folders below this one in which nothing is kept, and then this one."""
    for path in (*sorted(folder.rglob("*"), reverse=True), folder):
        with suppress(OSError):  # which folders that are not empty raise
            path.rmdir()


def understand(options: Namespace, started: float) -> Job[Settings]:
    """Load the model, read the prompts, open the folder."""
    settings, model = read_settings(options), open_model(options)
    table = prompt_table(options, model)
    batch = plain_batch(model, table, options)
    if options.command == "trace":
        batch = named_batch(model, table, batch, options)
    return Job(options, model, batch, settings, open_folder(options.out), started)


def open_model(options: Namespace) -> Model:
    """The model of the command line, with its tokenizer."""
    model = load_model(options.model, dtype=getattr(torch, options.dtype))
    if model.tokenizer is None:
        raise UsageError(f"{model.name} has no tokenizer: put its tokenizer.json beside the model")
    return model


def read_settings(options: Namespace) -> Settings:
    """The settings of a run: those that are given, in place of those of the preset or default."""
    preset = Settings.published() if vars(options).get("preset") else Settings()
    if options.command == "signals":
        preset = replace(preset, fraction=1.0)
    given = {key: value for key, value in vars(options).items() if key in vars(preset)}
    try:
        return replace(preset, **given)
    except ValueError as error:
        raise UsageError(f"--{error}") from error


def open_folder(out: Path) -> Path:
    """Make the folder for the files, and see that it can be written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return out
    except OSError as error:
        reason = "it is a file" if out.is_file() else (error.strerror or str(error)).lower()
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
    with warnings_said(options):
        return encode(model, prompts[["text"]], bos=options.bos)


@contextmanager
def warnings_said(options: Namespace) -> Iterator[None]:
    """Warnings come as lines of this program, or not at all with --quiet."""
    with warnings.catch_warnings(record=True, action="always") as caught:
        yield
    for line in dict.fromkeys(str(warning.message) for warning in caught):
        say(options, line)


def say(options: Namespace, line: str) -> None:
    """A line on what users should know, unless they want quiet."""
    if not options.quiet:
        print(f"{PROGRAM}: {line}", file=sys.stderr)


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
        return job.batch.table["text"].item() if number == 1 else f"{number} given"
    if job.options.prompts:
        return f"{number} from {job.options.prompts.name}"
    return f"{number} on IOI, seed {job.options.seed}"


# --- signals -------------------------------------------------------------------------------------


def run_signals(job: Job[Settings]) -> str:
    """Write firings.parquet, a chunk of prompts at a time, and return a summary."""

    def find(rows: slice) -> dict[str, pd.DataFrame]:
        part = run(job.model, job.batch.rows(rows))
        return {"firings": firing_table(part, job.settings, rows.start)}

    folder, progress = job.folder / CHUNKS, not job.options.quiet
    pieces = chunked(job.chunks, find, folder=folder, progress=progress)
    path = job.out / "firings.parquet"
    stream_parquet((piece["firings"] for piece in pieces), path, lists=["support"])
    errors = pd.read_parquet(path, columns=["error"])["error"]
    return outcome(job, f"{len(errors):,} firings", errors, [path])


def firing_table(run: Run, settings: Settings, first_prompt: int = 0) -> pd.DataFrame:
    """All firings of a run: where, how strong, which slices carry them, how few.

    Columns: prompt, layer, head, dest, src, attention, score, support (list of singular pairs),
    the measures of `signals.sparsity` with the size of the support as size, and error, the
    difference of the sum of slices from the score, relative to Σ|p|.
    Raises TraceError where the slices or the attention weights do not add up.
    """
    check_attention(run)
    pairs = find_firings(run, settings.level, settings.context)
    parts = slices(run, pairs)
    table = pairs.table()[["prompt", "layer", "head", "dest", "src", "attention", "score"]]
    table["prompt"] += first_prompt
    table["support"] = pd.Series(index_lists(support(parts, settings.fraction)), table.index)
    measures = sparsity(parts, settings.fraction).rename(columns={"support": "size"})
    error = (parts.sum(-1) - pairs.score).abs() / parts.abs().sum(-1)
    check_sums(run.model, error, "slices")
    return table.join(measures).assign(error=error.cpu().numpy())


# --- trace ---------------------------------------------------------------------------------------


def run_trace(job: Job[Settings]) -> str:
    """Trace, write the edges and the pooled circuit, and return a summary."""
    roots, progress = choose_roots(job), not job.options.quiet
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TraceWarning)  # said below, with the prompts
        traced = trace_prompts(
            job.model,
            job.batch,
            roots,
            job.settings,
            folder=job.folder / CHUNKS,
            progress=progress,
        )
    if traced.edges.empty:
        raise UsageError("no head is upstream of these roots: choose roots of a later layer")
    if progress:
        for line in describe_silent(traced):
            print(f"{PROGRAM}: {line}", file=sys.stderr)
    circuit = traced.pool()
    circuit.facts["prompts"] = describe_prompts(job)
    circuit.facts["settings"] += f", dtype {job.options.dtype}"
    circuit.facts["version"] = version("sparse-signals")
    edges = job.out / "edges.parquet"
    write_parquet(trace_table(traced), edges, lists=["vectors"])
    drawn = find_spec("altair") is not None  # without the extra "charts", no page
    suffixes = [suffix for suffix in FORMATS if drawn or suffix != ".html"]
    paths = [edges, *(circuit.save(job.out / f"circuit{suffix}") for suffix in suffixes)]
    if not drawn:
        say = "no circuit.html: pip install 'sparse-signals[charts]' draws it"
        print(f"{PROGRAM}: {say}", file=sys.stderr)
    shown = ", ".join(map(str, roots[:5])) + (f" and {len(roots) - 5} more" * (len(roots) > 5))
    found = f"{len(traced.firings):,} firings and {len(traced.edges):,} edges from {shown}"
    errors = traced.firings.get("error", pd.Series(dtype=float))
    return f"{outcome(job, found, errors, paths)}\n{strongest_edges(circuit)}"


def choose_roots(job: Job[Settings]) -> list[Root]:
    """The roots of the command line, or the heads that write most of the answer themselves.

    The latter are kept like a chunk: a run that goes on does not look for them again.
    """
    if given := [*job.options.root, *job.options.firing]:
        return [Root(*parts) for parts in dict.fromkeys(given)]
    number, each = job.options.top or 3, not job.options.pooled

    def find(_: slice) -> dict[str, pd.DataFrame]:
        found = strongest_roots(job.model, job.batch, number, job.settings, each=each)
        heads = [(root.layer, root.head, json.dumps(root.prompts)) for root in found]
        return {"roots": pd.DataFrame(heads, columns=["layer", "head", "prompts"])}

    (tables,) = chunked([slice(0)], find, folder=job.folder / ROOTS)
    rows = [(*head, json.loads(prompts)) for *head, prompts in tables["roots"].to_numpy().tolist()]
    return [Root(layer, head, prompts=prompts and tuple(prompts)) for layer, head, prompts in rows]


def describe_silent(traced: Trace) -> list[str]:
    """For each root, on which of its prompts it does not fire; and where none does, in words."""
    lines, every = [], len(traced.batch.tokens)
    for root, missing in traced.silent():
        if missing:
            of = every if root.prompts is None else len(root.prompts)
            lines.append(f"{root} does not fire on {len(missing)} of {of} prompts: {_few(missing)}")
    if missing := traced.untraced():
        lines.append(f"nothing is traced on {len(missing)} of {every} prompts: {_few(missing)}")
    return lines


def _few(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:10])) + (", …" if len(numbers) > 10 else "")


def trace_table(traced: Trace) -> pd.DataFrame:
    """The edges of a trace for a file: roles beside positions, the support of the firing."""
    roles = roles_of(traced.batch).groupby(["prompt", "pos"])["role"].agg(", ".join)
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


# --- summaries -----------------------------------------------------------------------------------


def outcome(job: Job, found: str, errors: pd.Series, paths: Sequence[Path]) -> str:
    """What was found, how long it took, how well sums add up, and the files."""
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
