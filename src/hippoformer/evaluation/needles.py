"""Facts hidden in long text, and the questions about them: what a memory is asked to recall.

Kinds, each with names that no text holds:

    pass key    a number of five digits
    home        a made-up name and a made-up place
    one of three   three numbers told together, one of them asked for
    moved       a home that was told before, of the same person at another place
    reworded    a home, asked for in other words than those it was told in

The last two are not among those asked by default.

The wordings are those of this evaluation and of no training text (`data.planted` has others).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from hippoformer.data import Document
from hippoformer.errors import TextError
from hippoformer.text import token_ids

PIECE = 512  # tokens read between two looks at what is due
KINDS = ("pass key", "home", "one of three")
ALL_KINDS = (*KINDS, "moved", "reworded")
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
    """A fact as token ids.

    Attributes:
        kind: one of `ALL_KINDS`.
        statement: what is put into the text, on lines of its own.
        question: what is read when the fact is asked for; the answer continues it.
        answer: the tokens that must come next.
        answer_offset: where the answer stands in the statement.
        earlier: what was told before and holds no longer; of most kinds nothing.
    """

    kind: str
    statement: list[int]
    question: list[int]
    answer: list[int]
    answer_offset: int
    earlier: tuple[int, ...] = ()


def draw_needle(kind: str, tokenizer: Any, draw: random.Random) -> Needle:
    """A new fact of a kind.

    Args:
        kind: one of `ALL_KINDS`. tokenizer: of the model that will read it.
        draw: names, places and numbers come from it.
    """
    if kind == "pass key":
        name = _name(draw, _PERSON_ENDS)
        return _encoded(kind, f"The pass key of {name} is", f" {_number(draw)}", ". Remember it.", "", tokenizer)
    if kind in ("home", "moved", "reworded"):
        name, place = _name(draw, _PERSON_ENDS), _name(draw, _PLACE_ENDS)
        told, question = f"{name} lives in", f"Where does {name} live?"
        home = _encoded(kind, told, f" {place}", ".", question, tokenizer)
        if kind == "reworded":
            other_words = f"\n\nIn which town is the house of {name}? The house of {name} is in"
            return replace(home, question=token_ids(tokenizer, other_words))
        if kind == "home":
            return home
        while (former := _name(draw, _PLACE_ENDS)) == place:
            pass
        return replace(home, earlier=tuple(_encoded(kind, told, f" {former}", ".", question, tokenizer).statement))
    names = [_name(draw, _PERSON_ENDS) for _ in range(3)]
    sentences = [(f"The special magic number for {name} is", f" {_number(draw)}") for name in names]
    asked = draw.randrange(3)
    head = "".join(f"{a}{b}. " for a, b in sentences[:asked])
    tail = "".join(f" {a}{b}." for a, b in sentences[asked + 1 :])
    question = f"What is the special magic number for {names[asked]}?"
    return _encoded(kind, sentences[asked][0], sentences[asked][1], f".{tail}", question, tokenizer, head)


@dataclass(frozen=True)
class Planted:
    """A fact in a stream: its statement begins at `start`."""

    haystack: int
    start: int
    needle: Needle

    @property
    def answer(self) -> range:
        """Where the answer stands in the stream."""
        first = self.start + self.needle.answer_offset
        return range(first, first + len(self.needle.answer))

    @property
    def end(self) -> int:
        """Tokens of the stream up to the end of the statement."""
        return self.start + len(self.needle.statement)


def haystack(
    tokenizer: Any,
    documents: Sequence[Document],
    number: int,
    facts: int,
    kinds: Sequence[str],
    spacing: int,
    farthest: int,
    seed: int,
) -> tuple[list[int], list[Planted]]:
    """The token ids of one stream, long enough for every question, and the facts in it.

    Args:
        documents: the stream begins with the one of this number and goes on with those after it, round and round.
        facts: of each kind. kinds: some of `ALL_KINDS`.
        spacing: tokens of the documents before the first fact and between two, and after what was told earlier.
        farthest: tokens after the last fact, at least.
        seed: of the facts.

    Raises:
        TextError: no text.
    """
    draw = random.Random(f"{seed}/{number}")
    needles = [draw_needle(kind, tokenizer, draw) for _ in range(facts) for kind in kinds]
    ids: list[int] = []
    planted = []
    text = _endless(tokenizer, documents, number)
    for needle in needles:
        if needle.earlier:
            ids += [*islice(text, spacing), *needle.earlier]
        ids += islice(text, spacing)
        planted.append(Planted(number, len(ids), needle))
        ids += needle.statement
    # Streams are cut to the shortest, and facts differ by a few tokens.
    ids += [next(text) for _ in range(farthest + 2 * PIECE + 16 * len(needles))]
    return ids, planted


def _endless(tokenizer: Any, documents: Sequence[Document], first: int):  # type: ignore[no-untyped-def]
    """Tokens of the documents from the first on, round and round."""
    if not any(document.text.strip() for document in documents):
        raise TextError("there is no text to hide facts in: name a longer one")
    while True:
        document = documents[first % len(documents)]
        yield from token_ids(tokenizer, document.text)
        first += 1


def _encoded(kind: str, prompt: str, answer: str, tail: str, question: str, tokenizer: Any, head: str = "") -> Needle:
    before, told, after = (token_ids(tokenizer, text) for text in (f"\n\n{head}{prompt}", answer, f"{tail}\n\n"))
    asked = token_ids(tokenizer, f"\n\n{question} {prompt}" if question else f"\n\n{prompt}")
    return Needle(kind, [*before, *told, *after], asked, told, len(before))


def _name(draw: random.Random, ends: Sequence[str]) -> str:
    return (draw.choice(_SYLLABLES) + draw.choice(_SYLLABLES) + draw.choice(ends)).capitalize()


def _number(draw: random.Random) -> str:
    return "".join(str(draw.randrange(10)) for _ in range(5))
