"""What was read, word for word: a bounded store of whole sentences, lines and turns, one list of passages a row.

A row's tokens are cut where the text pauses: at the first line end, or where none comes within `LONGEST` tokens at the
last end of a sentence (any script; not at "Mr." or an initial); failing that at a comma, at a space, or at least
between characters. Where it is cut depends on the tokens alone, not on the chunks they came in. Finished passages are
immutable and shared between copies of the store; the tokens after the last cut are the open passage. A row keeps
`capacity` tokens of finished passages: beyond that the passage of the lowest priority goes, whole (see `RULES`). All of
it lives on the CPU.
"""

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import regex
import torch
from torch import Tensor

from hippoformer.errors import InputError
from hippoformer.hippocampus.pauses import AHEAD, LONGEST, find_cut
from hippoformer.hippocampus.spelling import Spelling
from hippoformer.hippocampus.terms import distinct, terms

_RECENT, _EXACT, _COUNTS = 200, 3.0, 1 << 16  # see `by_novelty`
_NONE = np.zeros(0, np.uint8)
_SETTLE = 256  # tokens of the widest row that wait, on their device, before they are cut into passages
_LABEL = regex.compile(r"\s*([\p{L}\p{M}\p{N}][\p{L}\p{M}\p{N} .'-]{0,30})[:：]\s")


@dataclass(frozen=True, eq=False)
class Passage:
    """A stretch of what a row has read.

    Attributes:
        start, stop: place of its tokens in the row's own text, counted in tokens.
        token_ids: (stop - start,) int32.
        salience: mean salience of its tokens.
        priority: by the rule of the store; NaN until the store is full for the first time.
        rehearsed: how often an answer stood on it; each time counts like the priority of an average passage.
        score: fit to the query it was retrieved for; 0 in the store.
        cache: what reading its words costs once; shared by all copies of the passage.
    """

    start: int
    token_ids: np.ndarray
    salience: float = 0.0
    priority: float = math.nan
    rehearsed: int = 0
    score: float = 0.0
    cache: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def stop(self) -> int:
        """The place after its last token."""
        return self.start + len(self.token_ids)

    def __len__(self) -> int:
        return len(self.token_ids)


Rule = Callable[["Row", Passage, Spelling], float]


def by_novelty(row: "Row", passage: Passage, spelling: Spelling) -> float:
    """How much of a passage was not said before: what is new is what may be asked about.

    Each of its words counts by 1 / (1 + earlier passages that had it), names and numbers `_EXACT` times more. The sum
    is divided by length^0.75, and by the mean of the last `_RECENT` passages, so that the beginning of a long text,
    where everything is new, does not stay for ever.
    """
    if not len(row.counts):
        row.counts = np.zeros(_COUNTS, np.uint8)
    exact = passage_terms(passage, spelling).exact
    slots, weight = np.array([*exact], int) % _COUNTS, 1.0 + _EXACT * np.array([*exact.values()], float)
    worth = float((weight / (1.0 + row.counts[slots])).sum()) / len(passage) ** 0.75
    slots = np.unique(slots)
    row.counts[slots] += row.counts[slots] < 255
    row.judged += 1
    row.usual += (worth - row.usual) / min(row.judged, _RECENT)
    return worth / max(row.usual, 1e-9)


def by_salience(row: "Row", passage: Passage, spelling: Spelling) -> float:
    """The mean salience of its tokens by the gate."""
    return passage.salience


def by_position(row: "Row", passage: Passage, spelling: Spelling) -> float:
    """First in, first out."""
    return float(passage.start)


def by_chance(row: "Row", passage: Passage, spelling: Spelling) -> float:
    """Every passage as likely to stay as any other; the same at the same place of a text."""
    return float(np.random.default_rng(passage.start).random())


# Which passages stay when a stream is longer than the store. A rule of your own is one function and one entry.
RULES: dict[str, Rule] = {
    "novelty": by_novelty,
    "salience": by_salience,
    "fifo": by_position,
    "random": by_chance,
}


