"""Documents of Hugging Face `datasets`: the hub, local folders, and local copies under the names that papers use.

`datasets` fetches, caches, streams, and knows where a stream stands. This file adds three facts about the data:

- which repository a short name stands for: `datasets` no longer runs loading scripts, so names of classic ones point at
  copies with plain files (pg19, pile) or at the raw files (RedPajama);
- the rows of WikiText are lines, which are put together into articles again;
- rows without text are no documents.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from hippoformer.data.documents import Document, parse_record, read_documents, split_lines
from hippoformer.errors import ConfigurationError, TextError


class _Recipe(NamedTuple):
    """Arguments of `load_dataset`, and what a row is: "document", "line" of WikiText, or "record", a line of JSON."""

    path: str
    config: str | None = None
    rows: str = "document"
    data_files: str | None = None


_WIKITEXT = "Salesforce/wikitext"
_REDPAJAMA = "togethercomputer/RedPajama-Data-1T-Sample"
# The fields beside `text` differ between RedPajama's files, which no table has a type for; hence lines of JSON.
_RECIPES = {
    "wikitext": _Recipe(_WIKITEXT, "wikitext-2-raw-v1", "line"),
    "wikitext-2": _Recipe(_WIKITEXT, "wikitext-2-raw-v1", "line"),
    "wikitext-103": _Recipe(_WIKITEXT, "wikitext-103-raw-v1", "line"),
    "openwebtext": _Recipe("Skylion007/openwebtext"),
    "RedPajama-Data-1T-Sample": _Recipe("text", None, "record", f"hf://datasets/{_REDPAJAMA}/*.jsonl"),
    "pile": _Recipe("monology/pile-uncopyrighted"),
    "fineweb": _Recipe("HuggingFaceFW/fineweb", "sample-10BT"),
    "pg19": _Recipe("emozilla/pg19"),
}
_ALIASES = {
    _WIKITEXT: "wikitext",
    "wikitext-2-raw-v1": "wikitext-2",
    "wikitext-103-raw-v1": "wikitext-103",
    "redpajama": "RedPajama-Data-1T-Sample",
    _REDPAJAMA: "RedPajama-Data-1T-Sample",
    "EleutherAI/pile": "pile",
    "deepmind/pg19": "pg19",
    "HuggingFaceFW/fineweb": "fineweb",
}
_RAW_FILES = {"test": "wiki.test.raw", "validation": "wiki.valid.raw"}
# WikiText-103 has the validation and test sets of WikiText-2, to the byte.
_FOLDERS = {
    "wikitext-2": ("wikitext-2-raw", "wikitext-2"),
    "wikitext-103": ("wikitext-103-raw", "wikitext-103", "wikitext-2-raw", "wikitext-2"),
}


def benchmark_documents(name: str, split: str = "test", data_dir: str | Path = "data") -> list[Document]:
    """The documents of an evaluation set: a local copy, else the hub's.

    Args:
        name: a folder in `data_dir` (with a subfolder or file for the split), or a name for `dataset_documents`.
        split: "test", "validation", or what the data set calls it.

    Raises:
        TextError: neither a local copy nor the hub has it; the message names both.
    """
    folder = Path(data_dir)
    places = [folder / known / _RAW_FILES[split] for known in _FOLDERS.get(name, ()) if split in _RAW_FILES]
    places += [folder / name / split, folder / name / f"{split}.txt", folder / name / f"{split}.jsonl"]
    if found := next((place for place in places if place.exists()), None):
        return read_documents(found)
    try:
        return list(dataset_documents(name, split=split))
    except TextError as error:
        raise TextError(f"{name} ({split}) is not at hand: no {', '.join(map(str, places))}; and {error}") from error


def dataset_documents(
    name: str, config: str | None = None, split: str = "train", streaming: bool = False, max_samples: int | None = None
) -> Iterator[Document]:
    """Documents of a dataset, one after the other.

    The dataset is opened at once, so that a wrong name fails here; rows are read as the iterator advances.

    Args:
        name: wikitext, wikitext-2, wikitext-103, openwebtext, RedPajama-Data-1T-Sample, pile, fineweb, pg19; or any
            repository or local folder that `datasets.load_dataset` opens and whose rows have a `text`.
        config, split: of the dataset, as `datasets` spells them.
        streaming: read while downloading instead of preparing the whole dataset first.
        max_samples: stop after this many documents (for WikiText: articles, not lines); None reads all.

    Raises:
        TextError: the dataset cannot be reached, opened or decoded, or has no text. The cause is chained.
        ConfigurationError: `max_samples` below 1.
    """
    if max_samples is not None and max_samples < 1:
        raise ConfigurationError(f"max_samples={max_samples}; expected at least 1, or none for all")
    dataset = _Dataset(name, config, split, streaming)

    def documents() -> Iterator[Document]:
        found = islice(dataset.documents(), max_samples)
        yield next(found, None) or dataset.without_text()
        yield from found

    return documents()


class _Dataset:
    """An open dataset; `source` is its name in errors and documents."""

    def __init__(self, name: str, config: str | None, split: str, streaming: bool) -> None:
        import datasets

        self.recipe = _RECIPES.get(_ALIASES.get(name, name), _Recipe(name))
        config = config or self.recipe.config
        self.source = ":".join(part for part in (name, config, split) if part)
        files = self.recipe.data_files
        given = {"data_files": files} if files else {"name": config} if config else {}
        try:
            self.rows: Any = datasets.load_dataset(self.recipe.path, split=split, streaming=streaming, **given)
        except Exception as error:  # the hub, HTTP, archive and table libraries underneath share no base class
            raise self._unreachable(error) from error

    def documents(self) -> Iterator[Document]:
        """All documents; it takes no more rows than the next document needs, but for WikiText's lines."""
        if self.recipe.rows == "line":
            # A blank line is " \n" in the raw file and an empty row here.
            lines = (text if text.endswith("\n") else f"{text}\n" for row in self._rows() for text in [row[1] or " \n"])
            articles: Iterator[tuple[str, str]] = (
                (title or self.source, text) for title, text in split_lines(lines, "wikitext")
            )
        else:
            articles = self._records()
        yield from (Document(title, text, self.source) for title, text in articles if text.strip())

    def _records(self) -> Iterator[tuple[str, str]]:
        for number, (title, text) in enumerate(self._rows()):
            if self.recipe.rows == "record" and text.strip():
                title, text = parse_record(text, f"Row {number} of the dataset {self.source}")
            yield title or f"{self.source} {number}", text

    def _rows(self) -> Iterator[tuple[str | None, str]]:
        """(title, text) of each row; what breaks while streaming is a `TextError` too."""
        rows = iter(self.rows)
        while True:
            try:
                row = next(rows, None)
            except Exception as error:  # as above
                raise self._unreachable(error) from error
            if row is None:
                return
            text, title = row.get("text", 0), row.get("title") or row.get("short_book_title")
            if not isinstance(text, str | None):
                raise TextError(
                    f"The dataset {self.source} has no `text` column of strings; its columns are "
                    f"{', '.join(map(str, row))}. Choose another configuration, or export its text to files."
                )
            yield (title if isinstance(title, str) else None), text or ""

    def without_text(self) -> Any:
        """Raises the error of a dataset without documents."""
        raise TextError(f"The dataset {self.source} holds no text; choose another split or configuration.")

    def _unreachable(self, error: Exception) -> TextError:
        cause = " ".join(str(error).split())[:300]
        return TextError(
            f"The dataset {self.source} could not be read ({type(error).__name__}: {cause}). Check the name, "
            "configuration, split and network; without a network, name a file or folder with the text instead."
        )


