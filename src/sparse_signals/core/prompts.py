"""Prompts for indirect object identification (IOI), and what their tokens do.

Two people are named, one of them is named again and gives something "to" … the other one. The name
that comes once is the indirect object (IO), the name that comes twice is the subject (S). In an
ABBA prompt the IO is named first, in a BABA prompt the subject is. The task is that of Wang et al.
2023, "Interpretability in the Wild"; names, places, objects and sentences are this project's own.
"""

import csv
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
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
OTHER = "other"
INTACT = "intact"


class PromptError(ValueError):
    """A prompt that cannot be used, and why, in one line."""


@dataclass(frozen=True)
class Batch:
    """Prompts as tokens, padded on the right; `roles` maps a role to its position in each prompt.

    `roles`, `io` and `s` (token ids of the names) are empty or None where names are not known.
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
    split = [] if tokenizer is None else [x for x in names if _name_id(x, tokenizer) is None]
    if split and tuple(names) != NAMES:
        raise PromptError(f"not a single token with a space before it: {', '.join(split)}")
    pool = [name for name in dict.fromkeys(names) if name not in split]
    if len(pool) < needed:
        raise PromptError(f"{needed} different single-token names are needed, {len(pool)} left")
    return pool


def _name_id(name: str, tokenizer: "PreTrainedTokenizerBase") -> int | None:
    ids = tokenizer(f" {name}", add_special_tokens=False)["input_ids"]
    return ids[0] if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else None


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


def read_texts(path: str | Path) -> pd.DataFrame:
    """Read prompts from a .txt file (one a line) or a .csv file (text and, if known, io and s).

    Raises PromptError for another kind of file, one that is no UTF-8 text, and an empty one.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".csv"):
        raise PromptError(f"prompts come from a .txt or .csv file, not {path.name}")
    if not path.is_file():
        raise PromptError(f"no such file: {path}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            csv_file = path.suffix == ".csv"
            rows = list(csv.DictReader(file)) if csv_file else [{"text": line} for line in file]
    except (UnicodeDecodeError, csv.Error) as error:
        raise PromptError(f"{path.name} is not a {path.suffix} file in UTF-8: {error}") from error
    rows = [row | {"text": (row.get("text") or "").strip()} for row in rows]
    rows = [row for row in rows if row["text"]]
    if not rows:
        raise PromptError(f"{path.name} holds no prompts (a .csv file needs a column 'text')")
    if wide := [row["text"] for row in rows if None in row]:
        raise PromptError(f"{path.name}: a text with commas needs quotes around it: {wide[0]!r} …")
    return pd.DataFrame(rows)


def with_names(prompts: pd.DataFrame, names: Sequence[str] = NAMES) -> pd.DataFrame:
    """The prompts with columns io and s, inferred where they are missing, and then order.

    Of `names`, the one that comes twice is the subject and the other, that comes once, the
    indirect object. Raises PromptError for a prompt without such names.
    """
    return pd.DataFrame([row | _infer_names(row, names) for row in prompts.to_dict("records")])


def _infer_names(row: dict, names: Sequence[str]) -> dict:
    given = [row.get("io"), row.get("s")]
    if all(isinstance(name, str) and name for name in given):
        return {}
    found = [word for word in re.findall(r"\w+", row["text"]) if word in names]
    twice = [name for name in dict.fromkeys(found) if found.count(name) == 2]
    once = [name for name in dict.fromkeys(found) if found.count(name) == 1]
    if len(twice) != 1 or len(once) != 1:
        raise PromptError(f"needs one name twice and another once: {row['text']!r}")
    order = "ABBA" if found[0] == once[0] else "BABA"
    return {"io": once[0], "s": twice[0], "order": order}


def encode(
    model: Model, prompts: pd.DataFrame | Sequence[str], *, bos: bool | None = None
) -> Batch:
    """Tokenise prompts, pad them on the right and find the positions of their roles.

    `bos` puts the tokenizer's beginning-of-sequence token in front (None: where the model had it
    in training). Raises PromptError for a model without tokenizer, no prompts, an empty or too
    long one, an unknown word, a name that is not a single token or not where it should be.

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
    table = table.reset_index(drop=True)
    start = [tokenizer.bos_token_id] if bos else []
    if None in start:
        raise PromptError("the tokenizer has no beginning-of-sequence token")
    rows = [start + _token_ids(text, tokenizer) for text in table["text"]]
    _check_lengths(rows, table["text"], model.n_ctx)
    tokens, mask = _pad(rows, tokenizer)
    labels = [[tokenizer.decode([token]) for token in row] for row in rows]
    if not {"io", "s"} <= set(table.columns):
        return Batch(table, tokens, mask, labels, {}, None, None)
    io, s = (_ids(table[column], tokenizer) for column in ("io", "s"))
    return Batch(table, tokens, mask, labels, _roles(table, tokens, mask, tokenizer), io, s)


def _token_ids(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    if not text.strip():
        raise PromptError("an empty prompt")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.unk_token_id in ids:
        words = re.findall(r"\w+|[^\w\s]+", text)
        unknown = [word for word in words if _is_unknown(word, tokenizer)]
        raise PromptError(
            f"not in the vocabulary: {', '.join(unknown) or 'a special token'} "
            f"(the model knows {len(tokenizer):,} words)"
        )
    return ids


def _is_unknown(word: str, tokenizer: "PreTrainedTokenizerBase") -> bool:
    forms = (tokenizer(x, add_special_tokens=False)["input_ids"] for x in (word, f" {word}"))
    return all(tokenizer.unk_token_id in ids for ids in forms)


def _check_lengths(rows: list[list[int]], texts: Iterable[str], max_length: int) -> None:
    for row, text in zip(rows, texts, strict=True):
        if len(row) > max_length:
            raise PromptError(f"{len(row)} tokens, the limit is {max_length}: {text[:60]!r} …")


def _pad(
    rows: list[list[int]], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[Int[Tensor, "prompt pos"], Bool[Tensor, "prompt pos"]]:
    filler = next(x for x in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if x is not None)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    tokens = torch.full(mask.shape, filler)
    tokens[mask] = torch.tensor([token for row in rows for token in row])
    return tokens, mask


def _ids(names: pd.Series, tokenizer: "PreTrainedTokenizerBase") -> Int[Tensor, "prompt"]:
    known = {name: _name_id(name, tokenizer) for name in names.unique()}
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
    wanted = {"IO": ("io", 0), "S1": ("s", 0)}
    wanted |= {"third": ("third", 0)} if "third" in table else {"S2": ("s", 1)}
    roles = {}
    for role, (column, nth) in wanted.items():
        hits = (tokens == _ids(table[column], tokenizer)[:, None]) & mask
        nth_hit = hits & (hits.cumsum(1) == nth + 1)
        if missing := (~nth_hit.any(1)).nonzero().flatten().tolist():
            raise PromptError(f"no {role} in prompt {missing[0]}: {table['text'][missing[0]]!r}")
        roles[role] = nth_hit.int().argmax(1)
    return roles | {"S1+1": roles["S1"] + 1, "end": mask.sum(1) - 1}


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
    joined = table.groupby(["prompt", "pos"])["role"].agg(lambda x: ", ".join(sorted(x)))
    for (prompt, pos), role in joined[joined.index.get_level_values("pos") > 0].items():
        names[prompt][pos] = role
    return names


def role_numbers(batch: Batch, roles: tuple[str, ...]) -> Int[Tensor, "prompt pos"]:
    """Which of some roles every token has, −1 for none of them."""
    number = {role: n for n, role in enumerate(roles)}
    return torch.tensor([[number.get(name, -1) for name in row] for row in token_roles(batch)])
