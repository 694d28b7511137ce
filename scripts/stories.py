"""Training text for gpt2-ioi: endless short stories that end in " to", and who may come next.

One rule holds for every story: the answer is a person named once in it. Where one is named twice,
that one must be found and left out; who is named last, or gives, is not enough, since both vary.
Some pairs of names never meet in training (`held_out_pair`), and neither do the held-out
templates of `sparse_signals.sentences`; their words do, in other sentences.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparse_signals.core.prompts import fill
from sparse_signals.core.sentences import NAMES, OBJECTS, PLACES, TEMPLATES

NOBODY = "nobody"
OPENERS = (
    "On Monday", "Every Sunday", "Late on Friday", "That night", "At lunch", "Last week", "Then",
    "One evening", "Today", "In summer", "Before that", "Some days later", "Yesterday", "Once",
    "In winter", "Last year", "One morning", "Before dinner", "As always",
)  # fmt: skip
CLAUSES = ("When", "After", "While")
SOLOS = (
    "[A] was [AT] the [PLACE]", "[A] cleaned the [PLACE]", "[A] came late", "[A] left the [PLACE]",
    "[A] waited [AT] the [PLACE]", "[A] had a [ADJ] [THING]", "[A] went to the [PLACE]",
)  # fmt: skip
MEETINGS = (
    "[A] and [B] were [AT] the [PLACE]", "[A] sat with [B] [AT] the [PLACE]", "[A] met [B] there",
    "[A] saw [B] [AT] the [PLACE]", "[A] and [B] cleaned the [PLACE]", "[A] and [B] came late",
    "[A] talked with [B], and the [THING] was there", "[A] and [B] still had a [ADJ] [THING]",
    "[A] helped [B] [AT] the [PLACE]", "[A] left the [PLACE] with [B]",
    "[A] and [B] went to the [PLACE]", "[A] was [AT] the [PLACE], and so was [B]",
    "[A] had a [THING], [B] had none", "the [ADJ] [PLACE] was full, but [A] found [B]",
    "[A] looked for the [THING] and [B] for the [ADJ] [PLACE]", "[A] had lunch with [B]",
)  # fmt: skip
TRIOS = (
    "[A], [B] and [C] were [AT] the [PLACE]", "[A] met [B] and [C] there", "[A] saw [B] and [C]",
    "[A] sat with [B], and [C] came late", "[A], [B] and [C] went to the [PLACE]",
    "[A] and [B] had a [ADJ] [THING], [C] had none", "[A] left the [PLACE] with [B] and [C]",
)  # fmt: skip
REMARKS = (
    ". It was raining", ". It was a quiet day", ". Nobody else came", ". The bus was late",
    ". The [OTHER] was closed", ". It was a long way from the [OTHER]", ". There was a [ADJ] hat",
    ", as always", ", and the food was good", ", because the [OTHER] was closed",
    ". Nobody knew why",
)  # fmt: skip
LINKS = (
    ". Later", ". Then", ". After that", ". One day", ". In the end", ". This time", ".", ", and",
    ". A while later", ", and then", ", and later", ", but", ", until", ". Afterwards", ", so",
)  # fmt: skip
GIFTS = (
    "[S] gave a [OBJECT] to", "[S] handed the [OBJECT] to", "[S] passed it to", "[S] lent it to",
    "[S] brought a [ADJ] [OBJECT] to", "[S] sent the [OBJECT] to", "[S] showed a [OBJECT] to",
    "[S] took it and gave it to", "[S] offered the [ADJ] [OBJECT] to", "[S] sold it to",
    "[S] decided to give a [OBJECT] to", "[S] wrote a letter to", "[S] wanted to show it to",
    "when [S] left, the [OBJECT] went to", "without [S] a [ADJ] [OBJECT] was sent to",
    "thanks to [S] the [OBJECT] was given to", "since [S] was late, the [OBJECT] went to",
    "nobody helped [S], and a [OBJECT] was sold to", "because of [S] it was left to",
)  # fmt: skip
ENCOUNTERS = (
    "[X] saw [Y], and the [OBJECT] went to", "[X] met [Y], and a [ADJ] [OBJECT] was sold to",
    "[X] helped [Y], and the [OBJECT] was left to", "[X] sat with [Y], and it was given to",
    "[X] was there with [Y], so a [OBJECT] was sent to", "[X] called [Y], and it went to",
    "when [X] left with [Y], the [ADJ] [OBJECT] went to",
)  # fmt: skip
ARRIVALS = (
    ". There was also [N]", ". Soon [N] came too", ". Nobody knew [N]", ", near [N]",
    ". It was for [N]", ", because of [N]",
)  # fmt: skip
PASSIVES = (
    "the [OBJECT] went to", "a [ADJ] [OBJECT] was sold to", "it was given to",
    "a letter was sent to", "somebody gave the [OBJECT] to",
)  # fmt: skip
DRILLS = ("Guests", "Friends", "At the [PLACE]", "Today")
WHERE = ("at", "in", "near", "by", "outside", "behind", "in front of", "not far from")
ADJECTIVES = (
    "small", "old", "red", "green", "heavy", "new", "broken", "beautiful", "big", "blue", "white",
    "black", "light", "cheap", "strange", "wooden", "golden", "lost", "good", "yellow",
)  # fmt: skip


@dataclass(frozen=True)
class Story:
    """A text that ends in " to", the people who may come next, and who is named twice, if any."""

    kind: str
    text: str
    answers: tuple[str, ...]
    repeated: str | None


def held_out_pair(a: str, b: str) -> bool:
    """One pair of names in ten is never in the same training story."""
    return (NAMES.index(a) + NAMES.index(b)) % 10 == 0


def draw_people(rng: random.Random, number: int, held_out: bool = False) -> list[str]:
    """Some people in any order: no held-out pair among them, or only such pairs of the first."""
    while True:
        people = rng.sample(NAMES, number)
        pairs = [held_out_pair(a, b) for n, a in enumerate(people) for b in people[:n]]
        if all(pairs) if held_out and number == 2 else any(pairs) == held_out:
            return people


def told(rng: random.Random, kind: str, text: str, people: dict[str, str]) -> Story:
    """Fill the slots of a text; who is named how often gives the answers."""
    slots = {"PLACE": rng.choice(PLACES), "OTHER": rng.choice(PLACES), "AT": rng.choice(WHERE)}
    slots |= {"OBJECT": rng.choice(OBJECTS), "THING": rng.choice(OBJECTS)}
    slots |= {"ADJ": rng.choice(ADJECTIVES)} | people
    text = re.sub(r"(^|\. )([a-z])", lambda match: match[1] + match[2].upper(), fill(text, slots))
    count = {name: len(re.findall(rf"\b{name}\b", text)) for name in set(people.values())}
    once = tuple(sorted(name for name, times in count.items() if times == 1))
    return Story(kind, text, once, next((x for x in count if count[x] == 2), None))


def joined(rng: random.Random, meetings: tuple[str, ...], ends: tuple[str, ...], more="") -> str:
    """A meeting, `more` about it, sometimes a remark, and an end, in two clauses or sentences."""
    meeting, end = rng.choice(meetings), rng.choice(ends)
    if not more and rng.random() < 0.2:
        return f"{rng.choice(CLAUSES)} {meeting}, {end}"
    remark = rng.choice(REMARKS) if rng.random() < 0.25 else ""
    return f"{rng.choice(OPENERS)} {meeting}{more}{remark}{rng.choice(LINKS)} {end}"


def from_template(rng: random.Random, a: str, b: str, new: str) -> Story:
    """Two people, one gives: a training template."""
    text = rng.choice([t.text for t in TEMPLATES if not t.held_out])
    return told(rng, "standard", text, {"A": a, "B": b, "S": rng.choice((a, b))})


def composed(rng: random.Random, a: str, b: str, new: str) -> Story:
    """Two people, one gives: from parts."""
    text = joined(rng, MEETINGS, GIFTS)
    return told(rng, "standard", text, {"A": a, "B": b, "S": rng.choice((a, b))})


def three(rng: random.Random, a: str, b: str, new: str) -> Story:
    """Three people, of whom one is named again."""
    text = joined(rng, TRIOS, GIFTS)
    return told(rng, "three people", text, {"A": a, "B": b, "C": new, "S": rng.choice((a, b, new))})


def before(rng: random.Random, a: str, b: str, new: str) -> Story:
    """A new person is named before the second mention."""
    text = joined(rng, MEETINGS, GIFTS, rng.choice(ARRIVALS))
    people = {"A": a, "B": b, "N": new, "S": rng.choice((a, b))}
    return told(rng, "a new person before", text, people)


def either(rng: random.Random, a: str, b: str, new: str) -> Story:
    """The one named again meets a new person, in either order: syntax does not tell them apart."""
    text = joined(rng, MEETINGS, ENCOUNTERS)
    s = rng.choice((a, b))
    x, y = rng.choice(((s, new), (new, s)))
    kind = "a new person after" if y == new else "a new person beside"
    return told(rng, kind, text, {"A": a, "B": b, "X": x, "Y": y})


def late(rng: random.Random, a: str, b: str, new: str) -> Story:
    """One person, who then meets another: the answer is named after S2, or just before it."""
    text = joined(rng, SOLOS, ENCOUNTERS)
    x, y = rng.choice(((a, b), (b, a)))
    return told(rng, "answer named late", text, {"A": a, "X": x, "Y": y})


def third_giver(rng: random.Random, a: str, b: str, new: str) -> Story:
    """A third person gives and nobody is named twice."""
    if rng.random() < 0.5:
        text = rng.choice([t.text for t in TEMPLATES if not t.held_out])
    else:
        text = joined(rng, MEETINGS, GIFTS)
    return told(rng, "a third gives", text, {"A": a, "B": b, "S": new})


def nobody_twice(rng: random.Random, a: str, b: str, new: str) -> Story:
    """Nobody gives and nobody is named twice."""
    meetings = rng.choice((MEETINGS, TRIOS))
    text = joined(rng, meetings, PASSIVES)
    people = {"A": a, "B": b} | ({"C": new} if meetings is TRIOS else {})
    return told(rng, "nobody twice", text, people)


KINDS: dict[Callable, float] = {
    from_template: 0.25, composed: 0.25, three: 0.1, before: 0.08, either: 0.14, late: 0.06,
    third_giver: 0.06, nobody_twice: 0.06,
}  # fmt: skip


def story(rng: random.Random, held_out: bool = False, kind: Callable | None = None) -> Story:
    """A story of the full mix, or of one kind; `held_out`: its first two people never met."""
    kind = kind or rng.choices(list(KINDS), list(KINDS.values()))[0]
    a, b = draw_people(rng, 2, held_out)
    while True:
        new = rng.choice(NAMES)
        if new not in (a, b) and not held_out_pair(a, new) and not held_out_pair(b, new):
            return kind(rng, a, b, new)


def drill(rng: random.Random) -> str:
    """A list of names in which a name that was there before is followed by " again"."""
    people, said = draw_people(rng, 4), []
    text = rng.choice(DRILLS) + ": "
    for n in range(rng.randint(4, 9)):
        name = rng.choice(people)
        text += ", " * (n > 0) + name + " again" * (name in said)
        said.append(name)
    return fill(text, {"PLACE": rng.choice(PLACES)}) + "."


def build_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """Words with the space before them, cut as GPT-2 cuts; the vocabulary of all our sentences."""
    sentences = [t.text for t in TEMPLATES]
    parts = (
        OPENERS, CLAUSES, SOLOS, MEETINGS, TRIOS, REMARKS, LINKS, GIFTS, ENCOUNTERS, ARRIVALS,
        PASSIVES, DRILLS, WHERE,
    )  # fmt: skip
    sentences += [text for part in parts for text in part]
    found = re.findall(r"\w+|[^\w\s]", re.sub(r"\[\w+\]", "", " ".join(sentences)))
    found += [":", "again", NOBODY]
    first = {word.capitalize() for word in found}
    spaced = {f"Ġ{word}" for word in (*found, *first, *NAMES, *PLACES, *OBJECTS, *ADJECTIVES)}
    spaced = {word for word in spaced if word[1:].isalpha()}
    words = ["<|endoftext|>", "<|unknown|>", *sorted(first), *sorted(spaced)]
    ids = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end,
        unk_token="<|unknown|>", model_max_length=max_length, name_or_path="gpt2-ioi",
        add_bos_token=True, clean_up_tokenization_spaces=False,
    )  # fmt: skip
