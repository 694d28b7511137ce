"""Build the site. The last good site stays in _build/html until a new one is complete.

With MODEL set to another model than the shipped one, the chapters run on it first, in a copy:
the committed notebooks keep their outputs.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from sparse_signals.core.names import DEFAULT_MODEL, chosen_model

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "_build"
SITE = BUILD / "html"
SOURCES = ("_config.yml", "_toc.yml", "book")


def prepare_edition(model: str) -> Path:
    """A copy of the sources whose chapters have run on the named model."""
    source = BUILD / "edition"
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    for name in SOURCES:
        path = ROOT / name
        (shutil.copytree if path.is_dir() else shutil.copy)(path, source / name)
    chapters = sorted((source / "book").glob("*.ipynb"))
    known = os.path.isdir(model)
    environment = os.environ | {"MODEL": os.path.abspath(model) if known else model}
    command = [sys.executable, ROOT / "scripts" / "refresh.py", *chapters]
    subprocess.run(command, check=True, env=environment)
    return source


def build(source: Path) -> None:
    """Build the site of `source` aside, then put it in place of the old one."""
    aside, old = BUILD / "new", BUILD / "old"
    shutil.rmtree(aside, ignore_errors=True)
    program = Path(sys.executable).with_name("jupyter-book")
    command = [program, "build", source, "--path-output", aside, "-W", "-n", "--keep-going"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # warnings go to stderr
    shutil.rmtree(old, ignore_errors=True)
    if SITE.exists():
        SITE.rename(old)
    (aside / "_build" / "html").rename(SITE)
    shutil.rmtree(aside)
    shutil.rmtree(old, ignore_errors=True)


def main() -> int:
    """Build, and say where the site is or that nothing was changed."""
    model = chosen_model()
    print(f"Building the book on {model} ...", flush=True)
    try:
        build(ROOT if model == DEFAULT_MODEL else prepare_edition(model))
    except (subprocess.CalledProcessError, KeyboardInterrupt):
        kept = "The last good site is still in _build/html." if SITE.exists() else ""
        print(f"\nThe book was not built. {kept}", file=sys.stderr)
        return 1
    print(f"\nThe book is in {SITE / 'index.html'}\n`make serve` shows it in a browser.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
