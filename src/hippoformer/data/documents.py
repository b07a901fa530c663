"""From files to documents, without changing a character.

A memory is empty at the start of every document, so a reader must know where documents begin. Three layouts:

    wikitext   a line ` = Title = `, blank in front and one `=` a side, opens an article (the WikiText raw files).
               If a blank line follows the first title of a text, every title must stand between blank lines: sentences
               such as ` = 1 henry and capacitance C = ` have the shape of a title. Otherwise the shape decides.
    headings   a line `= Title =` at column 0, one `=` a side, opens an article (`== Section ==` does not).
    file       the whole file is one document.

`split="auto"` takes the layout of the first line that is not blank. Blank text before the first title belongs to the
first document, other text is a document of its own. Each line of a `.jsonl` file is a record whose `text` is one
document, with an optional `title`; "wikitext" and "headings" are applied inside each record. Joined together, the
documents of a file are the file (or the texts of its records), but for a byte order mark.
"""

import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Literal, get_args

from hippoformer.errors import ConfigurationError, TextError

Split = Literal["auto", "wikitext", "headings", "file"]
SUFFIXES = (".txt", ".raw", ".md", ".jsonl")

_HEADING = r"= (?!= )(?P<title>.*\S.*)(?<! =) = ?\r?\n?"
_TITLES: dict[Literal["wikitext", "headings"], re.Pattern[str]] = {
    "wikitext": re.compile(f" {_HEADING}"),
    "headings": re.compile(_HEADING),
}


@dataclass(frozen=True)
class Document:
    """One text that is read with a memory of its own, title line included.

    The title is that of the article or record, or the file's name without its suffix; the source is `path`, `path:line`
    of a record, or the name of a dataset.
    """

    title: str
    text: str
    source: str


def read_documents(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], split: Split = "auto"
) -> list[Document]:
    """Reads the documents of files and folders, in the order given.

    Args:
        paths: one or several. A folder is read with its subfolders, in the order of the relative paths: files that end
            in .txt, .raw, .md or .jsonl and are not hidden. A file that is named itself may have any suffix.
        split: where documents begin; see the head of this module.

    Raises:
        TextError: a path that is missing or unreadable, a file without text or not UTF-8 (with the byte offset), a
            folder without any text file, a record without `text`.
        ConfigurationError: an unknown `split`, or no path at all.
    """
    if split not in get_args(Split):
        raise ConfigurationError(f"split={split!r} is unknown; choose one of {', '.join(get_args(Split))}.")
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    if not paths:
        raise ConfigurationError("No text was named; give at least one file or folder.")
    files = [file for path in paths for file in _text_files(Path(path))]
    return [document for file in files for document in _file_documents(file, split)]


def split_lines(lines: Iterable[str], split: Literal["wikitext", "headings"]) -> Iterator[tuple[str | None, str]]:
    """Groups lines (with their line ends) into articles, with one line of look-ahead, so `lines` may be a stream.

    Yields:
        (title, text) of each article; the title is None for text before the first title.
    """
    between_blanks: bool | None = False if split == "headings" else None  # None: not known before the first title
    title: str | None = None
    collected: list[str] = []
    after_blank = True
    for line, following in pairwise(chain(lines, [""])):  # the end of the text counts as a blank line
        match, before_blank = _TITLES[split].fullmatch(line), not following.strip()
        if match and between_blanks is None:
            between_blanks = before_blank
        if match and (not between_blanks or (after_blank and before_blank)):
            if title is not None or any(earlier.strip() for earlier in collected):
                yield title, "".join(collected)
                collected = []
            title = match["title"].strip()
        collected.append(line)
        after_blank = not line.strip()
    if collected:
        yield title, "".join(collected)


def parse_record(line: str, source: str) -> tuple[str | None, str]:
    """(title or None, text) of one line of a `.jsonl` file.

    Raises:
        TextError: not a JSON object, no `text` in it, or a `text` that UTF-8 cannot write; it names `source`.
    """
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise TextError(f"{source} is not JSON ({error}); expected one object with a `text` field a line.") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise TextError(f"{source} has no text; expected a JSON object whose `text` field is a string.")
    if half := re.search("[\ud800-\udfff]", text):  # of a surrogate pair, written as an escape
        raise TextError(f"{source} holds a character that UTF-8 cannot write (position {half.start()} of `text`).")
    title = record.get("title")
    return title if isinstance(title, str) and title else None, text


def _text_files(path: Path) -> list[Path]:
    if not path.exists():
        raise TextError(f"{path} does not exist; expected a text file or a folder of text files.")
    if not path.is_dir():
        return [path]
    inside = (file.relative_to(path) for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    names = [name for name in inside if not any(part.startswith(".") for part in name.parts)]
    if not names:
        raise TextError(f"The folder {path} holds no text; expected files ending in {', '.join(SUFFIXES)}.")
    return [path / name for name in sorted(names, key=Path.as_posix)]


def _file_documents(path: Path, split: Split) -> Iterator[Document]:
    text = _read_text(path)
    if path.suffix.lower() != ".jsonl":
        yield from _text_documents(text, path.stem, str(path), split)
        return
    for number, line in enumerate(_lines(text), start=1):
        if line.strip():
            source = f"{path}:{number}"
            title, record = parse_record(line, source)
            if not record.strip():
                raise TextError(f"{source} has an empty `text`; remove the record or give it a text.")
            inside: Split = "file" if split == "auto" else split
            yield from _text_documents(record, title or f"{path.stem} {number}", source, inside)


def _text_documents(text: str, name: str, source: str, split: Split) -> Iterator[Document]:
    if split == "auto":
        first = next((line for line in _lines(text) if line.strip()), "")
        split = next((kind for kind, title in _TITLES.items() if title.fullmatch(first)), "file")
    if split == "auto" or split == "file":
        yield Document(name, text, source)
        return
    for title, article in split_lines(_lines(text), split):
        yield Document(name if title is None else title, article, source)


def _lines(text: str) -> io.StringIO:
    # Only "\n" ends a line here: str.splitlines also breaks at form feeds and Unicode separators inside a text.
    return io.StringIO(text, newline="\n")


def _read_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise TextError(f"{path} cannot be read ({error.strerror or error}); check its permissions.") from error
    except UnicodeDecodeError as error:
        raise TextError(
            f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start} ({error.reason}). "
            "Convert the file to UTF-8 first, for example with iconv."
        ) from error
    if not text.strip():
        raise TextError(f"{path} holds no text; expected at least one character that is not blank.")
    return text
