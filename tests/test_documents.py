"""Documents begin where they should, and not a byte of them is lost."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hippoformer.data import read_documents, split_lines
from hippoformer.errors import ConfigurationError, TextError

# The official layout: blank lines (one space) around titles, and a sentence that only looks like a title.
WIKITEXT = (
    " \n = First article = \n \n Some text .\n \n = = Section = = \n \n"
    " The values are k \n = 1 henry and capacitance C = \n 1 farad .\n \n = Second = \n \n Its text .\n \n"
)


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


def test_wikitext_splits_at_titles_between_blank_lines_only(tmp_path: Path) -> None:
    path = write(tmp_path / "wiki.raw", WIKITEXT)
    documents = read_documents(path)
    assert [document.title for document in documents] == ["First article", "Second"]
    assert documents[1].text.startswith(" = Second = \n")
    assert documents[0].text.startswith(" \n = First")  # blank text before the first title stays with it
    assert all(document.source == str(path) for document in documents)


def test_headings_at_column_0(tmp_path: Path) -> None:
    text = "= A =\n\nText a.\n== Section ==\n = not at column 0 =\n= total number of cases\n\n= B b =\nText b."
    documents = read_documents(write(tmp_path / "articles.txt", text))
    assert [document.title for document in documents] == ["A", "B b"]
    assert documents[1].text == "= B b =\nText b."


def test_split_can_be_forced(tmp_path: Path) -> None:
    path = write(tmp_path / "wiki.raw", WIKITEXT)
    assert [document.text for document in read_documents(path, split="file")] == [WIKITEXT]
    preamble = write(tmp_path / "preamble.txt", "Before.\n= A =\nText.\n")
    assert len(read_documents(preamble)) == 1
    titles = [document.title for document in read_documents(preamble, split="headings")]
    assert titles == ["preamble", "A"]
    with pytest.raises(ConfigurationError, match="'paragraphs' is unknown"):
        read_documents(path, split="paragraphs")  # type: ignore[arg-type]


def test_only_line_feeds_end_lines_and_all_characters_stay(tmp_path: Path) -> None:
    text = "\ufeff= A =\r\n\r\none\x0ctwo\u2028= no title =\r\n= B =\r\n\r\nend \u00e9\U0001f600\n\n\n"
    path = write(tmp_path / "a.txt", text)
    documents = read_documents(path)
    assert [document.title for document in documents] == ["A", "B"]
    assert "\ufeff" + "".join(document.text for document in documents) == path.read_bytes().decode(), "but for the mark"


@given(
    st.lists(
        st.sampled_from([" \n", "\n", " = A = \n", " = = S = = \n", "= B =\n", "== S ==\n", " = 1 b = \n", "text\n"])
        | st.text(st.characters(exclude_categories=["Cs"]), max_size=5).map(lambda text: text + "\n"),
        max_size=15,
    ),
    st.sampled_from(["wikitext", "headings"]),
)
def test_articles_joined_are_the_text(lines: list[str], split: str) -> None:
    articles = list(split_lines(lines, split))  # type: ignore[arg-type]
    assert "".join(text for _, text in articles) == "".join(lines)
    assert all(title is not None for title, _ in articles[1:])  # only the first may stand before any title


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    write(tmp_path / "c.txt", "c")
    write(tmp_path / "b" / "z.md", "z")
    write(tmp_path / "a.raw", "a")
    write(tmp_path / "image.png", b"\xff\xd8")
    write(tmp_path / ".hidden" / "d.txt", "d")
    assert [document.text for document in read_documents(tmp_path)] == ["a", "z", "c"]
    named = read_documents([tmp_path / "c.txt", str(tmp_path / "a.raw")])
    assert [document.text for document in named] == ["c", "a"]


def test_json_lines(tmp_path: Path) -> None:
    records = [{"text": "first\ntext", "title": "One"}, {"text": "= A =\nx\n= B =\ny\n", "other": 1}]
    path = write(tmp_path / "texts.jsonl", json.dumps(records[0]) + "\n\n" + json.dumps(records[1]))
    documents = read_documents(path)
    assert [document.text for document in documents] == [records[0]["text"], records[1]["text"]]
    assert [document.title for document in documents] == ["One", "texts 3"]
    assert [document.source for document in documents] == [f"{path}:1", f"{path}:3"]
    assert [document.title for document in read_documents(path, split="headings")] == ["One", "A", "B"]


@pytest.mark.parametrize(("prefix", "offset"), [(b"good text ", 10), (b"\xef\xbb\xbfgood ", 8), ("é".encode(), 2)])
def test_text_that_is_not_utf8_names_file_and_offset(tmp_path: Path, prefix: bytes, offset: int) -> None:
    path = write(tmp_path / "latin.txt", prefix + b"caf\xe9 au lait"[3:])
    with pytest.raises(TextError, match=rf"latin\.txt.*0xe9 at offset {offset}\b"):
        read_documents(path)


def test_missing_paths(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"nowhere\.txt does not exist"):
        read_documents(tmp_path / "nowhere.txt")
    with pytest.raises(TextError, match="holds no text; expected files ending in"):
        read_documents(tmp_path)
    with pytest.raises(ConfigurationError, match="No text was named"):
        read_documents([])
    for content in ("", " \n\t\n", "\ufeff"):
        with pytest.raises(TextError, match="holds no text"):
            read_documents(write(tmp_path / "empty.txt", content))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"bad\.jsonl:2 is not JSON"),
        ('["text"]', r"bad\.jsonl:2 has no text"),
        ('{"text": 3}', r"bad\.jsonl:2 has no text"),
        ('{"text": " "}', r"bad\.jsonl:2 has an empty `text`"),
        ('{"text": "half \\ud83d a pair"}', r"bad\.jsonl:2 .*position 5"),
    ],
)
def test_bad_records_name_their_line(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "bad.jsonl", '{"text": "good"}\n' + line + "\n")
    with pytest.raises(TextError, match=message):
        read_documents(path)
