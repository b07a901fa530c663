"""Stories hidden in books: order and length, what each condition reads, the report, the commands."""

import io
import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import hippoformer
from hippoformer import HippoFormer, cli
from hippoformer.data import Document
from hippoformer.data.babilong import hidden_questions, hide, sentences, write_questions
from hippoformer.data.questions import Question, read_questions
from hippoformer.errors import ConfigurationError, TextError
from hippoformer.evaluation import babilong
from hippoformer.evaluation.babilong import BabilongReport, Told, evaluate_babilong, places_of
from hippoformer.model import base_models
from hippoformer.model.rereading import reread
from tiny_texts import byte_tokenizer, tiny_load, tiny_tokenizer

PLACES = ("bathroom", "hallway", "garden", "office", "kitchen")
BOOKS = [
    Document(name, " ".join(f"The {name} had day {i},\nand it rained." for i in range(200)), "made up")
    for name in ("captain", "widow")
]
TOLD = [sentences(book.text) for book in BOOKS]
STORY = Question("babi-qa1:3", "Mary went to the garden.\nJohn slept.\nMary left.", "Where is Mary?", ("garden",))


def babi(folder: Path, name: str = "en", stories: int = 12) -> Path:
    """A folder with questions like those of bAbI's first task, two a story."""
    lines = []
    for story in range(stories):
        one, other = PLACES[story % 5], PLACES[(story + 2) % 5]
        lines += [f"1 Mary moved to the {one}.", f"2 Story {story} is told.", f"3 Where is Mary? \t{one}\t1"]
        lines += [f"4 Mary went to the {other}.", f"5 Where is Mary? \t{other}\t4"]
    for split in ("train", "test"):
        file = folder / "babi" / name / f"qa1_single-supporting-fact_{split}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines))
    return folder


def words(text: str) -> int:
    return len(text.split())


# ---------------------------------------------------------------- stories in books


def test_a_book_falls_into_sentences() -> None:
    book = 'It  was\nlate. "Go!" She left.  Mr. Smith said: “Why?” Nobody knew; e.g. he.\n'
    told = ["It was late.", '"Go!"', "She left.", "Mr. Smith said: “Why?”", "Nobody knew; e.g. he."]
    assert sentences(book) == told
    assert sentences(" \n") == []


@pytest.mark.parametrize("tokens", [0, 5, 60, 5_000])
def test_the_story_keeps_its_order_and_the_book_its_own(tokens: int) -> None:
    background, story = sentences(BOOKS[0].text), STORY.context.splitlines()
    hidden = hide(STORY, background, tokens, words, random.Random(1))
    assert words(hidden.context) >= max(tokens, words(STORY.context))
    assert words(hidden.context) <= tokens + words(STORY.context) + 20, "no longer than it has to be"
    assert (hidden.question, hidden.answers) == (STORY.question, STORY.answers)
    told = sentences(hidden.context)
    assert [sentence for sentence in told if sentence in story] == story
    others = [background.index(sentence) for sentence in told if sentence not in story]
    assert others == [(others[0] + i) % len(background) for i in range(len(others))] if others else tokens < 20
    if tokens == 0:
        assert hidden.context == "Mary went to the garden. John slept. Mary left."


def test_places_are_drawn_all_over_the_text() -> None:
    background = sentences(BOOKS[0].text)
    draws = [hide(STORY, background, 500, words, random.Random(seed)).context for seed in range(30)]
    first = [context.index("Mary went") / len(context) for context in draws]
    last = [context.index("Mary left") / len(context) for context in draws]
    assert min(first) < 0.1 and max(first) > 0.35 and min(last) < 0.65 and max(last) > 0.9
    assert len({context.split(",")[0] for context in draws}) > 5, "and the book begins anywhere"


def test_a_count_that_is_not_a_sum_is_met_too() -> None:
    """Tokens of sentences one by one may be more than of all together."""

    def count(text: str) -> int:
        return words(text) // 2 + 3

    hidden = hide(STORY, sentences(BOOKS[0].text), 300, count, random.Random(0))
    assert 300 <= count(hidden.context) < 320


