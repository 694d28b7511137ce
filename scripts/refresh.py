"""Run notebooks and store their outputs, byte for byte the same when nothing has changed.

Usage: python scripts/refresh.py [NOTEBOOK ...]    (default: all chapters in book/)
"""

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from sparse_signals.app.notebook import edition

BOOK = Path(__file__).parents[1] / "book"
KEPT = ("tags", "mystnb")
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def run(path: Path) -> None:
    """Execute a notebook in its folder and write it back, with nothing in it that varies.

    Raises CellExecutionError when a cell fails; the file is then left as it was.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=1200,
        kernel_name="python3",
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],  # not its remarks about encryption
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    notebook.metadata = nbformat.from_dict(
        {"edition": edition(), "kernelspec": KERNEL, "language_info": {"name": "python"}}
    )
    for cell in notebook.cells:
        cell.metadata = {key: cell.metadata[key] for key in KEPT if key in cell.metadata}
    nbformat.write(notebook, path)


def main(paths: list[Path]) -> int:
    """Run all notebooks in order; stop at the first that fails."""
    for path in paths:
        start = time.monotonic()
        try:
            run(path)
        except CellExecutionError as error:
            print(f"{path}: a cell failed; the notebook was left as it was\n{error}")
            return 1
        print(f"{path.name}: {time.monotonic() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main([Path(name) for name in sys.argv[1:]] or sorted(BOOK.glob("*.ipynb"))))
