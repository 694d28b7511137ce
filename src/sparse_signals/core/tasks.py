"""Tasks whose answers are known: prompts, right and wrong answers, aligned counterfactuals.

Every task draws a table for `questions`: text, answer, wrong, counterfactual, template and
held_out, the words in the slots, and where the roles begin ("at name", …). A counterfactual has
other tokens in some slots and the same ones elsewhere, so it is as long as its prompt. Held-out
templates are for tests of what was found on the others. Sentences and words are this project's own.
"""

import random
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import pandas as pd

from sparse_signals.core.prompts import (
    ROLE_MARK,
    PromptError,
    ioi_prompts,
    name_id,
    place_of,
    plain_ids,
)
from sparse_signals.core.sentences import NAMES, OBJECTS, PLACES, TEMPLATES, Template
from sparse_signals.core.task_sentences import (
    AGREEMENT,
    EVENTS,
    GREATER_THAN,
    INDUCTION,
    LISTED,
    MEN,
    NOUNS,
    PRONOUNS,
    WOMEN,
    YEARS,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Words = dict[str, list[str]]
NEEDED = 10  # words of a kind
BLOCK = range(5, 10)  # words of which induction repeats some


@dataclass(frozen=True)
class Task:
    """A task: what it asks, whose idea it is, its sentences, and its kinds of counterfactual.

    `tables` draws prompts with counterfactuals of a kind, the usual one first: from templates by
    their numbers, how many, the seed and the tokenizer.
    """

    name: str
    asks: str
    source: str
    templates: tuple[Template, ...]
    tables: dict[str, Callable[..., pd.DataFrame]]


def task_prompts(
    name: str,
    n: int,
    seed: int = 0,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    counterfactual: str | None = None,
    held_out: bool | None = None,
) -> pd.DataFrame:
    """Draw `n` prompts of a task of `TASKS`, the same ones for the same arguments.

    Columns: text, answer, wrong, counterfactual, template, held_out, and what was drawn; of IOI
    those of `ioi_prompts`. `counterfactual` is one of the kinds of the task (None: its first).
    `held_out` True takes held-out templates only, False the others only, None all. Words that are
    no single tokens are left out, with a warning. Greater-than needs the tokenizer: it asks for as
    many digits as a token of a year has.
    Raises PromptError for a bad choice, and where the tokenizer lacks words.

    >>> prompts = task_prompts("agreement", 2, seed=1)
    >>> prompts["answer"].tolist(), prompts["wrong"].tolist()
    (['is', 'are'], ['are', 'is'])
    """
    if name not in TASKS:
        raise PromptError(f"no task {name!r}: choose among {', '.join(TASKS)}")
    task = TASKS[name]
    kind = counterfactual or next(iter(task.tables))
    if kind not in task.tables:
        kinds = " or ".join(map(repr, task.tables))
        raise PromptError(f"the counterfactual of {name} is {kinds}, not {kind!r}")
    if n < 1:
        raise PromptError(f"at least one prompt is needed, not {n}")
    templates = {i: x for i, x in enumerate(task.templates) if held_out in (None, x.held_out)}
    table = task.tables[kind](templates, n, seed, tokenizer)
    table["held_out"] = [templates[i].held_out for i in table["template"]]
    first = ["text", "answer", "wrong", "counterfactual", "template", "held_out"]
    return table[[*first, *(column for column in table if column not in first)]]


def ioi_counterfactuals(
    table: pd.DataFrame,
    kind: str = "flip",
    seed: int = 0,
    *,
    names: Sequence[str] = NAMES,
) -> list[str]:
    """Counterfactuals of IOI prompts (columns text, io and s), token by token beside them.

    "flip": the second S is IO, so that the answer changes sides. "abc": three other names, all
    different, so that nobody is repeated and the sentence stays; of `names`, which should be single
    tokens.
    Raises PromptError for another kind, for prompts whose S is not there twice and IO once, and
    where too few names are left.

    >>> table = pd.DataFrame({"text": ["So Ann met Bob and Bob ran to"], "io": "Ann", "s": "Bob"})
    >>> ioi_counterfactuals(table, "flip")
    ['So Ann met Bob and Ann ran to']
    """
    if kind not in ("flip", "abc"):
        raise PromptError(f"the counterfactual of IOI is 'flip' or 'abc', not {kind!r}")
    rng, texts = random.Random(f"{kind} {seed}"), []
    for n, (text, io, s) in enumerate(zip(table["text"], table["io"], table["s"], strict=True)):
        pieces = re.split(rf"(?<!\w)({re.escape(io)}|{re.escape(s)})(?!\w)", text)
        if sorted(pieces[1::2]) != sorted([io, s, s]):
            raise PromptError(f"{place_of(table, n)}needs s twice and io once: {text!r}")
        if kind == "flip":
            second = [i for i, piece in enumerate(pieces) if piece == s][1]
            pieces[second] = io
        else:
            there = set(re.findall(r"\w+", text))
            free = [name for name in names if name not in there]
            if len(free) < 3:
                raise PromptError(f"three other names are needed, {len(free)} left")
            pieces[1::2] = rng.sample(free, 3)
        texts.append("".join(pieces))
    return texts


def _ioi_table(
    templates: dict[int, Template],
    n: int,
    seed: int,
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    kind: str,
) -> pd.DataFrame:
    numbers, names = list(templates), _known_words("ioi", "names", Pool(NAMES), tokenizer)
    table = ioi_prompts(n, seed, names=names, templates=list(templates.values()))
    table["template"] = [numbers[i] for i in table["template"]]
    table["answer"], table["wrong"] = table["io"], table["s"]
    table["counterfactual"] = ioi_counterfactuals(table, kind, seed, names=names)
    return table


# --- tasks of templates with slots ---------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """What is drawn for a prompt: words for its slots, and those of its counterfactual instead."""

    slots: dict[str, str]
    changed: dict[str, str]
    answer: str
    wrong: str


def _single_tokens(words: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    return [word for word in words if name_id(word, tokenizer) is not None]


def _noun_pairs(nouns: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    several = _single_tokens([NOUNS[noun] for noun in nouns], tokenizer)
    return [noun for noun in _single_tokens(nouns, tokenizer) if NOUNS[noun] in several]


def _split_years(years: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The years whose century is tokens of its own, and the rest as the most digits that occur."""
    digits = {year: _digits(year, tokenizer) for year in years}
    return [year for year in years if digits[year] and digits[year] == max(digits.values())]


def _digits(year: str, tokenizer: "PreTrainedTokenizerBase | None") -> int:
    """How many digits the token behind the century has: 2, 1, or 0 if the century has no end."""
    if tokenizer is None:
        return 2
    century, whole = (plain_ids(f"to {x}", tokenizer) for x in (year[:2], year))
    rest = whole[len(century) :]
    if whole[: len(century)] != century or tokenizer.unk_token_id in whole[1:]:
        return 0
    return {1: 2, 2: 1}.get(len(rest), 0)


@dataclass(frozen=True)
class Pool:
    """Words that may be drawn: `keep` leaves those that a tokenizer has as tokens."""

    words: Sequence[str]
    needed: int = NEEDED
    keep: "Callable[[Sequence[str], PreTrainedTokenizerBase], list[str]]" = _single_tokens


@dataclass(frozen=True)
class Slots:
    """How a task fills its templates: what it draws from, which slots are roles, how it draws."""

    task: str
    pools: dict[str, Pool]
    roles: tuple[str, ...]
    draw: "Callable[[random.Random, int, Words, PreTrainedTokenizerBase | None], Drawn]"

    def __call__(
        self,
        templates: dict[int, Template],
        n: int,
        seed: int,
        tokenizer: "PreTrainedTokenizerBase | None",
    ) -> pd.DataFrame:
        """A table of `n` prompts."""
        if tokenizer is not None:
            _check_templates(self.task, templates.values(), tokenizer)
        pools = self.pools.items()
        words = {kind: _known_words(self.task, kind, pool, tokenizer) for kind, pool in pools}
        rng, numbers, rows = random.Random(seed), list(templates), []
        for i in range(n):
            number, drawn = rng.choice(numbers), self.draw(rng, i, words, tokenizer)
            text, starts = _filled_in(templates[number].text, drawn.slots)
            other, _ = _filled_in(templates[number].text, drawn.slots | drawn.changed)
            row = {"text": text, "answer": drawn.answer, "wrong": drawn.wrong}
            row |= {"counterfactual": other, "template": number}
            row |= {role.lower(): drawn.slots[role] for role in self.roles}
            row |= {f"{ROLE_MARK}{role.lower()}": starts[role] for role in self.roles}
            rows.append(row)
        return pd.DataFrame(rows)


def _known_words(
    task: str, kind: str, pool: Pool, tokenizer: "PreTrainedTokenizerBase | None"
) -> list[str]:
    """The words of a pool that a tokenizer has as tokens; the others are warned of."""
    if tokenizer is None:
        return list(pool.words)
    known = pool.keep(pool.words, tokenizer)
    dropped = [word for word in pool.words if word not in set(known)]
    some = ", ".join(dropped[:8]) + ", …" * (len(dropped) > 8)
    if len(known) < pool.needed:
        raise PromptError(
            f"{task} needs {pool.needed} {kind} as tokens, this tokenizer has {len(known)} of "
            f"{len(pool.words)}, not {some}"
        )
    if dropped:
        warnings.warn(
            f"{task}: {len(dropped)} of {len(pool.words)} {kind} are left out, which this "
            f"tokenizer does not have as tokens: {some}",
            stacklevel=4,
        )
    return known


def _check_templates(
    task: str, templates: Iterable[Template], tokenizer: "PreTrainedTokenizerBase"
) -> None:
    """Raise PromptError for sentences with words that a tokenizer does not know."""
    texts = [re.sub(r"\[\w+\]", " ", template.text) for template in templates]
    words = dict.fromkeys(word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text))
    forms = {word: [plain_ids(x, tokenizer) for x in (word, f" {word}")] for word in words}
    unknown = [x for x in words if all(tokenizer.unk_token_id in ids for ids in forms[x])]
    if unknown:
        raise PromptError(
            f"the sentences of {task} have words that are not in the vocabulary: "
            f"{', '.join(unknown)}; another model is needed"
        )


def _filled_in(text: str, slots: dict[str, str]) -> tuple[str, dict[str, int]]:
    """A template with words in its slots, and at which character each slot begins, first if twice.

    A slot is [NAME].
    """
    filled, starts = "", {}
    for i, piece in enumerate(re.split(r"\[(\w+)\]", text)):
        if i % 2:
            starts.setdefault(piece, len(filled))
        filled += slots[piece] if i % 2 else piece
    return filled, starts


def _draw_years(
    rng: random.Random, n: int, words: Words, tokenizer: "PreTrainedTokenizerBase | None"
) -> Drawn:
    """Two digits: those after the year are right, the others wrong.

    One digit: later decades are right, earlier ones wrong; that of the year itself may be either.
    """
    start = rng.choice([year for year in words["years"] if "1" <= year[2] <= "8"])
    century = [year for year in words["years"] if year[:2] == start[:2]]
    early = next((year for year in century if year[2:] >= "01"), century[0])
    slots = {"EVENT": rng.choice(words["events"]), "CENTURY": start[:2], "YEAR": start[2:]}
    if _digits(start, tokenizer) == 2:
        right = [year[2:] for year in century if year > start]
        wrong = [year[2:] for year in century if year <= start]
    else:
        right = [digit for digit in "0123456789" if digit > start[2]]
        wrong = [digit for digit in "0123456789" if digit < start[2]]
    return Drawn(slots, {"YEAR": early[2:]}, "|".join(right), "|".join(wrong))


def _draw_pronoun(
    rng: random.Random, n: int, words: Words, tokenizer: "PreTrainedTokenizerBase | None"
) -> Drawn:
    """Women and men in turn."""
    woman, man = rng.choice(words["names of women"]), rng.choice(words["names of men"])
    slots = {"PLACE": rng.choice(words["places"]), "OBJECT": rng.choice(words["objects"])}
    if n % 2:
        return Drawn(slots | {"NAME": man}, {"NAME": woman}, "he", "she")
    return Drawn(slots | {"NAME": woman}, {"NAME": man}, "she", "he")


def _draw_nouns(
    rng: random.Random, n: int, words: Words, tokenizer: "PreTrainedTokenizerBase | None"
) -> Drawn:
    """One and several in turn; the noun between them and the verb is one or several by chance."""
    noun, other = rng.sample(words["nouns"], 2)
    slots = {"OTHER": rng.choice([other, NOUNS[other]])}
    if n % 2:
        return Drawn(slots | {"NOUN": NOUNS[noun]}, {"NOUN": noun}, "are", "is")
    return Drawn(slots | {"NOUN": noun}, {"NOUN": NOUNS[noun]}, "is", "are")


def _draw_repeated(
    rng: random.Random, n: int, words: Words, tokenizer: "PreTrainedTokenizerBase | None"
) -> Drawn:
    """A block of words, and its beginning again; the counterfactual has another block."""
    size = rng.choice(BLOCK)
    again = rng.randrange(2, size - 1)  # words that come again
    drawn = rng.sample(words["words"], 2 * size)
    blocks = [
        {
            "BEFORE": " ".join(block[: again - 1]),
            "SEEN": block[again - 1],
            "NEXT": block[again],
            "AFTER": " ".join(block[again + 1 :]),
        }
        for block in (drawn[:size], drawn[size:])
    ]
    slots = blocks[0] | {"AGAIN": " ".join(drawn[:again])}
    return Drawn(slots, blocks[1], blocks[0]["NEXT"], blocks[1]["NEXT"])


TASKS = {
    task.name: task
    for task in (
        Task(
            "ioi",
            "Of two people one is named again and gives something to … the other one.",
            "Wang et al. 2023, Interpretability in the Wild",
            TEMPLATES,
            {kind: partial(_ioi_table, kind=kind) for kind in ("flip", "abc")},
        ),
        Task(
            "greater-than",
            "Something begins in a year and ends later in the same century.",
            "Hanna et al. 2023, How does GPT-2 compute greater-than?",
            GREATER_THAN,
            {
                "early": Slots(
                    "greater-than",
                    {"events": Pool(EVENTS), "years": Pool(YEARS, keep=_split_years)},
                    ("EVENT", "YEAR"),
                    _draw_years,
                )
            },
        ),
        Task(
            "pronouns",
            "A person has a name, and is then called she or he.",
            "Mathwin et al. 2023, Identifying a Preliminary Circuit for Predicting Gendered "
            "Pronouns in GPT-2 Small",
            PRONOUNS,
            {
                "flip": Slots(
                    "pronouns",
                    {
                        "names of women": Pool(WOMEN),
                        "names of men": Pool(MEN),
                        "places": Pool(PLACES),
                        "objects": Pool(OBJECTS),
                    },
                    ("NAME",),
                    _draw_pronoun,
                )
            },
        ),
        Task(
            "induction",
            "Words in no order begin to come again: what came next the first time?",
            "Olsson et al. 2022, In-context Learning and Induction Heads",
            INDUCTION,
            {
                "unrepeated": Slots(
                    "induction",
                    {"words": Pool(LISTED, needed=2 * max(BLOCK))},
                    ("SEEN", "NEXT"),
                    _draw_repeated,
                )
            },
        ),
        Task(
            "agreement",
            "A verb is singular or plural as its subject is, whatever noun stands between them.",
            "Linzen et al. 2016, Assessing the Ability of LSTMs to Learn Syntax-Sensitive "
            "Dependencies",
            AGREEMENT,
            {
                "flip": Slots(
                    "agreement",
                    {"nouns": Pool(tuple(NOUNS), keep=_noun_pairs)},
                    ("NOUN", "OTHER"),
                    _draw_nouns,
                )
            },
        ),
    )
}
