"""The streaming protocol and its figures, worked out a second time from the model's own `score`."""

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from evaluation.common.results import Result
from evaluation.perplexity.run import Options, last_distance, run
from hippoformer import HippoFormer
from hippoformer.data import Document
from hippoformer.errors import ConfigurationError, NonFiniteError, TextError
from hippoformer.evaluation import CONDITIONS, encode, encode_all, figures, measure, score
from tiny_texts import WINDOW, byte_tokenizer, documents, tiny_load, tiny_tokenizer

TEXTS = documents(150, 1, 90, 7, 120)
SCORED = [0, 2, 3, 4]  # the second has one token, so nothing of it can be scored


@pytest.fixture(scope="module")
def model() -> HippoFormer:
    return tiny_load(residual_readout=False, unigram_weight=0.75)[0]


def evaluate(model: Any, texts: Any = TEXTS, tokenizer: Any = None, **options: Any) -> Result:
    return run(model, tokenizer or tiny_tokenizer(), texts, Options(**options))


def value(result: Result, condition: str, metric: str) -> Any:
    (row,) = (row for row in result.rows if (row.condition, row.metric) == (condition, metric))
    return row.value


def ids_of(text: str) -> Tensor:
    return torch.tensor([tiny_tokenizer()(text).input_ids])


@torch.no_grad()
def expected(model: HippoFormer, number: int) -> dict[str, Tensor]:
    """Condition -> log p of a text's tokens but the first, by the model's own ways to read."""
    ids = ids_of(TEXTS[number].text)
    others = ids_of("".join(document.text for document in TEXTS[number + 1 :] + TEXTS[:number]))[:, : ids.shape[1]]
    found = {"memory": model.score(ids)}
    with model.memory_off():
        found["off"] = model.score(ids)
    with model.episodes_off():
        found["unigram"] = model.score(ids)
    frozen, after, other = (model.new_cache(1) for _ in range(3))
    model.score(others, past_key_values=other)
    after.adopt_memory(other)
    for name, cache in (("window-only", frozen), ("other-document", after)):
        cache.freeze_memory()
        found[name] = model.score(ids, past_key_values=cache)
    return {name: log_probs[0].double() for name, log_probs in found.items()}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_condition_agrees_with_the_models_own_reading(model: HippoFormer, batch_size: int) -> None:
    found = measure(model, tiny_tokenizer(), TEXTS, Options(list(CONDITIONS), batch_size))
    for place, number in enumerate(SCORED):
        for condition, log_probs in expected(model, number).items():
            scored = found[condition][place]
            assert scored.document.index == number
            torch.testing.assert_close(scored.log_probs.double(), log_probs, rtol=0.0, atol=1e-4, msg=condition)
    assert len({round(of[0].nll, 3) for of in found.values()}) == len(CONDITIONS)
    memory, unigram, off = (found[name][0].memory_nbytes for name in ("memory", "unigram", "off"))
    assert memory > unigram > off == 0


def test_metrics_follow_from_the_text(model: HippoFormer) -> None:
    result = evaluate(model)
    assert result.details["leak check"]["future"] == 0.0
    nll = {name: -sum(float(expected(model, i)[name].sum()) for i in SCORED) for name in ("memory", "off")}
    scored = [TEXTS[number].text[1:] for number in SCORED]  # all but the first character
    tokens, words = sum(map(len, scored)), sum(len(text.split()) for text in scored)
    row = next(row for row in result.rows if row.metric == "perplexity" and row.condition == "off")
    assert row.value == pytest.approx(math.exp(nll["off"] / tokens), rel=1e-5) and row.n == 4
    assert row.low is not None and row.high is not None and row.low < row.value < row.high
    assert value(result, "off", "word perplexity") == pytest.approx(math.exp(nll["off"] / words), rel=1e-4)
    assert value(result, "off", "bits/byte") == pytest.approx(nll["off"] / tokens / math.log(2), rel=1e-5)
    ratio = math.exp((nll["memory"] - nll["off"]) / tokens)
    assert value(result, "memory", "against off, %") == pytest.approx(100 * (ratio - 1), abs=1e-3)
    better = sum(of["nll"]["memory"] < of["nll"]["off"] for of in result.details["documents"])
    assert value(result, "memory", "documents better") == better
    (accents,) = encode_all(tiny_tokenizer(), [Document("accents", text := "né à Ömsköldsvik 😀", "x")])
    assert accents.tokens_scored == accents.utf8_bytes == len(text.encode()) - 1 and accents.words == 4


