"""Prompts for indirect object identification (IOI), and what their tokens do.

Two people are named, one of them is named again and gives something "to" … the other one. The name
that comes once is the indirect object (IO), the name that comes twice is the subject (S). In an
ABBA prompt the IO is named first, in a BABA prompt the subject is. The task is that of Wang et al.
2023, "Interpretability in the Wild"; names, places, objects and sentences are this project's own.
"""

import random
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparse_signals.core.model import Model
from sparse_signals.core.sentences import NAMES, OBJECTS, PLACES, TEMPLATES, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEIGHBOURS = ("IO", "S1", "S2", "third")
ROLE_MARK = "at "  # columns that say at which character of the text a role begins
OTHER = "other"
INTACT = "intact"
OTHER_ORDER = {"ABBA": "BABA", "BABA": "ABBA"}


class PromptError(ValueError):
    """A prompt that cannot be used, and why, in one line."""


@dataclass(frozen=True)
class Batch:
    """Prompts as tokens, padded on the right; `roles` maps a role to its position in each prompt.

    `io` and `s` (token ids of the names) are None where names are not known, `roles` is empty
    where neither names are nor where else a role is.
    """

    table: pd.DataFrame
    tokens: Int[Tensor, "prompt pos"]
    mask: Bool[Tensor, "prompt pos"]
    labels: list[list[str]]
    roles: dict[str, Int[Tensor, "prompt"]]
    io: Int[Tensor, "prompt"] | None
    s: Int[Tensor, "prompt"] | None

    @property
    def last(self) -> Int[Tensor, "prompt"]:
        """The position of the last token of every prompt."""
        return self.mask.sum(1) - 1

    def answers(self, what: str) -> Int[Tensor, "prompt 2"]:
        """The token ids of IO and S. Raises PromptError, naming `what` needs them, without."""
        if self.io is None or self.s is None:
            raise PromptError(f"{what} needs prompts with two names, IO and S")
        return torch.stack([self.io, self.s], dim=1)

    def rows(self, rows: slice) -> "Batch":
        """Some of the prompts, as a batch of the same width."""
        return Batch(
            self.table.iloc[rows].reset_index(drop=True),
            self.tokens[rows],
            self.mask[rows],
            self.labels[rows],
            {role: position[rows] for role, position in self.roles.items()},
            None if self.io is None else self.io[rows],
            None if self.s is None else self.s[rows],
        )

    def positions(self, start: int, stop: int) -> "Batch":
        """The tokens from one position to before another; roles count from there."""
        roles = {role: position - start for role, position in self.roles.items()}
        labels = [row[start:stop] for row in self.labels]
        tokens, mask = self.tokens[:, start:stop], self.mask[:, start:stop]
        return Batch(self.table, tokens, mask, labels, roles, self.io, self.s)


def ioi_prompts(
    n: int,
    seed: int = 0,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    names: Sequence[str] = NAMES,
    order: str = "both",
    giver: str = "repeated",
    templates: Sequence[Template] = TEMPLATES,
) -> pd.DataFrame:
    """Draw `n` IOI prompts, the same ones for the same arguments.

    Columns: text, io, s, order ("ABBA" or "BABA", in turn when `order` is "both"), template (index
    into `templates`), place, object, and third when `giver` is "third". That is the control: a
    third person gives, nothing is repeated, and either of the first two may be the answer.
    With a tokenizer, `NAMES` is filtered to its single-token names.
    Raises PromptError for a bad choice, and for other names that are not single tokens.

    >>> prompts = ioi_prompts(4, seed=1)
    >>> prompts["order"].tolist()
    ['ABBA', 'BABA', 'ABBA', 'BABA']
    >>> all(row.text.count(row.s) == 2 for row in prompts.itertuples())
    True
    """
    _check_choices(n, order, giver, templates)
    pool = _name_pool(names, tokenizer, needed=3 if giver == "third" else 2)
    orders = ("ABBA", "BABA") if order == "both" else (order,)
    rng = random.Random(seed)
    rows = [_draw(rng, pool, orders[i % len(orders)], giver, templates) for i in range(n)]
    return pd.DataFrame(rows)


