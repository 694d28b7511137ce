"""A traced circuit as one HTML file: the graph, its table of edges, what was traced and how.

The file opens from a disk, asks no host for anything, and keeps its state in its address.
"""

import json
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import pandas as pd
import vl_convert

from sparse_signals.charts.style import VEGA_LITE, canonical
from sparse_signals.charts.tracing import circuit_graph, named_edges
from sparse_signals.core.numbers import fmt, rounded
from sparse_signals.core.resume import atomic
from sparse_signals.tracing.circuit import Circuit

COLUMNS = {  # key, which the address uses, and heading
    "upstream": "writer",
    "at": "writes at",
    "side": "side",
    "downstream": "reader",
    "dest": "reads at",
    "source": "attends to",
    "prompts": "prompts",
    "weight": "weight",
    "low": "95 % interval",
    "share": "share",
}
NUMBERS = ("prompts", "weight", "low", "share")
SORT = "-prompts"


def write_page(path: Path | str, edges: pd.DataFrame, *, title: str, facts: dict[str, str]) -> Path:
    """Write the pooled circuit as a self-contained page, and return its path.

    `edges` is the table that `circuit_graph` draws. `facts` says what was traced and how: names
    and values, shown below the title. The file appears whole or not at all.
    Raises ValueError when there are no edges, OSError when the file cannot be written.
    """
    content = {
        "title": escape(title),
        "facts": "".join(_fact(name, value) for name, value in facts.items()),
        "table": edge_table(edges),
        "spec": script_json(canonical(circuit_graph(edges).to_dict())),
        "vega": vega_script(),
        "style": _asset("circuit.css"),
        "script": _asset("circuit.js"),
    }
    path = Path(path)
    with atomic(Path(path)) as aside:
        aside.write_text(Template(_asset("circuit.html")).substitute(content), encoding="utf-8")
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


def edge_table(edges: pd.DataFrame) -> str:
    """The edges as an HTML table with headings to sort by; rows know their nodes and percentage."""
    table = rounded(named_edges(edges)).sort_values("prompts", ascending=False, kind="stable")
    head = "".join(_heading(key, name) for key, name in COLUMNS.items())
    body = "\n".join(_row(edge) for edge in table.to_dict("records"))
    caption = (
        f"Prompts are of {fmt(edges['of'].max())}; weight is the mean contribution to the score "
        "(as it enters the softmax, if weighting is exact), share its part of the side's sum."
    )
    return (
        f'<table id="edges" data-sort="{SORT}"><caption>{caption}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"
    )


def _heading(key: str, name: str) -> str:
    kind = ' class="number"' if key in NUMBERS else ""
    button = f'<button type="button">{escape(name)}</button>'
    return f'<th scope="col" data-key="{key}"{kind}>{button}</th>'


def _row(edge: dict[str, Any]) -> str:
    data = "".join(f' data-{c}="{escape(str(edge[c]))}"' for c in ("writer", "reader", "percent"))
    return f"<tr{data}>{''.join(_cell(key, edge) for key in COLUMNS)}</tr>"


def _cell(key: str, edge: dict[str, Any]) -> str:
    if key not in NUMBERS:
        return f"<td>{escape(str(edge[key]))}</td>"
    text = f"{fmt(edge['low'])} to {fmt(edge['high'])}" if key == "low" else fmt(edge[key])
    return f'<td class="number" data-value="{edge[key]}">{text}</td>'


def _fact(name: str, value: str) -> str:
    return f"<span>{escape(name)}: {escape(str(value))}</span>"


def _asset(name: str) -> str:
    return (files("sparse_signals") / "assets" / name).read_text(encoding="utf-8")
