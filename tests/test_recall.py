"""Facts hidden in streams and asked for: the protocol on a tiny model, and on one that knows every answer."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hippoformer import cli
from hippoformer.data import Document
from hippoformer.errors import ConfigurationError, TextError
from hippoformer.evaluation import examination, recall
from hippoformer.evaluation.needles import ALL_KINDS, KINDS, draw_needle, haystack
from hippoformer.evaluation.recall import evaluate_recall
from hippoformer.model.rereading import reread
from tiny_texts import documents, tiny_load, tiny_tokenizer

FAST = {"distances": (600, 1200), "facts": 1}


@pytest.fixture(scope="module")
def report() -> recall.RecallReport:
    model, tokenizer = tiny_load(buffer_size=4096, merge_threshold=2.0, priority_threshold=0.0)
    return evaluate_recall(model, tokenizer, documents(2000, 900), **FAST)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_needle_holds_its_answer_once_behind_the_words_of_its_question(kind: str) -> None:
    tokenizer = tiny_tokenizer()
    needle = draw_needle(kind, tokenizer, random.Random(1))
    told = needle.statement[needle.answer_offset : needle.answer_offset + len(needle.answer)]
    assert told == needle.answer
    statement, question, answer = (tokenizer.decode(ids) for ids in (needle.statement, needle.question, needle.answer))
    assert statement.count(answer) == 1 and answer not in question
    prompt = question.strip().split("? ")[-1]
    assert (f"{prompt}{answer}" in statement) == (kind != "reworded")
    assert draw_needle(kind, tokenizer, random.Random(1)) == needle
    assert draw_needle(kind, tokenizer, random.Random(2)) != needle


def test_every_fact_is_asked_for_once_at_every_distance(report: recall.RecallReport) -> None:
    assert len(report.asked) == 2 * len(KINDS) * 2  # streams, kinds, distances
    assert len({(a.haystack, a.position, a.asked_distance) for a in report.asked}) == len(report.asked)
    assert all(a.asked_distance <= a.distance < a.asked_distance + 512 for a in report.asked)
    assert [(c["kind"], c["distance"], c["cases"]) for c in report.cells()] == [
        (kind, distance, 2) for kind in KINDS for distance in FAST["distances"]
    ]


def test_the_stream_holds_the_facts_where_they_are_said_to_be() -> None:
    tokenizer = tiny_tokenizer()
    ids, planted = haystack(tokenizer, documents(700, 300), 1, 2, KINDS, 500, 1000, seed=3)
    assert len(planted) == 2 * len(KINDS)
    ends = [0, *(fact.end for fact in planted)]
    assert [fact.start - end for fact, end in zip(planted, ends, strict=False)] == [500] * len(planted)
    for fact in planted:
        assert ids[fact.answer.start : fact.answer.stop] == fact.needle.answer
        assert ids[fact.start : fact.end] == fact.needle.statement
    assert len(ids) >= planted[-1].end + 1000 + 512
    assert tokenizer.decode(ids[:300]) == documents(700, 300)[1].text[:300]


def test_who_moved_is_told_of_twice_and_asked_for_the_last() -> None:
    tokenizer = tiny_tokenizer()
    ids, planted = haystack(tokenizer, documents(700, 300), 0, 3, ("moved",), 400, 1000, seed=3)
    for fact in planted:
        needle, first = fact.needle, fact.start - 400 - len(fact.needle.earlier)
        assert ids[first : first + len(needle.earlier)] == list(needle.earlier)
        former, now = tokenizer.decode(needle.earlier), tokenizer.decode(needle.statement)
        told = tokenizer.decode(needle.question).strip().split("? ")[-1]
        assert told in former and told in now and former != now
        assert tokenizer.decode(needle.answer) not in former


def test_a_reworded_home_is_asked_for_in_other_words() -> None:
    tokenizer, draw = tiny_tokenizer(), random.Random(4)
    needle = draw_needle("reworded", tokenizer, draw)
    told, asked = tokenizer.decode(needle.statement), tokenizer.decode(needle.question)
    name = told.split()[0]
    assert told == f"\n\n{name} lives in{tokenizer.decode(needle.answer)}.\n\n"
    assert asked.count(name) == 2 and "live" not in asked and asked.endswith(" is in")
    assert needle.statement[needle.answer_offset :][: len(needle.answer)] == needle.answer


@torch.no_grad()
def test_what_is_right_after_rereading_is_the_base_s_answer_in_a_copy() -> None:
    model, tokenizer = tiny_load()
    ids, planted = haystack(tokenizer, documents(700), 0, 2, ("home", "reworded"), 60, 400, seed=3)
    cache = model.new_cache(1)
    model.score(torch.tensor([ids]), past_key_values=cache)
    before = {name: tensor.clone() for name, tensor in cache.tensors().items()}
    asked = examination.ask(model, cache, [(9, fact) for fact in planted], len(ids), reread_tokens=90)
    assert all(torch.equal(tensor, before[name]) for name, tensor in cache.tensors().items())
    for fact, found in zip(planted, asked, strict=True):
        cue = torch.tensor([fact.needle.question])
        with model.memory_off():
            reminded = reread(cache, cue, n_tokens=90)
            ((said, nats),) = examination.answers(model, reminded, [fact.needle])
        assert found.right_reread == (said == fact.needle.answer)
        assert found.nats_reread == pytest.approx(nats, abs=1e-3)
        assert found.nats_reread != found.nats_off, "the copy has read something"


def test_rereading_is_in_the_report_where_it_was_asked_for(report: recall.RecallReport) -> None:
    model, tokenizer = tiny_load()
    assert not any("right_reread" in cell for cell in report.cells())
    assert not any("reread" in str(column.header) for column in report.to_table().columns)
    again = evaluate_recall(model, tokenizer, documents(2000), **(FAST | {"reread_tokens": 64}))
    assert all(0 <= cell["low_reread"] <= cell["right_reread"] <= cell["high_reread"] for cell in again.cells())
    assert again.to_table().columns[-1].header == "right, reread"
    assert again.settings["reread_tokens"] == 64
    with pytest.raises(ConfigurationError, match="reread_tokens=-1"):
        evaluate_recall(model, tokenizer, documents(2000), **(FAST | {"reread_tokens": -1}))


def test_an_answer_counts_when_every_token_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that knows the answers is right everywhere; with one token off, nowhere. Off is judged by itself."""
    model, tokenizer = tiny_load()

    def knows(of: Any, cache: Any, needles: Any) -> list[tuple[list[int], float]]:
        wrong = 0 if of.episodes_on else 1
        return [([*n.answer[:-1], n.answer[-1] + wrong], 1.0 + wrong) for n in needles]

    monkeypatch.setattr(examination, "answers", knows)
    cells = evaluate_recall(model, tokenizer, documents(2000), **FAST).cells()
    assert {(c["right"], c["right_off"], c["nats"], c["nats_off"]) for c in cells} == {(1.0, 0.0, 1.0, 2.0)}
    assert all(0 < c["low"] < c["high"] == 1.0 for c in cells)