def _check_choices(n: int, order: str, giver: str, templates: Sequence[Template]) -> None:
    if n < 1:
        raise PromptError(f"at least one prompt is needed, not {n}")
    if order not in ("ABBA", "BABA", "both"):
        raise PromptError(f"order must be 'ABBA', 'BABA' or 'both', not {order!r}")
    if giver not in ("repeated", "third"):
        raise PromptError(f"giver must be 'repeated' or 'third', not {giver!r}")
    if not templates:
        raise PromptError("no templates given")


def _name_pool(
    names: Sequence[str], tokenizer: "PreTrainedTokenizerBase | None", needed: int
) -> list[str]:
    split = [] if tokenizer is None else [x for x in names if name_id(x, tokenizer) is None]
    if split and tuple(names) != NAMES:
        raise PromptError(f"not a single token with a space before it: {', '.join(split)}")
    pool = [name for name in dict.fromkeys(names) if name not in split]
    if len(pool) < needed:
        raise PromptError(f"{needed} different single-token names are needed, {len(pool)} left")
    return pool


def name_id(name: str, tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The token of a name after another word: some tokenizers put a space before the first one."""
    before, ids = plain_ids("to", tokenizer), plain_ids(f"to {name}", tokenizer)
    single = len(ids) == len(before) + 1 and ids[:-1] == before
    return ids[-1] if single and ids[-1] != tokenizer.unk_token_id else None


def plain_ids(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokens of a text, without any that tokenizers put in front of it."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _draw(
    rng: random.Random, pool: list[str], order: str, giver: str, templates: Sequence[Template]
) -> dict:
    io, s, third = (*rng.sample(pool, 2), None) if giver == "repeated" else rng.sample(pool, 3)
    template = rng.randrange(len(templates))
    place, thing = rng.choice(PLACES), rng.choice(OBJECTS)
    first, second = (io, s) if order == "ABBA" else (s, io)
    slots = {"A": first, "B": second, "S": third or s, "PLACE": place, "OBJECT": thing}
    row = {"text": fill(templates[template].text, slots), "io": io, "s": s, "order": order}
    row |= {"template": template, "place": place, "object": thing}
    return row | ({"third": third} if third else {})


def fill(text: str, slots: dict[str, str]) -> str:
    """Put words in the bracketed slots of a template."""
    return re.sub(r"\[([A-Z]+)\]", lambda match: slots[match[1]], text)


def exchanged(prompts: pd.DataFrame) -> pd.DataFrame:
    """The same prompts, in which the other one of the two names gives: IO and S change places.

    prompts: the table of `ioi_prompts`, with a repeated giver.

    >>> prompts = ss.ioi_prompts(1, names=["Mary", "John"], order="ABBA")
    >>> other = exchanged(prompts)
    >>> other.order.item(), other.io.item() == prompts.s.item()
    ('BABA', True)
    """
    parts = [text.rsplit(s, 1) for text, s in zip(prompts["text"], prompts["s"], strict=True)]
    texts = [before + io + after for (before, after), io in zip(parts, prompts["io"], strict=True)]
    order = prompts["order"].map(OTHER_ORDER)
    return prompts.assign(text=texts, io=prompts["s"], s=prompts["io"], order=order)


def place_of(table: pd.DataFrame, n: int) -> str:
    """Where a prompt stands, to begin a message with: nowhere in particular if it is alone."""
    name = table.index.name or ("prompt" if len(table) > 1 else "")
    return f"{name} {table.index[n]}: " if name else ""


def is_word(value: object) -> bool:
    """Whether a cell of a table holds a word: neither empty nor missing."""
    return isinstance(value, str) and value != ""


def encode(
    model: Model, prompts: pd.DataFrame | Sequence[str], *, bos: bool | None = None
) -> Batch:
    """Tokenise prompts, pad them on the right and find the positions of their roles.

    `bos` puts the tokenizer's beginning-of-sequence token in front (None: where the model had it
    in training), and a prompt that begins with one itself is warned of. Raises PromptError for a
    model without tokenizer or with that of another one, no prompts, an empty or too long one, an
    unknown word, a name that is not a single token, or not there once (io) and twice (s).
    Roles come from the names, and from columns "at noun", "at year", …: the role begins at this
    character of the text, from 0, and is that of the token there.

    >>> batch = encode(model, ioi_prompts(4, tokenizer=model.tokenizer))
    >>> batch.tokens.shape == batch.mask.shape, sorted(batch.roles)
    (True, ['IO', 'S1', 'S1+1', 'S2', 'end'])
    >>> batch.labels[0][int(batch.roles["IO"][0])] == " " + batch.table["io"][0]
    True
    """
    tokenizer, bos = model.tokenizer, model.bos if bos is None else bos
    if tokenizer is None:
        raise PromptError(f"{model.name} has no tokenizer: put its tokenizer.json beside the model")
    table = prompts if isinstance(prompts, pd.DataFrame) else pd.DataFrame({"text": list(prompts)})
    if not len(table):
        raise PromptError("no prompts given")
    start = [tokenizer.bos_token_id] if bos else []
    if None in start:
        raise PromptError(f"the tokenizer of {model.name} has no beginning-of-sequence token")
    texts = enumerate(table["text"])
    rows = [start + _token_ids(text, model, place_of(table, n)) for n, text in texts]
    if twice := [n for n, row in enumerate(rows) if bos and row[:2] == 2 * start]:
        more = f" (as do {len(twice) - 1} more)" * (len(twice) > 1)
        message = f"begins with {tokenizer.bos_token} twice, once of its own{more}: keep one"
        warnings.warn(f"{place_of(table, twice[0])}{message}", stacklevel=2)
    _check_lengths(rows, table["text"], model.n_ctx)
    words = _check_ids(rows, model)
    tokens, mask = _pad(rows, tokenizer, words)
    read = {token: tokenizer.decode([token]) for token in {x for row in rows for x in row}}
    labels = [[read[token] for token in row] for row in rows]
    roles = _marked(table, len(start), tokenizer)
    if {"io", "s"} <= set(table.columns):
        io, s = (_ids(table, column, tokenizer) for column in ("io", "s"))
        roles |= _roles(table, tokens, mask, tokenizer)
    else:
        io = s = None
    if roles:
        roles["end"] = mask.sum(1) - 1
    return Batch(table.reset_index(drop=True), tokens, mask, labels, roles, io, s)


def _token_ids(text: str, model: Model, place: str) -> list[int]:
    if not text.strip():
        raise PromptError(f"{place}an empty prompt")
    tokenizer = model.tokenizer
    ids = plain_ids(text, tokenizer)
    unknown, unknowns = tokenizer.unk_token_id, ids.count(tokenizer.unk_token_id)
    if unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        # it may be meant, as a special token
        unknowns -= text.count(str(tokenizer.unk_token or "\0"))
    if unknowns:
        raise PromptError(f"{place}{unknown_words(text, tokenizer)}")
    decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    normal = normalizer.normalize_str(text) if normalizer else text  # where "▁" may be a space
    if not any(_reads_as(decoded, form) for form in (text, normal.replace("▁", " "))):
        raise PromptError(
            f"{place}the tokenizer beside {model.name} is not its own, or has the wrong class: "
            f"its tokens read {decoded[:60]!r}, the prompt is {text[:60]!r}"
        )
    return ids


def _reads_as(decoded: str, text: str) -> bool:
    """Whether the same characters come in the same order, with a space where the text has one."""
    ends = [set(np.cumsum([len(word) for word in x.split()])) for x in (decoded, text)]
    return "".join(decoded.split()) == "".join(text.split()) and ends[0] >= ends[1]


def unknown_words(text: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Why a text has unknown tokens, and what to do about it."""

    def known(part: str) -> bool:
        return tokenizer.unk_token_id not in plain_ids(part, tokenizer)

    if str(tokenizer.unk_token) in text:
        return f"{tokenizer.unk_token} is a special token, no word: leave it out"
    words = re.findall(r"\w+|[^\w\s]+", text)
    if unknown := [word for word in words if not (known(word) or known(f" {word}"))]:
        large = {x: x.capitalize() for x in unknown if known(f" {x.capitalize()}")}
        hints = [f"{x} (write {large[x]})" if x in large else x for x in dict.fromkeys(unknown)]
        size = len(tokenizer) - len(tokenizer.all_special_ids)
        return f"not in the vocabulary: {', '.join(hints)} (the model knows {size:,} words)"
    if known(" ".join(text.split())):
        return f"a space too many, at the start, at the end or beside another: {text!r}"
    parts = [part for part in re.findall(r"\s?(?:\w+|[^\w\s]+)", text) if not known(part)]
    places = [f"{x.strip()!r} is known only {'without' if x[0] == ' ' else 'with'}" for x in parts]
    return f"{', '.join(places)} a space before it: {text!r}"


