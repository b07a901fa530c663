"""Questions about short stories whose sentences are hidden in a book, made as BABILong makes them.

A story of bAbI is told one sentence a line. Its sentences keep their order and are put at places drawn at random
between consecutive sentences of a book, until the whole is as long as was asked for (Kuratov et al. 2024,
arXiv:2406.10149). What the question needs is a few tokens among thousands that have nothing to do with it.
"""

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from hippoformer.data.questions import Question, read_questions
from hippoformer.errors import ConfigurationError, TextError

# After a full stop, with or without a closing quote, where a capital follows; not after the commonest titles.
_SENTENCE_END = re.compile(
    r"(?:(?<=[.!?])|(?<=[.!?][\"'”’]))(?<!\bMr\.)(?<!\bMrs\.)(?<!\bMs\.)(?<!\bDr\.)(?<!\bSt\.)\s+"
    r"(?=[\"'“‘]?[A-ZÀ-Þ])"
)


def sentences(text: str) -> list[str]:
    """The sentences of a book, every run of white space in them one space; told by a regular expression."""
    return [sentence for sentence in _SENTENCE_END.split(" ".join(text.split())) if sentence]


def hide(
    question: Question, background: Sequence[str], tokens: int, count: Callable[[str], int], draw: random.Random
) -> Question:
    """The question with its story hidden.

    Args:
        question: its context tells the story, a sentence a line.
        background: the sentences of a book, read from a random one on, round and round.
        tokens: of the new context, at least; 0: the story alone, on one line.
        count: how many tokens a text has. draw: places come from it.

    Raises:
        ConfigurationError: `tokens` below 0. TextError: no background where there has to be one.
    """
    if tokens < 0:
        raise ConfigurationError(f"tokens={tokens}; expected 0 for the story alone, or how long the text must be")
    story = question.context.splitlines()
    if tokens and not background:
        raise TextError("there is no sentence to hide a story among: name a text of whole sentences")
    following = _round_and_round(background, draw.randrange(len(background)) if background else 0)
    chosen: list[str] = []
    # Places as shares of the way, so that they stay where the book has to go on a little.
    places = sorted(draw.random() for _ in story)
    while True:
        told = " ".join(_woven(story, places, chosen))
        missing = tokens - count(told)
        if missing <= 0:
            return replace(question, context=told)
        while missing > 0:  # sentence by sentence is an estimate: together they may be fewer tokens
            chosen.append(next(following))
            missing -= max(1, count(f" {chosen[-1]}"))


def hidden_questions(
    task: str,
    split: str,
    books: Sequence[Sequence[str]],
    tokens: int,
    samples: int,
    count: Callable[[str], int],
    seed: int = 0,
    data_dir: str | Path = "data",
) -> list[Question]:
    """Questions of a bAbI task, each with its story hidden in a book drawn at random.

    One seed draws the same stories for every length, and of fewer samples the first.

    Args:
        task: qa1 … qa5, or 10k-qa1 and its like for the larger set. split: of bAbI.
        books: where stories are hidden, each as its sentences; for 0 tokens there need be none.
        tokens, count: as for `hide`. samples: how many questions. seed: of stories, books and places.
        data_dir: where bAbI lies.

    Raises:
        ConfigurationError: a number out of range, or more samples than the task has questions.
        TextError: the task is not at hand, or a book without sentences.
    """
    if samples < 1:
        raise ConfigurationError(f"samples={samples}; expected at least 1")
    if tokens > 0 and not books:
        raise TextError("there is no book to hide stories in: name one")
    found = read_questions(f"babi-{task}", split, data_dir)
    if samples > len(found):
        raise ConfigurationError(
            f"{samples} questions of babi-{task} ({split}) were asked for, and it has {len(found)}: ask for fewer"
        )
    random.Random(f"{seed}/{task}").shuffle(found)
    hidden = []
    for question in found[:samples]:
        number = question.name.rpartition(":")[2]
        draw = random.Random(f"{seed}/{task}/{number}/{tokens}")
        background = books[draw.randrange(len(books))] if tokens > 0 else ()
        named = replace(question, name=f"babilong-{_length(tokens)}-{task}:{number}")
        hidden.append(hide(named, background, tokens, count, draw))
    return hidden


def reasoned(question: Question) -> Question:
    """The question with answers that begin with what they follow from: first what was told, then the answer."""
    return replace(question, answers=tuple(" ".join((*question.reasons, answer)) for answer in question.answers))


def write_questions(path: str | Path, questions: Iterable[Question]) -> None:
    """Writes a .jsonl file that `read_questions` reads: a line a question.

    Raises:
        ConfigurationError: another ending, by which it would not be known. TextError: the file cannot be written.
    """
    if not str(path).endswith(".jsonl"):
        raise ConfigurationError(f"{path}: expected a name that ends in .jsonl, by which questions are known")
    rows = ({"context": q.context, "question": q.question, "answers": list(q.answers)} for q in questions)
    try:
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    except OSError as error:
        raise TextError(f"{path} cannot be written ({error}); expected a file in an existing folder") from error


def _woven(story: Sequence[str], places: Sequence[float], background: Sequence[str]) -> Iterator[str]:
    """All sentences of both, each story sentence at its share of the background."""
    following, done = iter(background), 0
    for sentence, place in zip(story, places, strict=True):
        before = int(place * (len(background) + 1))
        yield from islice(following, before - done)
        yield sentence
        done = before
    yield from following


def _round_and_round(background: Sequence[str], first: int) -> Iterator[str]:
    while True:
        yield background[first % len(background)]
        first += 1


def _length(tokens: int) -> str:
    return str(tokens) if tokens % 1_000 else f"{tokens // 1_000}k"
