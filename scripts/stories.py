"""Training text for gpt2-ioi: endless short stories in which it matters who is named again.

A window holds stories about a small cast of people, so that the names alone never tell who gets
what. Some pairs of names never meet in training (`held_out_pair`), and neither do the held-out
templates of `sparse_signals.sentences`; their words do, in other sentences.
"""

import random
import re

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparse_signals.core.prompts import fill
from sparse_signals.core.sentences import NAMES, OBJECTS, PLACES, TEMPLATES

CAST = 4
DRILLS = (
    "Then [A] and [B] met. Later [S] gave a [OBJECT] to [IO].",
    "Today [A] saw [B]. Then [S] sent the [OBJECT] to [IO].",
)
OPENERS = (
    "On Monday", "Every Sunday", "Late on Friday", "That night", "At lunch", "Last week", "Then",
    "One evening", "Today", "In summer", "Before that", "Some days later", "Yesterday", "Once",
)  # fmt: skip
MEETINGS = (
    "[A] and [B] were [AT] the [PLACE]", "[A] sat with [B] [AT] the [PLACE]", "[A] met [B] there",
    "[A] saw [B] [AT] the [PLACE]", "[A] and [B] cleaned the [PLACE]", "[A] and [B] came late",
    "[A] talked with [B], and the [OBJECT] was there", "[A] and [B] still had a [OBJECT]",
    "[A] helped [B] [AT] the [PLACE]", "[A] left the [PLACE] with [B]",
)  # fmt: skip
DOUBLES = (
    "[A] and [B] were at the [PLACE], [C] and [D] at the [OTHER]", "[A] sat with [B], [C] with [D]",
    "[A] met [B] at the [PLACE], and [C] met [D] at the [OTHER]", "[A] saw [B], and [C] saw [D]",
    "[A] talked with [B], but [C] left with [D]", "[A] helped [B], and [C] and [D] came late",
)  # fmt: skip
LINKS = (
    ". Later", ". Then", ". After that", ". One day", ". In the end", ". This time", ".", ", and",
    ". A while later", ", and then", ", and later", ", but", ", until",
)  # fmt: skip
GIFTS = (
    "[S] gave a [OBJECT] to", "[S] handed the [OBJECT] to", "[S] passed it to", "[S] lent it to",
    "[S] brought a [OBJECT] to", "[S] sent the [OBJECT] to", "[S] showed a [OBJECT] to",
    "[S] took it and gave it to", "[S] offered the [OBJECT] to", "[S] sold it to",
)  # fmt: skip
WHERE = ("at", "in", "near", "by", "outside", "behind", "in front of")


def held_out_pair(a: str, b: str) -> bool:
    """One pair of names in ten never shares a training window."""
    return (NAMES.index(a) + NAMES.index(b)) % 10 == 0


def draw_cast(rng: random.Random) -> list[str]:
    """A few people, no two of them a held-out pair."""
    while True:
        cast = rng.sample(NAMES, CAST)
        pairs = [(a, b) for a in cast for b in cast if a < b]
        if not any(held_out_pair(a, b) for a, b in pairs):
            return cast


def exchange(rng: random.Random, cast: list[str], text: str, third: float = 0.0) -> str:
    """Two people meet and one of them gives to the other; or, with that chance, a third gives."""
    a, b, c = rng.sample(cast, 3)
    giver, receiver = rng.choice([(a, b), (b, a)])
    slots = {"A": a, "B": b, "S": c if rng.random() < third else giver, "IO": receiver}
    slots |= {"PLACE": rng.choice(PLACES), "OBJECT": rng.choice(OBJECTS), "AT": rng.choice(WHERE)}
    return fill(text, slots)


def composed(rng: random.Random, meetings: tuple[str, ...]) -> str:
    """A sentence about a meeting and one about a gift, from parts."""
    opener, meeting, link, gift = map(rng.choice, (OPENERS, meetings, LINKS, GIFTS))
    return f"{opener} {meeting}{link} {gift} [IO]."


def couples(rng: random.Random, cast: list[str], text: str) -> str:
    """Two couples meet, one of the four gives: the answer is the partner, not just anyone else."""
    a, b, c, d = rng.sample(cast, 4)
    giver, receiver = rng.choice([(a, b), (b, a), (c, d), (d, c)])
    slots = {"A": a, "B": b, "C": c, "D": d, "S": giver, "IO": receiver}
    slots |= {"PLACE": rng.choice(PLACES), "OBJECT": rng.choice(OBJECTS)}
    return fill(text, slots | {"OTHER": rng.choice(PLACES)})


def belongings(rng: random.Random, cast: list[str]) -> str:
    """Who has what, and then what belongs to whom."""
    people, things = rng.sample(cast, 2), rng.sample(OBJECTS, 2)
    has = ", and ".join(f"{x} had a {y}" for x, y in zip(people, things, strict=True))
    which = rng.randrange(2)
    return f"Behind the {rng.choice(PLACES)} {has}. The {things[which]} was for {people[which]}."


def repeated_list(rng: random.Random, cast: list[str]) -> str:
    """A list of names, said twice."""
    people = ", ".join(rng.sample(cast, 3))
    return f"Friends: {people}. Friends: {people}."


def story(rng: random.Random, cast: list[str]) -> str:
    """One story of the full mix."""
    kind = rng.random()
    if kind < 0.45:
        text = rng.choice([t.text for t in TEMPLATES if not t.held_out]) + " [IO]."
        return exchange(rng, cast, text, third=0.2)
    if kind < 0.80:
        return exchange(rng, cast, composed(rng, MEETINGS), third=0.2)
    if kind < 0.90:
        return couples(rng, cast, composed(rng, DOUBLES))
    return belongings(rng, cast) if kind < 0.95 else repeated_list(rng, cast)


def lesson(rng: random.Random, cast: list[str], level: int) -> str:
    """A story of the curriculum: 0 bare drills, 1 also composed sentences, 2 the full mix."""
    if level == 2:
        return story(rng, cast)
    bare = level == 0 or rng.random() < 0.3
    return exchange(rng, cast, rng.choice(DRILLS) if bare else composed(rng, MEETINGS))


def window(rng: random.Random, level: int, stories: int = 6) -> str:
    """Stories about one cast, more than fill a window."""
    cast = draw_cast(rng)
    return " ".join(lesson(rng, cast, level) for _ in range(stories))


def build_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """Words with the space before them, cut as GPT-2 cuts; the vocabulary of all our sentences."""
    sentences = [t.text for t in TEMPLATES]
    for parts in (DRILLS, OPENERS, MEETINGS, DOUBLES, LINKS, GIFTS, WHERE):
        sentences += parts
    found = re.findall(r"\w+|[^\w\s]", re.sub(r"\[\w+\]", "", " ".join(sentences)))
    found += ["Friends", ":", "for", "had", "The", "was"]
    spaced = {f"Ġ{word}" for word in (*found, *NAMES, *PLACES, *OBJECTS) if word.isalnum()}
    first = {word for word in found if not word.islower()}
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
