"""The workflows on GitHub: free of faults, and calling the commands that the README names."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = ROOT / ".github" / "workflows"
ZIZMOR = Path(sys.executable).with_name("zizmor")


def lint(folder):
    """What the linter says about the workflows below a folder, and whether it is content."""
    command = [ZIZMOR, "--offline", "--strict-collection", "--persona=pedantic", "--quiet", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode == 0, done.stdout + done.stderr


def targets(text):
    return set(re.findall(r"\bmake ([a-z]+)", text))


def steps(name):
    jobs = yaml.safe_load((WORKFLOWS / name).read_text(encoding="utf-8"))["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


def test_the_linter_finds_nothing():
    good, words = lint(ROOT / ".github")
    assert good, words


@pytest.mark.parametrize(
    ("right", "wrong", "finding"),
    [
        ("runs-on:", "run-on:", "runs-on"),
        ("actions/checkout@v5", "actions/checkout", "missing `@<ref>`"),
        ("actions/setup-node@v5", "someone/setup-node@v5", "unpinned-uses"),
        ("persist-credentials: false", "fetch-depth: 1", "artipacked"),
        ("contents: read", "contents: write", "excessive-permissions"),
        ("make test", "echo ${{ github.head_ref }}", "template-injection"),
    ],
)
def test_the_linter_finds_a_fault(tmp_path, right, wrong, finding):
    shutil.copytree(ROOT / ".github", tmp_path / ".github")
    path = tmp_path / ".github" / "workflows" / "ci.yml"
    path.write_text(path.read_text().replace(right, wrong))
    good, words = lint(tmp_path / ".github")
    assert not good and finding in words


def test_the_workflows_call_the_commands_of_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = targets(readme.split("## Two commands")[1].split("```")[1])
    ci, pages = ([s["run"] for s in steps(name) if "run" in s] for name in ("ci.yml", "pages.yml"))
    assert "make test" in ci and "make book" in pages
    assert {"test", "book"} <= commands
    assert targets("\n".join(ci + pages)) == {"test", "book", "processors"}
    assert targets((ROOT / ".ci" / "run").read_text(encoding="utf-8")) == {"test"}


def test_ci_tests_every_supported_python_and_pages_shows_the_built_site():
    jobs = yaml.safe_load((WORKFLOWS / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    minors = range(11, 14)  # as in pyproject.toml: requires-python
    assert jobs["test"]["strategy"]["matrix"]["python"] == [f"3.{minor}" for minor in minors]
    assert 'requires-python = ">=3.11,<3.14"' in (ROOT / "pyproject.toml").read_text()
    shown = [s["with"]["path"] for s in steps("pages.yml") if "upload-pages" in s.get("uses", "")]
    assert shown == ["_build/html"]
