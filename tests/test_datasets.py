"""Datasets become documents, as a whole or as a stream: local folders for real, the hub through a stand-in."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hippoformer.data import dataset_documents
from hippoformer.data.datasets import DatasetStream
from hippoformer.errors import CheckpointError, ConfigurationError, TextError
from hippoformer.train import main
from hippoformer.training import processes
from hippoformer.training.streams import StreamedTexts
from test_training import interrupted
from tiny_training import arguments, differing

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _quiet_and_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """A dataset of three records, one of them without text."""
    path = tmp_path / "dataset"
    path.mkdir()
    rows = [{"text": "one\n", "title": "One"}, {"text": "", "title": "Empty"}, {"text": "three é\u2028", "title": None}]
    (path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def stand_in(monkeypatch: pytest.MonkeyPatch, rows: Any) -> dict[str, Any]:
    """Replaces `load_dataset` by something that returns rows; what it was called with comes back."""
    seen: dict[str, Any] = {}

    def load_dataset(path: str, **arguments: Any) -> Any:
        seen.update(path=path, **arguments)
        if isinstance(rows, Exception):
            raise rows
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return seen


@pytest.mark.parametrize("streaming", [False, True])
def test_a_local_folder(records: Path, streaming: bool) -> None:
    documents = list(dataset_documents(str(records), streaming=streaming))
    assert [document.text for document in documents] == ["one\n", "three é\u2028"]
    assert documents[0].title == "One"
    assert documents[1].title.endswith(" 2")  # the number of its row
    assert documents[0].source == f"{records}:train"


def test_streaming_reads_no_further_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    read = itertools.count()
    stand_in(monkeypatch, ({"text": f"document {next(read)}"} for _ in itertools.count()))
    documents = dataset_documents("openwebtext", streaming=True, max_samples=3)
    assert next(read) == 0  # opened, nothing read
    assert [document.text for document in documents] == ["document 1", "document 2", "document 3"]
    assert next(read) == 4
    with pytest.raises(ConfigurationError, match="max_samples=0"):
        dataset_documents("pile", max_samples=0)


@pytest.mark.parametrize("name", ["openwebtext", "pile", "pg19", "somebody/texts"])
def test_a_connection_lost_while_streaming(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield {"text": "first"}
        raise TimeoutError("read timed out")

    seen = stand_in(monkeypatch, rows())
    documents = dataset_documents(name, streaming=True)
    assert next(documents).text == "first" and ("/" in seen["path"])
    with pytest.raises(TextError, match="read timed out"):
        next(documents)


def test_wikitext_lines_become_articles(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = (
        " \n = One = \n \n Text of one .\n \n = = Section = = \n \n = 1 henry and C = \n more .\n"
        " \n = Two = \n \n Text of two .\n \n"
    )
    rows = [{"text": "" if line == " " else line + "\n"} for line in raw.split("\n")[:-1]]
    seen = stand_in(monkeypatch, rows)
    documents = list(dataset_documents("wikitext", split="test"))
    assert seen == {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test", "streaming": False}
    assert len(list(dataset_documents("wikitext", "wikitext-103-raw-v1"))) == 2 and "103" in seen["name"]
    assert [document.title for document in documents] == ["One", "Two"]
    assert "".join(document.text for document in documents) == raw
    assert [document.title for document in dataset_documents("wikitext", max_samples=1)] == ["One"]


def test_redpajama_records_of_different_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one\\n", "meta": {"url": "x"}}\n', encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "two", "meta": "y", "source": 1}\n{"text": ""}\n', encoding="utf-8")
    load_dataset = datasets.load_dataset
    asked = {}

    def local(path: str, data_files: str, **arguments: Any) -> Any:
        asked["data_files"] = data_files
        return load_dataset(path, data_files=str(tmp_path / "*.jsonl"), **arguments)

    monkeypatch.setattr(datasets, "load_dataset", local)
    for streaming in (False, True):
        documents = dataset_documents("RedPajama-Data-1T-Sample", streaming=streaming)
        assert [document.text for document in documents] == ["one\n", "two"]
    assert asked["data_files"] == "hf://datasets/togethercomputer/RedPajama-Data-1T-Sample/*.jsonl"


def test_unreachable_is_told_at_once_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    cause = ConnectionError("Couldn't reach the hub")
    stand_in(monkeypatch, cause)
    with pytest.raises(
        TextError, match=r"wikitext:wikitext-2-raw-v1:train could not be read .*reach the hub"
    ) as caught:
        dataset_documents("wikitext")
    assert caught.value.__cause__ is cause


def test_a_missing_folder_split_column_or_text(records: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TextError, match="could not be read"):
        dataset_documents(str(records), split="nowhere")
    stand_in(monkeypatch, [{"content": "text", "id": 3}])
    with pytest.raises(TextError, match="no `text` column of strings; its columns are content, id"):
        next(dataset_documents("somebody/texts"))
    stand_in(monkeypatch, [{"text": " "}, {"text": None}])
    with pytest.raises(TextError, match="holds no text"):
        list(dataset_documents("somebody/texts"))


# ---------------------------------------------------------------- streams


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """A dataset of eleven documents in three files, one of them blank and one a letter."""
    path = tmp_path / "corpus"
    path.mkdir()
    texts = [f"document {i} says what document {i} says. " * (1 + i % 4) for i in range(11)]
    texts[3], texts[5] = "  ", "x"
    for part in range(3):
        records = [json.dumps({"text": text}) + "\n" for text in texts[4 * part : 4 * part + 4]]
        (path / f"train-{part}.jsonl").write_text("".join(records), encoding="utf-8")
    return str(path)


def read(stream: DatasetStream, count: int) -> list[str]:
    return [stream.next().text for _ in range(count)]


def resumed(stream: DatasetStream, again: DatasetStream, count: int) -> None:
    again.restore(json.loads(json.dumps(stream.state())))
    assert read(again, count) == read(stream, count)


def test_a_stream_goes_round_and_resumes_exactly(corpus: str) -> None:
    stream = DatasetStream(corpus)
    once = read(stream, 10)
    assert len(set(once)) == 10 and stream.epoch == 0
    assert read(stream, 4) == once[:4] and stream.epoch == 1
    resumed(stream, DatasetStream(corpus), 25)


def test_processes_share_a_stream_out(corpus: str) -> None:
    whole = set(read(DatasetStream(corpus), 10))
    one, other = (DatasetStream(corpus, process=i, processes=2) for i in range(2))
    mine = [read(one, 1)[0] for _ in range(10) if one.epoch == 0]
    theirs = [read(other, 1)[0] for _ in range(10) if other.epoch == 0]
    assert set(mine) | set(theirs) == whole
    assert not set(mine[:4]) & set(theirs[:4])


def test_articles_of_wikitext_lines_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line for i in range(7) for line in ("", f" = Article {i} = \n", "", f" Text {i} . \n")]
    stand_in(monkeypatch, datasets.Dataset.from_dict({"text": lines}).to_iterable_dataset())
    stream = DatasetStream("wikitext")
    assert ["Article 0" in text for text in read(stream, 2)] == [True, False]
    resumed(stream, DatasetStream("wikitext"), 9)
    one, other = (DatasetStream("wikitext", process=i, processes=2) for i in range(2))
    assert not set(read(one, 4)) & set(read(other, 3))


def test_rows_read_documents_whole_and_in_turn(corpus: str) -> None:
    streams = StreamedTexts(DatasetStream(corpus), lambda text: torch.tensor(list(text.encode())), 2, 6)
    expected = [text for text in read(DatasetStream(corpus), 12) if len(text) > 1]
    got: dict[int, str] = {}
    for _ in range(60):
        piece = streams.next()
        for document, span in zip(piece.documents, piece.spans, strict=True):
            assert len(got.get(document, "")) == span.start
            got[document] = got.get(document, "") + bytes(streams[document][span].tolist()).decode()
    finished = [got[document] for document in sorted(got)[:-2]]
    assert finished == expected[: len(finished)] and len(finished) > 4


@pytest.mark.supports(trainer="frozen", architecture="llama", mode=("streamed dataset", "killed and resumed"))
def test_a_streamed_run_resumes_to_the_same_bits(folder: Path, corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def streamed(output: str, *more: str) -> list[str]:
        argv = arguments(folder, output, *more)
        place = argv.index("--text")
        return [*argv[:place], "--dataset", corpus, "--streaming", *argv[place + 2 :]]

    assert main(streamed("whole")) == 0
    interrupted(monkeypatch, streamed("parts"))
    resume = ("--resume_from_checkpoint", "auto")
    state = processes.load(folder / "parts")
    state[2]["orders"] *= 2
    with monkeypatch.context() as patched, pytest.raises(CheckpointError, match="as many processes"):
        patched.setattr(processes, "load", lambda *_: state)
        main(streamed("parts", *resume))
    assert main(streamed("parts", *resume)) == 0
    assert differing(folder / "whole", folder / "parts") == []
    with pytest.raises(CheckpointError, match="same data"):
        main(arguments(folder, "parts", *resume))
