"""Evaluation texts by the names papers use: a local copy where there is one, the hub otherwise.

`wikitext-2`, `wikitext-103`, `pg19` and whatever else `dataset_documents` knows are read from a folder of that name in
the data folder first, so that an evaluation needs no network. What is nowhere to be found is an error that says where
it was looked for: an average over nothing helps nobody.
"""

from itertools import islice
from pathlib import Path

from hippoformer.data.datasets import dataset_documents
from hippoformer.data.documents import Document, read_documents
from hippoformer.errors import ConfigurationError, TextError

# Name -> split -> files or folders that hold it, within the data folder.
_LOCAL: dict[str, dict[str, tuple[str, ...]]] = {
    "wikitext-2": {
        "test": ("wikitext-2-raw/wiki.test.raw", "wikitext-2/wiki.test.raw"),
        "validation": ("wikitext-2-raw/wiki.valid.raw", "wikitext-2/wiki.valid.raw"),
    },
    "wikitext-103": {
        "test": ("wikitext-103-raw/wiki.test.raw", "wikitext-103/wiki.test.raw"),
        "validation": ("wikitext-103-raw/wiki.valid.raw", "wikitext-103/wiki.valid.raw"),
    },
}
# WikiText-103 has the validation and test sets of WikiText-2, to the byte.
_LOCAL["wikitext-103"] = {split: files + _LOCAL["wikitext-2"][split] for split, files in _LOCAL["wikitext-103"].items()}


def benchmark_documents(
    name: str, split: str = "test", data_dir: str | Path = "data", max_samples: int | None = None
) -> list[Document]:
    """The documents of an evaluation set.

    Args:
        name: of a local folder in `data_dir` (with a subfolder or file for the split, or without), or any name that
            `dataset_documents` knows.
        split: "test", "validation", or what the data set calls it.
        data_dir: where local copies lie.
        max_samples: only the first so many.

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
    known = [data_dir / file for file in _LOCAL.get(name, {}).get(split, ())]
    return [*known, data_dir / name / split, data_dir / name / f"{split}.txt", data_dir / name / f"{split}.jsonl"]
