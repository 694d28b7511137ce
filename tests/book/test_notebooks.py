"""What nbval cannot see: cells never run, stale order, machine traces, charts without words."""

import json
import re
from pathlib import Path

import nbformat
import pytest
import vl_convert
import yaml

import refresh
from sparse_signals.app.editions import fingerprint, opens_on
from sparse_signals.app.findings import of_editions
from sparse_signals.charts.style import MIME
from sparse_signals.core.numbers import round_significant

ROOT = Path(__file__).parents[2]
BOOK = ROOT / "book"
CHAPTERS = sorted(BOOK.glob("*.ipynb"))
EDITIONS = sorted((ROOT / "editions").glob("*/*.ipynb"))
IGNORED = re.compile(r"nbval-(ignore-output|skip)|NBVAL_(IGNORE_OUTPUT|SKIP)")
REASON = re.compile(r"^# Not compared: .{10,}", re.MULTILINE)
MACHINE = re.compile(r"/home/|/root/|/Users/|site-packages|0x[0-9a-f]{8}|127\.0\.0\.1")
NO_PROSE = re.compile(
    r"```.*?```|\$\$.*?\$\$|\$[^$]*\$|\{[\w:]+\}`[^`]*`|`[^`]*`|\]\([^)]*\)", re.DOTALL
)
TYPED = re.compile(r"\b\d+\.\d+\b|\b\d+(?= ?%)|\bL\d+H\d+\b")
CHOSEN = {"95", "90", "80", "70", "20", "10", "100", "1", "5", "0.5"}  # levels set beforehand
MAX_LINES, MAX_OUTPUT, MAX_NOTEBOOK = 15, 400_000, 2_000_000


@pytest.fixture(params=[*CHAPTERS, *EDITIONS], ids=lambda path: f"{path.parent.name}-{path.stem}")
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def charts(notebook):
    return [
        output.data[MIME]
        for cell in code_cells(notebook)
        for output in cell.outputs
        if MIME in output.get("data", {})
    ]


def is_ignored(cell):
    return bool(IGNORED.search(cell.source + " ".join(cell.metadata.get("tags", []))))


def test_table_of_contents_names_every_chapter_and_appendix():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    parts = {part["caption"]: [x["file"] for x in part["chapters"]] for part in toc["parts"]}
    chapters, appendices = parts["Chapters"], parts["Appendices"]
    assert chapters + appendices == [f"book/{p.stem}" for p in CHAPTERS]
    assert all(Path(name).name[0] == "0" for name in chapters)
    assert all(Path(name).name[0] == "a" for name in appendices)


def test_every_cell_was_run_in_order(notebook):
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1)), "run make refresh"


def test_no_cell_failed_or_complained(notebook):
    for cell in code_cells(notebook):
        for output in cell.outputs:
            assert output.output_type != "error", cell.source
            assert output.get("name") != "stderr", cell.source


def test_cells_are_short(notebook):
    for cell in code_cells(notebook):
        assert 1 <= len(cell.source.splitlines()) <= MAX_LINES, cell.source


def test_ignored_cells_are_few_and_say_why(notebook):
    ignored = [cell for cell in code_cells(notebook) if is_ignored(cell)]
    assert len(ignored) <= 0.05 * len(code_cells(notebook))
    for cell in ignored:
        assert REASON.search(cell.source), f"say '# Not compared: reason' in\n{cell.source}"


def test_outputs_are_small_and_free_of_the_machine(path, notebook):
    assert path.stat().st_size <= MAX_NOTEBOOK
    for cell in code_cells(notebook):
        for output in cell.outputs:
            text = json.dumps(output)
            assert len(text) <= MAX_OUTPUT, cell.source
            assert not MACHINE.search(text), cell.source


def test_metadata_holds_nothing_that_varies(notebook):
    assert set(notebook.metadata) == {"edition", "kernelspec", "language_info"}, "run make refresh"
    assert all(set(cell.metadata) <= {"tags", "mystnb"} for cell in notebook.cells)


def test_a_notebook_was_refreshed_after_its_chapter_and_its_code(path, notebook):
    """As far as can be told without running it; the comparison of all outputs tells the rest."""
    edition = refresh.Edition.at(path)
    wanted = edition.notebook()
    assert [cell.source for cell in notebook.cells] == [cell.source for cell in wanted.cells]
    assert notebook.metadata.edition.code == fingerprint(wanted), "run make refresh"


def test_a_notebook_names_the_model_that_computed_it(path, notebook):
    named = {"model": opens_on(notebook), "opens_on": opens_on(refresh.read(BOOK / path.name))}
    if path.stem[0] == "a":  # needs none
        named = {"model": None, "opens_on": None}
    assert {name: notebook.metadata.edition.get(name) for name in named} == named
    assert named["model"] == (path.parent.name if path in EDITIONS else named["opens_on"])


def test_every_chapter_is_stored_on_every_model():
    stored = {edition.path for edition in refresh.stored()}
    assert set(CHAPTERS) <= stored <= {*CHAPTERS, *EDITIONS}


def test_prose_of_chapters_has_no_numbers_that_depend_on_the_model(path, notebook):
    """Numbers are glued in. Heads, decimals and percentages that are typed belong to the paper."""
    if path.stem[0] != "0":
        return
    prose = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for paragraph in re.split(r"\n\s*\n", NO_PROSE.sub("", prose)):
        if "GPT-2 small" not in paragraph:
            typed = TYPED.findall(paragraph)
            assert set(typed) <= CHOSEN, f"{typed} in {paragraph}"


def test_charts_say_what_they_show(notebook):
    assert charts(notebook)
    for spec in charts(notebook):
        assert spec["description"].strip()
        assert spec["title"]["text"]


def test_chart_numbers_are_rounded(notebook):
    for spec in charts(notebook):
        for rows in spec["datasets"].values():
            for row in rows:
                assert all(value == round_significant(value) for value in row.values())


@pytest.mark.slow
@pytest.mark.parametrize("version", ["5.8", "6.4"])  # JupyterLab's Vega-Lite, and the site's
def test_charts_can_be_drawn(notebook, version):
    for spec in charts(notebook):
        assert "<svg" in vl_convert.vegalite_to_svg(spec, vl_version=version)


def test_book_has_a_dozen_interactive_charts():
    specs = [s for p in CHAPTERS for s in charts(nbformat.read(p, as_version=4))]
    assert sum('"params"' in json.dumps(spec) for spec in specs) >= 12


def test_numbers_in_the_readme_are_those_of_the_findings():
    def plain(text):
        return re.sub(r"\s+", " ", text.replace("−", "-"))

    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## What the book found")[1]
    section = plain(section.split("\n## ")[0].split("side by side.")[1])
    intervals = re.findall(r"-?[\d.]+(?: ?%| of \d+)? \[[^\]]*\]", section)
    numbers = re.findall(r"-?\d+\.\d+|\d+ ?%|\d+ of \d+", section)
    tables = map(of_editions, CHAPTERS[:-1])
    every = plain(" | ".join(cell for table in tables for cell in table.to_numpy().ravel()))
    assert len(intervals) > 12 and len(numbers) > 40
    assert [number for number in (*intervals, *numbers) if number not in every] == []
