"""Facts hidden in long text and the questions about them, for measuring recall; no training text has these wordings.

pass key       a number of five digits
home           a made-up name and a made-up place
one of three   three numbers stated together, one of them asked for
moved          a home, after an earlier one of the same person that no longer holds
reworded       a home, asked for in other words
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from hippoformer.data.documents import Document
from hippoformer.errors import TextError
from hippoformer.text import token_ids

PIECE = 512  # tokens read between two looks at which questions are due
KINDS = ("pass key", "home", "one of three", "moved", "reworded")
# fmt: off
_SYLLABLES = (
    "al", "be", "cu", "dor", "eth", "fi", "gan", "hol", "iv", "ka", "lun", "mir", "on", "phi", "quor", "ska", "thu",
    "ur", "vel", "xan", "yl", "zor",
)
# fmt: on
_PERSON_ENDS = ("a", "an", "is", "o", "ra", "th")
_PLACE_ENDS = ("bury", "dale", "ford", "gate", "haven", "mere")


@dataclass(frozen=True)
class Needle:
    """A fact as token ids: its statement, the question that its answer continues, and where the answer stands in the
    statement; `earlier` is a statement before it that no longer holds. In a stream (row) it begins at `start`.
    """

    kind: str
    statement: list[int]
    question: list[int]
    answer: list[int]
    answer_offset: int
    earlier: tuple[int, ...] = ()
    row: int = 0
    start: int = 0

    @property
    def end(self) -> int:
        """Tokens of the stream up to the end of the statement."""
        return self.start + len(self.statement)

    @property
    def answer_positions(self) -> range:
        """Where the answer stands in the stream."""
        first = self.start + self.answer_offset
        return range(first, first + len(self.answer))


def draw_needle(kind: str, tokenizer: Any, draw: random.Random) -> Needle:
    """A new fact of one of `KINDS`."""
    if kind == "pass key":
        name = _name(draw, _PERSON_ENDS)
        return _encode(kind, f"The pass key of {name} is", f" {_number(draw)}", ". Remember it.", "", tokenizer)
    if kind == "one of three":
        names = [_name(draw, _PERSON_ENDS) for _ in range(3)]
        facts = [(f"The special magic number for {name} is", f" {_number(draw)}") for name in names]
        asked = draw.randrange(3)
        head = "".join(f"{a}{b}. " for a, b in facts[:asked])
        tail = "." + "".join(f" {a}{b}." for a, b in facts[asked + 1 :])
        question = f"What is the special magic number for {names[asked]}?"
        return _encode(kind, *facts[asked], tail, question, tokenizer, head)
    name, place = _name(draw, _PERSON_ENDS), _name(draw, _PLACE_ENDS)
    prompt, question = f"{name} lives in", f"Where does {name} live?"
    home = _encode(kind, prompt, f" {place}", ".", question, tokenizer)
    if kind == "reworded":
        other_words = f"\n\nIn which town is the house of {name}? The house of {name} is in"
        return replace(home, question=token_ids(tokenizer, other_words))
    if kind == "moved":
        while (former := _name(draw, _PLACE_ENDS)) == place:
            pass
        return replace(home, earlier=tuple(_encode(kind, prompt, f" {former}", ".", question, tokenizer).statement))
    return home


def haystack(
    tokenizer: Any, documents: Sequence[Document], row: int, facts: int, kinds: Sequence[str], spacing: int, after: int,
    seed: int,
) -> tuple[list[int], list[Needle]]:  # fmt: skip
    """The token ids of a stream, and the facts in it.

    Args:
        documents: the stream begins with the one of number `row` and goes on with those after it, round and round.
        facts: of each of the kinds. spacing: tokens before each statement. after: tokens after the last one, at least.

    Raises:
        TextError: no text.
    """
    if not any(document.text.strip() for document in documents):
        raise TextError("there is no text to hide facts in: name a longer one")
    draw = random.Random(f"{seed}/{row}")
    drawn = [draw_needle(kind, tokenizer, draw) for _ in range(facts) for kind in kinds]
    ids: list[int] = []
    needles = []
    text = _endless(tokenizer, documents, row)
    for needle in drawn:
        if needle.earlier:
            ids += [*islice(text, spacing), *needle.earlier]
        ids += islice(text, spacing)
        needles.append(replace(needle, row=row, start=len(ids)))
        ids += needle.statement
    # Streams are cut to the shortest, and facts differ by a few tokens.
    return ids + list(islice(text, after + 2 * PIECE + 16 * len(drawn))), needles


def _endless(tokenizer: Any, documents: Sequence[Document], number: int) -> Iterator[int]:
    while True:
        yield from token_ids(tokenizer, documents[number % len(documents)].text)
        number += 1


def _encode(kind: str, prompt: str, answer: str, tail: str, question: str, tokenizer: Any, head: str = "") -> Needle:
    before, told, after = (token_ids(tokenizer, text) for text in (f"\n\n{head}{prompt}", answer, f"{tail}\n\n"))
    asked = token_ids(tokenizer, f"\n\n{question} {prompt}" if question else f"\n\n{prompt}")
    return Needle(kind, [*before, *told, *after], asked, told, len(before))


def _name(draw: random.Random, ends: Sequence[str]) -> str:
    return (draw.choice(_SYLLABLES) + draw.choice(_SYLLABLES) + draw.choice(ends)).capitalize()


def _number(draw: random.Random) -> str:
    return "".join(str(draw.randrange(10)) for _ in range(5))