def _check_lengths(rows: list[list[int]], texts: Iterable[str], max_length: int) -> None:
    for row, text in zip(rows, texts, strict=True):
        if len(row) > max_length:
            raise PromptError(f"{len(row)} tokens, the limit is {max_length}: {text[:60]!r} …")


def _check_ids(rows: list[list[int]], model: Model) -> int:
    """The number of tokens that the model has, which all of these must be among."""
    words, largest = len(model.bridge.embed.W_E), max(map(max, rows))
    if largest >= words:
        raise PromptError(
            f"the tokenizer of {model.name} does not fit: it gives token {largest}, "
            f"the model has {words}"
        )
    return words


def _pad(
    rows: list[list[int]], tokenizer: "PreTrainedTokenizerBase", words: int
) -> tuple[Int[Tensor, "prompt pos"], Bool[Tensor, "prompt pos"]]:
    fillers = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    filler = next(x for x in fillers if isinstance(x, int) and x < words)  # one may have been added
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    tokens = torch.full(mask.shape, filler)
    tokens[mask] = torch.tensor([token for row in rows for token in row])
    return tokens, mask


def _ids(
    table: pd.DataFrame, column: str, tokenizer: "PreTrainedTokenizerBase"
) -> Int[Tensor, "prompt"]:
    names = table[column].tolist()
    if missing := [n for n, name in enumerate(names) if not is_word(name)]:
        raise PromptError(f"{place_of(table, missing[0])}no name in column {column}")
    known = {name: name_id(name, tokenizer) for name in dict.fromkeys(names)}
    split = [name for name, token in known.items() if token is None]
    if split:
        raise PromptError(f"not a single token with a space before it: {', '.join(split)}")
    return torch.tensor([known[name] for name in names])


