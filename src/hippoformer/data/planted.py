"""Facts planted in real text and asked for later, so that training has something exact to remember.

Natural text rarely needs a number from thousands of tokens ago. Made-up statements are put between the lines of a
document, and after a random gap each is asked for, mostly in other words; the answer ends the question. The wordings
are this module's own; evaluations use others (`evaluation/recall/needles.py`).
"""

import random
from collections.abc import Sequence

from hippoformer.data.documents import Document
from hippoformer.errors import ConfigurationError

# Kind of value -> what somebody can have.
_KINDS = {
    "number": "combination of the safe, ticket number, telephone number, entry in the ledger, regimental number, "
    "number of the cabin, weight of the parcel in grains, mark on the crate, account at the bank, "
    "reference of the letter",
    "place": "favourite town, place of birth, hiding place of the letter, next port of call, country seat",
    "word": "name of the horse, name of the boat, family motto, watchword, brand of tobacco",
    "person": "true name, godmother, lawyer, oldest friend",
    "common": "colour of the door, favourite dish, trade, instrument",
}
_ATTRIBUTES = {attribute: kind for kind, listed in _KINDS.items() for attribute in listed.split(", ")}
_ATTRIBUTES_A_DOCUMENT = 5
_STATEMENTS = (
    "The {attribute} of {owner} is {value}.",
    "{owner}'s {attribute} is {value}.",
    "Everyone knew that the {attribute} of {owner} was {value}.",
    "It was settled that the {attribute} for {owner} should be {value}.",
    "{owner} wrote down the {attribute}: {value}.",
    "Concerning {owner}, the {attribute} is {value}, and nobody else knew it.",
    "In those days {owner} gave the {attribute} as {value}.",
    "Note for later: {owner}, {attribute}, {value}.",
)
_QUESTIONS = (
    "What is the {attribute} of {owner}? The {attribute} of {owner} is {value}",
    "What is {owner}'s {attribute}? It is {value}",
    "Question: what was the {attribute} of {owner}? Answer: {value}",
    '"Can you tell me the {attribute} of {owner}?" "{value}',
    "Who remembers {owner}? The {attribute} was {value}",
    "{owner}'s {attribute}, as was said before, is {value}",
)
# fmt: off
_COMMON = (
    "blue", "green", "scarlet", "yellow", "mutton", "oysters", "pudding", "trout", "baker", "cooper", "tailor",
    "glazier", "flute", "violin", "harp", "bassoon",
)
_SYLLABLES = (
    "bar", "cor", "dal", "fen", "gri", "hul", "jas", "kel", "lor", "mav", "nem", "osk", "pel", "rov", "sul", "tam",
    "und", "ves", "wim", "yar", "zeb", "bri", "cha", "dro", "eli", "fro", "gwen", "hes", "ich", "jun", "kra", "lin",
    "mor", "nor", "ola", "pri", "qua", "ros", "sta", "tri", "uls", "vor", "wes",
)
_ENDINGS = (
    "a", "en", "ick", "ow", "us", "eth", "ard", "ine", "ley", "ton", "mont", "wick", "is", "o", "ham", "stead",
)
# fmt: on


def plant_facts(documents: Sequence[Document], facts: int, gap: tuple[int, int], seed: int) -> list[Document]:
    """Copies of the documents with facts in them.

    Args:
        documents: real text; facts go between its lines, at the beginning of a line.
        facts: planted in each document, each stated once and asked for once.
        gap: smallest and largest distance between the two, in characters.
        seed: of names, numbers, wordings and places.

    Returns:
        As many documents. One that is shorter than twice the smallest gap comes back without facts.

    Raises:
        ConfigurationError: a negative number of facts or a gap that is not a range.
    """
    if facts < 0 or not 0 < gap[0] <= gap[1]:
        raise ConfigurationError(f"expected facts >= 0 and a gap 0 < from <= to, got facts={facts}, gap={gap}")
    return [_planted(document, facts, gap, random.Random(f"{seed}/{i}")) for i, document in enumerate(documents)]


def _planted(document: Document, facts: int, gap: tuple[int, int], draw: random.Random) -> Document:
    text = document.text
    places: list[tuple[int, str]] = []
    # Few attributes, many owners: only the owner's name tells one number from another.
    attributes = draw.sample(sorted(_ATTRIBUTES), _ATTRIBUTES_A_DOCUMENT)
    for _ in range(facts if len(text) >= 2 * gap[0] else 0):
        statement, question = _fact(draw, draw.choice(attributes))
        first = draw.randrange(len(text) - gap[0])
        second = min(first + draw.randint(*gap), len(text) - 1)
        places += [(first, statement), (second, question)]
    pieces, end = [], 0
    for where, sentence in sorted(places):
        cut = max(end, text.find("\n", where) + 1 or len(text))
        pieces += [text[end:cut], "" if cut == 0 or text[cut - 1] == "\n" else "\n", sentence, "\n"]
        end = cut
    return Document(document.title, "".join(pieces) + text[end:], f"{document.source} with planted facts")


def _fact(draw: random.Random, attribute: str) -> tuple[str, str]:
    """A statement, and a question that ends with its value."""
    value = {
        "number": "".join(str(draw.randrange(10)) for _ in range(draw.randint(3, 6))),
        "place": _name(draw),
        "word": _name(draw),
        "person": f"{_name(draw)} {_name(draw)}",
        "common": draw.choice(_COMMON),
    }[_ATTRIBUTES[attribute]]
    owner = _name(draw) if draw.random() < 0.5 else f"{_name(draw)} {_name(draw)}"
    slots = {"attribute": attribute, "owner": owner, "value": value}
    return draw.choice(_STATEMENTS).format(**slots), draw.choice(_QUESTIONS).format(**slots)


def _name(draw: random.Random) -> str:
    middle = draw.choice(_SYLLABLES) if draw.random() < 0.5 else ""
    return (draw.choice(_SYLLABLES) + middle + draw.choice(_ENDINGS)).capitalize()
