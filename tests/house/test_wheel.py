"""The wheel holds all it needs, and runs with what it declares: no Jupyter, no charts."""

import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def declared(name: str, known: set[str]) -> set[str]:
    """A distribution and all that it needs, without extras."""
    name = canonicalize_name(name)
    if name in known:
        return known
    known.add(name)
    try:
        requirements = distribution(name).requires or []
    except PackageNotFoundError:  # for another platform
        return known
    for requirement in map(Requirement, requirements):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            declared(requirement.name, known)
            for extra in requirement.extras:
                for more in map(Requirement, distribution(requirement.name).requires or []):
                    if more.marker and more.marker.evaluate({"extra": extra}):
                        declared(more.name, known)
    return known


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A virtual environment with the wheel, that sees what the wheel declares and no more."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(packages)
    for name in declared("sparse-signals", set()) - {"sparse-signals"}:
        try:
            found = distribution(name)
        except PackageNotFoundError:  # for another platform
            continue
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (packages / top).exists():
                (packages / top).symlink_to(found.locate_file(top))
    return folder / "venv" / "bin" / "python"


def test_a_trace_runs_from_the_wheel(environment, tmp_path):
    code = (
        "import sys, sparse_signals; from sparse_signals.app.cli import main;"
        "assert 'venv' in sparse_signals.__file__;"
        "sys.exit(main(['trace', '--ioi', '8', '--out', 'out']))"
    )
    done = subprocess.run(
        [environment, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "8 prompts" in done.stdout and "strongest edges" in done.stdout
    assert "sparse-signals[charts]" in done.stderr  # no page without the extra
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"edges.parquet", "circuit.graphml", "circuit.json", "circuit.parquet"}


@pytest.mark.parametrize("module", ["altair", "jupyterlab", "IPython", "vl_convert"])
def test_nothing_else_is_seen(environment, module):
    command = [environment, "-I", "-c", f"import {module}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "ModuleNotFoundError" in done.stderr
