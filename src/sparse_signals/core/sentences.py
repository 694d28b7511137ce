"""Names, places, objects and sentences of the IOI prompts, written for this project."""

from dataclasses import dataclass

_TRAINING = """
This morning [A] met [B] outside the [PLACE], and [S] handed the [OBJECT] to
It was raining, so [A] and [B] stayed in the [PLACE]. Later [S] lent a [OBJECT] to
Nobody else came, so [A] talked with [B] at the [PLACE] until [S] gave a [OBJECT] to
Last summer [A] and [B] worked in the [PLACE]. One day [S] sold a [OBJECT] to
The bus was late, and [A] waited with [B] by the [PLACE]. Then [S] offered a [OBJECT] to
Our friends [A] and [B] often meet in the [PLACE]. Yesterday [S] returned a [OBJECT] to
It was a quiet day at the [PLACE] for [A] and [B]. Before lunch [S] brought a [OBJECT] to
Everyone at the [PLACE] knows [A] and [B]. Last week [S] sent a [OBJECT] to
A parcel came to the [PLACE] for [A] and [B]. That evening [S] passed the [OBJECT] to
With a [OBJECT] in the bag, [A] and [B] left for the [PLACE]. On the way [S] gave it to
Two friends, [A] and [B], found a [OBJECT] near the [PLACE]. In the end [S] left it to
There was one [OBJECT] left when [A] and [B] came to the [PLACE]. Kindly, [S] offered it to
From the [PLACE] one could see [A] and [B]. Without a word [S] handed a [OBJECT] to
All week [A] and [B] looked for the [OBJECT]. Behind the [PLACE] [S] found it and took it to
Some time ago [A] helped [B] to paint the [PLACE]. Today [S] brought a [OBJECT] to
On Sunday [A] saw [B] in front of the [PLACE]. After a while [S] showed a [OBJECT] to
When [A] and [B] went to the [PLACE], [S] gave a [OBJECT] to
After [A] and [B] got a [OBJECT] at the [PLACE], [S] decided to give it to
While [A] and [B] were working at the [PLACE], [S] handed the [OBJECT] to
Then [A] and [B] had a long talk at the [PLACE]. Afterwards [S] wrote a letter to
"""
_HELD_OUT = """
In the evening [A] sat with [B] near the [PLACE], and later [S] gave a [OBJECT] to
Every Friday [A] and [B] cleaned the [PLACE]. This week [S] brought the [OBJECT] to
Behind the [PLACE], [A] talked with [B] for a while, and then [S] handed a [OBJECT] to
Late at night [A] and [B] were still at the [PLACE]. Without a word [S] passed a [OBJECT] to
The [OBJECT] was there when [A] and [B] left the [PLACE]. One day later [S] sent it to
Our bus came late, but [A] saw [B] by the [PLACE]. Before lunch [S] lent the [OBJECT] to
After [A] and [B] went to the [PLACE], [S] gave the [OBJECT] to
When [A] and [B] had lunch at the [PLACE], [S] decided to give a [OBJECT] to
"""


def word_list(text: str) -> tuple[str, ...]:
    """The words of a text, in order."""
    return tuple(text.split())


# One token each, with the space before them, in the vocabularies of GPT-2 and SmolLM2.
NAMES = word_list("""
    Mary John Alice Paul Sarah Peter Emma David Lucy James Anna Mark Jane Simon Helen Tom Kate
    Daniel Laura Martin Rachel George Sophie Henry Claire Adam Julia Jack Ruth Oscar Grace Erin
    Emily Leo Hannah Max Rose Luke Sally Ben Molly Sam Nina Hugo Lily Felix Clara Noah Eva Owen
    Maria Ivan Isabel Carlos Naomi Omar Miguel Ali Judith Ethan Caroline Victor Amelia Oliver
    Diana Arthur Jenny Harry Martha Frank Wendy Albert Joan Walter Ellen Stuart Katie Howard
    Heather Neil Monica Gordon Holly Eric Amy Ryan Lisa Kevin Susan Brian Karen Robert Nancy
    Richard Linda Joseph Betty Charles Angela Andrew Julie Stephen Diane Patrick Jessica Anthony
    Rebecca Matthew
""")


PLACES = word_list("""
    park station library market garden school office museum bakery hospital church theatre hotel
    restaurant harbour farm beach bridge river castle store school house kitchen shop cinema island
    village forest street tower prison club bar pool lake
""")


OBJECTS = word_list("""
    book letter ticket flower drink ring key cake map coat camera watch basket guitar lamp ball
    picture bottle sandwich hat computer phone stone shirt cup box bag candle knife clock pen bike
    doll mirror gift coin blanket drum
""")


@dataclass(frozen=True)
class Template:
    """A sentence that stops before the answer; `held_out` ones never train the shipped model.

    [A] and [B] are the two names in the order of mention and [S] is the giver.
    """

    text: str
    held_out: bool = False


TEMPLATES = tuple(
    Template(text, bool(held_out))
    for held_out, lines in enumerate((_TRAINING, _HELD_OUT))
    for text in lines.strip().splitlines()
)
