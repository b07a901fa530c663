"""From files to documents, without changing a character on the way.

A memory must be empty at the start of every document, so the first thing to know of a text is where its documents
begin. Three layouts are understood:

    wikitext   a line ` = Title = `, blank in front and one `=` a side, opens an article (the WikiText raw files).
               The official files keep a blank line before and after each title; sentences such as
               ` = 1 henry and capacitance C = ` have the same shape and no blank lines around them. So if the first
               title of a text is followed by a blank line, every title must stand between blank lines; if it is not
               (copies from which the blank lines were removed), the shape alone decides.
    headings   a line `= Title =` at column 0, one `=` a side, opens an article (`== Section ==` does not).
    file       the whole file is one document.

`split="auto"` looks at the first line that is not blank: a wikitext title there means wikitext, a heading there means
headings, anything else means that the file is one document. A document begins at its title line. Text before the first
title belongs to the first document if it is blank, and is a document of its own otherwise.

Each line of a `.jsonl` file is a record whose `text` is one document (`title` names it, if there is one); a `split`
other than "auto" and "file" is applied inside each record.

Joined together, the documents of a file are the file (or the texts of its records) again. Only a byte order mark at the
very front is not text, and is dropped.
"""

import codecs
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from hippoformer.errors import ConfigurationError, TextError

Split = Literal["auto", "wikitext", "headings", "file"]

SUFFIXES = (".txt", ".raw", ".md", ".jsonl")

_WIKITEXT_TITLE = re.compile(r" = (?!= )(?P<title>.*\S.*)(?<! =) = ?\r?\n?")
_HEADING_TITLE = re.compile(r"= (?!= )(?P<title>.*\S.*)(?<! =) = ?\r?\n?")


@dataclass(frozen=True)
class Document:
    """One text that is read with a memory of its own.

    Attributes:
        title: the article's title, the record's, or the file's name without its suffix.
        text: the text, title line included.
        source: where it came from: `path`, `path:line` for a record, or the name of a dataset.
    """

    title: str
    text: str
    source: str


def read_documents(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], split: Split = "auto"
) -> list[Document]:
    """Reads the documents of a file, of a folder, or of a list of both, in that order.

    A folder is read with its subfolders, in the order of the relative paths: all files whose name ends in .txt, .raw,
    .md or .jsonl, except hidden ones. A file named directly is read whatever its suffix.

    Args:
        paths: one path or several.
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
    documents: list[Document] = []
    for path in paths:
        for file in _text_files(Path(path)):
            documents.extend(_file_documents(file, split))
    return documents


def split_lines(lines: Iterable[str], split: Literal["wikitext", "headings"]) -> Iterator[tuple[str | None, str]]:
    """Groups lines (with their line ends) into articles, one line of look-ahead at a time, so a stream will do.

    Yields:
        (title, text) of each article; the title is None for text that stands before the first title.
    """
    pattern = _WIKITEXT_TITLE if split == "wikitext" else _HEADING_TITLE
    between_blanks: bool | None = False if split == "headings" else None  # None: not known before the first title
    title: str | None = None
    collected: list[str] = []
    after_blank = True
    for line, before_blank in _with_next_blank(lines):
        match = pattern.fullmatch(line)
        if match and between_blanks is None:
            between_blanks = before_blank
        if match and (not between_blanks or (after_blank and before_blank)):
            if title is not None or any(not _blank(earlier) for earlier in collected):
                yield title, "".join(collected)
                collected = []
            title = match["title"].strip()
        collected.append(line)
        after_blank = _blank(line)
    if collected:
        yield title, "".join(collected)


def _with_next_blank(lines: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Pairs each line with whether the next one is blank; the end of the text counts as blank."""
    previous: str | None = None
    for line in lines:
        if previous is not None:
            yield previous, _blank(line)
        previous = line
    if previous is not None:
        yield previous, True


def _blank(line: str) -> bool:
    return not line.strip()


def _lines(text: str) -> io.StringIO:
    # Only "\n" ends a line here: str.splitlines would also break at form feeds and Unicode separators inside a text.
    return io.StringIO(text, newline="\n")


def _detect(text: str) -> Literal["wikitext", "headings", "file"]:
    first = next((line for line in _lines(text) if not _blank(line)), "")
    if _WIKITEXT_TITLE.fullmatch(first):
        return "wikitext"
    if _HEADING_TITLE.fullmatch(first):
        return "headings"
    return "file"


def _text_files(path: Path) -> list[Path]:
    if path.is_dir():
        files = [
            file
            for file in path.rglob("*")
            if file.suffix.lower() in SUFFIXES
            and file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
        if not files:
            raise TextError(f"The folder {path} holds no text; expected files ending in {', '.join(SUFFIXES)}.")
        return sorted(files, key=lambda file: file.relative_to(path).as_posix())
    if not path.exists():
        raise TextError(f"{path} does not exist; expected a text file or a folder of text files.")
    return [path]


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TextError(
            f"{path} cannot be read ({error.strerror or error}); check the file and its permissions."
        ) from error
    start = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    try:
        text = data[start:].decode("utf-8")
    except UnicodeDecodeError as error:
        offset = start + error.start
        raise TextError(
            f"{path} is not UTF-8: byte 0x{data[offset]:02x} at offset {offset} ({error.reason}). "
            "Convert the file to UTF-8 first, for example with iconv."
        ) from error
    if not text.strip():
        raise TextError(f"{path} holds no text; expected at least one character that is not blank.")
    return text


def _file_documents(path: Path, split: Split) -> Iterator[Document]:
    text = _read_text(path)
    if path.suffix.lower() != ".jsonl":
        yield from _text_documents(text, path.stem, str(path), split)
        return
    for number, line in enumerate(_lines(text), start=1):
        if _blank(line):
            continue
        source = f"{path}:{number}"
        title, record = parse_record(line, source)
        if _blank(record):
            raise TextError(f"{source} has an empty `text`; remove the record or give it a text.")
        yield from _text_documents(
            record, title or f"{path.stem} {number}", source, "file" if split == "auto" else split
        )


def _text_documents(text: str, name: str, source: str, split: Split) -> Iterator[Document]:
    kind = _detect(text) if split == "auto" else split
    if kind == "file":
        yield Document(title=name, text=text, source=source)
        return
    for title, article in split_lines(_lines(text), kind):
        yield Document(title=name if title is None else title, text=article, source=source)


def parse_record(line: str, source: str) -> tuple[str | None, str]:
    """(title or None, text) of one line of JSON lines, as in a `.jsonl` file.

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
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # half of a surrogate pair, written as an escape
        raise TextError(
            f"{source} holds a character that UTF-8 cannot write (position {error.start} of `text`)."
        ) from error
    title = record.get("title")
    return (title if isinstance(title, str) and title else None), text
