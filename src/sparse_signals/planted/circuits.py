"""Planted circuits: models whose true edges are known, to test whatever claims to find them.

The models are written by hand (`weights.py`) so that each side of a firing on the path is
carried by the planted components and by no other, which makes the right answer unambiguous.
"""

import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch

from sparse_signals.core.model import Model, wrap_model
from sparse_signals.core.prompts import Batch
from sparse_signals.core.sentences import NAMES, OBJECTS
from sparse_signals.planted.weights import MATCH, POSITIONS, Feature, Head, Match, handwritten_model

PLANTED = ("induction", "inhibition", "redundant", "decoys")
MUTE, LOUD = ("0.1", "1.1"), ("0.2", "1.2")  # the decoys: heads that send nothing, or noise
LOUDNESS = 1.0  # norm of what a LOUD head sends, four times a message
BLOCK = -64.0  # score of a token with itself where a head looks for another one like it
EDGE = ["upstream", "layer", "head", "side", "prompt", "dest", "src"]
START = "<start>"
PEOPLE, THINGS = NAMES[:8], OBJECTS[:14]
TWO_TEMPLATES = ("[A] and [B] met so [S] waved to", "when [A] and [B] left then [S] gave it to")
OTHER_PLACE = {1: 3, 3: 1, 2: 4, 4: 2}  # where [A] and [B] stand: in one template, in the other
SENTENCE_WORDS = tuple(
    dict.fromkeys(word for text in TWO_TEMPLATES for word in text.split() if word[0] != "[")
)


@dataclass(frozen=True)
class Planted:
    """A model whose circuit is known, and prompts on which it runs.

    `roots` (columns prompt, layer, head, dest, src) are the firings to trace from; `truth`
    (columns `EDGE`, kind) are the edges that a tracer must then find, all of them and no other. An
    edge leads from an upstream component ("embedding", "position" or a head) to one side, "dest"
    or "src", of the firing (dest, src) of a head. `batch.io` is the answer; `batch.s` is the other
    name or, for induction, the repeated token.
    """

    name: str
    model: Model
    batch: Batch
    roots: pd.DataFrame
    truth: pd.DataFrame


@dataclass(frozen=True)
class Stage:
    """A head in its circuit: the roles it fires between, and what carries either side."""

    head: Head
    dest: str
    src: str
    dest_from: tuple[str, ...]
    src_from: tuple[str, ...]
    root: bool = False


@dataclass(frozen=True)
class Planting:
    """The stages of a circuit, the decoys beside it, and the tokens it works on."""

    stages: tuple[Stage, ...]
    vocabulary: tuple[str, ...]
    draw: Callable[[random.Random, int], dict]
    decoys: tuple[Head, ...] = ()


def planted(name: str, noise: float = 0.0, seed: int = 0, prompts: int = 8) -> Planted:
    """Build a planted circuit, one of `PLANTED`, with float64 weights on the CPU.

    * induction: previous-token head 0.0 → induction head 1.0.
    * inhibition: duplicate-token head 0.0 → 1.0, which tells `end` where the repeated name stood
      first → name mover 2.0, which attends to the other name, and sends it.
    * redundant: 1.0 and 1.1 tell `end` the same, in equal parts, and two movers, 2.0 and 3.0, send
      the answer. Movers add up: the logit of the answer is ≈ `ANSWER_LOGIT` for each (LayerNorm
      takes its part), all other logits are 0. Their informants do not add up: with either alone
      both movers still attend fully, without both they rest, and the answer is lost.
    * decoys: inhibition, beside heads `MUTE` and `LOUD` that fire wherever 0.0 and 1.0 do. Mute
      ones send nothing; loud ones send more than any other head, where nobody listens.

    `noise` is the standard deviation of Gaussian noise on every entry of every weight matrix, in
    units of the root mean square of that matrix's nonzero entries. A matrix is W_Q, W_K, W_V or
    W_O of one head, the token, position or unembedding matrix, or one of an MLP. Where all entries
    are zero the unit is that of the same kind of matrix over all heads; an MLP's input counts as
    W_V, its output as W_O. `seed` fixes prompts and noise, separately.
    Raises ValueError for an unknown name, negative noise, or no prompts.
    """
    if name not in PLANTED:
        raise ValueError(f"no planted circuit called {name!r}: choose among {', '.join(PLANTED)}")
    if noise < 0 or prompts < 1:
        raise ValueError(f"noise must be at least 0 and prompts at least 1: {noise}, {prompts}")
    circuit = CIRCUITS[name]()
    heads = [stage.head for stage in circuit.stages] + list(circuit.decoys)
    hf_model = handwritten_model(heads, circuit.vocabulary, noise, seed)
    rng = random.Random(seed)
    batch = batch_of(circuit.vocabulary, [circuit.draw(rng, n) for n in range(prompts)])
    fired = [_firings(stage, batch) for stage in circuit.stages if stage.root]
    tables = pd.concat(fired, ignore_index=True), _truth(circuit.stages, batch)
    return Planted(name, wrap_model(hf_model, f"planted-{name}"), batch, *tables)


