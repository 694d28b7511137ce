"""Planted circuits that a score trace cannot see: what is moved by values and turned over by MLPs.

Each comes with counterfactual prompts, aligned token by token, so that its truth is a statement
about the answer: along which edges F(x) − F(x′) comes to be, F = logit(io) − logit(s). What x and
x′ have in common may be needed, and is no part of that truth.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import pandas as pd

from sparse_signals.core.model import Model, wrap_model
from sparse_signals.core.prompts import Batch
from sparse_signals.planted.circuits import (
    CIRCUITS,
    LOUDNESS,
    PEOPLE,
    START,
    THINGS,
    batch_of,
    pass_on,
)
from sparse_signals.planted.weights import MESSAGE, Head, Match, Unit, handwritten_model

PLANTED_ANSWERS = ("carried", "negative", "sum", "switch", "redundant")
LINK = ["upstream", "role", "channel", "downstream", "dest_role"]
ANSWER_EDGE = ["prompt", "upstream", "token", "channel", "downstream", "dest"]
CARRIED = ("[N] took the [W] . now [N] has", "the [W] of [N] fell . so [N] sees")
OWNERS, CARRIED_THINGS = PEOPLE[:4], THINGS[:8]
AGAINST = -0.25  # what a negative mover writes, in units of what the mover beside it does
CLOCK = ("zero", "one", "two", "three", "four")
SUMS = ("[A] plus [B] makes", "what is [A] plus [B] , say")
SWITCHES = ("[F] [P] or [Q] [E]", "[F] [P] or [Q] and only [E]")
FLAGS, WHICH, CHOICES = ("take", "leave"), ("former", "latter"), {"former": 2, "latter": 4}


@dataclass(frozen=True)
class PlantedAnswer:
    """A model whose way to the answer is known, prompts x, and counterfactuals x′.

    `batch.io` is the answer to x, `batch.s` that to x′. `links` (columns `LINK`) are the edges
    along which the difference comes to be, by the roles of their tokens; `truth` (columns
    `ANSWER_EDGE`, link) has them prompt by prompt. `decoys` are components that attend, or write
    loudly, where the circuit runs, and have no part in the answer, each with the role of its token.
    """

    name: str
    model: Model
    batch: Batch
    counterfactual: Batch
    links: pd.DataFrame
    truth: pd.DataFrame
    decoys: dict[str, str]


@dataclass(frozen=True)
class AnswerPlanting:
    """Parts of a circuit, its links, and how a prompt and its counterfactual are drawn."""

    heads: tuple[Head, ...]
    vocabulary: tuple[str, ...]
    draw: Callable[[random.Random, int], tuple[dict, dict]]
    links: tuple[tuple[str, str, str, str, str], ...]
    units: tuple[Unit, ...] = ()
    decoys: dict[str, str] = field(default_factory=dict)


def planted_answer(name: str, noise: float = 0.0, seed: int = 0, prompts: int = 8) -> PlantedAnswer:
    """Build a circuit, one of `PLANTED_ANSWERS`, with float64 weights on the CPU.

    * carried: head 0.0 brings a word to the stop behind it, and the value of 1.0 brings it from
      there to the end. Where these heads look is the same in x and x′.
    * negative: carried, with a negative mover, 1.2, that reads what 1.0 reads and writes `AGAINST`
      times as much, against the answer.
    * sum: 0.0 and 0.1 bring two digits to the end; a unit of MLP 0 for each pair of digits answers
      with their sum modulo 5. x′ has two other digits, and another sum.
    * switch: 0.0 brings a word, take or leave, to the end, which says former or latter. MLP 0 turns
      both into the place to look at (exclusive or), and the query of 1.0 looks there. x′ has the
      other word of take and leave.
    * redundant: that of `planted`; in x′ the other name is repeated.

    All but the last have decoys. "Echo" heads, 0.2, send what 0.0 sends, louder, where nobody
    listens. "Hum" heads, 0.3, are as loud, and the same in x and x′. Mute ones, 1.1, attend as a
    head of the circuit does, and send nothing. MLP 1 of sum does what MLP 0 does, unheard.
    `noise` and `seed` are those of `planted`. Raises ValueError as `planted` does.
    """
    if name not in PLANTED_ANSWERS:
        known = ", ".join(PLANTED_ANSWERS)
        raise ValueError(f"no planted answer called {name!r}: choose among {known}")
    if noise < 0 or prompts < 1:
        raise ValueError(f"noise must be at least 0 and prompts at least 1: {noise}, {prompts}")
    circuit = ANSWERS[name]()
    hf_model = handwritten_model(circuit.heads, circuit.vocabulary, noise, seed, circuit.units)
    rng = random.Random(seed)
    pairs = zip(*(circuit.draw(rng, n) for n in range(prompts)), strict=True)
    batch, other = (batch_of(circuit.vocabulary, drawn) for drawn in pairs)
    links = pd.DataFrame(list(circuit.links), columns=LINK)
    model = wrap_model(hf_model, f"planted-{name}")
    truth = _truth_of(links, batch)
    return PlantedAnswer(name, model, batch, other, links, truth, circuit.decoys)


def _truth_of(links: pd.DataFrame, batch: Batch) -> pd.DataFrame:
    places = pd.DataFrame({role: places.tolist() for role, places in batch.roles.items()})
    places = places.melt(var_name="role", value_name="token", ignore_index=False)
    places = places.rename_axis("prompt").reset_index()
    ends = places.set_axis(["prompt", "dest_role", "dest"], axis=1)
    table = links.rename_axis("link").reset_index().merge(places).merge(ends)
    return table.sort_values(["prompt", "link"], ignore_index=True)[[*ANSWER_EDGE, "link"]]


# --- circuits ------------------------------------------------------------------------------------


def _decoys(sender: Head, reader: Head, same: str) -> tuple[Head, ...]:
    """Echo and hum beside a sender, a mute copy of a reader; x and x′ share the word `same`."""
    echo = tuple((source, ("echo", source[1])) for source, _ in sender.send)
    looks = dict.fromkeys(match.dest for match in sender.match)
    return (
        replace(sender, head=2, send=echo, loudness=LOUDNESS),
        Head(
            sender.layer, 3, tuple(Match(dest, (("token", same),)) for dest in looks),
            ((("token", same), ("hum", same)),), LOUDNESS,
        ),
        replace(reader, layer=1, head=1, send=()),
    )  # fmt: skip


def _words_of(*templates: str) -> tuple[str, ...]:
    """The words of templates that are no slots, each once."""
    words = (word for text in templates for word in text.split())
    return tuple(dict.fromkeys(word for word in words if word[0] != "["))


def _fill(template: str, roles: dict[str, str], answer: str, other: str, **slots: str) -> dict:
    """A drawn prompt. `roles` names the slot of each role; the last token is "end"."""
    words = template.split()
    places = {role: 1 + words.index(slot) for role, slot in roles.items()} | {"end": len(words)}
    filled = [slots.get(word[1:-1], word) if word[0] == "[" else word for word in words]
    return {"words": filled, "io": answer, "s": other, "roles": places}


def _carried() -> AnswerPlanting:
    things = tuple(("token", thing) for thing in CARRIED_THINGS)
    first = Head(0, 0, (Match(("token", "."), things),), pass_on("token", "held", CARRIED_THINGS))
    ends = tuple(Match(("token", text.split()[-1]), (("token", "."),)) for text in CARRIED)
    second = Head(1, 0, ends, pass_on("held", "answer", CARRIED_THINGS))
    links = (
        ("embedding", "word", "value", "0.0", "stop"),
        ("0.0", "stop", "value", "1.0", "end"),
        ("1.0", "end", "direct", "answer", "end"),
    )
    vocabulary = (START, *CARRIED_THINGS, *OWNERS, *_words_of(*CARRIED))
    heads = (first, second, *_decoys(first, second, "the"))
    decoys = {"0.2": "stop", "0.3": "stop", "1.1": "end"}
    return AnswerPlanting(heads, vocabulary, _draw_carried, links, (), decoys)


def _negative() -> AnswerPlanting:
    carried = _carried()
    against = replace(carried.heads[1], head=2, loudness=AGAINST * MESSAGE)
    links = (
        *carried.links,
        ("0.0", "stop", "value", against.name, "end"),
        (against.name, "end", "direct", "answer", "end"),
    )
    return replace(carried, heads=(*carried.heads, against), links=links)


def _draw_carried(rng: random.Random, n: int) -> tuple[dict, dict]:
    owner, pair = rng.choice(OWNERS), rng.sample(CARRIED_THINGS, 2)
    roles = {"word": "[W]", "stop": "."}
    return _both(CARRIED[n % 2], roles, pair, [{"N": owner, "W": word} for word in pair])


def _both(
    template: str, roles: dict[str, str], answers: Sequence[str], slots: Sequence[dict[str, str]]
) -> tuple[dict, dict]:
    """A prompt and its counterfactual: the answer to each is the other answer to the other."""
    (right, wrong), (ours, theirs) = answers, slots
    return (
        _fill(template, roles, right, wrong, **ours),
        _fill(template, roles, wrong, right, **theirs),
    )


def _sum() -> AnswerPlanting:
    heads = []
    for head, (slot, side) in enumerate((("[A]", "left"), ("[B]", "right"))):
        looks = [(words[-1], 1 + words.index(slot)) for words in map(str.split, SUMS)]
        matches = tuple(Match(("token", end), (("position", at),)) for end, at in looks)
        heads.append(Head(0, head, matches, pass_on("token", side, CLOCK)))
    units = tuple(
        Unit(layer, (("left", a), ("right", b)), (space, CLOCK[(n + m) % len(CLOCK)]))
        for layer, space in enumerate(("answer", "echoed sum"))
        for (n, a), (m, b) in product(enumerate(CLOCK), repeat=2)
    )
    links = (
        ("embedding", "left", "value", "0.0", "end"),
        ("embedding", "right", "value", "0.1", "end"),
        ("0.0", "end", "MLP", "MLP 0", "end"),
        ("0.1", "end", "MLP", "MLP 0", "end"),
        ("MLP 0", "end", "direct", "answer", "end"),
    )
    vocabulary = (START, *CLOCK, *_words_of(*SUMS))
    heads += _decoys(heads[0], heads[0], "plus")
    decoys: dict[str, str] = dict.fromkeys(("0.2", "0.3", "1.1", "MLP 1"), "end")
    return AnswerPlanting(tuple(heads), vocabulary, _draw_sum, links, units, decoys)


def _draw_sum(rng: random.Random, n: int) -> tuple[dict, dict]:
    """Both digits change, and their sum."""
    size = len(CLOCK)
    a, b, more = rng.randrange(size), rng.randrange(size), rng.randrange(1, size)
    further = rng.choice([k for k in range(1, size) if (k + more) % size])
    pairs = (a, b), ((a + more) % size, (b + further) % size)
    answers = [CLOCK[sum(pair) % size] for pair in pairs]
    slots = [{"A": CLOCK[left], "B": CLOCK[right]} for left, right in pairs]
    return _both(SUMS[n % 2], {"left": "[A]", "right": "[B]"}, answers, slots)


def _switch() -> AnswerPlanting:
    flags = tuple(("token", flag) for flag in FLAGS)
    first = Head(
        0, 0, tuple(Match(("token", end), flags) for end in WHICH), pass_on("token", "flag", FLAGS)
    )
    units = tuple(
        Unit(0, (("flag", flag), ("token", end)), ("look", _chosen(flag, end)))
        for flag, end in product(FLAGS, WHICH)
    )
    looks = tuple(Match(("look", end), (("position", at),)) for end, at in CHOICES.items())
    second = Head(1, 0, looks, pass_on("token", "answer", CARRIED_THINGS))
    links = (
        ("embedding", "flag", "value", "0.0", "end"),
        ("0.0", "end", "MLP", "MLP 0", "end"),
        ("MLP 0", "end", "query", "1.0", "end"),
        ("1.0", "end", "direct", "answer", "end"),
    )
    vocabulary = (START, *CARRIED_THINGS, *FLAGS, *WHICH, *_words_of(*SWITCHES))
    heads = (first, second, *_decoys(first, second, "or"))
    decoys: dict[str, str] = dict.fromkeys(("0.2", "0.3", "1.1"), "end")
    return AnswerPlanting(heads, vocabulary, _draw_switch, links, units, decoys)


def _chosen(flag: str, end: str) -> str:
    """Which of the two words is left: "take the former", "leave the latter"."""
    return end if flag == FLAGS[0] else WHICH[1 - WHICH.index(end)]


def _draw_switch(rng: random.Random, n: int) -> tuple[dict, dict]:
    things, end = rng.sample(CARRIED_THINGS, 2), rng.choice(WHICH)
    flags = rng.sample(FLAGS, 2)
    answers = [things[WHICH.index(_chosen(flag, end))] for flag in flags]
    slots = [{"F": flag, "P": things[0], "Q": things[1], "E": end} for flag in flags]
    return _both(SWITCHES[n % 2], {"flag": "[F]"}, answers, slots)


def _redundant() -> AnswerPlanting:
    circuit = CIRCUITS["redundant"]()
    informants, movers = ("1.0", "1.1"), ("2.0", "3.0")
    links = (
        ("embedding", "S2", "query", "0.0", "S2"),
        *(("0.0", "S2", "value", informant, "end") for informant in informants),
        *((x, "end", "query", mover, "end") for x, mover in product(informants, movers)),
        *((mover, "end", "direct", "answer", "end") for mover in movers),
    )

    def draw(rng: random.Random, n: int) -> tuple[dict, dict]:
        """The other name is repeated instead."""
        drawn = circuit.draw(rng, n)
        words = list(drawn["words"])
        words[drawn["roles"]["S2"] - 1] = drawn["io"]
        return drawn, drawn | {"words": words, "io": drawn["s"], "s": drawn["io"]}

    heads = tuple(stage.head for stage in circuit.stages)
    return AnswerPlanting(heads, circuit.vocabulary, draw, links)


ANSWERS = {
    "carried": _carried,
    "negative": _negative,
    "sum": _sum,
    "switch": _switch,
    "redundant": _redundant,
}
