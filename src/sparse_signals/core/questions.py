"""What is asked of a model on prompts of any task: right answers, wrong ones, counterfactuals.

A table has a column text and, as far as they are known, answer, wrong, counterfactual, template
(the number of the sentence: what varies independently) and those of `encode`. An answer is one
item or several with | between them. An item is the token that comes next: "#1234" by its number,
anything else as the text goes on with it. A space comes before a word; not before a sign or a space
of its own, not after a space or an opening bracket, and not between two digits, where a number
goes on.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, cast

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from sparse_signals.core.model import Model, logits
from sparse_signals.core.objective import Objective
from sparse_signals.core.prompts import (
    Batch,
    PromptError,
    encode,
    is_word,
    place_of,
    plain_ids,
    unknown_words,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPENING = "([{“‘"
SHOWN = 6  # tokens of two texts that differ


@dataclass(frozen=True)
class Questions:
    """Prompts, their counterfactuals if any, token by token beside them, and what is asked.

    `right` and `wrong` are tokens of every prompt (none is wrong where no wrong answer is known),
    `template` numbers what varies independently: the prompt itself where no template is known.
    `notes` says, for people, what was chosen for them.
    """

    batch: Batch
    counterfactual: Batch | None
    objective: Objective
    right: list[list[int]]
    wrong: list[list[int]]
    template: Int[Tensor, "prompt"]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.right)

    def rows(self, rows: slice) -> "Questions":
        """The same of some of the prompts."""
        counterfactual = None if self.counterfactual is None else self.counterfactual.rows(rows)
        return Questions(
            self.batch.rows(rows),
            counterfactual,
            self.objective.rows(rows),
            self.right[rows],
            self.wrong[rows],
            self.template[rows],
            self.notes,
        )


def questions(
    model: Model, prompts: pd.DataFrame | Sequence[str], *, bos: bool | None = None
) -> Questions:
    """Encode prompts, and find the tokens that are asked about and the counterfactuals.

    F is the mean logit of the right tokens − that of the wrong ones, or ln P(a right token) where
    no wrong answer is known. Without an answer it is IO (and S is wrong) where the names are known,
    or else the token that the model itself finds likeliest. Of an item of several tokens the first
    one is asked, and a warning says so.
    Raises PromptError as `encode` does, and for an item that is no token, a right token that is
    wrong too, a column that is filled in some rows only, and a counterfactual of another length.

    >>> asked = questions(model, batch.table)  # of IOI, with columns io and s
    >>> asked.objective.what, [row[0] for row in asked.right] == batch.io.tolist()
    ('logit difference', True)
    """
    table = prompts if isinstance(prompts, pd.DataFrame) else pd.DataFrame({"text": list(prompts)})
    batch = encode(model, table, bos=bos)
    for column, names in {"answer": "io", "wrong": "s"}.items():
        if batch.io is not None and not _known(table, column):
            table = table.assign(**{column: table[names]})
    tokens = _Tokens(model, table)
    right, wrong, notes = tokens.of("answer"), tokens.of("wrong"), []
    if right is None:
        found = logits(model, batch.tokens, batch.last).argmax(1)
        right = found[:, None].tolist()
        notes.append("no answer is given: it is the token that the model finds likeliest")
    tokens.warn()
    if wrong is None:
        wrong = [[] for _ in right]
        objective = Objective.log_probability(right)
    else:
        _check_sides(right, wrong, table, tokens)
        objective = Objective.difference(right, wrong)
    return Questions(
        batch,
        _counterfactual(model, table, batch, bos),
        objective,
        right,
        wrong,
        _templates(table),
        tuple(notes),
    )


def next_tokens(item: str, text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokens of an item where a text goes on with it, by the rule above.

    Raises PromptError for an item with a word that the tokenizer does not know.
    """
    before, first = text[-1:], item[0]
    space = first.isalnum() and not (
        before.isspace() or before in OPENING or (before.isdigit() and first.isdigit())
    )
    # behind a word as any other, or behind a line break, which joins with nothing
    front = "to" if space else "\n"
    start, ids = plain_ids(front, tokenizer), plain_ids(f"{front}{' ' * space}{item}", tokenizer)
    found = ids[len(start) :]
    if tokenizer.unk_token_id in found:
        raise PromptError(unknown_words(" " * space + item, tokenizer))
    if ids[: len(start)] != start or not found:
        raise PromptError(f"cannot tell which token {item!r} is: give its number, as in #1234")
    return found


