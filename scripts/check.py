"""Every check of the project, one part after the other. All run, even after one that fails.

Says at the end how long each part took and which failed.
"""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
RUFF = str(Path(PYTHON).with_name("ruff"))
PYTEST = (PYTHON, "-m", "pytest", "-n", "2")
PYRIGHT = ROOT / "node_modules" / "pyright" / "index.js"  # npm fetches it with the site
NBVAL = ("--nbval", "--nbval-current-env", "--nbval-cell-timeout", "300", "--dist", "loadfile")
CODE = ("benchmarks", "scripts", "src", "tests")


@dataclass(frozen=True)
class Part:
    """A part of the checks: what it is called, and its commands, of which each must succeed.

    `needs` is a file without which the part is skipped, and said to be.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    needs: Path | None = None


PARTS = (  # the quick ones first; the site is built before it is tested
    Part("style", ((RUFF, "check", *CODE), (RUFF, "format", "--check", *CODE))),
    Part("rooms", ((str(Path(PYTHON).with_name("lint-imports")),),)),
    Part("site", ((PYTHON, "scripts/vendor_assets.py"), (PYTHON, "scripts/build_book.py"))),
    Part("types", (("node", str(PYRIGHT)),), needs=PYRIGHT),
    Part("examples", ((PYTHON, "-m", "pytest", "--doctest-modules", "src"),)),
    Part("unit tests", ((*PYTEST, "tests", "-m", "not site and not slow"),)),
    Part("long tests", ((*PYTEST, "tests", "-m", "slow and not site"),)),
    Part("site tests", ((*PYTEST, "tests", "-m", "site", "--dist", "loadgroup"),)),
    Part("notebooks", ((*PYTEST, "book", *NBVAL),)),
)


def check(part: Part) -> bool:
    """Run a part up to the first command that fails. Did all succeed?"""
    print(f"\n── {part.name}", flush=True)
    if part.needs and not part.needs.exists():
        print(f"   skipped: {part.needs.relative_to(ROOT)} is not there (install Node.js)")
        return True
    return all(subprocess.run(command, cwd=ROOT).returncode == 0 for command in part.commands)


def main(parts: tuple[Part, ...] = PARTS) -> int:
    """Run the parts, then print the time and the outcome of each."""
    lines, failed = [], False
    for part in parts:
        begun = time.perf_counter()
        good = check(part)
        failed |= not good
        seconds = time.perf_counter() - begun
        lines.append(f"   {part.name:12}{seconds:6.0f} s   {'good' if good else 'FAILED'}")
    print("\n── what was checked", *lines, sep="\n")
    return int(failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nInterrupted: the checks are not complete.")
