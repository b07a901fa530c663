"""Continuations: what `generate` would write, compared with the truth text by text."""

import numpy as np
import pytest
import torch
from scipy import stats

from hippoformer.errors import ConfigurationError, TextError
from hippoformer.evaluation.generation import continued
from hippoformer.evaluation.quality import QualityReport, evaluate_quality
from hippoformer.evaluation.text_metrics import corpus_bleu, text_scores
from tiny_texts import documents, tiny_load

TEXTS = documents(260, 90, 400)
CONTEXT, NEW = 120, 12


@pytest.fixture(scope="module")
def loaded() -> tuple:
    return tiny_load(residual_readout=False)


@pytest.fixture(scope="module")
def report(loaded: tuple) -> QualityReport:
    return evaluate_quality(*loaded, TEXTS, 3, CONTEXT, NEW, batch_size=2, resamples=20)


def test_openings_come_first_then_later_pieces(report: QualityReport) -> None:
    assert [(s["title"], s["position"]) for s in report.samples] == [("text 0", 120), ("text 2", 120), ("text 2", 252)]
    first = report.samples[0]
    assert first["truth"] == TEXTS[0].text[CONTEXT : CONTEXT + NEW]
    assert TEXTS[0].text[:CONTEXT].endswith(first["prompt"])
    assert report.samples[2]["truth"] == TEXTS[2].text[252 : 252 + NEW]


def test_what_is_written_is_what_generate_writes(loaded: tuple, report: QualityReport) -> None:
    model, tokenizer = loaded
    ids = tokenizer(TEXTS[0].text, return_tensors="pt").input_ids[:, :CONTEXT]
    for condition in ("memory", "off"):
        with torch.no_grad():
            if condition == "off":
                with model.memory_off():
                    made = model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
            else:
                made = model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
        assert report.samples[0][condition] == tokenizer.decode(made[0, CONTEXT:])


def test_rows_of_other_lengths_do_not_meet(loaded: tuple) -> None:
    model, tokenizer = loaded
    rows = [tokenizer(text.text).input_ids[:n] for text, n in ((TEXTS[0], 100), (TEXTS[1], 37))]
    together, speed = continued(model, rows, 5)
    assert together == [continued(model, [row], 5)[0][0] for row in rows]
    assert speed.seconds_to_first_token > 0 and speed.tokens_per_second == pytest.approx(2 / speed.seconds_per_token)


def test_figures_follow_from_the_samples(report: QualityReport) -> None:
    truth = [sample["truth"] for sample in report.samples]
    for condition in ("memory", "off"):
        texts = [sample[condition] for sample in report.samples]
        found, bleu = report.conditions[condition], corpus_bleu(texts, truth)
        assert {metric: found[metric].estimate for metric in bleu} == pytest.approx(bleu)
        scores = [text_scores(*pair) for pair in zip(texts, truth, strict=True)]
        for metric in ("rouge_l", "f1", "distinct_2"):
            assert found[metric].estimate == pytest.approx(np.mean([s[metric] for s in scores]))
    for metric, found in report.differences.items():
        both = [report.conditions[condition][metric].estimate for condition in ("memory", "off")]
        assert found.difference.estimate == pytest.approx(both[0] - both[1])
        if found.test.p is not None:
            ours, theirs = ([text_scores(s[c], s["truth"])[metric] for s in report.samples] for c in ("memory", "off"))
            assert found.test.p == pytest.approx(stats.wilcoxon(ours, theirs).pvalue)
    assert report.to_dict()["speed"]["memory"]["tokens_per_second"] > 0
    assert report.to_table().row_count == 11


def test_nothing_to_continue(loaded: tuple) -> None:
    with pytest.raises(TextError, match="132 tokens"):
        evaluate_quality(*loaded, documents(100), 2, CONTEXT, NEW)
    with pytest.raises(ConfigurationError, match="at least 1"):
        evaluate_quality(*loaded, TEXTS, 2, CONTEXT, 0)