def test_a_seed_is_a_draw_and_lengths_share_their_stories(tmp_path: Path) -> None:
    def drawn(tokens: int, samples: int = 8, seed: int = 0, name: str = "qa1") -> list[Question]:
        return hidden_questions(name, "test", TOLD, tokens, samples, words, seed, babi(tmp_path))

    assert drawn(100) == drawn(100)
    assert {q.context for q in drawn(100)}.isdisjoint(q.context for q in drawn(100, seed=1))
    assert drawn(100, 3) == drawn(100)[:3], "fewer are the first of more"
    numbers = [[q.name.rpartition(":")[2] for q in drawn(tokens)] for tokens in (0, 100, 2_000)]
    assert numbers[0] == numbers[1] == numbers[2] and len(set(numbers[0])) == 8
    assert [drawn(n, 1)[0].name.rpartition(":")[0] for n in (0, 100, 2_000)] == [
        "babilong-0k-qa1",
        "babilong-100-qa1",
        "babilong-2k-qa1",
    ]
    both = {("captain" in q.context, "widow" in q.context) for q in drawn(100, 24)}
    assert both == {(True, False), (False, True)}, "each in one book, in different books"
    for question in drawn(100, 24):
        original = read_questions("babi-qa1", "test", tmp_path)
        (same,) = [q for q in original if q.name.rpartition(":")[2] == question.name.rpartition(":")[2]]
        assert (question.question, question.answers) == (same.question, same.answers)
        assert all(line in question.context for line in same.context.splitlines())


def test_what_cannot_be_hidden_is_refused(tmp_path: Path) -> None:
    babi(tmp_path)

    def drawn(task: str = "qa1", tokens: int = 50, samples: int = 2, books: Any = BOOKS) -> None:
        hidden_questions(task, "test", [sentences(book.text) for book in books], tokens, samples, words, 0, tmp_path)

    with pytest.raises(TextError, match=r"babi-qa9 \(test\) is not at hand"):
        drawn("qa9")
    for wrong in ({"tokens": -1}, {"samples": 0}, {"samples": 25}):
        with pytest.raises(ConfigurationError, match=r"expected|ask for fewer"):
            drawn(**wrong)
    with pytest.raises(TextError, match="no book"):
        drawn(books=[])
    with pytest.raises(TextError, match="no sentence"):
        drawn(books=[Document("blank", " ", "made up")])
    drawn(tokens=0, books=[])


def test_the_larger_set_is_named(tmp_path: Path) -> None:
    babi(tmp_path, "en")
    with pytest.raises(TextError, match="en-10k"):
        read_questions("babi-10k-qa1", "train", tmp_path)
    babi(tmp_path, "en-10k", stories=40)
    assert len(read_questions("babi-qa1", "train", tmp_path)) == 24
    assert len(read_questions("babi-10k-qa1", "train", tmp_path)) == 80


def test_questions_come_back_from_their_file(tmp_path: Path) -> None:
    odd = Question("mine:1", "One\nline,\u2028two “lines”.", "Où?", ("là", "ici"))
    write_questions(tmp_path / "q.jsonl", [odd, STORY])
    back = read_questions(str(tmp_path / "q.jsonl"))
    assert [(q.context, q.question, q.answers) for q in back] == [
        (q.context, q.question, q.answers) for q in (odd, STORY)
    ]
    with pytest.raises(TextError, match="cannot be written"):
        write_questions(tmp_path / "nowhere" / "q.jsonl", [odd])
    with pytest.raises(ConfigurationError, match=r"\.jsonl"):
        write_questions(tmp_path / "q.txt", [odd])


# ---------------------------------------------------------------- asked


# One word of it is among the first of the first book.
ASKED = f"Where is {max(BOOKS[0].text[:100].split(), key=len)}?"


def loud(buffer_size: int = 256) -> HippoFormer:
    """A model whose memory is heard, and whose base never hears it."""
    model, _ = tiny_load(residual_readout=False, buffer_size=buffer_size)
    with torch.no_grad():
        model.hippocampus.recall.null_proj.bias.zero_()
        model.hippocampus.recall.log_scale.fill_(2.5)
        model.hippocampus.fusion.gate_out.bias.fill_(3.0)
    return model


