"""Signs of a brain and their controls, worked out a second time on what the model itself says."""

from pathlib import Path

import numpy as np
import pytest
import torch

from hippoformer.errors import TextError
from hippoformer.evaluation.brain import SURPRISE, TRAINED, UNTRAINED, BrainReport, coherence, evaluate_brain
from hippoformer.evaluation.views import unsmoothed_gate, untrained_gate
from hippoformer.evaluation.word_classes import token_classes
from hippoformer.training.credit import reconfigured
from tiny_texts import documents, tiny_load

TEXTS = documents(500, 360, 20)


@pytest.fixture(scope="module")
def loaded() -> tuple:
    model, tokenizer = tiny_load(residual_readout=False)
    gate = model.hippocampus.salience_gate
    with torch.no_grad():
        gate.smoothing.copy_(torch.tensor([0.8, 1.0]))
        gate.local_out.weight.mul_(20.0)  # some tokens tagged, some not
        gate.threshold.copy_(torch.tensor(gate.threshold.item() + 2.0))
    return model, tokenizer


@pytest.fixture(scope="module")
def report(loaded: tuple, tmp_path_factory: pytest.TempPathFactory) -> BrainReport:
    return evaluate_brain(*loaded, TEXTS, tmp_path_factory.mktemp("states"), tagger_name="word list", resamples=100)


@torch.no_grad()
def read(model, tokenizer, text: str, **options):  # type: ignore[no-untyped-def]
    """Salience, nats a token, and mean stored priority by the model's ordinary calls."""
    with reconfigured(model.hippocampus, **options):
        ids = tokenizer(text, return_tensors="pt").input_ids
        cache = model.new_cache(1)
        output = model(ids, labels=ids, past_key_values=cache, return_salience=True)
    stored = [episode.priority for episode in cache.episodes(0, stored_only=True)]
    return output.salience_scores[0, 1:].double().numpy(), float(output.loss), float(np.mean(stored))


def test_figures_are_those_of_the_model_itself(loaded: tuple, report: BrainReport) -> None:
    model, tokenizer = loaded
    assert report.documents == ["text 0", "text 1"]
    reads = [read(model, tokenizer, text.text) for text in TEXTS[:2]]
    values = report["temporal_coherence"].values
    assert values[TRAINED].estimate == pytest.approx(np.mean([coherence(s) for s, _, _ in reads]), abs=1e-4)
    plain = unsmoothed_gate(model)
    alone = [coherence(read(plain, tokenizer, text.text)[0]) for text in TEXTS[:2]]
    assert report["temporal_coherence_unsmoothed"].values[TRAINED].estimate == pytest.approx(np.mean(alone), abs=1e-4)
    assert values[TRAINED].estimate > report["temporal_coherence_unsmoothed"].values[TRAINED].estimate + 0.05
    assert abs(values["shuffled"].estimate - 0.5) < 0.1

    priority = report["retained_priority"].values
    assert priority[TRAINED].estimate == pytest.approx(np.mean([p for _, _, p in reads]), rel=1e-3)
    random = [read(model, tokenizer, text.text, selection="random")[2] for text in TEXTS[:2]]
    assert priority[f"{TRAINED}, random retention"].estimate == pytest.approx(np.mean(random), rel=1e-3)
    over = report["retained_over_random"].values[TRAINED]
    assert over.estimate == pytest.approx(np.mean([p for _, _, p in reads]) - np.mean(random), abs=1e-2)

    asleep = [read(model, tokenizer, text.text, max_replay_rounds=0)[1] for text in TEXTS[:2]]
    saved = np.mean(asleep) - np.mean([nats for _, nats, _ in reads])
    assert report["replay_benefit"].values[TRAINED].estimate == pytest.approx(saved, abs=1e-4)
    untrained = [read(untrained_gate(model, 0), tokenizer, text.text)[2] for text in TEXTS[:2]]
    assert priority[UNTRAINED].estimate == pytest.approx(np.mean(untrained), rel=1e-3)


def test_where_replay_is_off_its_worth_is_that_of_ten_rounds(tmp_path: Path) -> None:
    model, tokenizer = tiny_load(residual_readout=False, max_replay_rounds=0)
    report = evaluate_brain(model, tokenizer, TEXTS[:1], tmp_path, tagger_name="word list", resamples=20)
    awake, asleep = (read(model, tokenizer, TEXTS[0].text, max_replay_rounds=rounds)[1] for rounds in (10, 0))
    saved = report["replay_benefit"].values[TRAINED].estimate
    assert abs(saved) > 1e-5 and saved == pytest.approx(asleep - awake, rel=0.1, abs=1e-6)
    assert f"{TRAINED}, replay" in report["retained_priority"].values


def test_word_classes_are_counted_token_by_token(loaded: tuple, report: BrainReport) -> None:
    model, tokenizer = loaded
    tagged: dict[str, list[bool]] = {"content": [], "function": [], "other": []}
    for text in TEXTS[:2]:
        offsets = tokenizer(text.text, return_offsets_mapping=True)["offset_mapping"]
        salience, _, _ = read(model, tokenizer, text.text)
        for label, value in zip(token_classes(text.text, offsets)[1:], salience, strict=True):
            tagged[label].append(value > 0.5)
    for label, of in tagged.items():
        shown = report.word_classes[TRAINED][label]
        assert shown["tokens"] == len(of) and shown["tagged_share"] == pytest.approx(np.mean(of), abs=0.02)
    ratio = report["content_function_ratio"].values[TRAINED].estimate
    classes = report.word_classes[TRAINED]
    assert ratio == pytest.approx(classes["content"]["tagged_share"] / classes["function"]["tagged_share"])
    for rule in (TRAINED, UNTRAINED, SURPRISE):
        assert sum(report.distribution[rule]["counts"]) == report.tokens
    assert len({report.distribution[rule]["mean"] for rule in (TRAINED, UNTRAINED, SURPRISE)}) == 3


def test_targets_controls_and_json(report: BrainReport) -> None:
    targets = {measure.name: measure.target for measure in report.measures}
    assert (targets["content_function_ratio"], targets["retained_priority"]) == (2.11, 4.9)
    assert targets["temporal_coherence"] == targets["temporal_coherence_unsmoothed"] == 0.58
    for measure in report.measures:
        assert next(iter(measure.values)) == TRAINED and UNTRAINED in measure.values
    assert report.to_dict()["measures"][0]["chance"] == 1.0
    assert "untrained gate" in [column.header for column in report.to_table().columns]
    with pytest.raises(KeyError):
        report["no such measure"]


def test_coherence_of_known_series() -> None:
    assert coherence(np.arange(50.0)) == pytest.approx(1.0)
    assert coherence(np.array([0.0, 1.0] * 20)) == pytest.approx(0.0)
    assert coherence(np.ones(5)) is None


def test_a_ratio_of_nothing_is_no_figure(loaded: tuple, tmp_path: Path) -> None:
    model, tokenizer = loaded
    threshold = model.hippocampus.salience_gate.threshold
    before = threshold.item()
    threshold.data.fill_(1e4)
    try:
        report = evaluate_brain(model, tokenizer, TEXTS[:1], tmp_path, tagger_name="word list", resamples=10)
    finally:
        threshold.data.fill_(before)
    assert report["content_function_ratio"].values[TRAINED] is None
    assert report.to_dict()["measures"][0]["values"][TRAINED] is None
    with pytest.raises(TextError, match="something is stored"):
        evaluate_brain(model, tokenizer, TEXTS[2:], tmp_path)
