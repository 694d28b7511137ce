"""What a notebook needs around the mathematics: a model, numbers, tables, glue, checks."""

import json
import logging
import os
import warnings
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import pandas as pd

from sparse_signals.core.numbers import fmt, is_number

if TYPE_CHECKING:
    from sparse_signals.core.model import Model


def start(chapter: str) -> None:
    """Make the notebook quiet and reproducible. The chapter's name seeds the random numbers."""
    _be_quiet()
    import torch

    from sparse_signals.charts.style import use_book_renderer

    torch.manual_seed(sum(chapter.encode()))
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_grad_enabled(False)
    use_book_renderer()


def open_chapter(chapter: str, model: str) -> "Model":
    """Start a chapter, and load the model of this edition in float64.

    The environment variable MODEL names another one. Raises ModelError when it cannot be loaded.
    """
    start(chapter)
    import torch

    from sparse_signals.core.model import load_model

    return load_model(os.environ.get("MODEL") or model, dtype=torch.float64)


def _be_quiet() -> None:
    """No progress bars, no warnings: they differ from run to run."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_PROGRESS_BARS="1")
    os.environ.update(TRANSFORMERS_VERBOSITY="error", TQDM_DISABLE="1", WANDB_MODE="disabled")
    warnings.filterwarnings("ignore")
    for library in ("transformers", "transformer_lens", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)


def html_table(table: pd.DataFrame, digits: int = 3, caption: str = "") -> str:
    """The table as plain HTML: numbers by `fmt` and aligned right, no row numbers."""
    from pandas.io.formats.style import Styler

    styler = Styler.from_custom_template(str(files("sparse_signals") / "assets"), "table.html")
    table = table.reset_index(drop=True)
    numbers = table.map(lambda x: "number" if is_number(x) else "")
    plain = styler(table).hide(axis="index").format(lambda x: fmt(x, digits))
    return plain.set_td_classes(numbers).set_caption(caption).to_html(exclude_styles=True)


@dataclass(frozen=True, repr=False)
class Shown:
    """A table as a notebook shows it, in HTML and in text."""

    table: pd.DataFrame
    digits: int
    caption: str

    def _repr_html_(self) -> str:
        return html_table(self.table, self.digits, self.caption)

    def __repr__(self) -> str:
        text = self.table.map(lambda x: fmt(x, self.digits)).to_string(index=False)
        return f"{self.caption}\n{text}" if self.caption else text


def show(table: pd.DataFrame, digits: int = 3, caption: str = "") -> Shown:
    """The table rounded for reading: end a cell with it. Named indices become columns."""
    named = any(name is not None for name in table.index.names)
    return Shown(table.reset_index() if named else table, digits, caption)


def glue(name: str, value: Any, digits: int = 3) -> None:
    """Keep a value for the prose, as people read it: {glue:text}`name` puts it in a sentence."""
    import myst_nb

    myst_nb.glue(name, fmt(value, digits), display=False)


def check(condition: Any, right: str, wrong: str) -> None:
    """Tell the reader of an exercise whether the answer holds."""
    print(f"Right: {right}" if bool(condition) else f"Not yet: {wrong}")


def published() -> dict[str, Any]:
    """Published numbers for GPT-2 small, each with its source: the facts file."""
    facts = files("sparse_signals") / "assets" / "published_gpt2_small.json"
    return json.loads(facts.read_text(encoding="utf-8"))
