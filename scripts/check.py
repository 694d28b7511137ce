"""Every check of the project. All parts run, even after one that fails.

Parts that keep one core busy run two at a time, and what they say is shown when they end; the
others have both cores, one part after the other. Says at the end how long each part took and which
failed.
"""

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
RUFF = str(Path(PYTHON).with_name("ruff"))
PYTEST = (PYTHON, "-m", "pytest", "-n", "2")
PYRIGHT = ROOT / "node_modules" / "pyright" / "index.js"  # npm fetches it with the site
NBVAL = ("--nbval", "--nbval-current-env", "--nbval-cell-timeout", "600", "--dist", "loadfile")
SITE = (  # to read the others takes a while
    "tests/app/test_answer_page.py",
    "tests/app/test_page.py",
    "tests/book/test_site.py",
)
CODE = ("benchmarks", "scripts", "src", "tests")


@dataclass(frozen=True)
class Part:
    """A part of the checks: what it is called, and its commands, of which each must succeed.

    `needs` is a file without which the part is skipped, and said to be. Neighbours that keep `one`
    core busy run beside each other.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    needs: Path | None = None
    one: bool = False


PARTS = (  # the quick ones first; the site is built before it is tested
    Part("style", ((RUFF, "check", *CODE), (RUFF, "format", "--check", *CODE))),
    Part("rooms", ((str(Path(PYTHON).with_name("lint-imports")),),)),
    Part("assets", ((PYTHON, "scripts/vendor_assets.py"),)),
    Part("types", (("node", str(PYRIGHT)),), needs=PYRIGHT, one=True),
    Part("site", ((PYTHON, "scripts/build_book.py"),), one=True),
    Part("examples", ((PYTHON, "-m", "pytest", "--doctest-modules", "src"),), one=True),
    Part("unit tests", ((*PYTEST, "tests", "-m", "not site and not slow", "--dist", "loadfile"),)),
    Part("long tests", ((*PYTEST, "tests", "-m", "slow and not site", "--dist", "loadfile"),)),
    Part("site tests", ((*PYTEST, *SITE, "-m", "site", "--dist", "loadgroup"),)),
    Part("notebooks", ((*PYTEST, "book", "editions", *NBVAL),)),
)


@dataclass(frozen=True)
class Outcome:
    """How a part went: whether all succeeded, in how many seconds, what was said and not shown."""

    part: Part
    good: bool
    seconds: float
    said: str = ""


def check(part: Part) -> Outcome:
    """Run a part up to the first command that fails."""
    if part.needs and not part.needs.exists():
        said = f"   skipped: {part.needs.relative_to(ROOT)} is not there (install Node.js)\n"
        return Outcome(part, True, 0, said)
    begun, good, said = time.perf_counter(), True, ""
    caught = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    for command in part.commands:
        done = subprocess.run(command, cwd=ROOT, **(caught if part.one else {}))
        good, said = done.returncode == 0, said + (done.stdout or "")
        if not good:
            break
    return Outcome(part, good, time.perf_counter() - begun, said)


def head(name: str) -> None:
    print(f"\n── {name}", flush=True)


def outcomes(parts: tuple[Part, ...]) -> Iterator[Outcome]:
    """Run the parts in their order, and show what they say."""
    for one, group in groupby(parts, key=lambda part: part.one):
        if one:
            with ThreadPoolExecutor(2) as pool:
                for outcome in pool.map(check, group):
                    head(outcome.part.name)
                    print(outcome.said, end="", flush=True)
                    yield outcome
        else:
            for part in group:
                head(part.name)
                yield check(part)


def main(parts: tuple[Part, ...] = PARTS) -> int:
    """Run the parts, then print the time and the outcome of each."""
    lines, failed = [], False
    for outcome in outcomes(parts):
        failed |= not outcome.good
        result = "good" if outcome.good else "FAILED"
        lines.append(f"   {outcome.part.name:12}{outcome.seconds:6.0f} s   {result}")
    print("\n── what was checked", *lines, sep="\n")
    return int(failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nInterrupted: the checks are not complete.")
