"""Gains by position and by distance, and the memory over a stream, each against a slow second computation."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from hippoformer.errors import CheckpointError, ConfigurationError, TextError
from hippoformer.evaluation import evaluate_perplexity
from hippoformer.evaluation.dynamics import evaluate_dynamics
from hippoformer.evaluation.long_range import NEW, evaluate_long_range, last_distance
from hippoformer.evaluation.token_scores import TokenScores, score_tokens
from tiny_texts import SEGMENT, WINDOW, documents, tiny_load

TEXTS = documents(700, 420, 1, 260)


@pytest.fixture(scope="module")
def loaded() -> tuple:
    return tiny_load(residual_readout=False)


@pytest.fixture(scope="module")
def scores(loaded: tuple) -> TokenScores:
    return score_tokens(*loaded, TEXTS)


def test_distance_is_that_to_the_last_time() -> None:
    ids = torch.randint(0, 5, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    for n in (1, 2, 3):
        expected = []
        for t in range(len(ids)):
            gram = ids[t - n + 1 : t + 1]
            earlier = [s for s in range(n - 1, t) if ids[s - n + 1 : s + 1] == gram] if t >= n - 1 else []
            expected.append(t - earlier[-1] if earlier else NEW)
        assert last_distance(ids, n).tolist() == expected


def test_cells_are_sums_over_tokens(loaded: tuple, scores: TokenScores) -> None:
    report = evaluate_long_range(*loaded, TEXTS, scores=scores, resamples=50)
    assert report.documents == ["text 0", "text 1", "text 3"] and report.tokens == 699 + 419 + 259
    assert report.window == WINDOW
    tokens = [
        (place, t, {c: -float(scores.log_probs[c][place][t - 1]) for c in scores.conditions})
        for place in (0, 1, 3)
        for t in range(1, len(scores.input_ids[place]))
    ]
    for cell in report.by_position:
        inside = [nats for _, t, nats in tokens if cell.low <= t < cell.high]
        assert cell.tokens == len(inside)
        for condition in ("memory", "off", "window-only"):
            assert cell.nats[condition] == pytest.approx(np.mean([nats[condition] for nats in inside]), rel=1e-9)
            assert cell.perplexity[condition] == pytest.approx(math.exp(cell.nats[condition]))
        expected = np.mean([nats["off"] - nats["memory"] for nats in inside])
        assert cell.gain["memory"].estimate == pytest.approx(expected, abs=1e-9)
    for n, cells in report.by_distance.items():
        assert sum(cell.tokens for cell in cells) == report.tokens
        assert cells[0].label == "new" and cells[0].low is None
        distance = {place: last_distance(scores.input_ids[place].tolist(), int(n)) for place in (0, 1, 3)}
        for cell in cells:
            low, high = (0, 1) if cell.low is None else (cell.low, cell.high)
            assert cell.tokens == sum(low <= distance[place][t] < high for place, t, _ in tokens)
    beyond = [cell for cell in report.by_distance["3"] if cell.low is not None and cell.low > WINDOW]
    assert beyond and beyond[0].low == WINDOW + 1


def test_a_quarter_is_a_quarter(loaded: tuple, scores: TokenScores) -> None:
    report = evaluate_long_range(*loaded, TEXTS[:1], scores=score_tokens(*loaded, TEXTS[:1], limit_tokens=401))
    nats = -scores.log_probs["off"][0][:400].double().numpy()
    early, late = np.exp(nats[:100].mean()), np.exp(nats[300:].mean())
    assert report.early_late["off"] == pytest.approx(
        {"early": early, "late": late, "early_minus_late": early - late}, rel=1e-4
    )
    gain = report.early_late_gain["memory"]
    difference = gain["late"].estimate - gain["early"].estimate
    assert gain["late_minus_early"].estimate == pytest.approx(difference)


def test_perplexity_hands_over_the_same_scores(loaded: tuple, scores: TokenScores, tmp_path: Path) -> None:
    collected = TokenScores()
    conditions = ("memory", "off", "window-only")
    report = evaluate_perplexity(*loaded, TEXTS, conditions, resamples=10, on_scores=collected.collect)
    collected.save(tmp_path / "new" / "scores.safetensors")
    again = TokenScores.load(tmp_path / "new" / "scores.safetensors")
    assert again.titles == scores.titles and again.conditions == conditions and again.places == [0, 1, 3]
    for condition in conditions:
        for place, document in zip((0, 1, 3), report.documents, strict=True):
            assert torch.equal(again.log_probs[condition][place], collected.log_probs[condition][place])
            total = -float(again.log_probs[condition][place].double().sum())
            assert document.nll[condition] == pytest.approx(total, rel=1e-6)
            assert torch.allclose(again.log_probs[condition][place], scores.log_probs[condition][place], atol=1e-4)
    (tmp_path / "damaged").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="no token scores"):
        TokenScores.load(tmp_path / "damaged")


def test_a_gain_needs_something_to_compare(loaded: tuple) -> None:
    for conditions in (("memory",), ("memory", "other-document")):
        with pytest.raises(ConfigurationError):
            evaluate_long_range(*loaded, TEXTS, conditions)
    with pytest.raises(TextError, match="two tokens"):
        evaluate_long_range(*loaded, documents(1))


@torch.no_grad()
def test_the_memory_is_looked_at_after_every_segment(loaded: tuple) -> None:
    model, tokenizer = loaded
    report = evaluate_dynamics(model, tokenizer, TEXTS, limit_tokens=330)
    assert report.stream == {"title": "text 0", "source": "made up", "tokens_read": 330}
    assert [segment.end for segment in report.segments] == list(range(SEGMENT, 330, SEGMENT))
    ids = tokenizer(TEXTS[0].text, return_tensors="pt").input_ids[:, :330]
    cache, before = model.new_cache(1), set()
    for segment in report.segments:
        output = model(
            ids[:, segment.end - SEGMENT : segment.end],
            past_key_values=cache,
            return_memory_stats=True,
        )
        stats, stored = output.memory_stats, {e.position for e in cache.episodes(0, stored_only=True)}
        assert (segment.stored, segment.written) == (len(stored), len(stored - before))
        assert (segment.reactivated, segment.merged, segment.forgotten) == (
            stats["reactivated"],
            stats["merged"],
            stats["forgotten"],
        )
        assert segment.mean_priority == pytest.approx(stats["mean_priority"], rel=1e-4)
        assert segment.tagged_share == pytest.approx(output.salience_stats["tagged_share"])
        before = stored
    assert {int(e["position"]) for e in report.retained} == before and any(s.stored for s in report.segments)
    alone = score_tokens(model, tokenizer, TEXTS[:1], limit_tokens=SEGMENT)
    for condition in ("memory", "off"):
        expected = -float(alone.log_probs[condition][0].double().mean())
        assert report.segments[0].nats[condition] == pytest.approx(expected, rel=1e-4)
    with pytest.raises(TextError, match="name a longer text"):
        evaluate_dynamics(model, tokenizer, documents(SEGMENT - 1))