class DatasetStream(_Dataset):
    """An endless stream of the documents of a dataset, in the order they are stored, that can go back to a position.

    The lines of WikiText are seekable by articles alone: going back reads the articles before again.

    Args:
        name, config, split: as for `dataset_documents`. process, processes: which share of all documents to read.

    Raises:
        TextError: the dataset cannot be opened. The cause is chained.
    """

    def __init__(
        self, name: str, config: str | None = None, split: str = "train", process: int = 0, processes: int = 1
    ) -> None:
        from datasets.distributed import split_dataset_by_node

        super().__init__(name, config, split, streaming=True)
        self._process, self._processes = process, processes
        self._seekable = self.recipe.rows != "line"
        if self._seekable and processes > 1:
            self.rows = split_dataset_by_node(self.rows, rank=process, world_size=processes)
        self._documents: Iterator[Document] | None = None
        self.epoch = self.taken = 0

    def next(self) -> Document:
        """The next document.

        Raises:
            TextError: the stream broke, or has no text for this process.
        """
        while True:
            if self._documents is None:
                skipped = 0 if self._seekable else self._process + self.taken * self._processes
                self._documents = islice(self.documents(), skipped, None, 1 if self._seekable else self._processes)
            if (document := next(self._documents, None)) is not None:
                self.taken += 1
                return document
            if self.taken == 0:
                self.without_text()
            self._documents = None
            self.epoch, self.taken = self.epoch + 1, 0
            self.rows.set_epoch(self.epoch)  # a position that was restored holds for its own pass alone

    def state(self) -> dict[str, Any]:
        """The position, as JSON."""
        position = self.rows.state_dict() if self._seekable else None
        return {"epoch": self.epoch, "taken": self.taken, "position": position}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to where `state` was taken."""
        self.epoch, self.taken, self._documents = state["epoch"], state["taken"], None
        self.rows.set_epoch(self.epoch)
        if self._seekable:
            self.rows.load_state_dict(state["position"])
