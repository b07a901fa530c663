"""Questions about stories hidden in books, at several lengths: with the memory, without, and with longer windows.

Each text is read from an empty memory; then the question is put to a copy of the state, once with the memory and once
with it off. What the base has read is the same for both. Under `reread` a copy first reads again what is remembered of
the question (see `model.rereading`), and the base alone answers. A `window` is the base alone with attention over as
many tokens: it reads the start token, where there is one, and the last tokens before the question, as many as it holds.
An answer is decoded greedily and counts if every token of it is right; a reply, which may say first what it follows
from, if its last word is the answer.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from rich.table import Table
from rich.text import Text

from hippoformer.data.babilong import hidden_questions, sentences
from hippoformer.data.documents import Document
from hippoformer.errors import ConfigurationError, TextError
from hippoformer.evaluation.examination import answer_nats, answers
from hippoformer.evaluation.generation import decoded, first_line, read_texts, reminded
from hippoformer.evaluation.provenance import provenance
from hippoformer.evaluation.report import Report, with_range
from hippoformer.evaluation.scoring import check_untouched, describe, reading
from hippoformer.evaluation.statistics import LEVEL, share
from hippoformer.evaluation.views import with_options
from hippoformer.model.rereading import left_padded
from hippoformer.text import start_tokens, token_ids

REREAD_TOKENS = 256
_BEGINNING = 3  # tokens: the start token and one that differs, at most


@dataclass(frozen=True)
class Case:
    """A question as token ids; `text` begins with the start token, where the tokenizer has one.

    The question is what is read, and the cue what it asks, without the words that introduce it. `needed` is where in
    the text the tokens are that the answer follows from.
    """

    name: str
    task: str
    length: int
    text: list[int]
    cue: list[int]
    question: list[int]
    answer: list[int]
    needed: list[int]


@dataclass(frozen=True)
class Told:
    """One question and what was answered.

    Attributes:
        name: of the question. task, length: the cell it belongs to. tokens_read: before the question.
        reread: share of these tokens that are read again; None without that condition too.
        right: condition -> every token decoded is that of the answer, or the reply ends in it.
        stored: share of the tokens that the answer follows from that memory and window hold; None
            where the data does not say which these are.
        said: condition -> what was decoded. nats: condition -> -log p of the whole answer, said at once.
    """

    name: str
    task: str
    length: int
    tokens_read: int
    stored: float | None
    reread: float | None
    right: dict[str, bool]
    said: dict[str, str]
    nats: dict[str, float]


@dataclass(frozen=True)
class BabilongReport(Report):
    """Every question, and where the numbers came from.

    Attributes:
        model: what was measured. settings: options. conditions: names, in the order asked. asked: every question.
    """

    FORMAT: ClassVar[str] = "hippoformer.babilong/1"

    model: dict[str, Any]
    settings: dict[str, Any]
    conditions: tuple[str, ...]
    asked: tuple[Told, ...]
    provenance: dict[str, Any]

    def cells(self) -> list[dict[str, Any]]:
        """Per task, length and condition: cases, tokens read on average, what of the needed is stored and read again,
        share right with its interval, nats.
        """
        found = []
        for task in self.settings["tasks"]:
            for length in self.settings["lengths"]:
                of = [told for told in self.asked if (told.task, told.length) == (task, length)]
                shared: dict[str, Any] = {"task": task, "length": length, "cases": len(of)}
                shared["tokens_read"] = sum(told.tokens_read for told in of) / len(of)
                for name in ("stored", "reread"):
                    known = [part for told in of if (part := getattr(told, name)) is not None]
                    shared[name] = sum(known) / len(known) if known else None
                for condition in self.conditions:
                    right, low, high = share([told.right[condition] for told in of])
                    nats = sum(told.nats[condition] for told in of) / len(of)
                    found.append(
                        shared | {"condition": condition, "right": right, "low": low, "high": high, "nats": nats}
                    )
        return found

    def content(self) -> dict[str, Any]:
        """With the cells."""
        return super().content() | {"cells": self.cells()}

    def to_table(self) -> Table:
        """One line a task and length, for a terminal."""
        caption = (
            f"exact answers, greedy; [{LEVEL:.0%} Wilson intervals]; windows: the base alone; stored, brought back: "
            "of what is needed"
        )
        table = Table(title=Text(f"Hidden stories, {self.model['base_model_name']}"), caption=Text(caption))
        table.add_column("task")
        for heading in ("tokens", "cases", "stored", "brought back", *self.conditions):
            table.add_column(heading, justify="right")
        cells = self.cells()
        for first in range(0, len(cells), len(self.conditions)):
            row = cells[first : first + len(self.conditions)]
            shown = [Text(with_range("{:.0%}", cell["right"], cell["low"], cell["high"])) for cell in row]
            parts = ["-" if row[0][name] is None else f"{row[0][name]:.0%}" for name in ("stored", "reread")]
            table.add_row(row[0]["task"], f"{row[0]['length']:,}", str(row[0]["cases"]), *parts, *shown)
        return table


def evaluate_babilong(
    model: Any,
    tokenizer: Any,
    books: Sequence[Document],
    tasks: Sequence[str] = ("qa1", "qa2", "qa3"),
    lengths: Sequence[int] = (0, 1_000, 4_000, 16_000, 64_000),
    cases: int | Sequence[int] | Mapping[int, int] = 25,
    windows: Sequence[int] = (),
    reply_tokens: int = 0,
    reread_tokens: int = REREAD_TOKENS,
    split: str = "test",
    data_dir: str | Path = "data",
    batch_size: int = 5,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    command: str | None = None,
) -> BabilongReport:
    """Asks questions about stories hidden in books.

    Args:
        model: a HippoFormer whose base never hears the memory. tokenizer: its tokenizer.
        books: where stories are hidden. tasks: of bAbI, as `hidden_questions` takes them.
        lengths: tokens of a text, at least; 0: the story alone. The stories are the same at every length.
        cases: questions of each task and length; one number, one for each length, or length -> number.
        windows: tokens that the base alone attends to, for comparison. split, data_dir: of bAbI.
        reply_tokens: that a reply may have, to the end of its line; 0: the answer has to come at once.
        reread_tokens: that are read again before the question under `reread`; 0: not under that condition.
        batch_size: texts read side by side. seed: of stories, books and places.
        progress: called with (tokens read, tokens in all). command: recorded in the report.

    Raises:
        ConfigurationError: a number out of range, or a residual at an inner layer.
        TextError: a task that is not at hand, or books without sentences.
    """
    counts = _per_length(cases, lengths)
    lowest = min(batch_size, *windows, reply_tokens + 1, reread_tokens + 1)
    if not tasks or len(set(tasks)) < len(tasks) or lowest < 1:
        raise ConfigurationError(
            f"tasks={list(tasks)}, batch_size={batch_size}, windows={list(windows)}, reply_tokens={reply_tokens}, "
            f"reread_tokens={reread_tokens}; expected tasks, each once, and positive numbers"
        )
    check_untouched(model.config)
    views = {f"window {window}": with_options(model, window=window) for window in windows}
    start, ids, asked = start_tokens(tokenizer), partial(token_ids, tokenizer), {}
    told_in = [sentences(book.text) for book in books]
    for length, number in counts.items():
        for task in tasks:
            found = hidden_questions(task, split, told_in, length, number, lambda text: len(ids(text)), seed, data_dir)
            asked[length, task] = [
                Case(
                    name=one.name,
                    task=task,
                    length=length,
                    text=[*start, *ids(one.context)],
                    cue=ids(one.question),
                    question=ids(one.prompt),
                    answer=ids(f" {one.answers[0]}"),
                    needed=places_of([ids(f" {said}") for said in one.reasons], [*start, *ids(one.context)]),
                )
                for one in found
            ]
    told: list[Told] = []
    total, done = sum(len(case.text) for of in asked.values() for case in of), 0
    with reading(model):
        for batch in _batches(asked, batch_size):
            told += _asked(model, tokenizer, views, batch, len(start), reply_tokens, reread_tokens)
            done += sum(len(case.text) for case in batch)
            if progress is not None:
                progress(done, total)
    return BabilongReport(
        model=describe(model),
        settings={
            "tasks": list(tasks),
            "lengths": list(counts),
            "cases": list(counts.values()),
            "windows": list(windows),
            "reply_tokens": reply_tokens,
            "reread_tokens": reread_tokens,
            "split": split,
            "batch_size": batch_size,
            "seed": seed,
        },
        conditions=("memory", "off", *(["reread"] if reread_tokens else []), *views),
        asked=tuple(told),
        provenance=provenance(seed=seed, documents=list(books), command=command),
    )


def _per_length(cases: int | Sequence[int] | Mapping[int, int], lengths: Sequence[int]) -> dict[int, int]:
    """Length -> cases."""
    if isinstance(cases, Mapping):
        counts = dict(cases)
    else:
        numbers = [cases] * len(lengths) if isinstance(cases, int) else list(cases)
        counts = dict(zip(lengths, numbers, strict=True)) if len(numbers) == len(lengths) else {}
    if not counts or sorted(counts) != sorted(lengths) or min(counts) < 0 or min(counts.values()) < 1:
        raise ConfigurationError(
            f"lengths={list(lengths)}, cases={cases}; expected different lengths from 0 on, and a number of cases for "
            "all of them or for each"
        )
    return {length: counts[length] for length in lengths}


def _batches(asked: Mapping[tuple[int, str], list[Case]], batch_size: int) -> Iterator[list[Case]]:
    """Texts of one length side by side, the longest first: want of memory shows at once."""
    for length in sorted({length for length, _ in asked}, reverse=True):
        together = [case for (of, _), found in asked.items() if of == length for case in found]
        together.sort(key=lambda case: -len(case.text))
        for low in range(0, len(together), batch_size):
            yield together[low : low + batch_size]


def _asked(
    model: Any,
    tokenizer: Any,
    views: Mapping[str, Any],
    batch: Sequence[Case],
    start: int,
    reply_tokens: int,
    reread_tokens: int,
) -> list[Told]:
    """Reads the texts of a batch and asks their questions under every condition; `start` tokens begin each text."""

    def put(asked: Any, cache: Any) -> list[tuple[str, bool, float]]:
        """What is said, whether it is right, and -log p of the answer."""
        if reply_tokens == 0:
            at_once = answers(asked, cache, batch)
            return [
                (tokenizer.decode(said), said == case.answer, nats)
                for case, (said, nats) in zip(batch, at_once, strict=True)
            ]
        replies = decoded(asked, cache.copy(), [case.question for case in batch], reply_tokens)
        lines = [first_line(tokenizer, reply) for reply in replies]
        return [
            (line, _last_word(line) == _last_word(tokenizer.decode(case.answer)), nats)
            for line, case, nats in zip(lines, batch, answer_nats(asked, cache, batch), strict=True)
        ]

    cache = read_texts(model, [case.text for case in batch])
    positions = cache.memory.episodes.position.tolist()
    stored = [_part_of(case.needed, held) for case, held in zip(batch, positions, strict=True)]
    reread: list[float | None] = [None] * len(batch)
    found = {"memory": put(model, cache.copy())}
    with model.memory_off():
        found["off"] = put(model, cache.copy())
        if reread_tokens:
            cues = [case.cue for case in batch]
            again = cache.retrieve(*left_padded(cues, model.device), n_tokens=reread_tokens, beyond_window=True)
            held = [
                {*range(max(len(case.text) - model.config.window, 0), len(case.text))}.union(
                    *(range(passage.start, passage.stop) for passage in found)
                )
                for case, found in zip(batch, again, strict=True)
            ]
            reread = [_part_of(case.needed, places) for case, places in zip(batch, held, strict=True)]
            found["reread"] = put(model, reminded(cache, cues, reread_tokens))
    for name, view in views.items():
        texts = [[*case.text[:start], *case.text[start:][-max(1, view.config.window - start) :]] for case in batch]
        with view.memory_off():
            found[name] = put(view, read_texts(view, texts))
    return [
        Told(
            name=case.name,
            task=case.task,
            length=case.length,
            tokens_read=len(case.text),
            stored=stored[row],
            reread=reread[row],
            right={name: of[row][1] for name, of in found.items()},
            said={name: of[row][0] for name, of in found.items()},
            nats={name: of[row][2] for name, of in found.items()},
        )
        for row, case in enumerate(batch)
    ]


def places_of(passages: Sequence[Sequence[int]], text: Sequence[int]) -> list[int]:
    """Where the tokens of some passages stand in a text; of a passage that is there more than once, the last time.

    Args:
        passages: token ids; the first one is left out where the text begins with the passage, and has it otherwise.
        text: token ids.

    Raises:
        TextError: one is not there.
    """
    places: set[int] = set()
    for passage in passages:
        wanted = list(passage)
        there = [at for at in range(len(text)) if list(text[at : at + len(wanted)]) == wanted]
        if not there:
            del wanted[0]
            there = [at for at in range(_BEGINNING) if list(text[at : at + len(wanted)]) == wanted]
        if not there:
            raise TextError(f"the text does not hold the tokens {list(passage)}, from which the answer follows")
        places.update(range(there[-1], there[-1] + len(wanted)))
    return sorted(places)


def _part_of(needed: Sequence[int], held: Iterable[int]) -> float | None:
    return len(set(needed).intersection(held)) / len(needed) if needed else None


def _last_word(line: str) -> str:
    return (line.split() or [""])[-1].strip(".,;:!?\"'").lower()
