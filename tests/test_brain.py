"""Brain-like signs and their controls, worked out a second time on what the model itself says; word classes."""

from typing import Any

import numpy as np
import pytest
import torch

from evaluation.brain import run as brain
from evaluation.brain.words import token_classes, word_class
from evaluation.common.results import Result
from evaluation.salience.run import SURPRISE, TRAINED, UNTRAINED, gate
from hippoformer.errors import TextError
from hippoformer.training.credit import reconfigured
from tiny_texts import documents, tiny_load

TEXTS = documents(500, 360, 20)


@pytest.fixture(scope="module")
def loaded() -> tuple:
    model, tokenizer = tiny_load(residual_readout=False)
    own = model.hippocampus.salience_gate
    with torch.no_grad():
        own.smoothing.copy_(torch.tensor([0.8, 1.0]))
        own.local_out.weight.mul_(20.0)  # some tokens tagged, some not
        own.threshold.add_(2.0)
    return model, tokenizer


@pytest.fixture(scope="module")
def result(loaded: tuple) -> Result:
    return brain.run(*loaded, TEXTS, brain.Options())


def figure(result: Result, condition: str, metric: str) -> float:
    (row,) = [row for row in result.rows if (row.condition, row.metric) == (condition, metric)]
    assert row.value is not None
    return row.value


@torch.no_grad()
def read(loaded: tuple, number: int, kind: str = "own", **options: Any) -> tuple[np.ndarray, float, float]:
    """Salience, nats a token, and mean stored priority by the model's ordinary calls."""
    model, tokenizer = loaded
    with gate(model, kind), reconfigured(model.hippocampus, **options):
        ids, cache = tokenizer(TEXTS[number].text, return_tensors="pt").input_ids, model.new_cache(1)
        output = model(ids, labels=ids, past_key_values=cache, return_salience=True)
    stored = [episode.priority for episode in cache.episodes(0, stored_only=True)]
    return output.salience_scores[0, 1:].double().numpy(), float(output.loss), float(np.mean(stored))


def test_figures_are_those_of_the_model_itself(loaded: tuple, result: Result) -> None:
    assert result.details["documents"] == ["text 0", "text 1"], "what leaves nothing in the store is left out"
    plain = [read(loaded, number) for number in (0, 1)]
    expected = np.mean([brain.coherence(salience) for salience, _, _ in plain])
    assert figure(result, TRAINED, brain.COHERENCE) == pytest.approx(expected, abs=1e-4)
    alone = np.mean([brain.coherence(read(loaded, number, "unsmoothed")[0]) for number in (0, 1)])
    assert figure(result, TRAINED, brain.UNSMOOTHED) == pytest.approx(alone, abs=1e-4)
    assert alone < expected - 0.05
    assert figure(result, "shuffled", brain.COHERENCE) == pytest.approx(0.5, abs=0.1)
    kept = np.mean([priority for _, _, priority in plain])
    assert figure(result, TRAINED, brain.RETAINED) == pytest.approx(kept, rel=1e-3)
    random = np.mean([read(loaded, number, selection="random")[2] for number in (0, 1)])
    assert figure(result, TRAINED, brain.OVER_RANDOM) == pytest.approx(kept - random, abs=1e-2)
    untrained = np.mean([read(loaded, number, "untrained")[2] for number in (0, 1)])
    assert figure(result, UNTRAINED, brain.RETAINED) == pytest.approx(untrained, rel=1e-3)
    asleep = [read(loaded, number, max_replay_rounds=0)[1] for number in (0, 1)]
    saved = np.mean(asleep) - np.mean([nats for _, nats, _ in plain])
    assert figure(result, TRAINED, brain.REPLAY) == pytest.approx(saved, abs=1e-4)


def test_word_classes_are_counted_token_by_token(loaded: tuple, result: Result) -> None:
    tagged: dict[str, list[bool]] = {"content": [], "function": [], "other": []}
    for number in (0, 1):
        offsets = loaded[1](TEXTS[number].text, return_offsets_mapping=True)["offset_mapping"]
        labels = token_classes(TEXTS[number].text, offsets)[1:]
        for label, value in zip(labels, read(loaded, number)[0], strict=True):
            tagged[label].append(value > 0.5)
    counts = result.details["word_classes"][TRAINED]
    assert {name: of["tokens"] for name, of in counts.items()} == {name: len(of) for name, of in tagged.items()}
    shares = [np.mean(tagged[name]) for name in ("content", "function")]
    assert figure(result, TRAINED, brain.RATIO) == pytest.approx(shares[0] / shares[1], rel=0.05)
    assert len({figure(result, rule, "salience, mean") for rule in (TRAINED, UNTRAINED, SURPRISE)}) == 3
    assert figure(result, "original", brain.RATIO) == 2.11 and figure(result, "chance", brain.COHERENCE) == 0.5


def test_a_ratio_of_nothing_is_no_figure(loaded: tuple) -> None:
    threshold = loaded[0].hippocampus.salience_gate.threshold
    before = threshold.item()
    threshold.data.fill_(1e4)
    try:
        found = brain.run(*loaded, TEXTS[:1], brain.Options())
    finally:
        threshold.data.fill_(before)
    (ratio,) = [row.value for row in found.rows if (row.condition, row.metric) == (TRAINED, brain.RATIO)]
    assert ratio is None
    with pytest.raises(TextError, match="something is stored"):
        brain.run(*loaded, TEXTS[2:], brain.Options())


def test_a_token_has_the_class_of_the_word_that_it_shares_most_with() -> None:
    text = "The café, of 25 cats"
    offsets = [(0, 0), (0, 3), (3, 6), (6, 8), (8, 9), (9, 13), (9, 20), (13, 15)]
    found = ["", "function", "content", "content", "other", "function", "content", "other"]
    assert token_classes(text, offsets) == found


def test_coherence_and_word_classes() -> None:
    assert brain.coherence(np.arange(50.0)) == pytest.approx(1.0)
    assert brain.coherence(np.array([0.0, 1.0] * 20)) == pytest.approx(0.0) and brain.coherence(np.ones(5)) is None
    assert {word_class(word) for word in ("Of", "THEIR", "won't", "it's", "shouldn’t")} == {"function"}
    assert [word_class(word) for word in ("o'clock", "x9", "1984")] == ["content", "content", "other"]
