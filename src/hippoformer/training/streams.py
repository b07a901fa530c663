"""Documents side by side, segment by segment: the order in which training reads.

Each of R rows reads one document from its beginning to its end, then starts the next with an empty memory, so no span
ever mixes two documents without a reset between them. The order is a permutation per epoch, made from the seed and the
epoch number alone: where training stands is four small lists of numbers, and resuming there is exact.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from hippoformer.errors import TextError


@dataclass
class Piece:
    """What every row reads next: at most a segment each.

    Attributes:
        documents: index of each row's document.
        start: tokens of it already read. length: tokens to read now; 0 for a row that waits.
        fresh: rows that begin a document with this piece and must forget what they knew.
    """

    documents: list[int]
    start: list[int]
    length: list[int]
    fresh: list[int]

    def of_rows(self, rows: range) -> "Piece":
        """What some of the rows read, counted from the first of them."""
        part = slice(rows.start, rows.stop)
        fresh = [row - rows.start for row in self.fresh if row in rows]
        return Piece(self.documents[part], self.start[part], self.length[part], fresh)


def whole_documents(numbers: Sequence[int], lengths: Sequence[int], segment_len: int) -> Iterator[Piece]:
    """The pieces of a document in each row, of these lengths, all from the beginning; rows that are done wait."""
    for start in range(0, max(lengths), segment_len):
        begin = [min(start, length) for length in lengths]
        new = [min(segment_len, length - low) for length, low in zip(lengths, begin, strict=True)]
        yield Piece(list(numbers), begin, new, list(range(len(lengths))) if start == 0 else [])


class TextStreams:
    """An endless schedule of pieces over documents of known lengths.

    Args:
        lengths: tokens of each document.
        rows: documents read side by side.
        segment_len: tokens of a piece.
        seed: of the order.

    Raises:
        TextError: no document with at least two tokens.
    """

    def __init__(self, lengths: Sequence[int], rows: int, segment_len: int, seed: int) -> None:
        self._usable = [i for i, n in enumerate(lengths) if n >= 2]
        if not self._usable:
            raise TextError("nothing to train on: no document has two tokens or more")
        self._lengths, self._segment_len, self._seed = list(lengths), segment_len, seed
        self.taken = 0
        self.documents = [self._take() for _ in range(rows)]
        self.start = [0] * rows

    def next(self) -> Piece:
        """The next piece of every row."""
        fresh = []
        for row, document in enumerate(self.documents):
            if self.start[row] >= self._lengths[document]:
                self.documents[row], self.start[row] = self._take(), 0
            if self.start[row] == 0:
                fresh.append(row)
        remaining = [self._lengths[d] - s for d, s in zip(self.documents, self.start, strict=True)]
        length = [min(self._segment_len, n) for n in remaining]
        piece = Piece(list(self.documents), list(self.start), length, fresh)
        self.start = [s + n for s, n in zip(self.start, length, strict=True)]
        return piece

    @property
    def epoch(self) -> float:
        """Documents begun, in units of all documents."""
        return self.taken / len(self._usable)

    def _take(self) -> int:
        epoch, place = divmod(self.taken, len(self._usable))
        self.taken += 1
        order = torch.randperm(
            len(self._usable), generator=torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        )
        return self._usable[int(order[place])]

    def state(self) -> dict[str, int | list[int]]:
        """Where the schedule stands."""
        return {"taken": self.taken, "documents": self.documents, "start": self.start}

    def restore(self, state: dict[str, int | list[int]]) -> None:
        """Goes back to where `state` was taken."""
        taken, documents, start = state["taken"], state["documents"], state["start"]
        assert isinstance(taken, int) and isinstance(documents, list) and isinstance(start, list)
        self.taken, self.documents, self.start = taken, list(documents), list(start)
