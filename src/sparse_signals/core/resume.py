"""Long runs: chunks of prompts, kept on disk as they finish, so that a run that stopped goes on."""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

if TYPE_CHECKING:
    from torch import Tensor

    from sparse_signals.core.model import Model
    from sparse_signals.core.prompts import Batch

Tables = dict[str, pd.DataFrame]


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


def write_parquet(table: pd.DataFrame, path: Path) -> None:
    """Write a table so that nobody ever sees half of it."""
    with atomic(path) as aside:
        table.to_parquet(aside, index=False)


def stream_parquet(tables: Iterable[pd.DataFrame], path: Path) -> None:
    """Write tables of the same columns as one, with no more than one of them in memory."""
    tables = iter(tables)
    for first in tables:
        if len(first):  # without rows, a column of lists has no type
            break
    with atomic(path) as aside:
        first = pa.Table.from_pandas(first, preserve_index=False)
        with pq.ParquetWriter(aside, first.schema) as writer:
            writer.write_table(first)
            for table in tables:
                writer.write_table(pa.Table.from_pandas(table, first.schema, preserve_index=False))


def run_key(model: "Model", batch: "Batch", settings: object, *more: "Tensor") -> str:
    """A name for a run by its content. Same key, same results.

    Content: the version of this package, weights, tokens, roles, settings and any tensors besides.
    """
    code = version("sparse-signals")
    digest = sha256(repr((code, settings, sorted(batch.roles))).encode())
    roles = [batch.roles[role] for role in sorted(batch.roles)]
    for tensor in (*model.bridge.parameters(), batch.tokens, batch.mask, *roles, *more):
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def chunked(
    chunks: Sequence[slice],
    work: Callable[[slice], Tables],
    *,
    folder: Path | None = None,
    progress: bool = False,
) -> Iterator[Tables]:
    """The tables of every chunk, in order.

    With a folder, each chunk's tables are written there and read instead of computed next time.
    """
    for number, rows in enumerate(tqdm(chunks, disable=not progress, unit="chunk")):
        done = folder / f"{number:05d}" if folder else None
        if done and done.is_dir():
            yield {path.stem: pd.read_parquet(path) for path in sorted(done.glob("*.parquet"))}
            continue
        tables = work(rows)
        if done:
            _keep(tables, done)
        yield tables


def _keep(tables: Tables, done: Path) -> None:
    done.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=done.parent, prefix=".unfinished-"))
    for name, table in tables.items():
        table.to_parquet(aside / f"{name}.parquet", index=False)
    os.replace(aside, done)
