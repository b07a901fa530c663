"""Continuations: what `generate` would write, compared with the truth text by text; text metrics by their formulas."""

import math

import numpy as np
import pytest
import torch

from evaluation.common.results import Result
from evaluation.quality import run as quality
from evaluation.quality.metrics import TEXT_METRICS, corpus_bleu, distinct, text_scores, token_f1
from hippoformer.errors import ConfigurationError, InputError, TextError
from tiny_texts import documents, tiny_load

TEXTS = documents(260, 90, 400)
CONTEXT, NEW = 120, 12


@pytest.fixture(scope="module")
def loaded() -> tuple:
    return tiny_load(residual_readout=False)


@pytest.fixture(scope="module")
def result(loaded: tuple) -> Result:
    return quality.run(*loaded, TEXTS, quality.Options(3, CONTEXT, NEW, batch_size=2))


def test_openings_come_first_then_later_pieces(result: Result) -> None:
    samples = result.details["samples"]
    assert [(s["title"], s["position"]) for s in samples] == [("text 0", 120), ("text 2", 120), ("text 2", 252)]
    assert samples[0]["truth"] == TEXTS[0].text[CONTEXT : CONTEXT + NEW]
    assert TEXTS[0].text[:CONTEXT].endswith(samples[0]["prompt"])


@torch.no_grad()
def test_what_is_written_is_what_generate_writes(loaded: tuple, result: Result) -> None:
    model, tokenizer = loaded
    ids, options = tokenizer(TEXTS[0].text, return_tensors="pt").input_ids[:, :CONTEXT], {"do_sample": False}
    made = {"memory": model.generate(ids, max_new_tokens=NEW, eos_token_id=None, **options)}
    with model.memory_off():
        made["off"] = model.generate(ids, max_new_tokens=NEW, eos_token_id=None, **options)
    for condition, of in made.items():
        assert result.details["samples"][0][condition] == tokenizer.decode(of[0, CONTEXT:])


def test_figures_follow_from_the_samples(result: Result) -> None:
    samples = result.details["samples"]
    rows = {(row.condition, row.metric): row.value for row in result.rows}
    truth = [sample["truth"] for sample in samples]
    for condition in ("memory", "off"):
        texts = [sample[condition] for sample in samples]
        assert rows[condition, "bleu_2"] == pytest.approx(corpus_bleu(texts, truth)["bleu_2"])
        scores = [text_scores(text, [true]) for text, true in zip(texts, truth, strict=True)]
        for metric in TEXT_METRICS:
            assert rows[condition, metric] == pytest.approx(np.mean([score[metric] for score in scores]))
        assert rows[condition, "writing, tokens/s"] > 0
    for metric in TEXT_METRICS:
        difference = rows["memory", metric] - rows["off", metric]
        assert rows["memory - off", metric] == pytest.approx(difference)
        assert (rows["memory - off", f"{metric}, p"] is None) == all(
            text_scores(s["memory"], [s["truth"]])[metric] == text_scores(s["off"], [s["truth"]])[metric]
            for s in samples
        )


def test_nothing_to_continue(loaded: tuple) -> None:
    with pytest.raises(TextError, match="132 tokens"):
        quality.run(*loaded, documents(100), quality.Options(2, CONTEXT, NEW))
    with pytest.raises(ConfigurationError, match="positive"):
        quality.run(*loaded, TEXTS, quality.Options(2, CONTEXT, 0))


SAID = ["the cat sat on the mat today", "we saw a dog run home"]
REFERENCES = ["the cat lay on the mat", "we saw a dog run home again and again"]


def test_bleu_counts_words_of_the_whole_corpus() -> None:
    found = corpus_bleu(SAID, REFERENCES)
    brevity = math.exp(1 - 15 / 13)  # 13 words where 15 were wanted
    assert found["bleu_1"] == pytest.approx(100 * 11 / 13 * brevity)
    assert found["bleu_2"] == pytest.approx(100 * math.sqrt(11 / 13 * 8 / 11) * brevity)
    assert found["bleu"] == found["bleu_4"] < found["bleu_3"]
    with pytest.raises(InputError, match="one reference for each"):
        corpus_bleu(SAID, REFERENCES[:1])


def test_rouge_f1_and_the_rest_of_one_text() -> None:
    found = text_scores(SAID[0], REFERENCES[:1])
    assert found["rouge_1"] == pytest.approx(2 * 5 / (7 + 6))  # the cat on the mat
    assert found["rouge_2"] == pytest.approx(2 * 3 / (6 + 5))  # the cat, on the, the mat
    assert found["rouge_l"] == pytest.approx(2 * 5 / (7 + 6))
    # Without the articles: cat sat on mat today / cat lay on mat.
    assert found["f1"] == pytest.approx(2 * 3 / (5 + 4)) == pytest.approx(token_f1(SAID[0], REFERENCES[0]))
    assert found["exact_match"] == 0.0 and text_scores("The  Cat!", ["a cat"])["exact_match"] == 1.0
    assert distinct("a b a b a", 2) == pytest.approx(2 / 4) and distinct("a", 2) == 0.0
    assert token_f1("", "the") == 1.0 and token_f1("", "cat") == 0.0
    assert text_scores("in the garden", ["kitchen", "garden"])["f1"] == pytest.approx(2 / 3)
    with pytest.raises(InputError, match="without a reference"):
        text_scores("x", [])
