"""Stories hidden in books: order and length, what each condition reads, what is written to train on."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluation.babilong import run as babilong
from evaluation.babilong.stories import hidden_questions, hide, sentences
from evaluation.common.results import Result
from evaluation.questions.asking import ask
from evaluation.questions.sources import named_questions
from hippoformer import HippoFormer
from hippoformer.data import Document
from hippoformer.data.questions import Question, read_questions
from hippoformer.errors import ConfigurationError, TextError
from hippoformer.model.rereading import reread
from tiny_texts import tiny_load, tiny_tokenizer

PLACES = ("bathroom", "hallway", "garden", "office", "kitchen")
BOOKS = [
    Document(name, " ".join(f"The {name} had day {i},\nand it rained." for i in range(200)), "made up")
    for name in ("captain", "widow")
]
TOLD = [sentences(book.text) for book in BOOKS]
STORY = Question("babi-qa1:3", "Mary went to the garden.\nJohn slept.\nMary left.", "Where is Mary?", ("garden",))


@pytest.fixture(scope="module")
def babi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with questions like those of bAbI's first task, two a story."""
    folder, lines = tmp_path_factory.mktemp("data"), []
    for story in range(12):
        one, other = PLACES[story % 5], PLACES[(story + 2) % 5]
        lines += [f"1 Mary moved to the {one}.", f"2 Story {story} is told.", f"3 Where is Mary? \t{one}\t1"]
        lines += [f"4 Mary went to the {other}.", f"5 Where is Mary? \t{other}\t4"]
    for split in ("train", "test"):
        file = folder / "babi" / "en" / f"qa1_single-supporting-fact_{split}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines))
    return folder


def words(text: str) -> int:
    return len(text.split())


def test_a_book_falls_into_sentences() -> None:
    book = 'It  was\nlate. "Go!" She left.  Mr. Smith said: “Why?” Nobody knew; e.g. he.\n'
    assert sentences(book) == ["It was late.", '"Go!"', "She left.", "Mr. Smith said: “Why?”", "Nobody knew; e.g. he."]


@pytest.mark.parametrize("tokens", [0, 5, 60, 5_000])
def test_the_story_keeps_its_order_and_the_book_its_own(tokens: int) -> None:
    story = STORY.context.splitlines()
    hidden = hide(STORY, TOLD[0], tokens, words, random.Random(1))
    assert max(tokens, words(STORY.context)) <= words(hidden.context) <= tokens + words(STORY.context) + 20
    told = sentences(hidden.context)
    assert [sentence for sentence in told if sentence in story] == story
    others = [TOLD[0].index(sentence) for sentence in told if sentence not in story]
    assert others == [(others[0] + i) % len(TOLD[0]) for i in range(len(others))] if others else tokens < 20


def test_a_seed_is_a_draw_and_lengths_share_their_stories(babi: Path) -> None:
    def drawn(tokens: int, samples: int = 8, seed: int = 0) -> list[Question]:
        return hidden_questions("qa1", "test", TOLD, tokens, samples, words, seed, babi)

    assert drawn(100) == drawn(100) and drawn(100, 3) == drawn(100)[:3]
    assert {q.context for q in drawn(100)}.isdisjoint(q.context for q in drawn(100, seed=1))
    numbers = [[q.name.rpartition(":")[2] for q in drawn(tokens)] for tokens in (0, 100, 2_000)]
    assert numbers[0] == numbers[1] == numbers[2] and len(set(numbers[0])) == 8
    names = [drawn(n, 1)[0].name.rpartition(":")[0] for n in (0, 100, 2_000)]
    assert names == ["babilong-0k-qa1", "babilong-100-qa1", "babilong-2k-qa1"]
    originals = {q.name.rpartition(":")[2]: q for q in named_questions("babi-qa1", "test", babi)}
    for question in drawn(100, 24):
        same = originals[question.name.rpartition(":")[2]]
        assert (question.answers, question.reasons) == (same.answers, same.reasons)
        assert all(line in question.context for line in same.context.splitlines())
    for wrong in ({"tokens": -1}, {"tokens": 0, "samples": 0}, {"tokens": 0, "samples": 25}):
        with pytest.raises(ConfigurationError, match="24 questions"):
            drawn(**wrong)
    with pytest.raises(TextError, match="without a sentence"):
        hidden_questions("qa1", "test", [[]], 50, 2, words, 0, babi)


