"""Prompts out of files, and the names that they hold."""

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pandas as pd

from sparse_signals.core.prompts import PromptError, is_word, place_of
from sparse_signals.core.sentences import NAMES


def read_texts(path: str | Path) -> pd.DataFrame:
    """Read prompts from a .txt file (one a line) or a .csv file with a column text.

    Other columns, if known: io and s, the names; answer, wrong and counterfactual, as
    `questions` reads them; "at noun", …: at which character a role begins, as `encode` does.
    The index is the line in the file, from 1. Spaces around headers and values are dropped.
    Raises PromptError for another kind of file, one that is no UTF-8 text, an empty one, and for
    headers and rows that do not fit.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".csv"):
        raise PromptError(f"prompts come from a .txt or .csv file, not {path.name}")
    if not path.is_file():
        raise PromptError(f"no such file: {path}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = ((n, {"text": line.strip()}) for n, line in enumerate(file, 1) if line.strip())
            rows = dict(_csv_rows(file, path.name) if path.suffix == ".csv" else lines)
    except UnicodeDecodeError as error:
        raise PromptError(f"{path.name} is not a {path.suffix} file in UTF-8: {error}") from error
    if not rows:
        raise PromptError(f"{path.name} holds no prompts")
    return pd.DataFrame(rows.values(), index=pd.Index(rows, name="line"))


def _csv_rows(file: Iterable[str], name: str) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.reader(file, skipinitialspace=True, strict=True)
    header = [cell.strip().lower() for cell in next(reader, [])]
    if "text" not in header:
        raise PromptError(f"{name} needs a column 'text'; its first line is {', '.join(header)!r}")
    if twice := [x for x in dict.fromkeys(header) if x and header.count(x) > 1]:
        raise PromptError(f"{name} has several columns called {', '.join(twice)}: keep one of them")
    try:
        for cells in reader:
            row = dict(zip(header, (cell.strip() for cell in cells), strict=False))
            if len(cells) > len(header):
                raise csv.Error(f"a text with commas needs quotes around it: {row['text']!r} …")
            if any(row.values()):
                yield reader.line_num, row
    except csv.Error as error:
        raise PromptError(f"{name}, line {reader.line_num}: {error}") from error


def with_names(prompts: pd.DataFrame, names: Sequence[str] = NAMES) -> pd.DataFrame:
    """The prompts with columns io and s, inferred where they are missing, and then order.

    Of `names` and the one that is given, if any, the one that comes twice is the subject and the
    other, that comes once, the indirect object. Raises PromptError for a prompt without such names.
    """
    rows = prompts.to_dict("records")
    inferred = [_infer_names(row, names, place_of(prompts, n)) for n, row in enumerate(rows)]
    table = [row | more for row, more in zip(rows, inferred, strict=True)]
    return pd.DataFrame(table, index=prompts.index)


def _infer_names(row: dict, names: Sequence[str], place: str) -> dict:
    given = {key: row[key] for key in ("io", "s") if is_word(row.get(key))}
    if len(given) == 2:
        return {}
    words = re.findall(r"\w+", row["text"])
    found = [word for word in words if word in names or word in given.values()]
    count = {word: found.count(word) for word in [*found, *given.values()]}
    once = [given["io"]] if "io" in given else [x for x in count if count[x] == 1]
    twice = [given["s"]] if "s" in given else [x for x in count if count[x] == 2]
    if [count[x] for x in once] == [1] and [count[x] for x in twice] == [2]:
        order = "ABBA" if found.index(once[0]) < found.index(twice[0]) else "BABA"
        return {"io": once[0], "s": twice[0], "order": order}
    small = dict.fromkeys(x for x in words if x not in names and x.capitalize() in names)
    if small:
        reason = f"a name has a capital letter, but {', '.join(small)} has none"
    elif given:
        reason = " and ".join(f"{key} is {x!r}, there {count[x]}×" for key, x in given.items())
    else:
        has = ", ".join(f"{x} {n}×" for x, n in count.items()) or "none"
        reason = f"it has {has} of {len(names)} known names; columns io and s of a .csv name others"
    raise PromptError(f"{place}needs one name twice and another once: {row['text']!r} ({reason})")
