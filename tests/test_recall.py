"""Facts hidden in streams and asked for: on a tiny model, and on one that knows every answer."""

import random
from typing import Any

import numpy as np
import pytest
import torch

from evaluation.recall import run as recall
from evaluation.recall.needles import KINDS, draw_needle, haystack
from evaluation.recall_variants import run as recall_variants
from hippoformer.data import Document
from hippoformer.errors import ConfigurationError, TextError
from hippoformer.model.rereading import reread
from tiny_texts import documents, tiny_load, tiny_tokenizer

FAST: dict[str, Any] = {"distances": [600, 1200], "facts": 1}


@pytest.fixture(scope="module")
def answers() -> list[recall.Answer]:
    model, tokenizer = tiny_load(buffer_size=4096, max_replay_rounds=0, decay_rate=1.0)
    return recall.answers(model, tokenizer, documents(2000, 900), recall.Options(**FAST))


@pytest.mark.parametrize("kind", KINDS)
def test_a_needle_holds_its_answer_once_behind_the_words_of_its_question(kind: str) -> None:
    tokenizer = tiny_tokenizer()
    needle = draw_needle(kind, tokenizer, random.Random(1))
    assert needle.statement[needle.answer_offset : needle.answer_offset + len(needle.answer)] == needle.answer
    statement, question, answer = (tokenizer.decode(ids) for ids in (needle.statement, needle.question, needle.answer))
    assert statement.count(answer) == 1 and answer not in question
    prompt = question.strip().split("? ")[-1]
    assert (f"{prompt}{answer}" in statement) == (kind != "reworded")
    if kind == "moved":
        former = tokenizer.decode(needle.earlier)
        assert prompt in former and answer not in former
    assert draw_needle(kind, tokenizer, random.Random(1)) == needle != draw_needle(kind, tokenizer, random.Random(2))


def test_the_stream_holds_the_facts_where_they_are_said_to_be() -> None:
    tokenizer = tiny_tokenizer()
    ids, needles = haystack(tokenizer, documents(700, 300), 1, 2, KINDS[:3], 500, 1000, seed=3)
    ends = [0, *(needle.end for needle in needles)]
    assert [needle.start - end for needle, end in zip(needles, ends, strict=False)] == [500] * 6
    for needle in needles:
        assert ids[needle.answer_positions.start : needle.answer_positions.stop] == needle.answer
        assert ids[needle.start : needle.end] == needle.statement
    assert len(ids) >= needles[-1].end + 1000 + 512
    assert tokenizer.decode(ids[:300]) == documents(700, 300)[1].text[:300]
    ids, needles = haystack(tokenizer, documents(700), 0, 2, ("moved",), 400, 100, seed=3)
    for needle in needles:
        first = needle.start - 400 - len(needle.earlier)
        assert ids[first : first + len(needle.earlier)] == list(needle.earlier)


def test_every_fact_is_asked_for_once_at_every_distance(answers: list[recall.Answer]) -> None:
    asked = {(a.row, a.position, a.asked_distance, a.condition) for a in answers}
    assert len(asked) == len(answers) == 2 * 3 * 2 * 2  # streams, kinds, distances, conditions
    assert all(a.asked_distance <= a.distance < a.asked_distance + 512 for a in answers)
    assert all(a.kept == a.answer_tokens for a in answers), "there was room for everything"
    with_memory, off = ([a.nats for a in answers if a.condition == condition] for condition in ("memory", "off"))
    assert all(abs(one - other) > 1e-3 for one, other in zip(with_memory, off, strict=True))


def test_rows_are_those_of_the_answers(answers: list[recall.Answer]) -> None:
    found = {(row.condition, row.metric): row for row in recall.rows(answers)}
    assert len(found) == 6 * (3 + 2)  # cells; what is still stored is said once
    home = [a for a in answers if (a.condition, a.kind, a.asked_distance) == ("off", "home", 1200)]
    row = found["off", "home, 1,200 tokens ago: nats"]
    assert row.value == pytest.approx(np.mean([a.nats for a in home])) and row.n == 2
    right = found["memory", "home, 600 tokens ago: right, %"]
    assert right.low is not None and right.high is not None and right.low <= right.value <= right.high
    assert found["memory", "home, 600 tokens ago: answer stored, %"].value == 100.0


