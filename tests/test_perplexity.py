"""The streaming protocol, on a model whose every probability can be worked out by hand.

It predicts from the previous token by a table, and mixes in how often a token occurs in its window and in its store;
expected values come from slices of whole documents.
"""

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from evaluation.perplexity.run import Options as ByPosition
from evaluation.perplexity.run import last_distance
from evaluation.perplexity.run import run as run_by_position
from hippoformer.data import Document
from hippoformer.errors import ConfigurationError, NonFiniteError, TextError
from hippoformer.evaluation import Result
from hippoformer.evaluation.perplexity import CONDITIONS, Options, encode_all, run, score
from tiny_texts import WINDOW as TINY_WINDOW
from tiny_texts import byte_tokenizer, documents, tiny_load

WINDOW, VOCABULARY, START = 5, 257, 256
TABLE = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0)).softmax(-1).double()


class FakeCache:
    def __init__(self, rows: int) -> None:
        self.seen: list[list[int]] = [[] for _ in range(rows)]
        self.far: list[list[int]] = [[] for _ in range(rows)]
        self.frozen = False

    def freeze_memory(self, frozen: bool = True) -> None:
        self.frozen = frozen

    def adopt_memory(self, other: "FakeCache") -> None:
        self.far = [list(far) for far in other.far]

    @property
    def window_nbytes(self) -> int:
        return 100 * len(self.seen)

    @property
    def memory_nbytes(self) -> int:
        return 8_000 * len(self.seen)

    marginals_nbytes = 0


class FakeModel:
    config = SimpleNamespace(base_model_name="fake", window=WINDOW, to_dict=lambda: {"limit": math.inf})
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self) -> None:
        self.training, self.broken, self.streams = True, False, 0

    def train(self, mode: bool = True) -> None:
        self.training = mode

    def eval(self) -> None:
        self.train(False)

    def new_cache(self, rows: int) -> FakeCache:
        return FakeCache(rows)

    def stream(self, ids: Tensor, lengths: list[int], cache: FakeCache) -> Iterator[Any]:
        assert not self.training and not torch.is_grad_enabled()
        self.streams += 1
        target, base = torch.zeros(ids.shape), torch.zeros(ids.shape)
        for row, length in enumerate(lengths):
            seen, far = cache.seen[row], cache.far[row]
            for t, token in enumerate(ids[row, :length].tolist()):
                if seen:
                    base[row, t] = TABLE[seen[-1], token].log()
                    target[row, t] = math.log(mixed(seen, far, token))
                seen.append(token)
                if len(seen) > WINDOW:
                    left = seen.pop(0)
                    if not cache.frozen:
                        far.append(left)
        if self.broken:
            target[-1, 1] = math.nan
        log_probs = {"target_log_prob": target, "base_log_prob": base, "prior_log_prob": base}
        yield SimpleNamespace(start=[0] * len(lengths), new=lengths, **log_probs)


def mixed(window: list[int], far: list[int], token: int) -> float:
    probability = 0.8 * float(TABLE[window[-1], token]) + 0.2 * window.count(token) / len(window)
    return 0.7 * probability + 0.3 * far.count(token) / len(far) if far else probability


def expected_nll(ids: list[int], condition: str, other: list[int], first: int = 1) -> float:
    """Sum of -log p worked out from slices, without any state."""
    nll = 0.0
    for t in range(first, len(ids)):
        left = {"memory": ids[: max(0, t - WINDOW)], "window-only": [], "other-document": other[: len(other) - WINDOW]}
        off = condition in ("off", "unigram")
        here = ids[max(0, t - WINDOW) : t]
        nll -= math.log(TABLE[ids[t - 1], ids[t]] if off else mixed(here, left[condition], ids[t]))
    return nll


TEXTS = ("the cat sat on the mat", "a", "on and on and on it went", "cat mat", "we sat and sat\nand then we left")
DOCUMENTS = [Document(f"document {index}", text, f"texts:{index}") for index, text in enumerate(TEXTS)]
SCORED = [0, 2, 3, 4]  # the second has one token, so nothing of it can be scored
TOKENIZER = byte_tokenizer(last=["<s>"], bos_token="<s>")  # one token a byte


