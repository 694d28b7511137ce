"""How a chart in a notebook becomes part of a page: a MyST-NB renderer and a Sphinx extension.

The page gets the chart's picture (drawn at build time, with the description as its alternative
text), its Vega-Lite spec, which `charts.js` turns into the live chart, and its data as a table.
"""

import json
from hashlib import sha256
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
import vl_convert
from docutils import nodes
from myst_nb.core.render import MimeData, NbElementRenderer

from sparse_signals.app.editions import OFFERED, VERSIONS, page_name
from sparse_signals.app.findings import Findings
from sparse_signals.app.notebook import html_table
from sparse_signals.app.page import script_json
from sparse_signals.charts.style import MIME, VEGA_LITE

MAX_ROWS = 200
MAX_TEXT = 60
CITING = "book/how-to-run"
LICENCE = "https://creativecommons.org/licenses/by/4.0/"
HOW_TO_COMPUTE = "how-to-run.html#gpt-2-small"  # how an edition that is not stored is made


class VegaLiteRenderer:
    """MyST-NB plugin for Vega-Lite output. A chart without a description is a warning."""

    mime_priority_overrides = (("*", MIME, 1),)

    @staticmethod
    def handle_mime(
        renderer: NbElementRenderer, data: MimeData, inline: bool
    ) -> list[nodes.Element] | None:
        """The nodes of a chart, or None when the output is something else."""
        if inline or data.mime_type != MIME:
            return None
        spec: dict[str, Any] = data.content  # type: ignore[assignment]
        where = f"the chart in cell {(data.cell_index or 0) + 1}"
        if not spec.get("description"):
            renderer.logger.warning(f"{where} has no description", line=data.line)
        for order, script in enumerate(("vendor/vega.js", "charts.js")):
            renderer.add_js_file(f"chart_{order}", script, {"defer": "defer"})
        text = script_json(spec)
        brush = ["chart-brush"] if '"type": "interval"' in text else []
        figure = nodes.container(classes=["chart", *brush])
        try:
            figure += picture(renderer, spec)
        except ValueError as error:
            renderer.logger.warning(f"{where} cannot be drawn: {error}", line=data.line)
        figure += nodes.raw(text=live(text, spec.get("datasets", {})), format="html")
        return [figure]


def picture(renderer: NbElementRenderer, spec: dict[str, Any]) -> nodes.image:
    """The chart as it is before any click: what is seen without scripts, and in print."""
    opaque = spec | {"background": "white"}
    png = vl_convert.vegalite_to_png(opaque, vl_version=VEGA_LITE, scale=1.5)
    uri = renderer.write_file([f"{digest(png)}.png"], png, exists_ok=True)
    return nodes.image(uri=uri, alt=spec.get("description", ""), classes=["chart-picture"])


def digest(content: bytes) -> str:
    """A short name for some content."""
    return sha256(content).hexdigest()[:24]


def live(spec: str, datasets: dict[str, list[dict[str, Any]]]) -> str:
    """The spec (from `script_json`) for `charts.js`, and the chart's data in a folded table."""
    tables = "".join(data_table(rows) for rows in datasets.values())
    return (
        f'<script type="application/json" class="chart-spec">{spec}</script>'
        f'<details class="chart-data"><summary>Data behind this chart</summary>{tables}</details>'
    )


def data_table(rows: list[dict[str, Any]]) -> str:
    """At most 200 rows of a chart's data, as a table that says how many there are."""
    table = pd.DataFrame(rows[:MAX_ROWS]).map(shorten)
    total = f"{len(rows):,} rows"
    caption = total if len(rows) <= MAX_ROWS else f"The first {MAX_ROWS} of {total}"
    content = html_table(table, digits=4, caption=caption)
    return f'<div class="chart-table" tabindex="0">{content}</div>'


