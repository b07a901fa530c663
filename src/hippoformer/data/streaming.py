"""A dataset of the hub or of local files as a stream of documents that knows where it is.

`datasets` streams, and tells and takes its own position; this class keeps documents (see `datasets.py`) and passes over
the data in step with it. The rows of WikiText are lines that only together are articles: there the position is the
number of articles, and going back to it reads them again.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from hippoformer.data.datasets import opened, row_documents
from hippoformer.data.documents import Document
from hippoformer.errors import TextError


class DatasetStream:
    """An endless stream of the documents of a dataset, pass after pass, in the order they are stored.

    Args:
        name, config, split: as for `dataset_documents`.
        process, processes: of all documents, the share of one of several processes.

    Raises:
        TextError: the dataset cannot be opened. The cause is chained.
    """

    def __init__(
        self, name: str, config: str | None = None, split: str = "train", process: int = 0, processes: int = 1
    ) -> None:
        from datasets.distributed import split_dataset_by_node

        self._recipe, self._rows, self._source = opened(name, config, split, streaming=True)
        self._process, self._processes = process, processes
        self._seekable = self._recipe.rows != "line"
        if self._seekable and processes > 1:
            self._rows = split_dataset_by_node(self._rows, rank=process, world_size=processes)
        self._documents: Iterator[Document] | None = None
        self.epoch = 0
        self.taken = 0

    def next(self) -> Document:
        """The next document.

        Raises:
            TextError: the stream broke, or has no text.
        """
        while True:
            if self._documents is None:
                self._documents = self._begin()
            for document in self._documents:
                self.taken += 1
                return document
            if self.taken == 0:
                raise self.nothing("it has no document for this process")
            self._documents = None
            self.epoch, self.taken = self.epoch + 1, 0
            self._rows.set_epoch(self.epoch)  # a position that was taken up holds for its own pass alone

    def _begin(self) -> Iterator[Document]:
        documents = row_documents(self._rows, self._recipe, self._source)
        if self._seekable:
            return documents
        return islice(documents, self._process + self.taken * self._processes, None, self._processes)

    def nothing(self, why: str) -> TextError:
        """The error that says that there is nothing to read."""
        return TextError(f"The dataset {self._source} cannot be trained on: {why}. Choose another split or dataset.")

    def state(self) -> dict[str, Any]:
        """Where the stream stands, in words that JSON has."""
        position = self._rows.state_dict() if self._seekable else None
        return {"epoch": self.epoch, "taken": self.taken, "position": position}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to where `state` was taken."""
        self.epoch, self.taken = state["epoch"], state["taken"]
        self._rows.set_epoch(self.epoch)
        if self._seekable:
            self._rows.load_state_dict(state["position"])
        self._documents = None
