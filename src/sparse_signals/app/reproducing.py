"""`sparse-signals reproduce`: the published numbers of GPT-2 small, computed again and compared."""

import json
import shutil
import sys
from argparse import Namespace
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from sparse_signals.app.commands import PARTIAL, in_one_line, open_folder, open_model, warnings_said
from sparse_signals.app.errors import PROGRAM, Stopped, UsageError
from sparse_signals.app.notebook import published
from sparse_signals.core.model import Model
from sparse_signals.core.numbers import fmt, is_number
from sparse_signals.core.prompts import Batch, encode, ioi_prompts
from sparse_signals.core.reading import read_texts, with_names
from sparse_signals.core.resume import alone_in, atomic, remove_leftovers, write_parquet
from sparse_signals.interventions.case import templates_of
from sparse_signals.interventions.published_facts import side_by_side
from sparse_signals.interventions.reproduction import PROMPTS, measure

TABLE, SHEET, PAGE = "numbers.parquet", "numbers.csv", "numbers.md"
PRINTED = ["fact", "published", "computed", "difference", "tolerance", "verdict"]


def execute_reproduction(options: Namespace) -> None:
    """Compute every published number, write the comparison and print it."""
    with in_one_line():
        model = open_model(options)
        if model.rotary:
            raise UsageError(f"{model.name} is no GPT-2, of which the published numbers are")
        batch = published_like(model, options)
        out = open_folder(options.out or Path("runs") / "reproduce" / model.name)
        partial = out / PARTIAL
        with alone_in(partial):
            remove_leftovers(out / name for name in (TABLE, SHEET, PAGE))
            table = compared(model, batch, partial, options)
            for path in partial.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
        write_all(table, out, about(model, batch, options))
    if not options.quiet:
        print(said(table).to_string(index=False))
        print(verdicts(table).to_string(index=False))
        print("written:", *(f"  {out / name}" for name in (PAGE, SHEET, TABLE)), sep="\n")


def published_like(model: Model, options: Namespace) -> Batch:
    """As many prompts as were published, without a beginning-of-sequence token; or those given."""
    given = options.prompts
    prompts = read_texts(given) if given else ioi_prompts(PROMPTS, tokenizer=model.tokenizer)
    with warnings_said(options):
        return encode(model, with_names(prompts), bos=False)


def compared(model: Model, batch: Batch, partial: Path, options: Namespace) -> pd.DataFrame:
    """The comparison; what an interrupted run has finished is kept."""

    def say(line: str) -> None:
        print(f"{PROGRAM}: {line}", file=sys.stderr)

    facts = published()
    try:
        found, notes = measure(
            model, batch, facts, folder=partial, say=None if options.quiet else say
        )
    except KeyboardInterrupt:
        raise Stopped("stopped; finished chunks are kept, the same command goes on there") from None
    return side_by_side(facts, found, notes)


def about(model: Model, batch: Batch, options: Namespace) -> dict[str, str]:
    """What was computed, on what and with what."""
    source = options.prompts.name if options.prompts else "this project's sentences, seed 0"
    prompts = f"{len(batch.tokens)} ({source}), of {len(set(templates_of(batch)))} templates"
    packages = ("sparse-signals", "torch", "transformers", "transformer-lens")
    return {
        "model": f"{model.name}, {options.dtype}, on {model.device.type}",
        "prompts": prompts,
        "versions": ", ".join(f"{name} {version(name)}" for name in packages),
    }


# --- what is written and printed -----------------------------------------------------------------


def write_all(table: pd.DataFrame, out: Path, facts: dict[str, str]) -> None:
    """The comparison as a table for programs, as one for spreadsheets and as a page to read."""
    write_parquet(table, out / TABLE)
    texts = {SHEET: table.to_csv(index=False), PAGE: page_of(table, facts)}
    for name, text in texts.items():
        with atomic(out / name) as aside:
            aside.write_text(text, encoding="utf-8")


def said(table: pd.DataFrame) -> pd.DataFrame:
    """The quantities that are computed, as people read them."""
    rows = table[table["verdict"] != "not computed"]
    shown = rows[["fact", "verdict"]].assign(
        published=[_text(x) for x in rows["published"]],
        computed=[_with_interval(row) for row in rows.to_dict("records")],
        difference=[fmt(x) for x in rows["difference"]],
        tolerance=[fmt(x) for x in rows["tolerance"]],
    )
    return shown[PRINTED]


def _text(value: str) -> str:
    read = json.loads(value)
    return ", ".join(map(str, read)) if isinstance(read, list) else fmt(read, 4)


def _with_interval(row: dict) -> str:
    if row["verdict"] == "undefined":
        return "undefined"
    value = json.loads(row["computed"])
    if is_number(value) and pd.notna(row["low"]):
        return f"{fmt(value)} [{fmt(row['low'])}, {fmt(row['high'])}]"
    return _text(row["computed"])


def verdicts(table: pd.DataFrame) -> pd.DataFrame:
    """How many facts of every section have which verdict."""
    section = table["fact"].str.split("/").str[0].rename("section")
    counts = pd.crosstab(section, table["verdict"])
    names = ["agrees", "differs", "undefined", "not computed"]
    counts = counts.reindex(index=section.unique(), columns=names, fill_value=0)
    return pd.concat([counts, counts.sum().to_frame("all").T]).rename_axis("section").reset_index()


def page_of(table: pd.DataFrame, facts: dict[str, str]) -> str:
    """The comparison as Markdown: what was computed, the verdicts, then section by section."""
    lines = [f"# Published numbers, computed again on {facts['model'].split(',')[0]}", ""]
    lines += [f"* {name}: {value}" for name, value in facts.items()]
    lines += [f"* published: {published()['about'].split(', read from')[0]}", ""]
    lines += [
        "A number agrees only if it is within the tolerance, which was fixed before. An interval",
        "holds 95 % of what resampled templates of the prompts (in the summary of",
        "interventions: resampled edges) give. Where prompts differ, `differs` may mean no more.",
        "",
        *_markdown(verdicts(table)),
    ]
    names = table["fact"].str.split("/", n=1)
    table = table.assign(fact=names.str[-1])
    for section, rows in table.groupby(names.str[0], sort=False):
        lines += ["", f"## {section}", ""]
        ours = rows[rows["verdict"] != "not computed"]
        if len(ours):
            lines += [*_markdown(said(ours)), ""]
        for (how, basis, why), those in ours.groupby(["how", "basis", "why"], sort=False):
            lines.append(f"* {_named(those)}: {how}. Tolerance: {basis}. May differ: {why}.")
        notes = rows.dropna(subset="note")
        for (verdict, note), those in notes.groupby(["verdict", "note"], sort=False):
            lines.append(f"* {_named(those)}: {verdict}, {note}.")
    return "\n".join(lines) + "\n"


def _named(rows: pd.DataFrame) -> str:
    first, more = rows["fact"].iloc[0], f" and {len(rows) - 1} more" if len(rows) > 1 else ""
    return f"{first}{more}"


def _markdown(table: pd.DataFrame) -> Sequence[str]:
    rows = [table.columns, ["---"] * table.shape[1], *table.to_numpy()]
    return ["| " + " | ".join(str(x).replace("|", "\\|") for x in row) + " |" for row in rows]