def _roles(
    table: pd.DataFrame,
    tokens: Int[Tensor, "prompt pos"],
    mask: Bool[Tensor, "prompt pos"],
    tokenizer: "PreTrainedTokenizerBase",
) -> dict[str, Int[Tensor, "prompt"]]:
    wanted = {"io": ["IO"], "s": ["S1"] if "third" in table else ["S1", "S2"]}
    wanted |= {"third": ["third"]} if "third" in table else {}
    roles, prompts = {}, table.to_dict("records")
    for column, names in wanted.items():
        hits = (tokens == _ids(table, column, tokenizer)[:, None]) & mask
        for n, found in enumerate(hits.sum(1).tolist()):
            _check_name(prompts[n], column, found, len(names), place_of(table, n))
        order = hits.cumsum(1)
        for nth, role in enumerate(names, 1):
            roles[role] = (hits & (order == nth)).int().argmax(1)
    return roles | {"S1+1": roles["S1"] + 1}


def _marked(
    table: pd.DataFrame, first: int, tokenizer: "PreTrainedTokenizerBase"
) -> dict[str, Int[Tensor, "prompt"]]:
    """Where the roles are that columns "at …" mark, behind the `first` tokens of every prompt."""
    columns = [column for column in table.columns if column.startswith(ROLE_MARK)]
    if not columns:
        return {}
    if taken := {f"{ROLE_MARK}{name}" for name in (OTHER, INTACT)} & {*columns}:
        raise PromptError(f"{taken.pop()!r} is no role: it is what tokens without one are called")
    encoded = tokenizer(table["text"].tolist(), add_special_tokens=False)
    roles = {}
    for column in columns:
        places = pd.to_numeric(table[column], errors="coerce").tolist()
        found = [
            encoded.char_to_token(n, int(place)) if place >= 0 else None  # not where it is NaN
            for n, place in enumerate(places)
        ]
        if None in found:
            n = found.index(None)
            value, text = table[column].iloc[n], table["text"].iloc[n]
            raise PromptError(f"{place_of(table, n)}{column}: no token at {value!r}: {text!r}")
        roles[column.removeprefix(ROLE_MARK)] = torch.tensor(found) + first
    return roles


