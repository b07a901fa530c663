"""Questions about short stories whose sentences are hidden in a book, made as BABILong makes them.

The sentences of a bAbI story keep their order and are put at random places between consecutive sentences of a book,
until the whole is as long as was asked for (Kuratov et al. 2024, arXiv:2406.10149).
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count, islice
from pathlib import Path

from evaluation.questions.sources import named_questions
from hippoformer.data.questions import Question
from hippoformer.errors import ConfigurationError, TextError

# After a full stop, with or without a closing quote, where a capital follows; not after the commonest titles.
_SENTENCE_END = re.compile(
    r"(?:(?<=[.!?])|(?<=[.!?][\"'”’]))(?<!\bMr\.)(?<!\bMrs\.)(?<!\bMs\.)(?<!\bDr\.)(?<!\bSt\.)\s+"
    r"(?=[\"'“‘]?[A-ZÀ-Þ])"
)


def sentences(text: str) -> list[str]:
    """The sentences of a book, found by a regular expression; every run of white space in them becomes one blank."""
    return [sentence for sentence in _SENTENCE_END.split(" ".join(text.split())) if sentence]


def hide(
    question: Question, book: Sequence[str], n_tokens: int, length: Callable[[str], int], draw: random.Random
) -> Question:
    """The question with its story hidden in a book.

    Args:
        question: its context is the story, a sentence a line.
        book: sentences, read from a random one on, round and round.
        n_tokens: of the new context, at least; 0: the story alone, on one line.
        length: tokens of a text. draw: makes the places.
    """
    story = question.context.splitlines()
    first = draw.randrange(len(book)) if book else 0
    following = (book[number % len(book)] for number in count(first))
    places = sorted(draw.random() for _ in story)  # as shares of the book's part, which may have to grow
    chosen: list[str] = []
    while True:
        told = " ".join(_woven(story, places, chosen))
        missing = n_tokens - length(told)
        if missing <= 0:
            return replace(question, context=told)
        while missing > 0:  # an estimate: sentences together may be fewer tokens than one by one
            chosen.append(next(following))
            missing -= max(1, length(f" {chosen[-1]}"))


def hidden_questions(
    task: str,
    split: str,
    books: Sequence[Sequence[str]],
    n_tokens: int,
    samples: int,
    length: Callable[[str], int],
    seed: int = 0,
    data_dir: str | Path = "data",
) -> list[Question]:
    """Questions of a bAbI task, each with its story hidden in a book drawn at random.

    A seed draws the same stories at every length, and for fewer samples the first of them.

    Args:
        task: qa1 to qa5, or 10k-qa1 and its like for the larger set. split: of bAbI.
        books: each as its sentences; none are needed for 0 tokens. n_tokens, length: as for `hide`.

    Raises:
        ConfigurationError: a number out of range, or more samples than the task has questions.
        TextError: the task is not at hand, or there is no sentence to hide a story among.
    """
    found = named_questions(f"babi-{task}", split, data_dir)
    if n_tokens < 0 or not 1 <= samples <= len(found):
        raise ConfigurationError(
            f"n_tokens={n_tokens}, samples={samples}; expected n_tokens >= 0, and samples from 1 to the {len(found)} "
            f"questions of babi-{task} ({split})"
        )
    if n_tokens > 0 and not (books and all(books)):
        raise TextError("a book without a sentence to hide a story among: name texts of whole sentences")
    random.Random(f"{seed}/{task}").shuffle(found)
    shown, hidden = f"{n_tokens // 1_000}k" if n_tokens % 1_000 == 0 else str(n_tokens), []
    for question in found[:samples]:
        number = question.name.rpartition(":")[2]
        draw = random.Random(f"{seed}/{task}/{number}/{n_tokens}")
        book = books[draw.randrange(len(books))] if n_tokens > 0 else ()
        named = replace(question, name=f"babilong-{shown}-{task}:{number}")
        hidden.append(hide(named, book, n_tokens, length, draw))
    return hidden


def _woven(story: Sequence[str], places: Sequence[float], book: Sequence[str]) -> Iterator[str]:
    """All sentences of both, each story sentence at its share of the book."""
    following, done = iter(book), 0
    for sentence, place in zip(story, places, strict=True):
        before = int(place * (len(book) + 1))
        yield from islice(following, before - done)
        yield sentence
        done = before
    yield from following