def evaluate(texts: Any = DOCUMENTS, tokenizer: PreTrainedTokenizerFast = TOKENIZER, **options: Any) -> Result:
    return run(FakeModel(), tokenizer, texts, Options(**options))


def value(result: Result, condition: str, metric: str) -> Any:
    (row,) = (row for row in result.rows if (row.condition, row.metric) == (condition, metric))
    return row.value


def ids_of(text: str) -> list[int]:
    ids: list[int] = TOKENIZER(text)["input_ids"]
    return ids


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_every_condition_agrees_with_its_definition(batch_size: int) -> None:
    result = evaluate(conditions=list(CONDITIONS), batch_size=batch_size)
    for index, document in zip(SCORED, result.details["documents"], strict=True):
        ids, following = ids_of(TEXTS[index]), ids_of("".join(TEXTS[index + 1 :] + TEXTS[:index]))
        for condition in CONDITIONS:
            expected = expected_nll(ids, condition, following[: len(ids)])
            assert document["nll"][condition] == pytest.approx(expected, rel=1e-5), (index, condition)
    assert {value(result, condition, "window, bytes") for condition in CONDITIONS} == {100}
    assert [value(result, condition, "memory, bytes") for condition in CONDITIONS] == [8_000, 0, 0, 8_000, 8_000]


def test_metrics_follow_from_the_text() -> None:
    result = evaluate()
    nll = {c: sum(expected_nll(ids_of(TEXTS[i]), c, []) for i in SCORED) for c in ("memory", "off")}
    scored = [TEXTS[index][1:] for index in SCORED]  # all but the first character
    tokens, words = sum(map(len, scored)), sum(len(text.split()) for text in scored)
    row = next(row for row in result.rows if row.metric == "perplexity" and row.condition == "off")
    assert row.value == pytest.approx(math.exp(nll["off"] / tokens), rel=1e-6) and row.n == 4
    assert row.low is not None and row.high is not None and row.low < row.value < row.high
    assert value(result, "off", "word perplexity") == pytest.approx(math.exp(nll["off"] / words), rel=1e-5)
    assert value(result, "off", "bits/byte") == pytest.approx(nll["off"] / tokens / math.log(2), rel=1e-6)
    ratio = math.exp((nll["memory"] - nll["off"]) / tokens)
    assert value(result, "memory", "against off, %") == pytest.approx(100 * (ratio - 1))
    better = sum(of["nll"]["memory"] < of["nll"]["off"] for of in result.details["documents"])
    assert value(result, "memory", "documents better") == better
    assert evaluate(seed=1).rows != result.rows
    text = "né à Ömsköldsvik 😀"
    (accents,) = evaluate([Document("accents", text, "x")]).details["documents"]
    assert accents["tokens"] == accents["bytes"] == len(text.encode()) - 1 and accents["words"] == 4


def test_limits_and_skipped_tokens() -> None:
    result = evaluate(limit_tokens=12, skip_tokens=5)
    for index, document in zip(SCORED, result.details["documents"], strict=True):
        ids = ids_of(TEXTS[index])[:12]
        assert document["nll"]["memory"] == pytest.approx(expected_nll(ids, "memory", [], first=5), rel=1e-5)
        assert document["tokens"] == document["bytes"] == len(ids) - 5
        assert document["words"] == len(TEXTS[index][5:12].split())


def test_the_start_token_lets_the_first_character_be_scored() -> None:
    result = evaluate(tokenizer=byte_tokenizer(last=["<s>"], start="<s>", bos_token="<s>"))
    assert [document["tokens"] for document in result.details["documents"]] == [len(text) for text in TEXTS]
    first = -math.log(TABLE[START, ids_of("a")[0]])
    assert result.details["documents"][1]["nll"]["off"] == pytest.approx(first, rel=1e-5)


def test_other_documents_follow_those_scored() -> None:
    (document,) = evaluate(conditions=["other-document"], documents=1).details["documents"]
    ids, other = ids_of(TEXTS[0]), ids_of(TEXTS[1] + TEXTS[2])
    expected = expected_nll(ids, "other-document", other[: len(ids)])
    assert document["nll"]["other-document"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ConfigurationError, match="needs a second document"):
        evaluate(DOCUMENTS[:1], conditions=["other-document"])