@torch.no_grad()
def test_answers_are_those_of_generate_and_the_stream_stays_as_it_was() -> None:
    model, tokenizer = tiny_load()
    draw = random.Random(5)
    needles = [draw_needle(kind, tokenizer, draw) for kind in KINDS[:3]]
    ids = tokenizer(documents(150)[0].text, return_tensors="pt").input_ids.repeat(3, 1)
    cache = model.new_cache(3)
    model.score(ids, past_key_values=cache)
    before = {name: tensor.clone() for name, tensor in cache.tensors().items()}
    found = recall.ask(model, cache.copy(), needles)
    assert all(torch.equal(tensor, before[name]) for name, tensor in cache.tensors().items())
    for needle, (right, nats) in zip(needles, found, strict=True):
        prompt, n = torch.cat((ids[:1], torch.tensor([needle.question])), dim=1), len(needle.answer)
        said = model.generate(prompt, max_new_tokens=n, min_new_tokens=n, do_sample=False)[0, prompt.shape[1] :]
        if 0 not in said.tolist():  # generate is forbidden to stop, we are not
            assert right == (said.tolist() == needle.answer)
        whole = torch.cat((prompt, torch.tensor([needle.answer])), dim=1)
        assert nats == pytest.approx(-float(model.score(whole)[0, -n:].sum()), abs=1e-3)


@torch.no_grad()
def test_after_rereading_the_base_answers_in_a_copy() -> None:
    model, tokenizer = tiny_load()
    options = recall.Options(distances=[400], facts=1, kinds=["home"], spacing=60, streams=1, reread_tokens=90)
    (found,) = (a for a in recall.answers(model, tokenizer, documents(700), options) if a.condition == "reread")
    ids, (needle,) = haystack(tokenizer, documents(700), 0, 1, ["home"], 60, 400, seed=0)
    cache = model.new_cache(1)
    model.score(torch.tensor([ids[: needle.end + found.distance]]), past_key_values=cache)
    with model.memory_off():
        copy = reread(cache, torch.tensor([needle.question]), n_tokens=90)
        ((right, nats),) = recall.ask(model, copy, [needle])
    assert (found.right, found.nats) == (right, pytest.approx(nats, abs=1e-3))


def test_bad_requests_are_refused() -> None:
    wrong: tuple[dict[str, Any], ...] = ({"kinds": ["riddle"]}, {"facts": 0}, {"distances": []}, {"distances": [0]})
    for options in (*wrong, {"streams": 0}, {"spacing": 0}, {"reread_tokens": -1}):
        with pytest.raises(ConfigurationError, match="expected kinds"):
            recall.Options(**(FAST | options))
    with pytest.raises(TextError, match="no text"):
        recall.run(*tiny_load(), [Document("empty", " \n", "here")], recall.Options(**FAST))


def test_variants_are_compared_on_the_same_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """One variant that knows every answer, and one that knows none."""
    monkeypatch.setattr(
        recall, "ask", lambda of, cache, needles: [(of.config.selection == "fifo", 0.0) for _ in needles]
    )
    options = recall_variants.Options(variant=["none", "all:selection=fifo"], **FAST)
    result = recall_variants.run(*tiny_load(), documents(1500, 900), options)
    found = {(row.condition, row.metric): row for row in result.rows}
    for distance in ("600", "1,200"):
        assert found["none", f"right, {distance} tokens ago, %"].value == 0.0
        assert found["all", f"against none, {distance} tokens ago, points"].value == 100.0
    assert found["all", "p against none"].value < 0.01  # type: ignore[operator]
