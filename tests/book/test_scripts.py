"""The scripts behind make: refreshing notebooks, building the site, fetching its assets."""

import subprocess

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

import build_book
import refresh
import vendor_assets


@pytest.fixture
def notebook(tmp_path):
    cells = [
        new_code_cell(
            "import altair as alt\nfrom sparse_signals.app.notebook import glue", id="one"
        ),
        new_code_cell(
            "print('hello')\nglue('x', 0.12345)\n1 + 1", id="two", metadata={"tags": ["a"]}
        ),
    ]
    path = tmp_path / "chapter.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    return path


def test_refresh_twice_gives_the_same_bytes(notebook):
    assert refresh.main([notebook]) == 0
    first = notebook.read_bytes()
    assert refresh.main([notebook]) == 0
    assert notebook.read_bytes() == first
    assert b'"hello\\n"' in first and b"0.123" in first and b"iopub" not in first


def test_refresh_leaves_a_failing_notebook_as_it_was(notebook, capsys):
    content = nbformat.read(notebook, as_version=4)
    content.cells.append(new_code_cell("1 / 0", id="three"))
    nbformat.write(content, notebook)
    before = notebook.read_bytes()
    assert refresh.main([notebook]) == 1
    assert notebook.read_bytes() == before
    assert "ZeroDivisionError" in capsys.readouterr().out


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A place with a good old site, and a jupyter-book that writes a page and may then fail."""
    site = tmp_path / "_build" / "html"
    site.mkdir(parents=True)
    (site / "index.html").write_text("old")
    monkeypatch.setattr(build_book, "BUILD", tmp_path / "_build")
    monkeypatch.setattr(build_book, "SITE", site)
    monkeypatch.delenv("MODEL", raising=False)

    def behave(error=None):
        def run(command, **_):
            page = tmp_path / "_build" / "new" / "_build" / "html" / "index.html"
            page.parent.mkdir(parents=True)
            page.write_text("new")
            if error:
                raise error

        monkeypatch.setattr(subprocess, "run", run)
        return site / "index.html"

    return behave


def test_a_good_build_replaces_the_site(house, capsys):
    page = house()
    assert build_book.main() == 0
    assert page.read_text() == "new"
    assert "make serve" in capsys.readouterr().out


@pytest.mark.parametrize("error", [subprocess.CalledProcessError(1, "x"), KeyboardInterrupt()])
def test_a_failed_or_interrupted_build_keeps_the_old_site(house, error, capsys):
    page = house(error)
    assert build_book.main() == 1
    assert page.read_text() == "old"
    assert "last good site" in capsys.readouterr().err


def test_without_npm_the_message_says_what_is_missing_and_what_works(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vendor_assets, "VENDOR", tmp_path / "vendor")
    monkeypatch.setenv("PATH", "")
    assert vendor_assets.main() == 0
    assert (tmp_path / "vendor" / "vega.js").stat().st_size > 500_000
    message = capsys.readouterr().err
    assert "Node.js (npm) is not installed" in message and "Everything else works" in message
