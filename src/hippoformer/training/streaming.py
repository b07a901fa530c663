"""Rows of documents from a stream that is read while training goes on: a corpus of any size, nothing kept on disk.

Each row reads one document from beginning to end, then takes the next of the stream. A process has rows and a stream of
its own, so several never download the same document. Where a run stands is the stream's own position and the tokens of
the R documents in hand: both go into a checkpoint, and resuming is exact.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from hippoformer.data.streaming import DatasetStream
from hippoformer.training.streams import Piece

_MOST_TOO_SHORT = 10_000


class StreamedTexts:
    """An endless schedule of pieces, and the documents they are pieces of.

    Args:
        stream: of documents. encode: a text -> its token ids (T,).
        rows: of this process. segment_len: tokens of a piece.

    Raises:
        TextError: the stream has no document with two tokens.
    """

    def __init__(self, stream: DatasetStream, encode: Callable[[str], Tensor], rows: int, segment_len: int) -> None:
        self._stream, self._encode, self._segment_len = stream, encode, segment_len
        self._taken = 0
        self._held: dict[int, Tensor] = {}
        self._documents = [self._take() for _ in range(rows)]
        self._start = [0] * rows

    def __getitem__(self, number: int) -> Tensor:
        """Token ids of a document that some row reads now."""
        return self._held[number]

    @property
    def epoch(self) -> float:
        """Times the whole stream was read."""
        return float(self._stream.epoch)

    def texts(self) -> list[Tensor]:
        """Token ids of each row's document."""
        return [self._held[document] for document in self._documents]

    def next(self) -> Piece:
        """The next piece of every row."""
        fresh = []
        for row, document in enumerate(self._documents):
            if self._start[row] >= len(self._held[document]):
                del self._held[document]
                self._documents[row], self._start[row] = self._take(), 0
            if self._start[row] == 0:
                fresh.append(row)
        left = [len(self._held[d]) - s for d, s in zip(self._documents, self._start, strict=True)]
        length = [min(self._segment_len, n) for n in left]
        piece = Piece(list(self._documents), list(self._start), length, fresh)
        self._start = [s + n for s, n in zip(self._start, length, strict=True)]
        return piece

    def _take(self) -> int:
        for _ in range(_MOST_TOO_SHORT):
            ids = self._encode(self._stream.next().text)
            if len(ids) >= 2:
                self._held[self._taken] = ids
                self._taken += 1
                return self._taken - 1
        raise self._stream.nothing(f"{_MOST_TOO_SHORT} documents in a row have fewer than two tokens")

    def state(self) -> dict[str, Any]:
        """Where the schedule stands, but for the texts in hand."""
        return {
            "stream": self._stream.state(),
            "taken": self._taken,
            "documents": self._documents,
            "start": self._start,
        }

    def restore(self, state: dict[str, Any], texts: list[Tensor]) -> None:
        """Goes back to where `state` was taken, with what `texts` gave."""
        self._stream.restore(state["stream"])
        self._taken, self._documents, self._start = state["taken"], list(state["documents"]), list(state["start"])
        self._held = dict(zip(self._documents, texts, strict=True))
