"""A traced circuit as one HTML file: the graph, its table of edges, what was traced and how.

The file opens from a disk, asks no host for anything, and keeps its state in its address.
"""

import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined

from sparse_signals.charts.style import VEGA_LITE, specification
from sparse_signals.charts.tracing import circuit_graph, named_edges
from sparse_signals.core.numbers import fmt, rounded
from sparse_signals.core.resume import atomic
from sparse_signals.tracing.circuit import Circuit

TEXTS = {  # columns of the table: key, which the address uses, and heading
    "upstream": "writer",
    "at": "writes at",
    "side": "side",
    "downstream": "reader",
    "dest": "reads at",
    "source": "attends to",
}
NUMBERS = {"prompts": "prompts", "weight": "weight", "low": "95 % interval", "share": "share"}
PAGES = Environment(
    loader=PackageLoader("sparse_signals", "assets"), autoescape=True, undefined=StrictUndefined
)
PAGES.filters["fmt"] = fmt


def write_page(path: Path | str, edges: pd.DataFrame, *, title: str, facts: dict[str, str]) -> Path:
    """Write the pooled circuit as a self-contained page, and return its path.

    `edges` is the table that `circuit_graph` draws. `facts` says what was traced and how: names
    and values, shown below the title. The file appears whole or not at all.
    Raises ValueError when there are no edges, OSError when the file cannot be written.
    """
    table = rounded(named_edges(edges)).sort_values("prompts", ascending=False, kind="stable")
    page = PAGES.get_template("circuit.html").render(
        title=title,
        facts=facts,
        of=edges["of"].max(),
        edges=table.to_dict("records"),
        texts=TEXTS,
        numbers=NUMBERS,
        spec=script_json(specification(circuit_graph(edges))),
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
