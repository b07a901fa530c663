"""Training on a stream: documents come while it reads, and it goes on exactly where it was."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hippoformer.data.streaming import DatasetStream
from hippoformer.errors import CheckpointError, ConfigurationError, TextError
from hippoformer.train import main
from hippoformer.training.arguments import parse
from hippoformer.training.streaming import StreamedTexts
from hippoformer.training.trainer import Trainer
from test_datasets import stand_in
from tiny_training import arguments

datasets = pytest.importorskip("datasets")


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset of eleven documents in three files, one of them blank and one a letter."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "corpus"
    path.mkdir()
    texts = [f"document {i} says what document {i} says. " * (1 + i % 4) for i in range(11)]
    texts[3], texts[5] = "  ", "x"
    for part in range(3):
        records = [json.dumps({"text": text}) + "\n" for text in texts[4 * part : 4 * part + 4]]
        (path / f"train-{part}.jsonl").write_text("".join(records), encoding="utf-8")
    return path


def read(stream: DatasetStream, count: int) -> list[str]:
    return [stream.next().text for _ in range(count)]


def test_a_stream_goes_round_and_resumes_exactly(corpus: Path) -> None:
    stream = DatasetStream(str(corpus))
    once = read(stream, 10)
    assert len(set(once)) == 10 and stream.epoch == 0
    assert read(stream, 4) == once[:4] and stream.epoch == 1
    state = json.loads(json.dumps(stream.state()))
    expected = read(stream, 25)
    again = DatasetStream(str(corpus))
    again.restore(state)
    assert read(again, 25) == expected
    assert again.state() == stream.state()


def test_processes_share_a_stream_out(corpus: Path) -> None:
    whole = set(read(DatasetStream(str(corpus)), 10))
    one, other = (DatasetStream(str(corpus), process=i, processes=2) for i in range(2))
    mine = [read(one, 1)[0] for _ in range(10) if one.epoch == 0]
    theirs = [read(other, 1)[0] for _ in range(10) if other.epoch == 0]
    assert set(mine) | set(theirs) == whole
    assert not set(mine[:4]) & set(theirs[:4])


def test_articles_of_wikitext_lines_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f"{line}\n" for i in range(7) for line in ("", f" = Article {i} = ", "", f" Text {i} . ")]
    rows = datasets.Dataset.from_dict({"text": [line if line.strip() else "" for line in lines]})
    stand_in(monkeypatch, rows.to_iterable_dataset())
    stream = DatasetStream("wikitext")
    assert ["Article 0" in text for text in read(stream, 2)] == [True, False]
    state = json.loads(json.dumps(stream.state()))
    expected = read(stream, 9)
    again = DatasetStream("wikitext")
    again.restore(state)
    assert read(again, 9) == expected and "Article 2" in expected[0]
    other = DatasetStream("wikitext", process=1, processes=3)
    assert ["Article 1" in read(other, 1)[0], "Article 4" in read(other, 1)[0]] == [True, True]


@pytest.mark.parametrize("name", ["openwebtext", "pile", "fineweb", "RedPajama-Data-1T-Sample"])
def test_the_known_names_stream(name: str, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [{"text": f"document {i}"} for i in range(5)]
    if name.startswith("RedPajama"):  # read as lines of JSON
        records = [{"text": json.dumps(record)} for record in records]
    seen = stand_in(monkeypatch, datasets.Dataset.from_list(records).to_iterable_dataset())
    stream = DatasetStream(name)
    assert seen["streaming"] is True and seen["split"] == "train"
    assert read(stream, 7) == [f"document {i % 5}" for i in range(7)]
    again = DatasetStream(name)
    again.restore(stream.state())
    assert read(again, 1) == ["document 2"]


def test_a_stream_without_text_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, datasets.Dataset.from_list([{"text": " "}]).to_iterable_dataset())
    with pytest.raises(TextError, match="no document"):
        DatasetStream("openwebtext").next()


def test_rows_read_documents_whole_and_in_turn(corpus: Path) -> None:
    streams = StreamedTexts(DatasetStream(str(corpus)), lambda text: torch.tensor(list(text.encode())), 2, 6)
    expected = [text for text in read(DatasetStream(str(corpus)), 12) if len(text) > 1]
    got: dict[int, str] = {}
    for _ in range(60):
        piece = streams.next()
        for row, (document, start, n) in enumerate(zip(piece.documents, piece.start, piece.length, strict=True)):
            assert (start == 0) == (row in piece.fresh) and len(got.get(document, "")) == start
            got[document] = got.get(document, "") + bytes(streams[document][start : start + n].tolist()).decode()
    finished = [got[document] for document in sorted(got)[:-2]]
    assert finished == expected[: len(finished)] and len(finished) > 4


def streamed(folder: Path, corpus: Path, output: str, *more: str) -> list[str]:
    argv = arguments(folder, output, *more)
    place = argv.index("--text")
    return [*argv[:place], "--dataset", str(corpus), "--streaming", *argv[place + 2 :]]


@pytest.mark.supports(trainer="frozen", architecture="llama", mode=("streamed dataset", "killed and resumed"))
def test_a_streamed_run_resumes_to_the_same_bits(
    folder: Path,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert main(streamed(folder, corpus, "whole")) == 0
    save = Trainer._save

    def killed(self: Trainer) -> None:
        save(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_save", killed)
    with pytest.raises(KeyboardInterrupt):
        main(streamed(folder, corpus, "parts"))
    monkeypatch.undo()
    assert main(streamed(folder, corpus, "parts", "--resume_from_checkpoint", "auto")) == 0
    whole, parts = (load_file(folder / run / "model.safetensors") for run in ("whole", "parts"))
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []
    assert main(arguments(folder, "parts", "--resume_from_checkpoint", "auto")) == 2  # other data


def test_a_streamed_run_of_other_processes_is_not_taken_up(
    folder: Path,
    corpus: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(streamed(folder, corpus, "run", "--max_steps", "3")) == 0
    file = folder / "run" / "checkpoint-00000003" / "training.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"processes": 2}))
    assert main(streamed(folder, corpus, "run", "--resume_from_checkpoint", "auto")) == 2
    assert CheckpointError.__name__ in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["--text", "a", "--streaming"],
        ["--dataset", "pile", "--streaming", "--num_epochs", "1"],
        ["--dataset", "pile", "--streaming", "--planted_documents", "3"],
    ],
)
def test_what_a_stream_cannot_do_is_refused(argv: list[str]) -> None:
    with pytest.raises(ConfigurationError, match="--streaming"):
        parse(argv)
