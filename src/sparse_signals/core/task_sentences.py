"""Words and sentences of the tasks beside IOI, written for this project.

Sentences stop before the answer. Every slot but CENTURY is one token with the space before it, in
the vocabularies of GPT-2 and SmolLM2.
"""

from sparse_signals.core.sentences import NAMES, OBJECTS, PLACES, Template, word_list


def _sentences(training: str, held_out: str) -> tuple[Template, ...]:
    return tuple(
        Template(text, bool(held))
        for held, lines in enumerate((training, held_out))
        for text in lines.strip().splitlines()
    )


WOMEN = word_list("""
    Mary Alice Sarah Emma Lucy Anna Jane Helen Kate Laura Rachel Claire Julia Ruth Grace Erin Emily
    Hannah Sally Molly Nina Rose Lily Sophie Clara Eva Maria Isabel Naomi Judith Caroline Amelia
    Diana Jenny Martha Wendy Joan Ellen Katie Heather Monica Holly Amy Lisa Susan Karen Nancy Linda
    Betty Angela Julie Diane Jessica Rebecca
""")
MEN = tuple(name for name in NAMES if name not in WOMEN)

LISTED = tuple(dict.fromkeys((*PLACES, *OBJECTS)))  # each once

EVENTS = word_list("""
    war journey project strike reign siege voyage trial drought famine festival contest debate
    rebellion expedition treaty search study
""")
YEARS = tuple(f"{year}" for year in range(1500, 1900))

_NOUNS = word_list("""
    key letter book camera picture ticket window door car ship tree flower house road machine plate
    bottle table chair doctor teacher student friend parent driver singer writer dog cat horse bird
    lamp shirt bag map boy girl king soldier farmer player manager guard judge artist actor officer
    brother sister
""")
NOUNS = {noun: f"{noun}s" for noun in _NOUNS}  # one of them: several
NOUNS |= {"child": "children", "man": "men", "woman": "women"}

GREATER_THAN = _sentences(
    """
The [EVENT] began in [CENTURY][YEAR] and was over in [CENTURY]
It took long: the [EVENT] started in [CENTURY][YEAR] and ended in [CENTURY]
The [EVENT] that began in the year [CENTURY][YEAR] went on until the year [CENTURY]
He was there for the whole [EVENT], from [CENTURY][YEAR] until [CENTURY]
We know that the [EVENT] went on from [CENTURY][YEAR] to [CENTURY]
The first [EVENT] was in the year [CENTURY][YEAR], and the second one in the year [CENTURY]
People spoke of a [EVENT] from the year [CENTURY][YEAR] to the year [CENTURY]
""",
    """
The [EVENT] ran from [CENTURY][YEAR] through [CENTURY]
Nobody forgot the [EVENT], which started in [CENTURY][YEAR] and stopped in [CENTURY]
Plans for the [EVENT] were made in [CENTURY][YEAR] and carried out in [CENTURY]
All papers about the [EVENT] are from between [CENTURY][YEAR] and [CENTURY]
""",
)

PRONOUNS = _sentences(
    """
When [NAME] came home from the [PLACE],
Yesterday [NAME] lost the [OBJECT], and now
We know that [NAME] sold the [OBJECT] because
Last week [NAME] stayed at the [PLACE] until
Everyone at the [PLACE] likes [NAME], because
If [NAME] cannot find the [OBJECT],
Before [NAME] went to the [PLACE],
I gave the [OBJECT] to [NAME], and then
""",
    """
After [NAME] left the [PLACE],
This morning [NAME] bought a [OBJECT], but
The [OBJECT] belongs to [NAME], and today
Whenever [NAME] walks by the [PLACE],
""",
)

AGREEMENT = _sentences(
    """
The [NOUN] near the [OTHER]
Everyone says that the [NOUN] beside the [OTHER]
In this picture the [NOUN] in front of the [OTHER]
I think that the [NOUN] behind the [OTHER]
As you can see, the [NOUN] from the story about the [OTHER]
The [NOUN] on the left of the [OTHER]
""",
    """
The [NOUN] next to the [OTHER]
Today the [NOUN] across from the [OTHER]
We heard that the [NOUN] with the [OTHER]
On this page the [NOUN] above the [OTHER]
""",
)

INDUCTION = _sentences(  # in words of the shipped model
    """
Yesterday: [BEFORE] [SEEN] [NEXT] [AFTER]. Today: [AGAIN]
Last week: [BEFORE] [SEEN] [NEXT] [AFTER]. This week: [AGAIN]
In the morning: [BEFORE] [SEEN] [NEXT] [AFTER]. In the evening: [AGAIN]
It was [BEFORE] [SEEN] [NEXT] [AFTER], and again it was [AGAIN]
In the summer: [BEFORE] [SEEN] [NEXT] [AFTER]. In the winter: [AGAIN]
At lunch: [BEFORE] [SEEN] [NEXT] [AFTER]. At dinner: [AGAIN]
""",
    """
On Monday: [BEFORE] [SEEN] [NEXT] [AFTER]. On Friday: [AGAIN]
There was [BEFORE] [SEEN] [NEXT] [AFTER]. Then there was [AGAIN]
One day: [BEFORE] [SEEN] [NEXT] [AFTER]. One week later: [AGAIN]
Everyone got [BEFORE] [SEEN] [NEXT] [AFTER], and nobody else got [AGAIN]
""",
)
