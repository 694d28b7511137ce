"""The findings of all editions side by side."""

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from sparse_signals.app.findings import findings, of_editions
from sparse_signals.app.notebook import html_table


def store(path, model, rows, first="finding"):
    """A notebook that ends with a table of findings."""
    table = pd.DataFrame(rows, columns=[first, f"this edition, {model}", "published"])
    shown = new_output("display_data", data={"text/html": html_table(table, caption="So")})
    opening = 'open_chapter("03-x", "smollm2-135m")'
    cells = [new_code_cell(opening), new_code_cell("show(table)", outputs=[shown])]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=cells), path)


@pytest.fixture
def chapter(tmp_path):
    chapter = tmp_path / "book" / "03-x.ipynb"
    store(chapter, "smollm2-135m", [["a < b", "1.0 [0.9, 1.1]", "–"], ["only here", "2", "3"]])
    other = tmp_path / "editions" / "gpt2-ioi" / "03-x.ipynb"
    store(other, "gpt2-ioi", [["a < b", "5", "–"], ["only there", "6", "–"]])
    return chapter


def test_findings_are_read_from_the_table_that_is_called_so(chapter):
    assert findings(chapter).to_numpy().tolist() == [
        ["a < b", "1.0 [0.9, 1.1]", "–"],
        ["only here", "2", "3"],
    ]


def test_editions_stand_side_by_side_with_what_only_one_has(chapter):
    table = of_editions(chapter)
    assert list(table) == ["finding", "smollm2-135m", "gpt2-ioi", "GPT-2 small, published"]
    assert table.to_numpy().tolist() == [
        ["a < b", "1.0 [0.9, 1.1]", "5", "–"],
        ["only here", "2", "–", "3"],
        ["only there", "–", "6", "–"],
    ]


def test_a_chapter_without_findings_is_an_error(tmp_path):
    store(tmp_path / "book" / "04-x.ipynb", "gpt2-ioi", [["a", "b", "c"]], first="head")
    with pytest.raises(ValueError, match="no table of findings"):
        findings(tmp_path / "book" / "04-x.ipynb")