def test_limits_and_start_tokens(model: HippoFormer) -> None:
    (cut,) = measure(model, tiny_tokenizer(), TEXTS, Options(["memory"], limit_tokens=60, documents=1))["memory"]
    torch.testing.assert_close(cut.log_probs.double(), expected(model, 0)["memory"][:59], rtol=0.0, atol=1e-4)
    assert cut.document.utf8_bytes == 59 and cut.document.words == len(TEXTS[0].text[1:60].split())
    started = byte_tokenizer(["<s>"], start="<s>", bos_token="<s>")
    assert [encode(started, document).tokens_scored for document in TEXTS] == [150, 1, 90, 7, 120]


def test_conditions_of_one_memory_share_a_reading_and_the_mode_comes_back(
    model: HippoFormer, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, streams = HippoFormer.stream, []

    def stream(self: HippoFormer, ids: Tensor, lengths: list[int], cache: Any) -> Any:
        assert not self.training and not torch.is_grad_enabled()
        streams.append(ids)
        for step in own(self, ids, lengths, cache):
            yield step if len(streams) < 5 else dataclasses.replace(step, target_log_prob=step.target_log_prob / 0)

    monkeypatch.setattr(HippoFormer, "stream", stream)
    model.train()
    measure(model, tiny_tokenizer(), TEXTS, Options(list(CONDITIONS)))
    assert len(streams) == 4 and model.training  # one a memory, and one of the other documents
    with pytest.raises(NonFiniteError, match=r"'text 0' \(made up\) .*under memory"):
        measure(model, tiny_tokenizer(), TEXTS, Options())
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    "options",
    [
        *({"conditions": of} for of in (["memory", "sleep"], [], ["off", "off"])),
        *({name: 0} for name in ("batch_size", "limit_tokens", "documents")),
        {"limit_tokens": 1},
    ],
    ids=str,
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        Options(**options)


def test_nothing_to_score(model: HippoFormer) -> None:
    for texts in (TEXTS[1:2], []):
        with pytest.raises(TextError, match=f"none of {len(texts)} documents has two tokens"):
            evaluate(model, texts)
    with pytest.raises(ConfigurationError, match="does not say which characters"):
        encode_all(SimpleNamespace(is_fast=False), TEXTS)
    with pytest.raises(ConfigurationError, match="needs a second document"):
        measure(model, tiny_tokenizer(), TEXTS[:1], Options(["other-document"]))
    single = figures(measure(model, tiny_tokenizer(), [Document("blank", "    ", "x")], Options(["off"]))["off"])
    assert single["word perplexity"] is None


def test_distance_is_that_to_the_last_time() -> None:
    ids = torch.randint(0, 5, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    for n in (1, 2, 3):
        expected = []
        for t in range(len(ids)):
            gram = ids[t - n + 1 : t + 1]
            earlier = [s for s in range(n - 1, t) if ids[s - n + 1 : s + 1] == gram] if t >= n - 1 else []
            expected.append(t - earlier[-1] if earlier else 0)
        assert last_distance(ids, n).tolist() == expected


def test_cells_by_position_and_distance_are_means_over_their_tokens() -> None:
    model, tokenizer = tiny_load()
    texts = documents(400, 1, 260)
    result = run(model, tokenizer, texts, Options(by_position=True))
    encoded = encode_all(tokenizer, texts)
    scores = {(s.condition, s.document.index): s.log_probs for s in score(model, encoded, ["memory", "off"])}
    nats = [(d, t, -float(scores["off", d.index][t - 1])) for d in encoded for t in range(1, len(d.input_ids))]
    saved = [-float(scores["off", d.index][t - 1] - scores["memory", d.index][t - 1]) for d, t, _ in nats]
    here = [i for i, (_, t, _) in enumerate(nats) if 128 <= t < 256]
    mean = sum(nats[i][2] for i in here) / len(here)
    assert value(result, "off", "position 128 to 255: perplexity") == pytest.approx(math.exp(mean), rel=1e-5)
    gain = value(result, "memory", "position 128 to 255: gain, nats/token")
    assert gain == pytest.approx(sum(saved[i] for i in here) / len(here), abs=1e-5)
    far = WINDOW + 1
    distance = {d.index: last_distance(d.input_ids.tolist(), 2) for d in encoded}
    here = [i for i, (d, t, _) in enumerate(nats) if far <= distance[d.index][t] < 2 * far - 1]
    gain = value(result, "memory", f"last 2-gram {far} to {2 * far - 2}: gain, nats/token")
    assert gain == pytest.approx(sum(saved[i] for i in here) / len(here), abs=1e-5)
    early, late = (value(result, "off", f"quarter {q} to {q}: perplexity") for q in (0, 3))
    assert value(result, "off", "perplexity, first minus last quarter") == pytest.approx(early - late)
    assert result.details["leak check"]["future"] == 0.0