@torch.no_grad()
def test_answers_are_those_of_generate_and_the_stream_stays_as_it_was() -> None:
    model, tokenizer = tiny_load()
    draw = random.Random(5)
    needles = [draw_needle(kind, tokenizer, draw) for kind in KINDS]
    ids = tokenizer(documents(150)[0].text, return_tensors="pt").input_ids.repeat(3, 1)
    cache = model.new_cache(3)
    model.score(ids, past_key_values=cache)
    before = {name: tensor.clone() for name, tensor in cache.tensors().items()}
    answers = examination.answers(model, cache.copy(), needles)
    assert all(torch.equal(tensor, before[name]) for name, tensor in cache.tensors().items())
    for needle, (said, nats) in zip(needles, answers, strict=True):
        prompt = torch.cat((ids[:1], torch.tensor([needle.question])), dim=1)
        n = len(needle.answer)
        expected = model.generate(prompt, max_new_tokens=n, min_new_tokens=n, do_sample=False)[0, prompt.shape[1] :]
        if 0 not in expected.tolist():  # generate is forbidden to stop, we are not
            assert said == expected.tolist()
        whole = torch.cat((prompt, torch.tensor([needle.answer])), dim=1)
        assert nats == pytest.approx(-float(model.score(whole)[0, -n:].sum()), abs=1e-3)


def test_memory_off_is_reported_beside_it(report: recall.RecallReport) -> None:
    assert all(a.nats > 0 and a.nats_off > 0 for a in report.asked)
    assert any(abs(a.nats - a.nats_off) > 1e-3 for a in report.asked)
    assert all(a.kept == a.answer_tokens for a in report.asked), "there was room for everything"


def test_bad_requests_are_refused() -> None:
    model, tokenizer = tiny_load()
    for options in (
        {"kinds": ["riddle"]},
        {"facts": 0},
        {"distances": []},
        {"distances": [0]},
        {"haystacks": 0},
        {"spacing": 0},
    ):
        with pytest.raises(ConfigurationError, match="expected kinds"):
            evaluate_recall(model, tokenizer, documents(500), **(FAST | options))
    with pytest.raises(TextError, match="no text"):
        evaluate_recall(model, tokenizer, [Document("empty", " \n", "here")], **FAST)


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hippoformer

    monkeypatch.setattr(hippoformer, "load", tiny_load)
    (tmp_path / "text.txt").write_text(documents(1500)[0].text)
    output = tmp_path / "recall.json"
    arguments = ["eval", "recall", "--model", "tiny", "--text", str(tmp_path / "text.txt"), "--facts", "1"]
    arguments += ["--spacing", "700"]
    result = CliRunner().invoke(cli.app, [*arguments, "--distances", "600,", "--output", str(output)])
    assert result.exit_code == 0, result.output
    written = json.loads(output.read_text())
    assert written["settings"]["spacing"] == 700 and min(case["position"] for case in written["asked"]) > 700
    assert "one of three" in result.output and output.is_file()
    assert CliRunner().invoke(cli.app, [*arguments, "--distances", "many"]).exit_code == 2
