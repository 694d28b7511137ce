"""Run notebooks and store their outputs, byte for byte the same when nothing has changed.

Usage: python scripts/refresh.py [NOTEBOOK ...]

Without arguments all stored editions are renewed, those whose code, model and versions are not
what they were: each chapter of book/ on the model it opens on, and in editions/<model>/ on the
others. With MODEL set, the edition of that model alone. Notebooks that are named run in any case.
"""

import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from sparse_signals.app.editions import STORED, facts, on_model, opens_on

if TYPE_CHECKING:
    from sparse_signals.core.model import Model

ROOT = Path(__file__).parents[1]
BOOK, EDITIONS = ROOT / "book", ROOT / "editions"
KEPT = ("tags", "mystnb")
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
WORKERS = 2  # chapters that run at the same time: each may take some gigabytes


@dataclass(frozen=True)
class Edition:
    """A notebook to write: the chapter it is made of, and the model it runs on, if it needs one."""

    path: Path
    chapter: Path
    model: str | None

    @classmethod
    def at(cls, path: Path) -> "Edition":
        """What a stored notebook is: in editions/<model>/ a chapter on that model."""
        if path.parent.parent == EDITIONS:
            return cls(path, BOOK / path.name, path.parent.name)
        return cls(path, path, opens_on(read(path)))

    def notebook(self) -> Any:
        """The notebook as it is to run."""
        chapter = read(self.chapter)
        return chapter if self.model is None else on_model(chapter, self.model)

    def facts(self) -> dict[str, str]:
        """What will have computed it."""
        model = None if self.model is None else loaded(self.model)
        opening = self.model if self.path == self.chapter else opens_on(read(self.chapter))
        return facts(self.notebook(), model, opening)

    def is_fresh(self) -> bool:
        """Whether what is stored is what would be computed, as far as can be told without it."""
        if not self.path.exists():
            return False
        stored, wanted = read(self.path), self.notebook()
        same = [cell.source for cell in stored.cells] == [cell.source for cell in wanted.cells]
        return same and stored.metadata.get("edition") == self.facts()


def read(path: Path) -> Any:
    """A notebook."""
    return nbformat.read(path, as_version=4)


@cache
def loaded(model: str) -> "Model":
    """A model, loaded once."""
    from sparse_signals.core.model import load_model

    return load_model(model)


def stored(model: str | None = None) -> Iterator[Edition]:
    """The notebooks of all editions that come with the book, or of that of one model."""
    for chapter in sorted(BOOK.glob("*.ipynb")):
        opening = opens_on(read(chapter))
        others = (*STORED, model) if opening and model else STORED if opening else ()
        for each in dict.fromkeys((opening, *others)):
            if model in (None, each):
                own = each == opening
                yield Edition(chapter if own else EDITIONS / each / chapter.name, chapter, each)


@dataclass(frozen=True)
class Outcome:
    """How a notebook went: in how many seconds, and what failed, if anything did."""

    seconds: float
    error: str | None = None


def client(notebook: Any, folder: Path) -> NotebookClient:
    """What executes a notebook in a folder."""
    return NotebookClient(
        notebook,
        timeout=1200,
        kernel_name="python3",
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],  # not its remarks about encryption
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )


def run(edition: Edition) -> Outcome:
    """Execute a notebook in its folder and write it, with nothing in it that varies.

    When a cell fails, the file is left as it was.
    """
    begun = time.monotonic()
    os.environ.pop("MODEL", None)  # the notebook names its model
    notebook = edition.notebook()
    folder = edition.path.parent
    folder.mkdir(parents=True, exist_ok=True)
    try:
        client(notebook, folder).execute()
    except (CellExecutionError, DeadKernelError) as error:
        return Outcome(time.monotonic() - begun, str(error))
    notebook.metadata = nbformat.from_dict(
        {"edition": edition.facts(), "kernelspec": KERNEL, "language_info": {"name": "python"}}
    )
    for cell in notebook.cells:
        cell.metadata = {key: cell.metadata[key] for key in KEPT if key in cell.metadata}
    aside = edition.path.with_suffix(".new")
    nbformat.write(notebook, aside)
    aside.replace(edition.path)
    return Outcome(time.monotonic() - begun)


def run_all(editions: list[Edition]) -> bool:
    """Run notebooks, some at the same time, and say how it went; whether none failed."""
    good = True
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))
    with ProcessPoolExecutor(WORKERS, get_context("spawn")) as pool:
        running = {pool.submit(run, edition): edition for edition in editions}
        for done in as_completed(running):
            path = running[done].path
            name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
            outcome = done.result()
            if outcome.error is None:
                print(f"{name}: {outcome.seconds:.0f} s", flush=True)
            else:
                good = False
                print(
                    f"{name}: a cell failed; the notebook was left as it was\n{outcome.error}",
                    flush=True,
                )
    return good


def main(paths: list[Path]) -> int:
    """Run the named notebooks, or those of the stored editions that are not fresh."""
    if paths:
        editions = [Edition.at(path.resolve()) for path in paths]
    else:
        wanted = list(stored(os.environ.get("MODEL")))
        editions = [edition for edition in wanted if not edition.is_fresh()]
        print(
            f"{len(wanted) - len(editions)} of {len(wanted)} notebooks are up to date", flush=True
        )
    return 0 if run_all(editions) else 1


if __name__ == "__main__":
    sys.exit(main([Path(name) for name in sys.argv[1:]]))
