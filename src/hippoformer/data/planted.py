"""Facts planted in real text and told again later, so that training has something exact to remember.

Natural text rarely needs a number from thousands of tokens ago, so a hippocampus trained on it alone learns the gist
and forgets the digits. Here made-up sentences are put between the lines of a document, and each is told again after a
gap drawn at random: whoever kept it can foretell its ending. The wordings are this module's own; evaluations must use
others.
"""

import random
from collections.abc import Sequence

from hippoformer.data.documents import Document
from hippoformer.errors import ConfigurationError

_SUBJECTS = (
    "The combination of the safe in {place} is {number}.",
    "{name} was given the ticket with the number {number}.",
    "In the ledger, {name} of {place} stands under entry {number}.",
    "The telephone of {name} answers to {number}.",
    "The wine cellar at {place} holds {number} bottles.",
    "The favourite town of {name} is {place}.",
    "{name} hid the letter in {place}, beside the well.",
    "The horse of {name} carries the mark {number}.",
)
_SYLLABLES = ("bar", "cor", "dal", "fen", "gri", "hul", "jas", "kel", "lor", "mav", "nem", "osk", "pel", "rov", "sul")
_ENDINGS = ("a", "en", "ick", "ow", "us", "eth", "ard", "ine")


def plant_facts(documents: Sequence[Document], facts: int, gap: tuple[int, int], seed: int) -> list[Document]:
    """Copies of the documents with facts in them.

    Args:
        documents: real text; facts go between its lines, at the beginning of a line.
        facts: planted in each document, each told twice.
        gap: smallest and largest distance between the two tellings, in characters.
        seed: of names, numbers and places.

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
    for _ in range(facts if len(text) >= 2 * gap[0] else 0):
        sentence = _sentence(draw)
        first = draw.randrange(len(text) - gap[0])
        second = min(first + draw.randint(*gap), len(text) - 1)
        places += [(first, sentence), (second, sentence)]
    pieces, end = [], 0
    for where, sentence in sorted(places):
        cut = max(end, text.find("\n", where) + 1 or len(text))
        pieces += [text[end:cut], "" if cut == 0 or text[cut - 1] == "\n" else "\n", sentence, "\n"]
        end = cut
    return Document(document.title, "".join(pieces) + text[end:], f"{document.source} with planted facts")


def _sentence(draw: random.Random) -> str:
    def name() -> str:
        return (draw.choice(_SYLLABLES) + draw.choice(_SYLLABLES) + draw.choice(_ENDINGS)).capitalize()

    number = "".join(str(draw.randrange(10)) for _ in range(draw.randint(3, 6)))
    return draw.choice(_SUBJECTS).format(name=f"{name()} {name()}", place=name(), number=number)