def test_conditions_of_one_memory_share_a_reading_and_the_mode_comes_back() -> None:
    model = FakeModel()
    run(model, TOKENIZER, DOCUMENTS, Options(conditions=list(CONDITIONS)))
    assert model.streams == 4 and model.training  # one a memory, and one of the other documents
    model.broken = True
    with pytest.raises(NonFiniteError, match=r"'document 3' \(texts:3\) .*under memory"):
        run(model, TOKENIZER, DOCUMENTS, Options())
    assert model.training


@pytest.mark.parametrize(
    "options",
    [
        {"conditions": ["memory", "sleep"]},
        {"conditions": []},
        {"conditions": ["off", "off"]},
        {"batch_size": 0},
        {"limit_tokens": 1},
        {"skip_tokens": -1},
        {"limit_tokens": 8, "skip_tokens": 8},
        {"documents": 0},
    ],
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        Options(**options)


def test_nothing_to_score() -> None:
    for texts, skipped in ((DOCUMENTS, 100), ([], 0)):
        with pytest.raises(TextError, match=f"none of {len(texts)} documents has more than"):
            evaluate(texts, skip_tokens=skipped)
    with pytest.raises(ConfigurationError, match="does not say which characters"):
        encode_all(SimpleNamespace(is_fast=False), DOCUMENTS)


@torch.no_grad()
def test_the_conditions_of_a_model_are_its_own_ways_to_read() -> None:
    """Against `score` of the model itself, with the memory off, without episodes, and frozen."""
    model, tokenizer = tiny_load(residual_readout=False, marginal_weight=0.75)
    encoded = encode_all(tokenizer, documents(150, 90, 7))
    found = {(s.condition, s.document.index): s for s in score(model, encoded, list(CONDITIONS), batch_size=2)}
    for document in encoded:
        ids = document.input_ids.unsqueeze(0)
        expected = {"memory": model.score(ids)}
        with model.memory_off():
            expected["off"] = model.score(ids)
        with model.episodes_off():
            expected["unigram"] = model.score(ids)
        cache = model.new_cache(1)
        cache.freeze_memory()
        expected["window-only"] = model.score(ids, past_key_values=cache)
        for condition, log_probs in expected.items():
            torch.testing.assert_close(
                found[condition, document.index].log_probs, log_probs[0], rtol=0.0, atol=1e-4, msg=condition
            )
    assert len({round(found[condition, 0].nll, 3) for condition in CONDITIONS}) == len(CONDITIONS)
    assert found["memory", 0].memory_nbytes > found["unigram", 0].memory_nbytes > found["off", 0].memory_nbytes == 0


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
    result = run_by_position(model, tokenizer, texts, ByPosition(by_position=True))
    encoded = encode_all(tokenizer, texts)
    scores = {(s.condition, s.document.index): s.log_probs for s in score(model, encoded, ["memory", "off"])}
    nats = [(d, t, -float(scores["off", d.index][t - 1])) for d in encoded for t in range(1, len(d.input_ids))]
    saved = [-float(scores["off", d.index][t - 1] - scores["memory", d.index][t - 1]) for d, t, _ in nats]
    here = [i for i, (_, t, _) in enumerate(nats) if 128 <= t < 256]
    mean = sum(nats[i][2] for i in here) / len(here)
    assert value(result, "off", "position 128 to 255: perplexity") == pytest.approx(math.exp(mean), rel=1e-5)
    gain = value(result, "memory", "position 128 to 255: gain, nats/token")
    assert gain == pytest.approx(sum(saved[i] for i in here) / len(here), abs=1e-5)
    far = TINY_WINDOW + 1
    distance = {d.index: last_distance(d.input_ids.tolist(), 2) for d in encoded}
    here = [i for i, (d, t, _) in enumerate(nats) if far <= distance[d.index][t] < 2 * far - 1]
    gain = value(result, "memory", f"last 2-gram {far} to {2 * far - 2}: gain, nats/token")
    assert gain == pytest.approx(sum(saved[i] for i in here) / len(here), abs=1e-5)
    early, late = (value(result, "off", f"quarter {q} to {q}: perplexity") for q in (0, 3))
    assert value(result, "off", "perplexity, first minus last quarter") == pytest.approx(early - late)
    assert result.details["leak check"]["future"] == 0.0
