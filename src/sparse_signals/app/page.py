"""A circuit as one HTML file: the graph, its table of edges, what was traced and how.

The file opens from a disk, asks no host for anything, and keeps its state in its address.
"""

import json
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined

from sparse_signals.charts.attribution import (
    answer_graph,
    answer_prompt_graph,
    named_answer_edges,
)
from sparse_signals.charts.style import VEGA_LITE, specification
from sparse_signals.charts.tracing import ORDER, circuit_graph, named_edges
from sparse_signals.core.numbers import fmt, rounded, signed_percent
from sparse_signals.core.resume import atomic
from sparse_signals.tracing.circuit import Circuit

MOST_EDGES = 200  # of a trace from the answer, on its page; the files have all
PAGES = Environment(
    loader=PackageLoader("sparse_signals", "assets"), autoescape=True, undefined=StrictUndefined
)
PAGES.filters["fmt"] = fmt
PAGES.filters["percent"] = signed_percent

Row = dict[Hashable, Any]  # of a table, as pandas gives it


@dataclass(frozen=True)
class Column:
    """A column of the table of edges: what the address calls it, and its heading.

    Of numbers, `show` says how a row shows it, and `by` what it is sorted by (None: itself).
    """

    key: str
    heading: str
    show: Callable[[Row], str] | None = None
    by: Callable[[Row], int | float] | None = None

    def text(self, row: Row) -> str:
        """What stands in a row."""
        return row[self.key] if self.show is None else self.show(row)

    def value(self, row: Row) -> int | float:
        """What a row is sorted by."""
        return row[self.key] if self.by is None else self.by(row)


@dataclass(frozen=True)
class EdgeTable:
    """A graph and the table of its edges, as a page shows them."""

    spec: dict[str, Any]
    columns: Sequence[Column]
    rows: list[Row]
    sort: str
    caption: str

    @property
    def script(self) -> str:
        """The graph for a script element."""
        return script_json(self.spec)


def number_column(key: str, heading: str) -> Column:
    """A column of numbers."""
    return Column(key, heading, lambda row: fmt(row[key]))


def share_column(key: str, heading: str) -> Column:
    """A column of shares, sorted by size."""
    return Column(key, heading, lambda row: signed_percent(row[key]), lambda row: abs(row[key]))


ENDS = (
    Column("upstream", "writer"),
    Column("at", "writes at"),
    Column("downstream", "reader"),
    Column("dest", "reads at"),
)
SCORE_COLUMNS = (
    *ENDS[:2],
    Column("side", "side"),
    *ENDS[2:],
    Column("source", "attends to"),
    number_column("prompts", "prompts"),
    number_column("weight", "weight"),
    Column(
        "low",
        "95 % interval",
        lambda row: f"{fmt(row['low'])} to {fmt(row['high'])}",
        lambda row: row["low"],
    ),
    number_column("share", "share"),
)
ANSWER_ENDS = (
    *ENDS[:2],
    Column("channel", "as"),
    *ENDS[2:],
    share_column("share", "share"),
)
POOLED_COLUMNS = (
    *ANSWER_ENDS,
    Column(
        "low",
        "95 % interval",
        lambda row: f"{signed_percent(row['low'])} to {signed_percent(row['high'])}",
        lambda row: row["low"],
    ),
    number_column("value", "value"),
    number_column("prompts", "prompts"),
)
PROMPT_COLUMNS = (
    *ANSWER_ENDS,
    share_column("of_node", "of its reader"),
    number_column("value", "value"),
)


def edge_table(edges: pd.DataFrame) -> EdgeTable:
    """The pooled edges of a circuit: of scores, or, with a column channel, of a whole answer."""
    if "channel" in edges:
        return answer_table(edges)
    table = rounded(named_edges(edges)).sort_values("prompts", ascending=False, kind="stable")
    caption = (
        f"Prompts are of {fmt(edges['of'].max())}; weight is the mean contribution to the score "
        "(as it enters the softmax, if weighting is exact), share its part of the side's sum."
    )
    spec = specification(circuit_graph(edges))
    return EdgeTable(spec, SCORE_COLUMNS, table.to_dict("records"), "-prompts", caption)


def answer_table(edges: pd.DataFrame, tokens: Sequence[str] | None = None) -> EdgeTable:
    """The largest edges of a trace from the answer: pooled, or with tokens those of one prompt.

    The caption says how many are left out.
    """
    some = edges.loc[edges["share"].abs().nlargest(MOST_EDGES).index]
    table = rounded(named_answer_edges(some, tokens)).to_dict("records")
    left = f"The {len(some)} largest of {len(edges):,} edges. " if len(some) < len(edges) else ""
    caption = (
        f"{left}Value is in units of F, share of the difference between the two answers; minus "
        "works against the answer. Sorting by a share goes by its size. Edges into the same reader "
        "add up, along a path they do not: what MLP 0 gets, it passes on."
    )
    if tokens is None:
        caption += f" Prompts are of {fmt(edges['of'].max())}."
        spec = specification(answer_graph(some, ORDER))
        return EdgeTable(spec, POOLED_COLUMNS, table, "-share", caption)
    spec = specification(answer_prompt_graph(some, tokens))
    return EdgeTable(spec, PROMPT_COLUMNS, table, "-share", caption)


def write_page(path: Path | str, edges: pd.DataFrame, *, title: str, facts: dict[str, str]) -> Path:
    """Write the pooled circuit as a self-contained page, and return its path.

    `edges` is the table that `circuit_graph` draws, or `answer_graph`. `facts` says what was traced
    and how: names and values, shown below the title. The file appears whole or not at all.
    Raises ValueError when there are no edges, OSError when the file cannot be written.
    """
    return fill_page(path, "circuit.html", title=title, facts=facts, edges=edge_table(edges))


def fill_page(path: Path | str, template: str, **values: Any) -> Path:
    """Write a page by its template; script and style are in it."""
    page = PAGES.get_template(template).render(
        **values,
        vega=vega_script(),
        style=_asset("circuit.css"),
        script=_asset("circuit.js"),
    )
    path = Path(path)
    with atomic(path) as aside:
        aside.write_text(page, encoding="utf-8")
    return path


def write_circuit_page(circuit: Circuit, path: Path) -> None:
    """What `Circuit.save` does for .html (the entry point "circuit" of `sparse_signals.pages`)."""
    title = f"A circuit of {circuit.facts.get('model', 'a model')}"
    write_page(path, circuit.edges, title=title, facts=circuit.facts)


@cache
def vega_script() -> str:
    """Vega, Vega-Lite and vega-embed as one script that defines only `vegaEmbed`."""
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VEGA_LITE)
    return f"(() => {{{bundle}}})();\n"


def script_json(value: Any) -> str:
    """JSON for a script element, which no text in it can close."""
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")


def _asset(name: str) -> str:
    return (files("sparse_signals") / "assets" / name).read_text(encoding="utf-8")
