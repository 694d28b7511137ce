"""Long runs: chunks of prompts, kept on disk as they finish, so that a run that stopped goes on."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from tqdm import tqdm

if TYPE_CHECKING:  # importing torch takes seconds, and a page needs only `atomic`
    from sparse_signals.core.model import Model
    from sparse_signals.core.prompts import Batch

Tables = dict[str, pd.DataFrame]
UNFINISHED = ".unfinished-"
LOCK = ".lock"


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A place to write to, beside `path`, which it replaces when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    aside = Path(name)
    try:
        yield aside
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def remove_leftovers(paths: Iterable[Path]) -> None:
    """Remove what killed runs left when they wrote these files with `atomic`."""
    for path in paths:
        for aside in path.parent.glob(f".{path.name}.*"):
            aside.unlink(missing_ok=True)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder for a while. Raises BlockingIOError where one is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BlockingIOError(f"another run is writing to {folder}: wait for its end") from None
    try:
        yield
    finally:
        with suppress(OSError):  # before the release, or the next run's lock would be removed
            (folder / LOCK).unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):
            folder.rmdir()  # which fails, as it should, where chunks are kept


def write_parquet(table: pd.DataFrame, path: Path, lists: Sequence[str] = ()) -> None:
    """Write a table so that nobody ever sees half of it; `lists` as in `stream_parquet`."""
    stream_parquet([table], path, lists)


def stream_parquet(tables: Iterable[pd.DataFrame], path: Path, lists: Sequence[str] = ()) -> None:
    """Write tables of the same columns as one, with no more than one of them in memory.

    The columns `lists` hold lists of whole numbers, which an empty table does not show.
    """
    writer = None
    with atomic(path) as aside:
        for table in tables:
            table = table.astype(dict.fromkeys(lists, object))  # an empty one may be of numbers
            if writer is None:
                schema = pa.Schema.from_pandas(table, preserve_index=False)
                for name in lists:
                    column = pa.field(name, pa.list_(pa.int64()))
                    schema = schema.set(schema.get_field_index(name), column)
                writer = pq.ParquetWriter(aside, schema)
            writer.write_table(pa.Table.from_pandas(table, writer.schema, preserve_index=False))
        if writer:
            writer.close()


def run_key(model: "Model", batch: "Batch", settings: object) -> str:
    """A name for a run by its content. Same key, same results.

    Content: the code of this package and the versions of what computes; configuration, weights,
    number format and device of the model; its tokenizer; tokens and their roles; settings.
    """
    config = model.bridge.original_model.config.to_json_string()
    tokenizer = getattr(model.tokenizer, "backend_tokenizer", None)
    words = tokenizer.to_str() if tokenizer else repr(model.tokenizer)
    facts = (code_version(), config, words, str(model.dtype), model.device.type, model.n_ctx)
    digest = sha256(repr((*facts, settings, batch.labels, sorted(batch.roles))).encode())
    names = [] if batch.io is None or batch.s is None else [batch.io, batch.s]
    roles = [batch.roles[role] for role in sorted(batch.roles)]
    tensors = (*model.bridge.parameters(), *model.bridge.buffers())
    for tensor in (*tensors, batch.tokens, batch.mask, *roles, *names):
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@cache
def code_version() -> str:
    """A name for the code that computes: this package's files, and versions of libraries."""
    digest = sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    names = ("torch", "transformers", "transformer-lens")
    return " ".join([digest.hexdigest(), *map(version, names)])


def chunked(
    chunks: Sequence[slice],
    work: Callable[[slice], Tables],
    *,
    folder: Path | None = None,
    progress: bool = False,
) -> Iterator[Tables]:
    """The tables of every chunk, in order.

    With a folder, each chunk's tables are written there and read instead of computed next time.
    Files that are damaged count as missing.
    Raises BlockingIOError where another run is at work in that folder.
    """
    steps = tqdm(chunks, disable=not progress, unit="chunk")
    if folder is None:
        yield from map(work, steps)
        return
    with alone_in(folder):
        for aside in folder.glob(f"{UNFINISHED}*"):  # of a run that was killed
            shutil.rmtree(aside, ignore_errors=True)
        for number, rows in enumerate(steps):
            done = folder / f"{number:05d}"
            if not (tables := _kept(done)):
                _keep(work(rows), done)
                tables = _kept(done)
            yield tables


def _kept(done: Path) -> Tables:
    """The tables of a finished chunk, none where they are not there or damaged."""
    try:
        return {path.stem: pd.read_parquet(path) for path in done.glob("*.parquet")}
    except (OSError, pa.ArrowException):
        shutil.rmtree(done, ignore_errors=True)
        return {}


def _keep(tables: Tables, done: Path) -> None:
    aside = Path(tempfile.mkdtemp(dir=done.parent, prefix=UNFINISHED))
    for name, table in tables.items():
        table.to_parquet(aside / f"{name}.parquet", index=False)
    os.replace(aside, done)