def loud() -> HippoFormer:
    """A model whose memory is heard."""
    model, _ = tiny_load(residual_readout=False, buffer_size=256)
    with torch.no_grad():
        model.hippocampus.recall.null_proj.bias.zero_()
        model.hippocampus.recall.log_scale.fill_(2.5)
        model.hippocampus.fusion.gate_out.bias.fill_(3.0)
    return model


@torch.no_grad()
def test_every_condition_is_what_it_says() -> None:
    contexts = [BOOKS[0].text[:410], BOOKS[1].text[50:300], "Short. " * 3]
    asked = f"Where is {max(BOOKS[0].text[:100].split(), key=len)}?"  # one of its words is in the text
    questions = [Question(f"q{i}", context, asked, ("here",)) for i, context in enumerate(contexts)]
    model, tokenizer = loud(), tiny_tokenizer()
    replies = ask(model, tokenizer, questions, 3, batch_size=2, reread_tokens=256, windows=(64, 800))
    tail = tokenizer(f"\n\nQuestion: {asked}\nAnswer: here").input_ids
    for reply, context in zip(replies, contexts, strict=True):
        ids = torch.tensor([tokenizer(context).input_ids + tail])
        memory = model.score(ids)[0, -5:].sum()
        cache, cue = model.new_cache(1), torch.tensor([tokenizer(asked).input_ids])
        model.score(ids[:, : -len(tail)], past_key_values=cache)
        with model.memory_off():
            off = model.score(ids)[0, -5:].sum()
            again = model.score(ids[:, -len(tail) :], past_key_values=reread(cache, cue))[0, -5:].sum()
        held = torch.cat((ids[:, : -len(tail)][:, -64:], ids[:, -len(tail) :]), 1)
        alone = [
            model.base(of).logits.log_softmax(-1)[0, :-1].gather(-1, of[0, 1:, None])[-5:].sum() for of in (held, ids)
        ]
        expected = {"memory": memory, "off": off, "reread": again, "window 64": alone[0], "window 800": alone[1]}
        assert {name: one.nats for name, one in reply.items()} == pytest.approx(
            {name: -float(value) for name, value in expected.items()}, rel=1e-4
        )
    assert len({round(one.nats, 3) for one in replies[0].values()}) == 5, "and they are not the same"


def evaluated(babi: Path, **options: Any) -> Result:
    arguments = {"tasks": ["qa1"], "lengths": [0, 300], "cases": [3], "windows": [64], "batch_size": 2}
    return babilong.run(loud(), tiny_tokenizer(), BOOKS, babilong.Options(**(arguments | options), babi_dir=babi))


def test_right_is_every_token_at_once_or_the_last_word_of_a_reply(babi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replies(model: Any, tokenizer: Any, questions: Any, *_: Any) -> list[dict[str, Any]]:
        said = [("He went to the garden.", tokenizer(f" {q.answers[0]}").input_ids) for q in questions]
        return [
            {"memory": babilong.Reply(ids, line, 1.5), "off": babilong.Reply(ids[1:], "", 2.0)} for line, ids in said
        ]

    monkeypatch.setattr(babilong, "ask", replies)
    right = {row.metric: row for row in evaluated(babi, lengths=[0], cases=[4]).rows}
    assert right["memory, right, %"].value == 100.0 and right["off, right, %"].value == 0.0
    assert right["memory, right, %"].low == pytest.approx(51.01, abs=0.01), "Wilson's, of 4 of 4"
    (told,) = [
        row for row in evaluated(babi, lengths=[0], cases=[24], reply_tokens=9).rows if row.metric == "memory, right, %"
    ]
    assert 0 < told.value < 100, "the garden is the answer to some"


def test_questions_to_train_on_are_written(babi: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="expected tasks and lengths"):
        evaluated(babi, tasks=["qa1", "qa1"])
    evaluated(babi, write=tmp_path / "q.jsonl", reasons=True, babi_split="train", lengths=[0, 30], cases=[4])
    found = read_questions(tmp_path / "q.jsonl")
    assert len(found) == 8 and len({question.context for question in found}) == 8
    assert all(q.answers[0].startswith("Mary ") and q.answers[0].split()[-1] in PLACES for q in found)