def evaluated(folder: Path, **options: Any) -> BabilongReport:
    arguments: dict[str, Any] = {"tasks": ("qa1",), "lengths": (0, 300), "cases": 3, "windows": (64,), "batch_size": 2}
    return evaluate_babilong(loud(), tiny_tokenizer(), BOOKS, data_dir=babi(folder), **(arguments | options))


def given(monkeypatch: pytest.MonkeyPatch, contexts: list[str]) -> None:
    """Lets the evaluation ask about these contexts."""
    questions = [Question(f"q{i}", context, ASKED, ("here",)) for i, context in enumerate(contexts)]
    monkeypatch.setattr(babilong, "hidden_questions", lambda *_: questions)


def by_name(report: BabilongReport) -> list[Told]:
    return sorted(report.asked, key=lambda told: told.name)


def test_every_condition_is_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contexts = [BOOKS[0].text[:410], BOOKS[1].text[50:300], "Short. " * 3]
    given(monkeypatch, contexts)
    report = evaluated(tmp_path, lengths=(0,), windows=(64, 800))
    model, tokenizer = loud(), tiny_tokenizer()
    tail = tokenizer(f"\n\nQuestion: {ASKED}\nAnswer: here").input_ids
    for told, context in zip(by_name(report), contexts, strict=True):
        ids = torch.tensor([tokenizer(context).input_ids + tail])
        assert told.tokens_read == len(context)
        with torch.no_grad():
            memory = model.score(ids)[0, -5:].sum()
            with model.memory_off():
                off = model.score(ids)[0, -5:].sum()
            log_probs = model.base(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[-5:].sum()
            cache, cue = model.new_cache(1), torch.tensor([tokenizer(ASKED).input_ids])
            model.score(ids[:, : -len(tail)], past_key_values=cache)
            with model.memory_off():
                again = model.score(ids[:, -len(tail) :], past_key_values=reread(cache, cue))[0, -5:].sum()
        expected = {"memory": memory, "off": off, "reread": again, "window 800": log_probs}
        for condition, value in expected.items():
            assert told.nats[condition] == pytest.approx(-float(value), rel=1e-4), condition
    long = by_name(report)[0].nats
    assert len({round(nats, 3) for nats in long.values()}) == 5, "and they are not the same"


def test_a_window_reads_nothing_from_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = BOOKS[0].text[500:564]
    given(monkeypatch, ["A first beginning. " * 20 + shared, "Quite another one! " * 20 + shared, shared])
    one, other, alone = (told.nats for told in by_name(evaluated(tmp_path, lengths=(0,), batch_size=1)))
    assert one["window 64"] == other["window 64"] == alone["window 64"]
    assert abs(one["memory"] - other["memory"]) > 1e-3 and abs(one["off"] - other["off"]) > 1e-6
    given(monkeypatch, [shared, shared[:-1] + "?"])
    one, other = (told.nats for told in by_name(evaluated(tmp_path, lengths=(0,), batch_size=1)))
    assert one["window 64"] != other["window 64"]


def test_a_window_begins_with_the_start_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = byte_tokenizer(["<end>"], start="<end>", bos_token="<end>", eos_token="<end>", pad_token="<end>")
    given(monkeypatch, [BOOKS[0].text[:500], BOOKS[0].text[500 - 63 : 500], BOOKS[0].text[500 - 64 : 500]])
    report = evaluate_babilong(loud(), started, BOOKS, ("qa1",), (0,), 3, (64,), data_dir=babi(tmp_path), batch_size=1)
    long, full, one_more = by_name(report)
    assert (long.tokens_read, full.tokens_read, one_more.tokens_read) == (501, 64, 65)
    assert long.nats["window 64"] == full.nats["window 64"] == one_more.nats["window 64"]


def test_rows_side_by_side_answer_as_they_do_alone(tmp_path: Path) -> None:
    together, alone = by_name(evaluated(tmp_path, batch_size=5)), by_name(evaluated(tmp_path, batch_size=1))
    assert len(together) == 6
    for one, other in zip(together, alone, strict=True):
        assert (one.name, one.tokens_read, one.right) == (other.name, other.tokens_read, other.right)
        assert one.nats == pytest.approx(other.nats, rel=1e-4)


def test_what_the_answer_follows_from_is_found_where_it_was_said_last() -> None:
    text = [7, 1, 2, 3, 9, 5, 2, 3, 9, 1, 2, 3]
    assert places_of([[1, 2, 3]], text) == [9, 10, 11]
    assert places_of([[2, 3, 9], [7, 1]], text) == [0, 1, 6, 7, 8]
    assert places_of([[4, 7, 1, 2]], text) == [0, 1, 2], "its first token is missing where the text begins with it"
    assert places_of([], text) == []
    with pytest.raises(TextError, match="does not hold"):
        places_of([[4, 5, 2]], text)


def test_how_much_of_what_is_needed_is_stored(tmp_path: Path) -> None:
    """All of it where the window holds the text; no more than a small store where it does not."""
    model, tokenizer = loud(buffer_size=8), tiny_tokenizer()
    report = evaluate_babilong(model, tokenizer, BOOKS, ("qa1",), (0, 600), 3, data_dir=babi(tmp_path), batch_size=2)
    short, long = (report.cells()[place]["stored"] for place in (0, 3))
    assert {told.stored for told in report.asked if told.tokens_read < 40} <= {1.0}
    assert 0.0 <= long < 0.5 < short <= 1.0


def test_how_much_of_what_is_needed_is_read_again(tmp_path: Path) -> None:
    """All of it where there is room for the whole text, and no more than what is stored where little is."""
    model, tokenizer = loud(buffer_size=1024), tiny_tokenizer()
    asked = partial(evaluate_babilong, model, tokenizer, BOOKS, ("qa1",), (600,), 3, data_dir=babi(tmp_path))
    assert {told.reread for told in asked(reread_tokens=700).asked} == {1.0}
    assert {told.reread for told in asked(reread_tokens=0).asked} == {None}
    assert asked(reread_tokens=3).cells()[0]["reread"] < 0.5
    shown = io.StringIO()
    Console(file=shown, width=200).print(asked(reread_tokens=700).to_table())
    assert "brought back" in shown.getvalue() and "100%" in shown.getvalue()


def test_right_is_every_token_of_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(model: Any, cache: Any, posed: Any) -> Any:
        wide = model.config.window == 64
        return [(one.answer if model.episodes_on else one.answer[: 5 if wide else -1], 1.5) for one in posed]

    monkeypatch.setattr(babilong, "answers", answers)
    report = evaluated(tmp_path, cases={300: 4, 0: 2})
    assert all(told.right["memory"] and not told.right["off"] for told in report.asked)
    assert [(c["length"], c["condition"], c["cases"]) for c in report.cells()] == [
        (length, condition, cases)
        for length, cases in ((0, 2), (300, 4))
        for condition in ("memory", "off", "reread", "window 64")
    ]
    memory, off = report.cells()[4:6]
    assert (memory["right"], off["right"], memory["nats"]) == (1.0, 0.0, 1.5)
    assert memory["high"] == 1.0 and memory["low"] == pytest.approx(0.5101, abs=1e-4), "Wilson's, of 4 of 4"
    assert memory["tokens_read"] >= 300
    assert report.to_table().row_count == 2


def test_a_reply_is_right_by_its_last_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def decoded(model: Any, cache: Any, prompts: Any, new_tokens: int) -> Any:
        wide, said = model.config.window == 64, tokenizer.decode
        end = "" if wide else " garden." if model.episodes_on else " garden it is"
        assert new_tokens == 40 and said(prompts[0]).startswith("\n\nQuestion: Where is Mary?")
        return [tokenizer(f" Because it was so.{end}\nhallway").input_ids]

    tokenizer = tiny_tokenizer()
    questions = [Question("q0", "Mary is there.", "Where is Mary?", ("garden",))]
    monkeypatch.setattr(babilong, "hidden_questions", lambda *_: questions)
    monkeypatch.setattr(babilong, "decoded", decoded)
    (told,) = evaluated(tmp_path, lengths=(0,), cases=1, reply_tokens=40, reread_tokens=0).asked
    assert told.right == {"memory": True, "off": False, "window 64": False}
    assert told.said["memory"] == "Because it was so. garden." and told.said["off"].endswith("it is")


def test_what_was_decoded_is_reported(tmp_path: Path) -> None:
    for told in evaluated(tmp_path, lengths=(0,), reply_tokens=6).asked:
        assert set(told.said) == set(told.right) == set(told.nats)
        assert all(len(line) <= 6 and "\n" not in line for line in told.said.values())


def test_what_cannot_be_asked_is_refused(tmp_path: Path) -> None:
    for wrong in (
        {"tasks": ()},
        {"tasks": ("qa1", "qa1")},
        {"lengths": ()},
        {"lengths": (0, 0)},
        {"lengths": (-1,)},
        {"cases": 0},
        {"cases": (3, 3, 3)},
        {"cases": {0: 3}},
        {"windows": (0,)},
        {"windows": (5_000,)},  # beyond the base's positions
        {"batch_size": 0},
        {"reply_tokens": -1},
        {"reread_tokens": -1},
    ):
        with pytest.raises(ConfigurationError):
            evaluated(tmp_path, **wrong)
    with pytest.raises(TextError, match="babi-qa2"):
        evaluated(tmp_path, tasks=("qa2",))
    model, tokenizer = tiny_load(residual_readout=True, marginal_weight=0.0, memory_layer=1)
    with pytest.raises(ConfigurationError, match="residual at layer 1"):
        evaluate_babilong(model, tokenizer, BOOKS, ("qa1",), (0,), 1, data_dir=babi(tmp_path))


# ---------------------------------------------------------------- the command line


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(hippoformer, "load", lambda name, **options: tiny_load(name, residual_readout=False, **options))
    monkeypatch.setattr(base_models, "load_tokenizer", lambda name: tiny_tokenizer())
    (tmp_path / "book.txt").write_text(BOOKS[0].text)
    return babi(tmp_path)


def test_eval_babilong_writes_its_report(folder: Path) -> None:
    output = folder / "babilong.json"
    fixed = ["eval", "babilong", "--model", "any", "--text", str(folder / "book.txt"), "--data-dir", str(folder)]
    fixed += [
        "--tasks",
        "qa1",
        "--lengths",
        "0,200",
        "--windows",
        "64",
        "--reread-tokens",
        "99",
        "--output",
        str(output),
    ]
    for cases, counts in (("2", [2, 2]), ("3,1", [3, 1])):
        result = CliRunner().invoke(cli.app, [*fixed, "--cases", cases])
        assert result.exit_code == 0, result.output
        assert "window 64" in result.output and "qa1" in result.output
        written = json.loads(output.read_text())
        assert written["format"] == "hippoformer.babilong/1" and written["settings"]["cases"] == counts
        assert [cell["cases"] for cell in written["cells"]] == [n for n in counts for _ in range(4)]
    assert CliRunner().invoke(cli.app, [*fixed, "--cases", "1,2,3"]).exit_code == 2


def test_hide_stories_writes_questions(folder: Path) -> None:
    def written(*more: str) -> list[Question]:
        arguments = ["hide-stories", "--text", str(folder / "book.txt"), "--data-dir", str(folder), "--samples", "6"]
        output = folder / "train.jsonl"
        result = CliRunner().invoke(cli.app, [*arguments, "--lengths", "0,300", "--output", str(output), *more])
        assert result.exit_code == 0, result.output
        return read_questions(str(output))

    found = written()
    assert len(found) == 12 and written() == found and written("--seed", "1") != found
    long = [len(question.context) >= 300 for question in found]
    assert sum(long) == 6 and long != sorted(long), "shuffled"
    for plain, reasoned in zip(found, written("--reasons"), strict=True):
        told, _, answer = reasoned.answers[0].rpartition(" ")
        assert answer == plain.answers[0] and told in plain.context and told.endswith(f"the {answer}.")
    asked = ["eval", "questions", "--model", "any", "--questions", str(folder / "train.jsonl"), "--new-tokens", "2"]
    assert CliRunner().invoke(cli.app, [*asked, "--samples", "2"]).exit_code == 0