def recovery(
    found: pd.DataFrame, truth: pd.DataFrame, key: Sequence[str] = tuple(EDGE)
) -> pd.Series:
    """How well edges were found, whatever their order or number of copies.

    precision |found ∩ truth| / |found|, recall |found ∩ truth| / |truth| (NaN for 0 / 0), and the
    counts correct, spurious and missing. Edges are the same if all of `key` is.
    Raises ValueError where a column is missing.
    """
    columns = list(key)
    for table in (found, truth):
        if absent := sorted(set(columns) - set(table.columns)):
            raise ValueError(f"a table of edges needs the columns {columns}; not there: {absent}")
    a, b = (set(table[columns].itertuples(index=False, name=None)) for table in (found, truth))
    counts = {"correct": len(a & b), "spurious": len(a - b), "missing": len(b - a)}
    rates = {
        "precision": len(a & b) / len(a) if a else float("nan"),
        "recall": len(a & b) / len(b) if b else float("nan"),
    }
    return pd.Series(rates | counts)


# --- circuits ------------------------------------------------------------------------------------


def same_value(
    space: str, other: str, values: Sequence[Hashable], score: float = MATCH
) -> tuple[Match, ...]:
    """A match of feature (space, value) with (other, value) for every value."""
    return tuple(Match((space, x), ((other, x),), score) for x in values)


def pass_on(
    space: str, message: str, values: Sequence[Hashable]
) -> tuple[tuple[Feature, Feature], ...]:
    """What a head sends that tells, of every value that a source has, just this value."""
    return tuple(((space, x), (message, x)) for x in values)


def _induction() -> Planting:
    before = tuple(Match(("position", i), (("position", i - 1),)) for i in range(2, POSITIONS))
    previous = Head(0, 0, before, pass_on("token", "previous", THINGS))
    matches = same_value("token", "previous", THINGS)
    induction = Head(1, 0, matches, pass_on("token", "answer", THINGS))
    stages = (
        Stage(previous, "S1+1", "S1", ("position",), ("position",)),
        Stage(induction, "end", "S1+1", ("embedding",), ("0.0",), root=True),
    )
    return Planting(stages, (START, *THINGS), _draw_repeat)


def _heads_of_inhibition() -> tuple[Head, Head, Head]:
    places = tuple(OTHER_PLACE)
    others = same_value("token", "token", PEOPLE)
    others += same_value("position", "position", range(1, POSITIONS), BLOCK)
    duplicate = Head(0, 0, others, pass_on("position", "repeated", places))
    is_repeated = Match(("token", "to"), tuple(("repeated", place) for place in places))
    inhibition = Head(1, 0, (is_repeated,), pass_on("repeated", "inhibited", places))
    answers = tuple(
        Match(("inhibited", place), (("position", other),)) for place, other in OTHER_PLACE.items()
    )
    return duplicate, inhibition, Head(2, 0, answers, pass_on("token", "answer", PEOPLE))


