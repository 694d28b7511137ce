"""The editions of a chapter: the same notebook, run on one model or another.

A chapter in `book/` names the model it opens on, in its call of `open_chapter`, and holds what was
computed on it. `editions/<model>/` holds the chapter once more, with another model in that call.
Each notebook says in its metadata what computed it, and of which code that was the outcome.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparse_signals.core.model import Model

STORED = ("gpt2-ioi", "smollm2-135m")  # whose outputs come with the book
OFFERED = (*STORED, "gpt2-small")  # of which each page speaks
OPEN_CALL = re.compile(r'open_chapter\("([\w-]+)", "([^"]+)"\)')
PACKAGE = Path(__file__).parents[1]
SHIPPED = PACKAGE / "assets" / "gpt2-ioi"
VERSIONS = ("sparse-signals", "torch", "transformers", "transformer-lens")


def opens_on(notebook: Any) -> str | None:
    """The model that a notebook names in its call of `open_chapter`; None if it needs none."""
    found = OPEN_CALL.search("\n".join(_code(notebook)))
    return found[2] if found else None


def on_model(notebook: Any, model: str) -> Any:
    """The chapter with another model in its call of `open_chapter`, not run yet."""
    changed = deepcopy(notebook)
    for cell in changed.cells:
        if cell.cell_type == "code":
            cell.source = OPEN_CALL.sub(rf'open_chapter("\1", "{model}")', cell.source)
            cell.update(outputs=[], execution_count=None)
    return changed


def page_name(chapter: str, model: str, opening: str) -> str:
    """What the page of an edition is called: as the chapter, if it opens on that model."""
    return chapter if model == opening else f"{chapter}-on-{model}"


def facts(notebook: Any, model: "Model | None", opening: str | None) -> dict[str, str]:
    """What computes a notebook here: model and its size, kind of device, versions, code.

    Each page shows them; outputs are not compared with them. `model` is None where the notebook
    needs none, `opening` is the model on which the chapter in `book/` opens.
    """
    import torch

    about = {}
    if model is not None and opening is not None:
        weights = sum(weight.numel() for weight in model.bridge.original_model.parameters())
        size = f"{model.n_layers} layers of {model.n_heads} heads, {weights:,} weights"
        about = {"model": model.name, "size": size, "opens_on": opening}
    device = "GPU" if torch.cuda.is_available() else "CPU"
    versions = {name: _version(name) for name in VERSIONS}
    return about | {"device": device, "code": fingerprint(notebook)} | versions


def fingerprint(notebook: Any) -> str:
    """A short digest of all that outputs follow from: code cells, modules they reach, weights.

    Modules are those of this package that cells import, and that these import in turn, less their
    comments and docstrings; the weights are those of the shipped model, if the notebook opens on
    it. What the libraries are, `facts` says.
    """
    cells = _code(notebook)
    reached: set[str] = set()
    new = {name for cell in cells for name in _imported(cell)}
    while new:
        reached |= new
        new = {name for module in new for name in _imports_of(module)} - reached
    digest = sha256("\0".join(cells).encode())
    for name in sorted(reached):
        digest.update(_essence(_file(name).read_text(encoding="utf-8")).encode())
    if opens_on(notebook) == SHIPPED.name:
        for path in sorted(SHIPPED.iterdir()):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _code(notebook: Any) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package).split("+")[0]
    except PackageNotFoundError:
        return "not installed"


# --- which code a notebook reaches ---------------------------------------------------------------


def _file(module: str) -> Path:
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def _imports_of(module: str) -> frozenset[str]:
    return frozenset(_imported(_file(module).read_text(encoding="utf-8")))


def _imported(source: str) -> Iterator[str]:
    """The modules of this package that some code imports, in functions too."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.split(".")[0] == PACKAGE.name and _file(name).is_file():
                yield name
    if re.search(rf"^import {PACKAGE.name}\b", source, re.MULTILINE):  # the front door is lazy
        from sparse_signals import HOMES

        yield from (f"{PACKAGE.name}.{home}" for home in HOMES.values())


def _essence(source: str) -> str:
    """Code without comments, docstrings and empty lines, the same for every version of Python."""
    lines = source.splitlines()
    places = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, places) and ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            assert first.end_lineno is not None
            lines[first.lineno - 1 : first.end_lineno] = [""] * (
                first.end_lineno - first.lineno + 1
            )
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        row, column = token.start
        if token.type == tokenize.COMMENT and lines[row - 1]:
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(line.rstrip() for line in lines if line.strip())