@dataclass
class Row:
    """One sequence: finished passages in the order of the text, and the tokens after the last cut."""

    finished: list[Passage] = field(default_factory=list)
    open_ids: list[int] = field(default_factory=list)
    open_salience: list[float] = field(default_factory=list)
    read: int = 0  # tokens so far
    kept: int = 0  # tokens of `finished`
    column: int = 0  # characters between the last line end and the first open token
    judged: int = 0  # passages that got a priority
    usual: float = 0.0  # novelty of the last of them, on average
    counts: np.ndarray = field(default_factory=lambda: _NONE)  # (_COUNTS,) passages that had a term, by its hash

    def copy(self) -> "Row":
        """A row that goes on by itself; passages are shared."""
        mine = {name: copy(value) for name, value in vars(self).items()}
        return Row(**mine)

    def opened(self) -> list[Passage]:
        """The open passage, if there is one."""
        if not self.open_ids:
            return []
        return [_passage(self.read - len(self.open_ids), self.open_ids, self.open_salience)]


class Passages:
    """The store of R rows.

    Args:
        rows: R.
        spelling: of the vocabulary that the rows are read in.
        capacity: tokens of finished passages a row keeps; at least `LONGEST`.
        rule: of `RULES`, which passages stay.

    Raises:
        InputError: a capacity that does not hold one passage, or a rule that does not exist.
    """

    def __init__(self, rows: int, spelling: Spelling, capacity: int = 65_536, rule: str = "novelty") -> None:
        if capacity < LONGEST:
            raise InputError(f"passage_tokens={capacity} is less than one passage; give at least {LONGEST}")
        if rule not in RULES:
            raise InputError(f"expected a rule in ({', '.join(RULES)}), got {rule!r}")
        self.rows = [Row() for _ in range(rows)]
        self.spelling, self.capacity, self.rule = spelling, capacity, rule
        self._waiting: list[tuple[Tensor, list[int], Tensor | None, list[int] | None]] = []
        self._longest_wait = 0

    def append(
        self,
        token_ids: Tensor,
        lengths: Sequence[int] | None = None,
        salience: Tensor | None = None,
        start: Sequence[int] | None = None,
    ) -> None:
        """Reads on. Tokens wait on their device until there are enough of them to be worth the transfer.

        Args:
            token_ids: (R, T), row r's new tokens first. lengths: of each row, default T.
            salience: (R, T), default 0.
            start: place of each row's first new token in its text; default behind the last one read here. Where it is
                farther on, the tokens between were not stored, and the open passage ends before them.

        Raises:
            InputError: another number of rows than the store's.
        """
        if token_ids.shape[0] != len(self.rows):
            raise InputError(f"{token_ids.shape[0]} rows of tokens do not fit a store of {len(self.rows)} rows")
        lengths = [token_ids.shape[1]] * len(self.rows) if lengths is None else list(lengths)
        weights = None if salience is None else salience.detach()
        self._waiting.append((token_ids.detach(), lengths, weights, None if start is None else list(start)))
        self._longest_wait += max(lengths, default=0)
        if self._longest_wait >= _SETTLE:
            self.settle()

    def settle(self) -> None:
        """Cuts what waits into passages. Everything that looks at the rows calls this first."""
        waiting, self._waiting, self._longest_wait = self._waiting, [], 0
        for token_ids, lengths, salience, starts in waiting:
            ids = token_ids.tolist()
            values = [[0.0] * len(row) for row in ids] if salience is None else salience.float().tolist()
            for number, (row, length, new, weights) in enumerate(zip(self.rows, lengths, ids, values, strict=True)):
                if starts is not None and length and row.read != starts[number]:
                    self._skip(row, starts[number])
                row.open_ids += new[:length]
                row.open_salience += weights[:length]
                row.read += length
        for row in self.rows if waiting else ():
            self._cut(row)

    def _skip(self, row: Row, place: int) -> None:
        """Ends the open passage: the row goes on at `place`."""
        self._cut(row)
        for passage in row.opened():
            self._keep(row, passage)
        row.open_ids, row.open_salience, row.column, row.read = [], [], 0, place

    def _keep(self, row: Row, passage: Passage) -> None:
        """Takes a finished passage in, and lets the lowest go while there is no room."""
        row.finished.append(passage)
        row.kept += len(passage)
        if row.kept > self.capacity:
            self._judge(row)
        while row.kept > self.capacity:
            lowest = min(row.finished, key=lambda passage: passage.priority + passage.rehearsed)
            self._remove(row, lowest)

    def _remove(self, row: Row, passage: Passage) -> None:
        row.finished.remove(passage)
        row.kept -= len(passage)

    def _judge(self, row: Row) -> None:
        """Gives the passages that have none yet a priority, in the order of the text: none before the store is full."""
        first = len(row.finished)
        while first and math.isnan(row.finished[first - 1].priority):
            first -= 1
        for place in range(first, len(row.finished)):
            passage = row.finished[place]
            row.finished[place] = replace(passage, priority=RULES[self.rule](row, passage, self.spelling))

    def _cut(self, row: Row) -> None:
        done = 0
        while cut := find_cut(self.spelling, row.open_ids[done : done + LONGEST + AHEAD], row.column):
            ids = row.open_ids[done : done + cut]
            self._keep(row, _passage(row.read - len(row.open_ids) + done, ids, row.open_salience[done : done + cut]))
            _, line_end, after = self.spelling.text(ids, mark=True).rpartition("\n")
            row.column = len(after) if line_end else row.column + len(after)
            done += cut
        del row.open_ids[:done], row.open_salience[:done]

    def of_row(self, row: int) -> list[Passage]:
        """A row's passages in the order of its text, the open one last.

        Raises:
            InputError: no such row.
        """
        if not 0 <= row < len(self.rows):
            raise InputError(f"row {row} does not exist: the store holds {len(self.rows)} rows, from 0")
        self.settle()
        return self.rows[row].finished + self.rows[row].opened()

    def rehearse(self, row: int, passages: Sequence[Passage]) -> None:
        """Notes that an answer stood on these passages: replay of what was of use (see `Passage.rehearsed`)."""
        self.settle()
        starts = {passage.start for passage in passages}
        finished = self.rows[row].finished
        for place, passage in enumerate(finished):
            if passage.start in starts:
                finished[place] = replace(passage, rehearsed=passage.rehearsed + 1)

    def forget(self, row: int, condition: Callable[[Passage], bool]) -> list[Passage]:
        """Removes the passages for which the condition holds, the open one too, and returns them.

        Raises:
            InputError: no such row.
        """
        gone = [passage for passage in self.of_row(row) if condition(passage)]
        state, starts = self.rows[row], {passage.start for passage in gone}
        for passage in [passage for passage in state.finished if passage.start in starts]:
            self._remove(state, passage)
        if state.open_ids and state.read - len(state.open_ids) in starts:
            state.open_ids, state.open_salience, state.column = [], [], 0
        return gone

    def adopt(self, other: "Passages") -> None:
        """Replaces what every row keeps by what the rows of another store keep; a store of one row serves all."""
        for number, row in enumerate(self.rows):
            number = number if len(other.rows) > 1 else 0
            theirs = other.of_row(number)
            self.settle()
            row.finished, row.kept = list(theirs), sum(map(len, theirs))
            row.open_ids, row.open_salience, row.column = [], [], 0
            source = other.rows[number]
            row.judged, row.usual, row.counts = source.judged, source.usual, source.counts.copy()

    def copy(self) -> "Passages":
        """A store that goes on by itself; finished passages are shared."""
        return self.select_rows(range(len(self.rows)))

    def select_rows(self, rows: Sequence[int]) -> "Passages":
        """A store of the given rows in the given order; a row may come more than once."""
        self.settle()
        selected = Passages(0, self.spelling, self.capacity, self.rule)
        selected.rows = [self.rows[row].copy() for row in rows]
        return selected

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Forgets everything of the given rows (default: all)."""
        self.settle()
        for row in range(len(self.rows)) if rows is None else rows:
            self.rows[row] = Row()

    @property
    def nbytes(self) -> int:
        """Bytes that a file of it takes: 4 a token (8 an open one), 32 a passage, 40 a row, and 64 kB a row once
        the store was full."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Every number of the state, the rows one after the other: N tokens in P finished passages, M open tokens.

        `places` is row, start, length, times rehearsed; `worth` is salience and priority; `rows` is tokens read, column
        of the first open token, open tokens; `novelty` is passages judged and their usual novelty, `counts` what was
        said before, (R, 65536) or nothing while the store was never full.
        """
        self.settle()
        width = max((len(row.counts) for row in self.rows), default=0)
        counts = [row.counts if len(row.counts) == width else np.zeros(width, np.uint8) for row in self.rows]
        finished = [(number, passage) for number, row in enumerate(self.rows) for passage in row.finished]
        ids = np.concatenate([np.zeros(0, np.int32), *(p.token_ids for _, p in finished)])
        places = [(n, p.start, len(p), p.rehearsed) for n, p in finished]
        worth = [(p.salience, p.priority) for _, p in finished]
        return {
            "token_ids": torch.from_numpy(ids),  # (N,)
            "places": torch.tensor(places, dtype=torch.int32).reshape(-1, 4),  # (P, 4), see above
            "worth": torch.tensor(worth, dtype=torch.float64).reshape(-1, 2),  # (P, 2)
            "open_ids": torch.tensor([i for row in self.rows for i in row.open_ids], dtype=torch.int32),  # (M,)
            "open_salience": torch.tensor([s for row in self.rows for s in row.open_salience], dtype=torch.float32),
            "rows": torch.tensor([(r.read, r.column, len(r.open_ids)) for r in self.rows]).reshape(-1, 3),  # (R, 3)
            "novelty": torch.tensor([(r.judged, r.usual) for r in self.rows], dtype=torch.float64).reshape(-1, 2),
            "counts": torch.from_numpy(np.stack(counts) if width else _NONE.copy()),
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Replaces the state by one that `tensors` gave; the number of rows is that of the file.

        Raises:
            KeyError, IndexError, ValueError, RuntimeError: tensors that no store gave.
        """
        self._waiting, self._longest_wait = [], 0
        self.rows, done = [], 0
        open_ids, open_salience = tensors["open_ids"].tolist(), tensors["open_salience"].tolist()
        counts = tensors["rows"].tolist()
        # Files of before passages competed by novelty have none, and priorities of another kind.
        novelty = tensors["novelty"].tolist() if "novelty" in tensors else None
        for number, (read, column, count) in enumerate(counts):
            span = slice(done, done + count)
            judged, usual = novelty[number] if novelty else (0, 0.0)
            seen = tensors["counts"][number].numpy().copy() if novelty and len(tensors["counts"]) else _NONE
            row = Row([], open_ids[span], open_salience[span], read, 0, column, int(judged), usual, seen)
            self.rows.append(row)
            done += count
        ids, done = tensors["token_ids"].numpy(), 0
        for (number, start, length, *rest), (salience, *_, priority) in zip(
            tensors["places"].tolist(), tensors["worth"].tolist(), strict=True
        ):
            row = self.rows[number]
            kept = ids[done : done + length].copy()
            passage = Passage(start, kept, salience, priority if novelty else math.nan, rest[0])
            row.finished.append(passage)
            row.kept += length
            done += length


@dataclass(frozen=True)
class PassageTerms:
    """What the words of a passage are found by.

    Attributes:
        terms: (words,) uint32 in their order. exact: of each term, whether it is a name or a number.
        label: terms of the name that the passage's line begins with, before a colon.
    """

    terms: np.ndarray
    exact: dict[int, bool]
    label: frozenset[int]


def passage_terms(passage: Passage, spelling: Spelling) -> PassageTerms:
    """Worked out once for all copies of a passage."""
    if "terms" not in passage.cache:
        text = spelling.text(passage.token_ids, mark=True)
        label, found = _LABEL.match(text), terms(text)
        passage.cache["terms"] = PassageTerms(
            np.array([term for term, _ in found], np.uint32),
            distinct(found),
            frozenset(term for term, _ in terms(label[1])) if label else frozenset(),
        )
    return passage.cache["terms"]


def _passage(start: int, ids: list[int], salience: list[float]) -> Passage:
    return Passage(start, np.array(ids, np.int32), sum(salience) / len(ids))
