"""A name is defined once in the package, with one meaning."""

import ast
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "src" / "sparse_signals"


def definitions() -> dict[str, list[str]]:
    """Every top-level name, and the modules that define it."""
    found = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names = [node.name]
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [
                    x.id
                    for t in targets
                    for x in ast.walk(t)
                    if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)
                ]
            else:
                continue
            for name in names:
                found[name].append(path.relative_to(PACKAGE).as_posix())
    return found


def test_a_name_is_defined_once():
    assert {name: places for name, places in definitions().items() if len(places) > 1} == {}
