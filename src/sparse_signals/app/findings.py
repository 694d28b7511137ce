"""The findings of all chapters on one page: the tables that end them, editions side by side."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
from bs4 import BeautifulSoup
from docutils import nodes
from docutils.parsers.rst import Directive

from sparse_signals.app.editions import opens_on, page_name
from sparse_signals.app.notebook import html_table
from sparse_signals.core.names import DEFAULT_MODEL

FINDING, PUBLISHED = "finding", "GPT-2 small, published"


def findings(path: Path) -> pd.DataFrame:
    """The table of findings of a notebook: finding, what its model gives, what is published.

    It is the one whose first column is called finding. Raises ValueError where there is none.
    """
    for cell in _notebook(path).cells:
        for output in cell.get("outputs", []):
            table = BeautifulSoup(output.get("data", {}).get("text/html", ""), "html.parser")
            rows = [[x.get_text() for x in row(["th", "td"])] for row in table("tr")]
            if rows and rows[0][0] == FINDING:
                return pd.DataFrame(rows[1:], columns=[FINDING, "value", PUBLISHED])
    raise ValueError(f"{path} has no table of findings")


def of_editions(chapter: Path) -> pd.DataFrame:
    """The findings of a chapter on every model it is stored on, and what is published.

    The shipped model comes last. The rows are those of the first, then any that only others have.
    """
    paths = {opens_on(_notebook(chapter)) or "": chapter}
    paths |= {
        path.parent.name: path for path in chapter.parents[1].glob(f"editions/*/{chapter.name}")
    }
    models = sorted(paths, key=lambda model: (model == DEFAULT_MODEL, model))
    tables = {model: findings(paths[model]).set_index(FINDING) for model in models}
    rows = list(dict.fromkeys(row for table in tables.values() for row in table.index))
    every = pd.DataFrame({model: table["value"] for model, table in tables.items()}, index=rows)
    published = pd.concat([table[PUBLISHED] for table in tables.values()])
    every[PUBLISHED] = published[~published.index.duplicated()]
    return every.fillna("–").rename_axis(FINDING).reset_index()


class Findings(Directive):
    """The directive `{findings}`: the tables of all chapters of the book."""

    def run(self) -> list[nodes.Node]:
        """A section for each chapter, with links to its pages."""
        env = self.state.document.settings.env
        return list(_sections(Path(env.srcdir), env.note_dependency))


def _sections(source: Path, depends_on: Any) -> Iterator[nodes.Node]:
    for chapter in sorted((source / "book").glob("0*.ipynb")):
        depends_on(str(chapter))
        table, notebook = of_editions(chapter), _notebook(chapter)
        title = notebook.cells[0].source.split("\n")[0].removeprefix("# ")
        number = int(chapter.stem[:2])
        section = nodes.section(ids=[nodes.make_id(title)])
        section += nodes.title(text=f"{number} · {title}")
        html = html_table(table)
        for model in table.columns[1:-1]:
            page = page_name(chapter.stem, model, opening=str(opens_on(notebook)))
            html = html.replace(f">{model}</th>", f'><a href="{page}.html">{model}</a></th>', 1)
        section += nodes.raw(text=f'<div class="findings" tabindex="0">{html}</div>', format="html")
        yield section


def _notebook(path: Path) -> Any:
    return nbformat.read(path, as_version=4)
