"""Fixtures of the tests of the command line."""

import re
import shlex

import pytest

from sparse_signals.app.cli import main


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def said(capsys, out):
    """Run a command line with --out, and return exit code, output and errors."""

    def call(line, *more):
        folder = [] if "--out" in line or not line else ["--out", str(out)]
        code = main([*shlex.split(line), *map(str, more), *folder])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def refused(said, out):
    """Run a command line that must fail with one clear line and write nothing."""

    def call(line, *more):
        code, output, error = said(line, *more)
        assert code == 2 and output == ""
        error = re.sub(r"^\r.*\r", "", error).splitlines()[-1]
        assert error.startswith("sparse-signals: ") and "Traceback" not in error
        assert not out.exists() or not list(out.iterdir())
        return error

    return call


@pytest.fixture
def loaded_once(monkeypatch):
    """The shipped model is loaded once, with what follows from its weights."""
    from shipped import shipped
    from sparse_signals.app import commands
    from sparse_signals.core.model import load_model

    def load(name, dtype):
        return (load_model if name else shipped)(name, dtype=dtype)

    monkeypatch.setattr(commands, "load_model", load)