def _check_name(row: dict, column: str, found: int, wanted: int, place: str) -> None:
    """Refuse a name that is not where its role says; `found` is how often its token is there."""
    name, text = row[column], row["text"]
    there = len(re.findall(rf"(?<!\w){re.escape(name)}(?!\w)", text))
    if row["io"] == row["s"]:
        problem = f"io and s are both {name!r}"
    elif there != wanted:
        problem = f"{column} is {name!r}, which is there {there} times, not {wanted}"
    elif found < wanted:
        problem = f"{name!r} is another token without a space before it: write a word before it"
    elif found > wanted:
        problem = f"the token of {name!r} is part of another word too"
    else:
        return
    raise PromptError(f"{place}{problem}: {text!r}")


def role_table(batch: Batch) -> pd.DataFrame:
    """One row for each token and role: prompt, pos, token, role ("" for a token without a role).

    Roles are sets: in "Mary and John", " and" is both IO+1 and S1-1.
    """
    places = dict(batch.roles)
    for role in NEIGHBOURS:
        if role in batch.roles:
            places |= {f"{role}{step:+}": batch.roles[role] + step for step in (-1, 1)}
    of_token: dict[tuple[int, int], list[str]] = {}
    for role, positions in places.items():
        for key in enumerate(positions.tolist()):
            of_token.setdefault(key, []).append(role)
    rows = [
        (prompt, pos, token, role)
        for prompt, labels in enumerate(batch.labels)
        for pos, token in enumerate(labels)
        for role in of_token.get((prompt, pos), [""])
    ]
    return pd.DataFrame(rows, columns=["prompt", "pos", "token", "role"])


def roles_of(batch: Batch) -> pd.DataFrame:
    """Every role of every token: prompt, pos, role ("other" for a token without)."""
    if batch.roles:
        table = role_table(batch)[["prompt", "pos", "role"]].drop_duplicates()
    else:
        prompt, pos = batch.mask.nonzero(as_tuple=True)
        last = pos == batch.mask.sum(1)[prompt] - 1
        table = pd.DataFrame({"prompt": prompt, "pos": pos, "role": np.where(last, "end", "")})
    return table.replace({"role": {"": OTHER}})


def token_roles(batch: Batch) -> list[list[str]]:
    """The role of every token: its roles as one name, "other", or "intact"."""
    names = [[INTACT] * batch.tokens.shape[1] for _ in range(len(batch.tokens))]
    table = roles_of(batch)
    table["role"] = table["role"].str.replace("third", "S2")
    groups = table.groupby(["prompt", "pos"], as_index=False)[["role"]]
    joined = groups.agg(lambda x: ", ".join(sorted(x)))
    for prompt, pos, role in joined[joined["pos"] > 0].itertuples(index=False, name=None):
        names[prompt][pos] = role
    return names
