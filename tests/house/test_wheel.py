"""The wheel holds all it needs, and runs with what it declares: no Jupyter, no charts."""

import subprocess
import sys
import zipfile
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
REFUSE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {refused!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}: not declared", name=name)

sys.meta_path.insert(0, Refuse())
sys.path.append({packages!r})
"""


def declared(name: str, known: set[str]) -> set[str]:
    """A distribution and all that it needs, without extras."""
    name = canonicalize_name(name)
    if name in known:
        return known
    known.add(name)
    try:
        requirements = distribution(name).requires or []
    except ModuleNotFoundError:  # for another platform
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
    kept = declared("sparse-signals", set())
    refused = {
        module
        for module, names in packages_distributions().items()
        if not kept & {canonicalize_name(name) for name in names}
    }
    ours = distribution("numpy").locate_file("")
    hook = REFUSE.format(refused=refused | {"conftest"}, packages=str(ours))
    (packages / "sitecustomize.py").write_text(hook)
    return folder / "venv" / "bin" / "python"


def test_a_trace_runs_from_the_wheel(environment, tmp_path):
    code = (
        "import sys, sparse_signals; from sparse_signals.app.cli import main;"
        "assert 'venv' in sparse_signals.__file__;"
        "sys.exit(main(['trace', '--ioi', '8', '--out', 'out']))"
    )
    done = subprocess.run(
        [environment, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "8 prompts" in done.stdout and "strongest edges" in done.stdout
    assert "sparse-signals[charts]" in done.stderr  # no page without the extra
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"edges.parquet", "circuit.graphml", "circuit.json", "circuit.parquet"}


@pytest.mark.parametrize("module", ["altair", "jupyterlab", "IPython", "vl_convert"])
def test_nothing_else_is_seen(environment, module):
    done = subprocess.run([environment, "-c", f"import {module}"], capture_output=True, text=True)
    assert done.returncode == 1 and "not declared" in done.stderr