def answer_words(ids: list[int], tokenizer: "PreTrainedTokenizerBase", most: int = 3) -> str:
    """Right or wrong tokens as text: the first few, with | between them."""
    words = [cast(str, tokenizer.decode([token])).strip() for token in ids[:most]]
    return " | ".join([*words, "…"] if len(ids) > most else words)


class _Tokens:
    """The tokens of the items of a table, and which of these are not whole."""

    def __init__(self, model: Model, table: pd.DataFrame) -> None:
        self.model, self.table = model, table
        self.split: dict[str, list[int]] = {}
        self.next = cache(lambda item, end: next_tokens(item, end, model.tokenizer))

    def of(self, column: str) -> list[list[int]] | None:
        """The tokens of a column, each once in every row; None where it is not there."""
        if not _known(self.table, column):
            return None
        rows = enumerate(zip(self.table["text"], self.table[column], strict=True))
        return [self._row(n, text, cell) for n, (text, cell) in rows]

    def _row(self, n: int, text: str, cell: str) -> list[int]:
        items = [item.rstrip() for item in cell.split("|") if item.strip()]
        try:
            return list(dict.fromkeys(self._token(item, text) for item in items))
        except PromptError as error:
            raise PromptError(f"{place_of(self.table, n)}{error}") from None

    def _token(self, item: str, text: str) -> int:
        if item.strip()[0] == "#" and item.strip()[1:].isdecimal():
            token, words = int(item.strip()[1:]), len(self.model.bridge.embed.W_E)
            if token >= words:
                raise PromptError(f"there is no token {item}: the model has {words:,}")
            return token
        found = self.next(item, text[-1:])
        if len(found) > 1:
            self.split[item] = found
        return found[0]

    def read(self, tokens: list[int]) -> str:
        """Tokens as text."""
        return self.model.tokenizer.decode(tokens)

    def warn(self) -> None:
        """Say which items are more than a token."""
        if self.split:
            found = next(iter(self.split.values()))
            more = f" (and so for {len(self.split) - 1} more)" * (len(self.split) > 1)
            warnings.warn(
                f"{self.read(found)!r} is {len(found)} tokens: its first, "
                f"{self.read(found[:1])!r}, is the answer{more}",
                stacklevel=3,
            )


def _known(table: pd.DataFrame, column: str) -> bool:
    """Whether a column is filled. Raises PromptError where it is so in some rows only."""
    filled = [is_word(cell) and bool(cell.strip(" |")) for cell in table.get(column, [])]
    if any(filled) and not all(filled):
        raise PromptError(
            f"{place_of(table, filled.index(False))}nothing in column {column}, "
            "which other prompts have: fill it, or keep such prompts apart"
        )
    return any(filled)


def _check_sides(
    right: list[list[int]], wrong: list[list[int]], table: pd.DataFrame, tokens: _Tokens
) -> None:
    """Raise PromptError for a prompt with a token that is right and wrong."""
    for n, (ours, theirs) in enumerate(zip(right, wrong, strict=True)):
        if both := [token for token in ours if token in theirs]:
            raise PromptError(
                f"{place_of(table, n)}the answer and the wrong answer are the same token, "
                f"{tokens.read(both[:1])!r}: {table['text'].iloc[n][-60:]!r}"
            )


def _counterfactual(
    model: Model, table: pd.DataFrame, batch: Batch, bos: bool | None
) -> Batch | None:
    """The counterfactuals, as many tokens as the prompts: PromptError where one has not."""
    if not _known(table, "counterfactual"):
        return None
    texts = pd.DataFrame({"text": table["counterfactual"]}, index=table.index)
    try:
        other = encode(model, texts, bos=bos)
    except PromptError as error:
        raise PromptError(f"counterfactuals: {error}") from None
    lengths = [x.mask.sum(1) for x in (batch, other)]
    if uneven := (lengths[0] != lengths[1]).nonzero().flatten().tolist():
        n = uneven[0]
        ours, theirs = batch.labels[n], other.labels[n]
        same = [a == b for a, b in zip(ours, theirs, strict=False)]
        first = [*same, False].index(False)
        seen = ["|".join(x[first : first + SHOWN]) for x in (theirs, ours)]
        raise PromptError(
            f"{place_of(table, n)}the counterfactual has {len(theirs)} tokens and the prompt "
            f"{len(ours)}, they must have the same number: {seen[0]!r} against {seen[1]!r}"
        )
    return other


def _templates(table: pd.DataFrame) -> Int[Tensor, "prompt"]:
    if "template" not in table:
        return torch.arange(len(table))
    return torch.tensor(pd.factorize(table["template"])[0])
