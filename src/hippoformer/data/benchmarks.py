"""Evaluation texts by the names that papers use: a local copy in the data folder, else the hub."""

from itertools import islice
from pathlib import Path

from hippoformer.data.datasets import dataset_documents
from hippoformer.data.documents import Document, read_documents
from hippoformer.errors import ConfigurationError, TextError

_RAW_FILES = {"test": "wiki.test.raw", "validation": "wiki.valid.raw"}
# WikiText-103 has the validation and test sets of WikiText-2, to the byte.
_FOLDERS = {
    "wikitext-2": ("wikitext-2-raw", "wikitext-2"),
    "wikitext-103": ("wikitext-103-raw", "wikitext-103", "wikitext-2-raw", "wikitext-2"),
}


def benchmark_documents(
    name: str, split: str = "test", data_dir: str | Path = "data", max_samples: int | None = None
) -> list[Document]:
    """The documents of an evaluation set.

    Args:
        name: a folder in `data_dir` (with a subfolder or file for the split), or a name for `dataset_documents`.
        split: "test", "validation", or what the data set calls it.
        data_dir: folder of local copies. max_samples: only the first N documents.

    Raises:
        TextError: neither a local copy nor the hub has it; the message names both.
        ConfigurationError: `max_samples` below 1.
    """
    if max_samples is not None and max_samples < 1:
        raise ConfigurationError(f"max_samples={max_samples}; expected at least 1, or none for all")
    looked_for = local_places(name, split, Path(data_dir))
    for place in looked_for:
        if place.exists():
            return read_documents(place)[:max_samples]
    try:
        return list(islice(dataset_documents(name, split=split, streaming=max_samples is not None), max_samples))
    except TextError as error:
        places = ", ".join(str(place) for place in looked_for)
        raise TextError(f"{name} ({split}) is not at hand: no {places}; and {error}") from error


def local_places(name: str, split: str, data_dir: Path) -> list[Path]:
    """Where a local copy of a split would lie, the likeliest first."""
    known = [data_dir / folder / _RAW_FILES[split] for folder in _FOLDERS.get(name, ()) if split in _RAW_FILES]
    return [*known, data_dir / name / split, data_dir / name / f"{split}.txt", data_dir / name / f"{split}.jsonl"]
