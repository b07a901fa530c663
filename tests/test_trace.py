"""A trace says what happened: every column against a computation of its own, one token a call."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import hippoformer
from hippoformer import HippoFormer
from hippoformer.cli import app
from hippoformer.data import Document
from hippoformer.errors import TextError
from hippoformer.evaluation.trace import TraceReport, evaluate_trace
from tiny_texts import byte_tokenizer, text, tiny_load, tiny_tokenizer

TOKENS = 180


@pytest.fixture(scope="module")
def model() -> HippoFormer:
    """Recall is loud: most tokens are recalled, from the window and from the store."""
    model, _ = tiny_load(buffer_size=40, window=24, segment_len=16)
    with torch.no_grad():
        model.hippocampus.recall.null_proj.bias.zero_()
        model.hippocampus.recall.log_scale.fill_(2.5)
        model.hippocampus.salience_gate.local_out.weight.mul_(20.0)
    return model


@pytest.fixture(scope="module")
def document() -> Document:
    passage = text(1, 60)
    return Document("again", passage + text(2, 60) + passage, "made up")


@pytest.fixture(scope="module")
def trace(model: HippoFormer, document: Document) -> TraceReport:
    return evaluate_trace(model, tiny_tokenizer(), document)


@torch.no_grad()
def test_log_p_is_that_of_the_logits(model: HippoFormer, document: Document, trace: TraceReport) -> None:
    ids = torch.tensor([tiny_tokenizer()(document.text).input_ids])
    for column, off in ((trace.tokens.log_p, False), (trace.tokens.log_p_off, True)):
        if off:
            with model.memory_off():
                logits = model(ids).logits
        else:
            logits = model(ids).logits
        expected = torch.log_softmax(logits, -1)[0, :-1].gather(-1, ids[0, 1:, None]).squeeze(-1)
        assert column[0] is None
        assert torch.allclose(torch.tensor(column[1:]), expected, atol=1e-4)
    assert trace.tokens.log_p != trace.tokens.log_p_off


@torch.no_grad()
def test_recall_is_what_the_last_query_voted(model: HippoFormer, document: Document, trace: TraceReport) -> None:
    """The vote that the cache carries, looked at before each token is read by itself."""
    ids = tiny_tokenizer()(document.text).input_ids
    cache, tokens = model.new_cache(1), trace.tokens
    places = {"window": 0, "store": 0}
    for t, token in enumerate(ids):
        vote, episodes = cache.memory.vote, cache.memory.episodes
        weight, slot = vote.weights[0].max(-1)
        assert tokens.weight[t] == pytest.approx(float(weight), abs=1e-4)
        assert tokens.mixture[t] == pytest.approx(float(vote.mixture), abs=1e-4)
        assert tokens.nothing[t] == pytest.approx(float(vote.nothing), abs=1e-4)
        assert tokens.hit[t] == pytest.approx(float(vote.weights[0][vote.token[0] == token].sum()), abs=1e-4)
        if weight == 0:
            assert tokens.episode[t] is None and not tokens.stored[t]
        else:
            episode = tokens.episode[t]
            assert episode is not None and ids[episode] == vote.token[0, slot]
            if t % 16:  # a segment end has moved the slots
                assert episode == episodes.position[0, slot]
                assert tokens.stored[t] == (int(slot) < model.config.buffer_size)
            assert t - 24 - 16 <= episode < t or tokens.stored[t]
            places["store" if tokens.stored[t] else "window"] += 1
        output = model(torch.tensor([[token]]), past_key_values=cache, return_salience=True)
        assert tokens.salience[t] == pytest.approx(float(output.salience_scores), abs=1e-4)
        assert tokens.tagged[t] == (output.salience_scores > 0.5).item()
    assert min(places.values()) > 20 and 0 < sum(tokens.tagged) < TOKENS
    assert trace.store["position"] == [e.position for e in cache.episodes(stored_only=True)]
    assert trace.store["credit"] == pytest.approx([e.credit for e in cache.episodes(stored_only=True)], abs=1e-4)


@torch.no_grad()
def test_segments_are_those_of_the_cache(model: HippoFormer, document: Document, trace: TraceReport) -> None:
    ids = torch.tensor([tiny_tokenizer()(document.text).input_ids])
    cache = model.new_cache(1)
    assert [s.end for s in trace.segments] == list(range(16, TOKENS + 1, 16))
    before: set[int] = set()
    for part, segment in zip(ids.split(16, dim=1), trace.segments, strict=False):
        stats = model(part, past_key_values=cache, return_memory_stats=True).memory_stats
        stored = {e.position for e in cache.episodes(stored_only=True)}
        assert segment.stored == len(stored) == stats["stored"][0]
        assert segment.written == len(stored - before)
        assert (segment.reactivated, segment.merged) == (stats["reactivated"], stats["merged"])
        assert segment.mean_age == pytest.approx(stats["mean_age"], abs=1e-4)
        assert segment.mean_credit == pytest.approx(stats["mean_credit"], abs=1e-4)
        before = stored
    # The window of 24 is passed after two segments; token 0 completes no episode.
    assert [s.left_window for s in trace.segments[:4]] == [0, 7, 16, 16]
    assert sum(s.reactivated for s in trace.segments) > 0


def test_the_texts_of_the_tokens_are_the_text(document: Document, trace: TraceReport, model: HippoFormer) -> None:
    assert "".join(trace.tokens.text) == document.text and len(trace.tokens.text) == TOKENS
    wide = Document("wide", "naïve café 日本 " * 3, "made up")
    read = evaluate_trace(model, tiny_tokenizer(), wide, limit_tokens=20)
    assert len(read.tokens.text) == 20 and wide.text.startswith("".join(read.tokens.text))
    started = byte_tokenizer(["<s>"], start="<s>", bos_token="<s>")
    assert evaluate_trace(model, started, wide, limit_tokens=4).tokens.text == ["", "n", "a", "ï"]


def test_numbers_are_rounded_and_the_file_is_small(trace: TraceReport, tmp_path: Path) -> None:
    trace.save(tmp_path / "trace.json")
    written = (tmp_path / "trace.json").read_text(encoding="utf-8")
    assert len(written.splitlines()) == 1 and ", " not in written.partition('"tokens":{"text"')[0]
    read = json.loads(written)
    assert read["format"] == "hippoformer.trace/1"
    assert all(len(column) == TOKENS for column in read["tokens"].values())
    for name in ("salience", "log_p", "weight"):
        whole = getattr(trace.tokens, name)
        assert read["tokens"][name] == [None if v is None else round(v, 4) for v in whole]


def test_a_text_of_one_token_is_refused(model: HippoFormer) -> None:
    with pytest.raises(TextError, match="less than two tokens"):
        evaluate_trace(model, tiny_tokenizer(), Document("short", "a", "made up"))


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def load(name: str, **options: Any) -> Any:
        asked.update(options)
        return tiny_load(name, **options)

    monkeypatch.setattr(hippoformer, "load", load)
    articles, output = tmp_path / "articles.txt", tmp_path / "trace.json"
    articles.write_text("= One =\n\n" + text(1, 50) + "\n= Two =\n\n" + text(2, 80), encoding="utf-8")
    arguments = ["eval", "trace", "--model", "m", "--text", str(articles), "--limit-tokens", "60", "--window", "32"]
    result = CliRunner().invoke(app, [*arguments, "--title", "Two", "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert asked == {"window": 32}
    read = json.loads(output.read_text(encoding="utf-8"))
    assert read["document"]["title"] == "Two" and len(read["tokens"]["text"]) == 60
    assert "Where recall helped most in Two" in result.stdout
    result = CliRunner().invoke(app, [*arguments, "--title", "Three"])
    assert result.exit_code == 2 and "its first ones are One, Two" in result.stderr
