"""The editions of a chapter: which model it opens on, and when what is stored is out of date."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from sparse_signals.app import editions
from sparse_signals.app.editions import facts, fingerprint, on_model, opens_on, page_name
from sparse_signals.core.model import load_model

OPEN = 'from sparse_signals.heads.svd import head_svd\nmodel = open_chapter("03-x", "smollm2-135m")'


def chapter(*code):
    cells = [new_markdown_cell("# X", id="text")]
    for number, source in enumerate(code):
        outputs = [new_output("stream", text="1")]
        cells.append(new_code_cell(source, id=f"c{number}", outputs=outputs, execution_count=1))
    return new_notebook(cells=cells)


def test_a_chapter_names_the_model_it_opens_on():
    assert opens_on(chapter("import torch", OPEN)) == "smollm2-135m"
    assert opens_on(chapter('start("a1-x")')) is None


def test_on_another_model_only_that_name_differs_and_nothing_has_run():
    before = chapter(OPEN, "print(1)")
    after = on_model(before, "gpt2-ioi")
    sources = [cell.source.replace("gpt2-ioi", "smollm2-135m") for cell in after.cells]
    assert opens_on(after) == "gpt2-ioi"
    assert sources == [cell.source for cell in before.cells]
    assert all(not cell.get("outputs") for cell in after.cells)
    assert opens_on(before) == "smollm2-135m" and before.cells[1].outputs


def test_pages_of_other_editions_have_names_of_their_own():
    assert page_name("03-x", "a", opening="a") == "03-x"
    assert page_name("03-x", "b", opening="a") == "03-x-on-b"


def test_facts_name_model_size_device_and_versions():
    model = load_model("gpt2-ioi")
    found = facts(chapter(OPEN), model, "smollm2-135m")
    layers = f"{model.n_layers} layers of {model.n_heads} heads, "
    assert found["model"] == "gpt2-ioi" and found["opens_on"] == "smollm2-135m"
    assert found["size"].startswith(layers) and found["size"].endswith(" weights")
    assert found["device"] in ("CPU", "GPU") and found["torch"].startswith("2.")
    assert "model" not in facts(chapter("1 + 1"), None, None)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of three modules, of which the first imports the second, in a function."""
    home = tmp_path / "sparse_signals"
    (home / "heads").mkdir(parents=True)
    (home / "__init__.py").write_text("HOMES = {}\n")
    (home / "heads" / "__init__.py").write_text("")
    (home / "heads" / "svd.py").write_text(
        "def f():\n    from sparse_signals.heads.scores import g\n    return g\n"
    )
    (home / "heads" / "scores.py").write_text('def g():\n    """Says."""\n    return 1  # one\n')
    (home / "heads" / "other.py").write_text("x = 1\n")
    monkeypatch.setattr(editions, "PACKAGE", home)
    monkeypatch.setattr(editions, "_imports_of", editions._imports_of.__wrapped__)
    return home / "heads"


@pytest.mark.parametrize(
    ("file", "text", "changes"),
    [
        ("scores.py", 'def g():\n    """Says more.\n\n    Much."""\n\n    return 1\n', False),
        ("scores.py", 'def g():\n    """Says."""\n    return 2  # one\n', True),
        ("scores.py", 'def g():\n    return "# one"\n', True),
        ("svd.py", "def f():\n    return None\n", True),
        ("other.py", "x = 2\n", False),
    ],
)
def test_the_digest_follows_the_code_that_is_reached_and_not_its_comments(
    package, file, text, changes
):
    before = fingerprint(chapter(OPEN))
    (package / file).write_text(text)
    assert (fingerprint(chapter(OPEN)) != before) == changes


def test_the_digest_follows_code_cells_and_not_prose():
    notebook = chapter("x = 1")
    before = fingerprint(notebook)
    notebook.cells[0].source = "# Y"
    assert fingerprint(notebook) == before
    notebook.cells[1].source = "x = 2"
    assert fingerprint(notebook) != before


def test_the_digest_follows_the_shipped_weights(tmp_path, monkeypatch):
    weights = tmp_path / "gpt2-ioi"
    weights.mkdir()
    (weights / "model").write_text("1")
    monkeypatch.setattr(editions, "SHIPPED", weights)
    ours, others = (chapter(f'm = open_chapter("x", "{name}")') for name in ("gpt2-ioi", "y"))
    before = fingerprint(ours), fingerprint(others)
    (weights / "model").write_text("2")
    assert fingerprint(ours) != before[0] and fingerprint(others) == before[1]


def test_the_digest_of_a_stored_notebook_is_the_same_after_reading(tmp_path):
    notebook = chapter(OPEN)
    nbformat.write(notebook, tmp_path / "x.ipynb")
    assert fingerprint(nbformat.read(tmp_path / "x.ipynb", as_version=4)) == fingerprint(notebook)
