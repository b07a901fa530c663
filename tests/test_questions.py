"""Questions: read from every source they come from, answered as `generate` would, scored against the best answer."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from evaluation.quality.metrics import text_scores
from evaluation.questions import run as questions
from evaluation.questions.sources import named_questions, write_questions
from hippoformer.data.questions import Question, read_questions
from hippoformer.errors import ConfigurationError, TextError
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
    for folder in ("en", "en-10k"):
        (tmp_path / "babi" / folder).mkdir(parents=True)
    (tmp_path / "babi" / "en" / "qa1_single-supporting-fact_test.txt").write_text(BABI)
    found = named_questions("babi-qa1", "test", tmp_path)
    assert [(q.question, q.answers, q.reasons) for q in found] == [
        ("Where is Mary?", ("bathroom",), ("Mary moved to the bathroom.",)),
        ("Where is Daniel?", ("hallway",), ("Daniel went back to the hallway.",)),
        ("Where is Sandra?", ("office",), ("Sandra travelled to the office.",)),
    ]
    assert found[1].context.splitlines()[-1] == "Daniel went back to the hallway."
    for name in ("babi-qa2", "babi-10k-qa1"):
        with pytest.raises(TextError, match=rf"{name} \(test\) is not available"):
            named_questions(name, "test", tmp_path)


def test_a_file_of_ones_own_and_local_copies(tmp_path: Path) -> None:
    odd = Question("mine:1", "One\nline,\u2028two “lines”.", "Où?", ("là", "ici"))
    write_questions(tmp_path / "mine.jsonl", [odd])
    with (tmp_path / "mine.jsonl").open("a") as file:
        file.write('\n{"context": "d", "question": "r", "answer": "x"}')
    found = named_questions(str(tmp_path / "mine.jsonl"))
    assert found == [odd, Question("mine:3", "d", "r", ("x",))]
    (tmp_path / "narrativeqa").mkdir()
    (tmp_path / "narrativeqa" / "validation.jsonl").write_text((tmp_path / "mine.jsonl").read_text())
    assert len(named_questions("narrativeqa", "validation", tmp_path, max_samples=1)) == 1
    for broken in ('{"context": "c"}', "no json", '{"context": "", "question": "q", "answer": "a"}', ""):
        (tmp_path / "broken.jsonl").write_text(broken)
        with pytest.raises(TextError, match=r"broken(\.jsonl|:1)"):
            read_questions(tmp_path / "broken.jsonl")
    with pytest.raises(ConfigurationError, match="at least 1"):
        read_questions(tmp_path / "mine.jsonl", max_samples=0)
    with pytest.raises(ConfigurationError, match=r"\.jsonl"):
        write_questions(tmp_path / "q.txt", [odd])


def test_data_sets_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    rows: list[dict[str, Any]] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: asked.append((names, options)) or rows)
    rows[:] = [{"input": "long text", "question": "Where?", "target": "here"}]
    assert named_questions("babilong-4k-qa2", data_dir=tmp_path)[0].answers == ("here",)
    assert asked.pop() == (("RMT-team/babilong",), {"name": "4k", "split": "qa2"})
    rows[:] = [
        {"document": {"text": "a book"}, "question": {"text": "Who?"}, "answers": [{"text": "he"}, {"text": "she"}]}
    ]
    assert named_questions("narrativeqa", "test", tmp_path)[0].answers == ("he", "she")
    rows[:] = [{"id": 1, "input": "Who?\n\nA text.\n\nMore.", "output": o} for o in ("x", "y")]
    (one,) = named_questions("scrolls-qasper", "validation", tmp_path)
    assert (one.question, one.context, one.answers) == ("Who?", "A text.\n\nMore.", ("x", "y"))
    assert asked.pop()[1]["data_files"]["validation"].startswith("zip://qasper/validation.jsonl::hf://")
    (summary,) = named_questions("scrolls-gov_report", "validation", tmp_path)
    assert summary.context.startswith("Who?") and summary.question == "What is a summary of this?"
    rows[:] = [{"id": 1, "input": "Who?\n\nA text.", "output": None}]
    with pytest.raises(TextError, match="has no answers"):
        named_questions("scrolls-qasper", "test", tmp_path)
    for name in ("squad", "scrolls-squad", "babilong-qa1"):
        with pytest.raises(ConfigurationError, match="scrolls-qasper"):
            named_questions(name, data_dir=tmp_path)

    def unreachable(*_: object, **__: object) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(TextError, match=r"narrativeqa is not available: no .*validation.jsonl.*no network"):
        named_questions("narrativeqa", data_dir=tmp_path)


QUESTIONS = [Question(f"q{i}", text(i, n), "Where is it?", ("here", "a b")) for i, n in enumerate((150, 90, 200))]


@torch.no_grad()
def test_answers_are_those_of_generate_up_to_the_line_s_end(tmp_path: Path) -> None:
    model, tokenizer = tiny_load(residual_readout=False)
    write_questions(tmp_path / "q.jsonl", QUESTIONS)
    options = questions.Options([str(tmp_path / "q.jsonl")], new_tokens=8, limit_tokens=180, reread_tokens=90)
    result = questions.run(model, tokenizer, [], options)
    told = result.details["questions"]
    for row, question in zip(told, QUESTIONS, strict=True):
        read = tokenizer(question.context[:180], return_tensors="pt").input_ids
        prompt = tokenizer(question.prompt, return_tensors="pt").input_ids
        made = model.generate(torch.cat((read, prompt), 1), max_new_tokens=8, do_sample=False, eos_token_id=None)
        cache, cue = model.new_cache(1), tokenizer(question.question, return_tensors="pt").input_ids
        model.score(read, past_key_values=cache)
        with model.memory_off():
            again = model.generate(
                prompt,
                past_key_values=reread(cache, cue, n_tokens=90),
                max_new_tokens=8,
                do_sample=False,
                eos_token_id=None,
            )
        for condition, ids in (("memory", made), ("reread", again)):
            line = tokenizer.decode(ids[0, -8:]).strip().partition("\n")[0].strip()
            assert row["said"][condition] == line
    best = [text_scores(row["said"]["off"], ["here", "a b"])["f1"] for row in told]
    figures = {(row.condition, row.metric): row.value for row in result.rows}
    assert figures["off", "f1"] == pytest.approx(sum(best) / 3)
    assert figures["reread - off", "f1"] == pytest.approx(figures["reread", "f1"] - figures["off", "f1"])
    for wrong in ({"questions": []}, {"questions": ["q"], "new_tokens": 0}, {"questions": ["q"], "reread_tokens": -1}):
        with pytest.raises(ConfigurationError, match="at least 1"):
            questions.run(model, tokenizer, [], questions.Options(**wrong))
