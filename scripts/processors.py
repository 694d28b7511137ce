"""Run notebooks as other processors would, and compare what every cell says with what is stored.

Usage: python scripts/processors.py [NOTEBOOK ...]    (default: chapter 3 of all stored editions)

Code of PyTorch and of MKL for older processors, and another number of threads, add up in another
order: a cell that prints something else hangs on the last digits. Of a notebook that is not stored,
editions/<model>/<chapter>, the first run is what the others are compared with.
Exits with 1 if a cell differs, and shows how.
"""

import difflib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from nbclient.exceptions import CellExecutionError, DeadKernelError

from refresh import BOOK, EDITIONS, Edition, client, read

CHAPTER = "03-sparse-signals.ipynb"
SETTINGS = {
    "own, 1 thread": {"OMP_NUM_THREADS": "1"},
    "own, 2 threads": {"OMP_NUM_THREADS": "2"},
    "no vector code, 1 thread": {"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "default"},
    "AVX2, 1 thread": {"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "avx2"},
    "MKL compatible, 1 thread": {"OMP_NUM_THREADS": "1", "MKL_CBWR": "COMPATIBLE"},
}
LINES, WIDTH = 12, 160  # of a difference that are shown


def outputs(cell: Any) -> dict[str, list[str]]:
    """What a cell says, as lines, by kind: text, HTML, chart, glued value, printed, error."""
    found: dict[str, list[str]] = {}
    for output in cell.get("outputs", []):
        kinds = dict(output.get("data", {}))
        if "text" in output:
            kinds[output["name"]] = output["text"]
        if "ename" in output:
            kinds["error"] = f"{output['ename']}: {output['evalue']}"
        for kind, value in kinds.items():
            text = value if isinstance(value, str) else json.dumps(value, indent=1, sort_keys=True)
            found.setdefault(kind, []).extend(text.splitlines())
    return found


def executed(edition: Edition, setting: dict[str, str]) -> Any:
    """The notebook of an edition, run in a process of its own with a setting, up to an error."""
    notebook = edition.notebook()
    others = {name for names in SETTINGS.values() for name in names} | {"MODEL"}
    kept = {name: value for name, value in os.environ.items() if name not in others}
    with suppress(CellExecutionError):  # which the outputs tell
        client(notebook, BOOK).execute(env=kept | setting)
    return notebook


def differences(expected: Any, found: Any) -> Iterator[tuple[str, list[str]]]:
    """Every cell that says something else, by its id, and the lines that differ."""
    for old, new in zip(expected.cells, found.cells, strict=True):
        before, after = outputs(old), outputs(new)
        lines = []
        for kind in sorted(before.keys() | after.keys()):
            each = [side.get(kind, []) for side in (before, after)]
            changed = list(difflib.unified_diff(*each, n=0, lineterm=""))[2:]
            lines += [f"({kind})", *changed] if changed else []
        if lines:
            yield new["id"], lines


def compare(edition: Edition) -> bool:
    """Run a notebook with every setting and print a line for each; whether all said the same."""
    good, reference = True, read(edition.path) if edition.path.exists() else None
    print(f"\n{edition.path.name}, model {edition.model or 'of its own'}", flush=True)
    for name, setting in SETTINGS.items():
        begun = time.monotonic()
        found = executed(edition, setting)
        reference = reference or found
        cells = sum(cell.cell_type == "code" for cell in found.cells)
        differing = list(differences(reference, found))
        seconds = time.monotonic() - begun
        print(f"  {name:26}{cells:4} cells{len(differing):4} differ{seconds:6.0f} s", flush=True)
        for cell, lines in differing:
            print(f"    cell {cell}")
            print(*(f"      {line[:WIDTH]}" for line in lines[:LINES]), sep="\n")
        good &= not differing
    return good


def main(paths: list[Path]) -> int:
    """Compare the named notebooks, or a chapter of all stored editions."""
    paths = paths or [BOOK / CHAPTER, *sorted(EDITIONS.glob(f"*/{CHAPTER}"))]
    try:
        results = [compare(Edition.at(path.resolve())) for path in paths]
    except DeadKernelError:
        print("The process that ran the notebook was ended, perhaps for want of memory.")
        return 1
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main([Path(name) for name in sys.argv[1:]]))
