"""Questions: read from every source they come from, answered as `generate` would, scored against the best answer."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from typer.testing import CliRunner

import hippoformer
from hippoformer.cli import app
from hippoformer.data.questions import Question, read_questions
from hippoformer.errors import ConfigurationError, TextError
from hippoformer.evaluation.questions import evaluate_questions
from hippoformer.evaluation.text_metrics import text_scores
from hippoformer.model.rereading import reread
from tiny_texts import text, tiny_load

BABI = """1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Daniel went back to the hallway.
5 Where is Daniel? \thallway\t4
1 Sandra travelled to the office.
2 Where is Sandra? |office|1
"""


def test_babi_stories_end_where_numbers_begin_anew(tmp_path: Path) -> None:
    folder = tmp_path / "babi" / "en"
    folder.mkdir(parents=True)
    (folder / "qa1_single-supporting-fact_test.txt").write_text(BABI)
    found = read_questions("babi-qa1", "test", tmp_path)
    assert [(q.question, q.answers) for q in found] == [
        ("Where is Mary?", ("bathroom",)),
        ("Where is Daniel?", ("hallway",)),
        ("Where is Sandra?", ("office",)),
    ]
    assert found[1].context.splitlines()[-1] == "Daniel went back to the hallway."
    assert found[2].context == "Sandra travelled to the office."
    with pytest.raises(TextError, match=r"babi-qa2 \(test\) is not at hand"):
        read_questions("babi-qa2", "test", tmp_path)


def test_a_file_of_ones_own_and_local_copies(tmp_path: Path) -> None:
    rows = [
        {"context": "c", "question": "q", "answers": ["a", "b", " "]},
        {"context": "d", "question": "r", "answer": "x"},
    ]
    lines = "\n\n".join(json.dumps(row) for row in rows)
    (tmp_path / "mine.jsonl").write_text(lines)
    found = read_questions(str(tmp_path / "mine.jsonl"))
    assert [q.answers for q in found] == [("a", "b"), ("x",)]
    (tmp_path / "narrativeqa").mkdir()
    (tmp_path / "narrativeqa" / "validation.jsonl").write_text(lines)
    assert len(read_questions("narrativeqa", "validation", tmp_path, max_samples=1)) == 1
    for broken in ('{"context": "c"}', "no json", '{"context": "", "question": "q", "answer": "a"}'):
        (tmp_path / "broken.jsonl").write_text(broken)
        with pytest.raises(TextError):
            read_questions(str(tmp_path / "broken.jsonl"))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(TextError, match="holds no question"):
        read_questions(str(tmp_path / "empty.jsonl"))


def test_data_sets_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    rows: list[dict[str, Any]] = []

    def load_dataset(*arguments: Any, **options: Any) -> list[dict[str, Any]]:
        asked.append((arguments, options))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows[:] = [{"input": "long text", "question": "Where?", "target": "here"}]
    assert read_questions("babilong-4k-qa2", data_dir=tmp_path)[0].answers == ("here",)
    assert asked.pop() == (("RMT-team/babilong",), {"name": "4k", "split": "qa2"})
    rows[:] = [
        {"document": {"text": "a book"}, "question": {"text": "Who?"}, "answers": [{"text": "he"}, {"text": "she"}]}
    ]
    assert read_questions("narrativeqa", "test", tmp_path)[0].answers == ("he", "she")
    asked.clear()
    rows[:] = [{"id": 1, "input": "Who?\n\nA text.\n\nMore.", "output": o} for o in ("x", "y")]
    (one,) = read_questions("scrolls-qasper", "validation", tmp_path)
    assert (one.question, one.context, one.answers) == ("Who?", "A text.\n\nMore.", ("x", "y"))
    assert asked.pop()[1]["data_files"] == {
        "validation": "zip://qasper/validation.jsonl::hf://datasets/tau/scrolls/qasper.zip"
    }
    (summary,) = read_questions("scrolls-gov_report", "validation", tmp_path)
    assert summary.context.startswith("Who?") and summary.question == "What is a summary of this?"
    rows[:] = [{"id": 1, "input": "Who?\n\nA text.", "output": None}]
    with pytest.raises(TextError, match="has no answers"):
        read_questions("scrolls-qasper", "test", tmp_path)

    def unreachable(*_: object, **__: object) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(TextError, match=r"narrativeqa is not at hand: no .*validation.jsonl.*no network"):
        read_questions("narrativeqa", data_dir=tmp_path)
    for name in ("squad", "scrolls-squad", "babilong-qa1"):
        with pytest.raises(ConfigurationError, match="scrolls-qasper"):
            read_questions(name, data_dir=tmp_path)
    with pytest.raises(ConfigurationError, match="at least 1"):
        read_questions("narrativeqa", max_samples=0)


QUESTIONS = [Question(f"q{i}", text(i, n), "Where is it?", ("here", "a b")) for i, n in enumerate((150, 90, 200))]


def test_answers_are_those_of_generate_up_to_the_line_s_end() -> None:
    model, tokenizer = tiny_load(residual_readout=False)
    report = evaluate_questions(model, tokenizer, QUESTIONS, "mine", 8, limit_tokens=180, batch_size=2, resamples=20)
    assert [row["name"] for row in report.asked] == ["q0", "q1", "q2"]
    for row, question in zip(report.asked, QUESTIONS, strict=True):
        prompt = question.context[:180] + "\n\nQuestion: Where is it?\nAnswer:"
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        assert row["tokens_read"] == ids.shape[1]
        with torch.no_grad():
            made = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)[0, ids.shape[1] :]
        assert row["memory"] == tokenizer.decode(made).strip().partition("\n")[0].strip()
    best = [max(text_scores(row["off"], answer)["f1"] for answer in ("here", "a b")) for row in report.asked]
    assert report.conditions["off"]["f1"].estimate == pytest.approx(sum(best) / 3)
    assert report.to_table().row_count == len(report.differences) == 6
    assert "reread" not in report.conditions and report.reread_differences == {}
    with pytest.raises(TextError, match="no question"):
        evaluate_questions(model, tokenizer, [], "none")
    with pytest.raises(ConfigurationError, match="reread_tokens"):
        evaluate_questions(model, tokenizer, QUESTIONS, "mine", reread_tokens=-1)
    with pytest.raises(ConfigurationError, match="at least 1"):
        evaluate_questions(model, tokenizer, QUESTIONS, "mine", 0)


@torch.no_grad()
def test_reread_is_the_base_s_answer_after_rereading_in_a_copy() -> None:
    model, tokenizer = tiny_load(residual_readout=False)
    options = {"new_tokens": 8, "batch_size": 2, "resamples": 20}
    report = evaluate_questions(model, tokenizer, QUESTIONS, "mine", reread_tokens=90, **options)
    plain = evaluate_questions(model, tokenizer, QUESTIONS, "mine", **options)
    assert list(report.conditions) == ["memory", "off", "reread"]
    for row, without, question in zip(report.asked, plain.asked, QUESTIONS, strict=True):
        assert (row["memory"], row["off"]) == (without["memory"], without["off"])
        cache = model.new_cache(1)
        model.score(tokenizer(question.context, return_tensors="pt").input_ids, past_key_values=cache)
        cue = tokenizer(question.question, return_tensors="pt").input_ids
        ids = tokenizer(question.prompt, return_tensors="pt").input_ids
        with model.memory_off():
            copy = reread(cache, cue, n_tokens=90)
            made = model.generate(ids, past_key_values=copy, max_new_tokens=8, do_sample=False, eos_token_id=None)
        assert row["reread"] == tokenizer.decode(made[0, ids.shape[1] :]).strip().partition("\n")[0].strip()
    assert set(report.reread_differences) == set(report.differences)
    assert len(report.to_table().columns) == len(plain.to_table().columns) + 2


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hippoformer, "load", lambda name, **options: tiny_load(name, residual_readout=False, **options))
    row = {"context": text(0, 80), "question": "Where?", "answer": "here"}
    (tmp_path / "mine.jsonl").write_text(json.dumps(row))
    arguments = ["eval", "questions", "--model", "tiny", "--questions", str(tmp_path / "mine.jsonl")]
    result = CliRunner().invoke(
        app, [*arguments, "--new-tokens", "3", "--reread-tokens", "40", "--output", str(tmp_path / "out.json")]
    )
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out.json").read_text())["format"] == "hippoformer.questions/1"
