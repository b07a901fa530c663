"""The order in which training reads: documents in rows, segment by segment.

Each of R rows reads one document from its beginning to its end, then starts the next with an empty memory. Kept
documents come in a permutation per epoch, made from the seed and the epoch's number; streamed ones in the order they
are stored, each process with rows and a share of the stream of its own. The state of a schedule is a few numbers, and
for a stream the tokens of the R documents in hand, so resuming is exact.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hippoformer.data.datasets import DatasetStream
from hippoformer.errors import TextError

_MOST_TOO_SHORT = 10_000


@dataclass
class Piece:
    """What every row reads next, at most to the end of its segment: its document, the tokens of it that the row has
    read, and those to read now, 0 for a row that waits.
    """

    documents: list[int]
    read: list[int]
    new: list[int]

    @property
    def fresh(self) -> list[int]:
        """Rows that begin a document with this piece and must forget the one before."""
        return [row for row, read in enumerate(self.read) if read == 0]

    @property
    def spans(self) -> list[slice]:
        """Which tokens of its document each row reads."""
        return [slice(read, read + new) for read, new in zip(self.read, self.new, strict=True)]

    def of_rows(self, rows: range) -> "Piece":
        """What some of the rows read."""
        return Piece(*([values[row] for row in rows] for values in (self.documents, self.read, self.new)))


def whole_documents(numbers: Sequence[int], lengths: Sequence[int], segment_len: int) -> Iterator[Piece]:
    """The pieces of a document in each row, from beginning to end; rows that are done wait."""
    for start in range(0, max(lengths), segment_len):
        read = [min(start, length) for length in lengths]
        yield Piece(list(numbers), read, [min(segment_len, n - low) for low, n in zip(read, lengths, strict=True)])


class _Schedule:
    """An endless schedule of pieces; `_take` says which document a row reads next, and how many tokens it has."""

    _state = ("taken", "documents", "length", "read")

    def __init__(self, rows: int, segment_len: int) -> None:
        self.segment_len, self.taken = segment_len, 0
        self.documents, self.length, self.read = ([0] * rows for _ in range(3))  # of each row
        for row in range(rows):
            self.documents[row], self.length[row] = self._take(row)

    def next(self) -> Piece:
        """The next piece of every row."""
        for row, (read, length) in enumerate(zip(self.read, self.length, strict=True)):
            if read >= length:
                (self.documents[row], self.length[row]), self.read[row] = self._take(row), 0
        left = [length - read for length, read in zip(self.length, self.read, strict=True)]
        piece = Piece([*self.documents], [*self.read], [min(self.segment_len, n) for n in left])
        self.read = [span.stop for span in piece.spans]
        return piece

    def _take(self, row: int) -> tuple[int, int]:
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """Where the schedule stands, as JSON."""
        return {name: getattr(self, name) for name in self._state}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to where `state` was taken."""
        vars(self).update({name: state[name] for name in self._state})


class TextStreams(_Schedule):
    """A schedule over documents of known lengths, in an order drawn from the seed.

    Raises:
        TextError: no document with at least two tokens.
    """

    def __init__(self, lengths: Sequence[int], rows: int, segment_len: int, seed: int) -> None:
        self._lengths, self._seed = lengths, seed
        self._usable = [document for document, n in enumerate(lengths) if n >= 2]
        if not self._usable:
            raise TextError("nothing to train on: no document has two tokens or more")
        super().__init__(rows, segment_len)

    @property
    def epoch(self) -> float:
        """Documents begun, in units of all documents."""
        return self.taken / len(self._usable)

    def _take(self, row: int) -> tuple[int, int]:
        epoch, place = divmod(self.taken, len(self._usable))
        self.taken += 1
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        document = self._usable[int(torch.randperm(len(self._usable), generator=generator)[place])]
        return document, self._lengths[document]


class StreamedTexts(_Schedule):
    """A schedule over a stream, and the documents that its rows, those of this process, read now.

    Args:
        encode: a text -> its token ids (T,).
    """

    def __init__(self, stream: DatasetStream, encode: Callable[[str], Tensor], rows: int, segment_len: int) -> None:
        self._stream, self._encode = stream, encode
        self.texts = [torch.zeros(0, dtype=torch.int64)] * rows
        super().__init__(rows, segment_len)

    def __getitem__(self, document: int) -> Tensor:
        """Token ids of a document that some row reads now."""
        return self.texts[self.documents.index(document)]

    @property
    def epoch(self) -> float:
        """Times the whole stream was read."""
        return float(self._stream.epoch)

    def _take(self, row: int) -> tuple[int, int]:
        for _ in range(_MOST_TOO_SHORT):
            self.texts[row] = self._encode(self._stream.next().text)
            if len(self.texts[row]) >= 2:
                self.taken += 1
                return self.taken, len(self.texts[row])
        raise TextError(f"{_MOST_TOO_SHORT} documents of {self._stream.source} in a row have fewer than two tokens")

    def state(self) -> dict[str, Any]:
        """Where the schedule stands, with the documents in hand, as JSON."""
        return super().state() | {"stream": self._stream.state(), "texts": [ids.tolist() for ids in self.texts]}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to where `state` was taken."""
        super().restore(state)
        self._stream.restore(state["stream"])
        self.texts = [torch.tensor(ids) for ids in state["texts"]]