def shorten(value: Any) -> Any:
    """Long text (packed numbers) cut for the table; anything else as it is."""
    long = isinstance(value, str) and len(value) > MAX_TEXT
    return value[: MAX_TEXT - 1] + "…" if long else value


def finish_page(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Sphinx event: name the edition below the title of an executed page; mend a list's roles."""
    body = context.get("body") or ""
    # docutils 0.21 gives list items of a bibliography a role that lists may not contain
    body = body.replace('role="doc-biblioentry"', 'role="listitem"')
    edition = app.env.metadata.get(page, {}).get("edition")
    if edition:
        facts = json.loads(edition) if isinstance(edition, str) else edition
        stored = [
            path.parent.name
            for path in Path(app.srcdir, "editions").glob(f"*/{page.split('/')[-1]}.ipynb")
        ]
        lines = f'<p class="edition">{escape(describe(facts))}</p>{switch(page, facts, stored)}'
        body = body.replace("</h1>", f"</h1>\n{lines}", 1)
        if facts.get("model") != facts.get("opens_on"):
            context["title"] = f"{context['title']} ({facts['model']})"
    context["body"] = body
    if "pathto" in context:
        context["theme_extra_footer"] = footer(context["pathto"](CITING), repository(app))


def footer(citing: str, address: str) -> str:
    """Whose the page is and where its code is, for the foot of it."""
    parts = [f'Prose and figures: <a href="{LICENCE}">CC BY 4.0</a>. Code: MIT.']
    parts += [f'<a href="{escape(citing)}#citing-and-licences">How to cite</a>.']
    parts += [f'<a href="{escape(address)}">Source of the book</a>.'] if address else []
    return f"<p>{' '.join(parts)}</p>"


def repository(app: Any) -> str:
    """Where the code is: `repository: url` of the configuration, or nothing."""
    return app.config.html_theme_options.get("repository_url") or ""


def name_repository(app: Any, page: str, source: list[str]) -> None:
    """Sphinx event: where a page says ADDRESS it means the repository, if that is known."""
    if page == CITING and repository(app):
        source[0] = source[0].replace("ADDRESS", repository(app))


def describe(facts: dict[str, str]) -> str:
    """What computed a page, in a sentence."""
    versions = ", ".join(f"{name} {facts[name]}" for name in VERSIONS)
    model = f"with the model {facts['model']} ({facts['size']}) " if "model" in facts else ""
    return f"Computed {model}on a {facts['device']}: {versions}."


def switch(page: str, facts: dict[str, str], stored: list[str]) -> str:
    """Links from a page to the same chapter on other models; nothing where none is `stored`."""
    if not stored:
        return ""
    chapter, items = page.split("/")[-1], []
    for model in dict.fromkeys((facts["opens_on"], *sorted(stored), *OFFERED)):
        href = f"{page_name(chapter, model, facts['opens_on'])}.html"
        if model == facts["model"]:
            items.append(f'<li aria-current="page">{escape(model)}</li>')
        elif model in (facts["opens_on"], *stored):
            items.append(f'<li><a rel="alternate" href="{escape(href)}">{escape(model)}</a></li>')
        else:
            link = f'<a href="{HOW_TO_COMPUTE}">not computed yet</a>'
            items.append(f"<li>{escape(model)}: {link}</li>")
    head = '<nav class="editions" aria-label="This chapter on other models"><span>This chapter on'
    return f"{head}</span><ul>{''.join(items)}</ul></nav>"


def plain_bars(
    app: Any, what: str, name: str, documented: Any, options: Any, lines: list[str]
) -> None:
    """Sphinx event: bars in docstrings are absolute values, not references."""
    lines[:] = [x if x.startswith(">>>") else x.replace("|", r"\|") for x in lines]


def setup(app: Any) -> dict[str, bool]:
    """Sphinx extension entry point."""
    app.add_directive("findings", Findings)
    app.connect("source-read", name_repository)
    app.connect("html-page-context", finish_page)
    app.connect("autodoc-process-docstring", plain_bars)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
