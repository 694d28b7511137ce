"""Build the site. The last good site stays in _build/html until a new one is complete.

Chapters show what is stored in book/, and each of editions/<model>/ becomes a page beside its
chapter. With MODEL set, all chapters are shown on that model instead: those that are not stored, or
are not fresh, run first, in a copy, and the stored notebooks stay as they are.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat

import refresh
from sparse_signals.app.editions import on_model, page_name

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "_build"
SITE = BUILD / "html"
CARD = "src/sparse_signals/assets/gpt2-ioi/README.md"  # which a page includes
SOURCES = ("_config.yml", "_toc.yml", "book", CARD)


def copied(name: str, *more: str) -> Path:
    """A fresh copy of the sources."""
    source = BUILD / name
    shutil.rmtree(source, ignore_errors=True)
    for part in (*SOURCES, *more):
        path = ROOT / part
        (source / part).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if path.is_dir() else shutil.copy)(path, source / part)
    return source


def run_edition(model: str) -> Path | None:
    """A copy of the sources whose chapters have run on a model, or None where one failed."""
    source = copied("edition")
    to_run = []
    for edition in refresh.stored(model):
        path = source / "book" / edition.chapter.name
        if edition.is_fresh():
            shutil.copy(edition.path, path)
        else:
            nbformat.write(on_model(refresh.read(path), model), path)
            to_run.append(refresh.Edition.at(path))
    return source if refresh.run_all(to_run) else None


def shown_edition(model: str) -> Path:
    """A copy of the sources with the stored edition of a model in place of the chapters."""
    source = copied(f"on-{model}", "editions")
    shutil.copytree(ROOT / "editions" / model, source / "book", dirs_exist_ok=True)
    return source


def build(source: Path, aside: Path) -> Path:
    """Build the site of some sources in a folder aside, and say where its pages are."""
    shutil.rmtree(aside, ignore_errors=True)
    program = Path(sys.executable).with_name("jupyter-book")
    command = [program, "build", source, "--path-output", aside, "-W", "-n", "--keep-going"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # warnings go to stderr
    return aside / "_build" / "html"


def add_pages(site: Path, other: Path, model: str) -> None:
    """Put the chapters of the edition of a model, out of its own site, beside those of a site."""
    for edition in refresh.stored(model):
        if edition.path != edition.chapter and edition.path.exists():
            chapter = edition.chapter.stem
            name = page_name(chapter, model, opening="")
            page = (other / "book" / f"{chapter}.html").read_text(encoding="utf-8")
            page = page.replace(f"_sources/book/{chapter}.", f"_sources/book/{name}.")
            (site / "book" / f"{name}.html").write_text(page, encoding="utf-8")
            source = other / "_sources" / "book" / f"{chapter}.ipynb"
            shutil.copy(source, site / "_sources" / "book" / f"{name}.ipynb")
    shutil.copytree(other / "_images", site / "_images", dirs_exist_ok=True)


def whole_site() -> Path:
    """The site of what is stored, every chapter in all its editions."""
    models = sorted(path.name for path in (ROOT / "editions").iterdir() if path.is_dir())
    sources = [ROOT, *map(shown_edition, models)]
    asides = [BUILD / f"new-{number}" for number in range(len(sources))]
    with ThreadPoolExecutor(2) as pool:
        site, *others = pool.map(build, sources, asides)
    for other, model in zip(others, models, strict=True):
        add_pages(site, other, model)
    return site


def put_in_place(site: Path) -> None:
    """Let a new site take the place of the old one, and clean up."""
    old = BUILD / "old"
    shutil.rmtree(old, ignore_errors=True)
    if SITE.exists():
        SITE.rename(old)
    site.rename(SITE)
    for path in BUILD.iterdir():
        if path != SITE:
            shutil.rmtree(path)


def main() -> int:
    """Build, and say where the site is or that nothing was changed."""
    model = os.environ.get("MODEL")
    on = f" on {model}" if model else ""
    print(f"Building the book{on} ...", flush=True)
    try:
        if model:
            known = os.path.abspath(model) if os.path.isdir(model) else model
            source = run_edition(known)
            site = source and build(source, BUILD / "new")
        else:
            site = whole_site()
    except (subprocess.CalledProcessError, KeyboardInterrupt):
        site = None
    if site is None:
        kept = "The last good site is still in _build/html." if SITE.exists() else ""
        print(f"\nThe book was not built. {kept}", file=sys.stderr)
        return 1
    put_in_place(site)
    print(f"\nThe book is in {SITE / 'index.html'}\n`make serve` shows it in a browser.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
