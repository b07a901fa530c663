"""Documents from Hugging Face `datasets`, under the names that training has always used.

`datasets` does the fetching, caching and streaming; this file knows three things about the data it brings:

- which repository a short name means today. Several of the classic ones were Python loading scripts, which `datasets`
  no longer runs, so the names point at copies that hold plain files (pg19, pile) or at the raw files (RedPajama);
- that the rows of WikiText are lines: they are put together again into articles, as in the files they were cut from;
- that rows without text are no documents.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from hippoformer.data.documents import Document, parse_record, split_lines
from hippoformer.errors import ConfigurationError, TextError


@dataclass(frozen=True)
class _Recipe:
    """How to load one dataset: arguments of `load_dataset`, and what a row of it is."""

    path: str
    config: str | None = None
    data_files: str | None = None
    rows: str = "document"  # "document", "line" of WikiText, or "record": a line of JSON


# RedPajama: the fields beside `text` differ from file to file, which no table has a type for; hence lines of JSON.
_RECIPES: dict[str, _Recipe] = {
    "wikitext": _Recipe("Salesforce/wikitext", "wikitext-2-raw-v1", rows="line"),
    "wikitext-2": _Recipe("Salesforce/wikitext", "wikitext-2-raw-v1", rows="line"),
    "wikitext-103": _Recipe("Salesforce/wikitext", "wikitext-103-raw-v1", rows="line"),
    "openwebtext": _Recipe("Skylion007/openwebtext"),
    "RedPajama-Data-1T-Sample": _Recipe(
        "text", data_files="hf://datasets/togethercomputer/RedPajama-Data-1T-Sample/*.jsonl", rows="record"
    ),
    "pile": _Recipe("monology/pile-uncopyrighted"),
    "fineweb": _Recipe("HuggingFaceFW/fineweb", "sample-10BT"),
    "pg19": _Recipe("emozilla/pg19"),
}
_ALIASES = {
    "Salesforce/wikitext": "wikitext",
    "wikitext-2-raw-v1": "wikitext-2",
    "wikitext-103-raw-v1": "wikitext-103",
    "redpajama": "RedPajama-Data-1T-Sample",
    "togethercomputer/RedPajama-Data-1T-Sample": "RedPajama-Data-1T-Sample",
    "EleutherAI/pile": "pile",
    "deepmind/pg19": "pg19",
    "HuggingFaceFW/fineweb": "fineweb",
}

_MISSING = object()


def dataset_documents(
    name: str,
    config: str | None = None,
    split: str = "train",
    streaming: bool = False,
    max_samples: int | None = None,
) -> Iterator[Document]:
    """Documents of a dataset, one after the other.

    The dataset is opened at once, so that a wrong name fails here; its rows are read as the iterator advances, which
    with `streaming` is also when they are downloaded.

    Args:
        name: wikitext, wikitext-2, wikitext-103, openwebtext, RedPajama-Data-1T-Sample, pile, fineweb, pg19; or any
            repository or local folder that `datasets.load_dataset` can open and whose rows have a `text`.
        config: the dataset's configuration; wikitext-2-raw-v1 is wikitext's default.
        split: the part to read, as `datasets` spells it ("train", "test", without streaming also "train[:10%]").
        streaming: read while downloading instead of preparing the whole dataset first.
        max_samples: stop after this many documents (for WikiText: articles, not lines); None reads all.

    Raises:
        TextError: the dataset cannot be reached, opened or decoded, or has no text. The cause is chained.
        ConfigurationError: `max_samples` below 1.
    """
    if max_samples is not None and max_samples < 1:
        raise ConfigurationError(
            f"max_samples={max_samples}, but at least one document must be read; leave it out for all."
        )
    recipe, rows, source = opened(name, config, split, streaming)
    return _limited(row_documents(rows, recipe, source), max_samples, source)


def opened(name: str, config: str | None, split: str, streaming: bool) -> tuple[_Recipe, Any, str]:
    """A dataset by its short or full name: what its rows are, its rows, and what errors call it.

    Raises:
        TextError: it cannot be reached or opened. The cause is chained.
    """
    recipe = _RECIPES.get(_ALIASES.get(name, name), _Recipe(name))
    config = config or recipe.config
    source = ":".join(part for part in (name, config, split) if part)
    return recipe, _open(recipe, config, split, streaming, source), source


def row_documents(rows: Iterable[Mapping[str, Any]], recipe: _Recipe, source: str) -> Iterator[Document]:
    """The documents in the rows; it takes no more rows than it needs for the next one, but for WikiText's lines."""
    return _documents(_guarded(rows, source), recipe, source)


def _open(recipe: _Recipe, config: str | None, split: str, streaming: bool, source: str) -> Iterable[Mapping[str, Any]]:
    import datasets  # takes a second to import, and only those who ask for a dataset need it

    arguments: dict[str, Any] = {"split": split, "streaming": streaming}
    if recipe.data_files is not None:
        arguments["data_files"] = recipe.data_files
    elif config is not None:
        arguments["name"] = config
    try:
        rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(recipe.path, **arguments)
        return rows
    except Exception as error:  # the hub, HTTP, archive and table libraries underneath share no base class
        raise _unreachable(source, error) from error


def _guarded(rows: Iterable[Mapping[str, Any]], source: str) -> Iterator[Mapping[str, Any]]:
    """The same rows; what breaks while streaming is told as a `TextError` too."""
    iterator = iter(rows)
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # as above
            raise _unreachable(source, error) from error
        yield row


def _unreachable(source: str, error: Exception) -> TextError:
    cause = " ".join(str(error).split())
    return TextError(
        f"The dataset {source} could not be read ({type(error).__name__}: {cause[:300]}). "
        "Check the name, configuration, split and network; without a network, download the text elsewhere and name "
        "the file or folder instead."
    )


def _documents(rows: Iterator[Mapping[str, Any]], recipe: _Recipe, source: str) -> Iterator[Document]:
    if recipe.rows == "line":
        # The rows are the raw file's lines, in which a blank line is written " \n" and became the empty row.
        lines = (_text(row, source) or " \n" for row in rows)
        for title, text in split_lines((line if line.endswith("\n") else line + "\n" for line in lines), "wikitext"):
            if text.strip():
                yield Document(title=title or source, text=text, source=source)
        return
    for number, row in enumerate(rows):
        text = _text(row, source)
        title = row.get("title") or row.get("short_book_title")
        if recipe.rows == "record" and text.strip():
            title, text = parse_record(text, f"Row {number} of the dataset {source}")
        if text.strip():
            yield Document(title=title if isinstance(title, str) else f"{source} {number}", text=text, source=source)


def _text(row: Mapping[str, Any], source: str) -> str:
    text = row.get("text", _MISSING)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise TextError(
            f"The dataset {source} has no `text` column of strings; its columns are {', '.join(map(str, row))}. "
            "Choose another configuration, or export its text to files."
        )
    return text


def _limited(documents: Iterator[Document], max_samples: int | None, source: str) -> Iterator[Document]:
    found = False
    for document in islice(documents, max_samples):
        found = True
        yield document
    if not found:
        raise TextError(f"The dataset {source} holds no text; choose another split or configuration.")