def _inhibition(copies: int = 1, decoys: tuple[Head, ...] = ()) -> Planting:
    duplicate, inhibition, mover = _heads_of_inhibition()
    informants = [replace(inhibition, head=n) for n in range(copies)]
    names = tuple(head.name for head in informants)
    stages = (
        Stage(duplicate, "S2", "S1", ("embedding",), ("embedding",)),
        *(Stage(head, "end", "S2", ("embedding",), (duplicate.name,)) for head in informants),
        *(
            Stage(replace(mover, layer=2 + n), "end", "IO", names, ("position",), root=True)
            for n in range(copies)
        ),
    )
    return Planting(stages, (START, *PEOPLE, *SENTENCE_WORDS), _draw_sentence, decoys)


def _with_decoys() -> Planting:
    decoys = []
    for head in _heads_of_inhibition()[:2]:
        loud = tuple((feature, ("loud", head.name)) for feature, _ in head.send)
        decoys.append(replace(head, head=1, send=()))
        decoys.append(replace(head, head=2, send=loud, loudness=LOUDNESS))
    return _inhibition(decoys=tuple(decoys))


CIRCUITS = {
    "induction": _induction,
    "inhibition": _inhibition,
    "redundant": lambda: _inhibition(copies=2),
    "decoys": _with_decoys,
}


# --- prompts and truth ---------------------------------------------------------------------------


def _draw_repeat(rng: random.Random, n: int) -> dict:
    """Different words, then one of them again; the word after its first place is the answer."""
    words = rng.sample(THINGS, rng.randint(5, POSITIONS - 2))
    first = rng.randrange(len(words) - 1)
    roles = {"S1": 1 + first, "S1+1": 2 + first, "S2": 1 + len(words), "end": 1 + len(words)}
    answer, repeated = words[first + 1], words[first]
    return {"words": [*words, repeated], "io": answer, "s": repeated, "roles": roles}


def _draw_sentence(rng: random.Random, n: int) -> dict:
    """ABBA and BABA in turn; every second pair of prompts has the other template."""
    io, s = rng.sample(PEOPLE, 2)
    order = ("ABBA", "BABA")[n % 2]
    a, b = (io, s) if order == "ABBA" else (s, io)
    template = TWO_TEMPLATES[n // 2 % 2].split()
    words = [{"[A]": a, "[B]": b, "[S]": s}.get(word, word) for word in template]
    first = 1 + words.index(s)
    roles = {"IO": 1 + words.index(io), "S1": first, "S1+1": first + 1}
    roles |= {"S2": 1 + words.index(s, first), "end": len(words)}
    return {"words": words, "io": io, "s": s, "order": order, "roles": roles}


def batch_of(vocabulary: Sequence[str], drawn: Sequence[dict]) -> Batch:
    """Prompts as drawn: their words, roles, answer (io) and other answer (s), and what else."""
    rows = pd.DataFrame(drawn)
    labels = [[START, *words] for words in rows.pop("words")]
    rows.insert(0, "text", [" ".join(words[1:]) for words in labels])
    each = pd.DataFrame([*rows.pop("roles")])
    roles = {str(role): torch.tensor(x.tolist()) for role, x in each.items()}
    number = {word: token for token, word in enumerate(vocabulary)}
    ids = [torch.tensor([number[word] for word in words]) for words in labels]
    tokens = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = torch.arange(tokens.shape[1]) < torch.tensor([len(row) for row in ids])[:, None]
    io, s = (torch.tensor([number[word] for word in rows[column]]) for column in ("io", "s"))
    return Batch(rows, tokens, mask, labels, roles, io, s)


def _truth(stages: Sequence[Stage], batch: Batch) -> pd.DataFrame:
    """One edge per stage, prompt, side and component that carries the side."""
    tables = [
        _firings(stage, batch).assign(upstream=upstream, kind=_kind(upstream), side=side)
        for stage in stages
        for side, components in (("dest", stage.dest_from), ("src", stage.src_from))
        for upstream in components
    ]
    return pd.concat(tables, ignore_index=True)[[*EDGE, "kind"]]


def _kind(upstream: str) -> str:
    return upstream if upstream in ("embedding", "position") else "head"


def _firings(stage: Stage, batch: Batch) -> pd.DataFrame:
    places = {side: batch.roles[getattr(stage, side)].numpy() for side in ("dest", "src")}
    where = {"prompt": range(len(batch.tokens)), "layer": stage.head.layer}
    return pd.DataFrame(where | {"head": stage.head.head} | places)
