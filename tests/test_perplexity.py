"""The streaming protocol, measured on a model whose every probability can be worked out by hand.

The stand-in has the methods of a HippoFormer. It predicts from the previous token by a table, and mixes in how often a
token occurs in its window and, beyond it, in its far store. It reads token by token and keeps state in a cache, as the
real model does; the expected values are worked out from slices of whole documents.
"""

import contextlib
import copy
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hippoformer.configuration import HippoFormerConfig
from hippoformer.data import Document
from hippoformer.errors import ConfigurationError, InputError, NonFiniteError, TextError
from hippoformer.evaluation import CONDITIONS, PerplexityReport, evaluate_perplexity
from hippoformer.evaluation.causality import check
from hippoformer.evaluation.scoring import KNOWN_CONDITIONS, EncodedDocument, reading, score_batch, score_together
from hippoformer.model.modeling import HippoFormer
from tiny import awake, text
from tiny_texts import byte_tokenizer

WINDOW = 5
VOCABULARY = 257
START = 256

# A table of conditional probabilities, (previous, next).
TABLE = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0)).softmax(-1).double()


class FakeConfig:
    base_model_name, window, sink_tokens, segment_len, buffer_size = "fake [model]", WINDOW, 0, 4, 1000
    vocab_size, residual_readout = VOCABULARY, True

    def to_dict(self) -> dict[str, Any]:
        return {"window": WINDOW, "dtype": torch.float32, "limit": math.inf}


class FakeCache:
    """State of rows: tokens seen, tokens that left the window, and whether the far store still takes them."""

    def __init__(self, rows: int) -> None:
        self.seen: list[list[int]] = [[] for _ in range(rows)]
        self.far: list[list[int]] = [[] for _ in range(rows)]
        self.frozen = False

    def copy(self) -> "FakeCache":
        return copy.deepcopy(self)

    def freeze_memory(self, frozen: bool = True) -> None:
        self.frozen = frozen

    def adopt_memory(self, other: "FakeCache") -> None:
        self.far = [list(far) for far in other.far]

    @property
    def window_nbytes(self) -> int:
        return 100 * len(self.seen)

    @property
    def memory_nbytes(self) -> int:
        return len(self.seen) * 8 * 1000  # room for the buffer, filled or not


class FakeModel:
    def __init__(self) -> None:
        self.config, self.device, self.dtype = FakeConfig(), torch.device("cpu"), torch.float32
        self.training, self.remembers, self.broken = True, True, False
        self.streams = 0

    def train(self, mode: bool = True) -> None:
        self.training = mode

    def eval(self) -> None:
        self.train(False)

    def new_cache(self, batch_size: int) -> FakeCache:
        return FakeCache(batch_size)

    @contextlib.contextmanager
    def memory_off(self) -> Iterator[None]:
        self.remembers = False
        try:
            yield
        finally:
            self.remembers = True

    def score(self, input_ids: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        self.streams += 1
        out = torch.zeros(input_ids.shape[0], input_ids.shape[1] - 1)
        for row, (ids, mask) in enumerate(zip(input_ids.tolist(), attention_mask.tolist(), strict=True)):
            seen, far = past_key_values.seen[row], past_key_values.far[row]
            for place, token in enumerate(token for token, real in zip(ids, mask, strict=True) if real):
                if seen and place:
                    out[row, place - 1] = math.log(self._probability(seen, far, token))
                self._read(token, seen, far, past_key_values.frozen)
        if self.broken:
            out[-1, 0] = math.nan
        return out

    def __call__(self, input_ids: Tensor, past_key_values: Any) -> SimpleNamespace:
        (ids,), seen, far = input_ids.tolist(), past_key_values.seen[0], past_key_values.far[0]
        rows = []
        for token in ids:
            self._read(token, seen, far, past_key_values.frozen)
            row = 0.8 * TABLE[seen[-1]] + 0.2 * torch.bincount(torch.tensor(seen), minlength=VOCABULARY) / len(seen)
            if far:
                row = 0.7 * row + 0.3 * torch.bincount(torch.tensor(far), minlength=VOCABULARY) / len(far)
            rows.append(row.log())
        return SimpleNamespace(logits=torch.stack(rows).unsqueeze(0))

    def _read(self, token: int, seen: list[int], far: list[int], frozen: bool) -> None:
        seen.append(token)
        if len(seen) > WINDOW:
            left = seen.pop(0)
            if self.remembers and not frozen:
                far.append(left)

    def _probability(self, window: list[int], far: list[int], token: int) -> float:
        probability = float(TABLE[window[-1], token])
        if self.remembers:
            probability = 0.8 * probability + 0.2 * window.count(token) / len(window)
            if far:
                probability = 0.7 * probability + 0.3 * far.count(token) / len(far)
        return probability


def expected_nll(ids: list[int], condition: str, other: list[int], first_scored: int = 1) -> float:
    """Sum of −log p worked out from slices, without any state."""
    nll = 0.0
    for t in range(first_scored, len(ids)):
        probability = float(TABLE[ids[t - 1], ids[t]])
        if condition != "off":
            window = ids[max(0, t - WINDOW) : t]
            far = {
                "memory": ids[: max(0, t - WINDOW)],
                "window-only": [],
                "other-document": other[: max(0, len(other) - WINDOW)],
            }[condition]
            probability = 0.8 * probability + 0.2 * window.count(ids[t]) / len(window)
            if far:
                probability = 0.7 * probability + 0.3 * far.count(ids[t]) / len(far)
        nll -= math.log(probability)
    return nll


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that tokens and bytes can be counted on the text."""
    return byte_tokenizer(last=["<s>"], bos_token="<s>")


TEXTS = ("the cat sat on the mat", "a", "on and on and on it went", "cat mat", "we sat and sat\nand then we left")
DOCUMENTS = [Document(f"document {index}", text, f"texts:{index}") for index, text in enumerate(TEXTS)]
# The second has one token, so nothing of it can be scored.
SCORED = [0, 2, 3, 4]


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


def evaluate(
    tokenizer: PreTrainedTokenizerFast, documents: list[Document] = DOCUMENTS, **options: Any
) -> PerplexityReport:
    return evaluate_perplexity(FakeModel(), tokenizer, documents, resamples=200, **options)


def others_of(tokenizer: PreTrainedTokenizerFast, index: int) -> list[int]:
    """Tokens of the documents that follow, going round, as many as the document has."""
    following = "".join(TEXTS[index + 1 :] + TEXTS[:index])
    return ids_of(tokenizer, following)[: len(TEXTS[index])]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_every_condition_agrees_with_its_definition(tokenizer: PreTrainedTokenizerFast, batch_size: int) -> None:
    report = evaluate(tokenizer, batch_size=batch_size)
    assert [result.condition for result in report.conditions] == list(CONDITIONS)
    assert [document.title for document in report.documents] == [f"document {index}" for index in SCORED]
    for place, index in enumerate(SCORED):
        ids = ids_of(tokenizer, TEXTS[index])
        for condition in CONDITIONS:
            expected = expected_nll(ids, condition, others_of(tokenizer, index))
            assert report.documents[place].nll[condition] == pytest.approx(expected, rel=1e-5), (index, condition)
        assert report.documents[place].other_tokens == len(ids)


def test_metrics_follow_from_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    report = evaluate(tokenizer, conditions=["off"])
    nll = sum(expected_nll(ids_of(tokenizer, TEXTS[index]), "off", []) for index in SCORED)
    # One token a byte, all ASCII: what is scored is the text without its first character.
    scored_text = [TEXTS[index][1:] for index in SCORED]
    tokens = sum(len(text) for text in scored_text)
    result = report["off"]
    assert (result.tokens_scored, result.tokens_read, result.utf8_bytes) == (tokens, tokens + len(SCORED), tokens)
    assert result.words == sum(len(text.split()) for text in scored_text)
    assert result.token_perplexity.estimate == pytest.approx(math.exp(nll / tokens), rel=1e-6)
    assert result.word_perplexity == pytest.approx(math.exp(nll / result.words), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(nll / tokens / math.log(2), rel=1e-6)
    assert result.token_perplexity.low < result.token_perplexity.estimate < result.token_perplexity.high


def test_limits_and_skipped_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    report = evaluate(tokenizer, conditions=["memory", "off"], limit_tokens=12, skip_tokens=5)
    assert report.left_out == ("document 1",)
    for place, index in enumerate(SCORED):
        ids = ids_of(tokenizer, TEXTS[index])[:12]
        document = report.documents[place]
        assert document.nll["memory"] == pytest.approx(expected_nll(ids, "memory", [], first_scored=5), rel=1e-5)
        assert document.tokens_read == len(ids)
        assert document.tokens_scored == document.utf8_bytes == len(ids) - 5
        assert document.words == len(TEXTS[index][5:12].split())


def test_the_start_token_lets_the_first_character_be_scored() -> None:
    tokenizer = byte_tokenizer(last=["<s>"], start="<s>", bos_token="<s>")
    report = evaluate(tokenizer, conditions=["off"])
    assert report.left_out == ()
    assert [document.tokens_scored for document in report.documents] == [len(text) for text in TEXTS]
    assert report.documents[1].nll["off"] == pytest.approx(-math.log(TABLE[START, ids_of(tokenizer, "a")[1]]), rel=1e-5)
    assert report["off"].utf8_bytes == sum(len(text) for text in TEXTS)


def test_bytes_are_those_of_the_text_and_not_of_the_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    report = evaluate(tokenizer, [Document("accents", "né à Ömsköldsvik 😀", "x")], conditions=["off"])
    assert report["off"].tokens_scored == report["off"].utf8_bytes == len("né à Ömsköldsvik 😀".encode()) - 1
    assert report["off"].words == 4


def test_the_state_is_empty_at_the_start_of_each_document(tokenizer: PreTrainedTokenizerFast) -> None:
    twice = evaluate(tokenizer, [DOCUMENTS[0], DOCUMENTS[4], DOCUMENTS[0]], conditions=["memory"], batch_size=1)
    assert twice.documents[0].nll == twice.documents[2].nll


def test_other_documents_may_be_named_or_follow_those_scored(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = ids_of(tokenizer, TEXTS[0])
    named = evaluate(tokenizer, DOCUMENTS[:1], conditions=["other-document"], other_documents=DOCUMENTS[3:])
    other = ids_of(tokenizer, TEXTS[3] + TEXTS[4])[: len(ids)]
    assert named.documents[0].nll["other-document"] == pytest.approx(expected_nll(ids, "other-document", other))
    assert named.settings["other_documents"] == ["document 3", "document 4"]
    following = evaluate(tokenizer, conditions=["other-document"], max_documents=1)
    assert len(following.documents) == 1
    other = ids_of(tokenizer, TEXTS[1] + TEXTS[2])[: len(ids)]
    assert following.documents[0].nll["other-document"] == pytest.approx(expected_nll(ids, "other-document", other))
    with pytest.raises(ConfigurationError, match="needs a document beside the scored one"):
        evaluate(tokenizer, DOCUMENTS[:1])


def test_a_short_other_document_is_told(tokenizer: PreTrainedTokenizerFast) -> None:
    report = evaluate(tokenizer, DOCUMENTS[:1], conditions=["other-document"], other_documents=DOCUMENTS[1:2])
    assert report.documents[0].other_tokens == 1


def test_conditions_are_compared_with_off(tokenizer: PreTrainedTokenizerFast) -> None:
    report = evaluate(tokenizer)
    assert report["off"].against_off is None
    compared = report["memory"].against_off
    assert compared is not None
    tokens = report["off"].tokens_scored
    difference = sum(document.nll["memory"] - document.nll["off"] for document in report.documents)
    assert compared.ratio.estimate == pytest.approx(math.exp(difference / tokens))
    better = [document.nll["memory"] < document.nll["off"] for document in report.documents]
    assert compared.documents_better == sum(better)
    assert evaluate(tokenizer, conditions=["memory"])["memory"].against_off is None


def test_bytes_of_state_are_those_of_one_row(tokenizer: PreTrainedTokenizerFast) -> None:
    for batch_size in (1, 4):
        report = evaluate(tokenizer, batch_size=batch_size)
        assert {result.window_nbytes for result in report.conditions} == {100}
        assert {result.condition: result.memory_nbytes for result in report.conditions} == {
            **{"memory": 8000, "off": 0, "window-only": 8000, "other-document": 8000}
        }


def test_seeds_and_progress(tokenizer: PreTrainedTokenizerFast) -> None:
    model, calls = FakeModel(), []
    first = evaluate_perplexity(model, tokenizer, DOCUMENTS, resamples=200, progress=lambda *done: calls.append(done))
    assert model.training  # as it was before
    read = sum(len(TEXTS[index]) for index in SCORED)
    assert calls[-1] == (4 * read, 4 * read)
    assert calls == sorted(calls)
    assert evaluate(tokenizer)["memory"].token_perplexity == first["memory"].token_perplexity
    assert evaluate(tokenizer, seed=1)["memory"].token_perplexity != first["memory"].token_perplexity


def test_no_stream_beyond_those_needed(tokenizer: PreTrainedTokenizerFast) -> None:
    model = FakeModel()
    with reading(model):
        check(model)
    for_the_check, model.streams = model.streams, 0
    evaluate_perplexity(model, tokenizer, DOCUMENTS, resamples=10, batch_size=len(SCORED))
    assert model.streams - for_the_check == 5  # one a condition, and one that reads the other documents


def test_nan_names_the_document_and_the_mode_comes_back(tokenizer: PreTrainedTokenizerFast) -> None:
    model = FakeModel()
    model.broken = True
    with pytest.raises(NonFiniteError, match=r"'document 3' \(texts:3\) .*condition memory"):
        evaluate_perplexity(model, tokenizer, DOCUMENTS)
    assert model.training


def test_the_json_holds_everything_and_is_valid(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    report = evaluate(tokenizer, command="a command")
    path = tmp_path / "results.json"
    report.save(path)
    content = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert content == json.loads(report.to_json())
    assert content["model"]["config"] == {"window": WINDOW, "dtype": "torch.float32", "limit": "Infinity"}
    assert content["provenance"]["command"] == "a command"
    assert content["provenance"]["data"]["documents"] == len(DOCUMENTS)
    assert content["left_out"] == ["document 1"]
    memory = content["conditions"]["memory"]
    assert memory["nll"] == pytest.approx(sum(document["nll"]["memory"] for document in content["documents"]))
    assert memory["token_perplexity"]["estimate"] == pytest.approx(math.exp(memory["nats_per_token"]))
    assert memory["state_nbytes"] == memory["window_nbytes"] + memory["memory_nbytes"]
    assert memory["tokens_per_second"] > 0
    assert len(memory["against_off"]["document_ratios"]) == len(SCORED)


def test_the_table_shows_every_condition(tokenizer: PreTrainedTokenizerFast) -> None:
    report = evaluate(tokenizer)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report.to_table())
    shown = console.export_text()
    for result in report.conditions:
        row = next(line for line in shown.splitlines() if f"│ {result.condition} " in line)
        assert f"{result.token_perplexity.estimate:.2f} [{result.token_perplexity.low:.2f}" in row
        assert f"{result.bits_per_byte:.4f}" in row
    assert "fake [model]" in shown
    assert "1 documents too short to score" in " ".join(shown.split())


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
        {"max_documents": 0},
    ],
)
def test_options_out_of_range(tokenizer: PreTrainedTokenizerFast, options: dict[str, Any]) -> None:
    name = next(iter(options))
    with pytest.raises(ConfigurationError, match=name):
        evaluate(tokenizer, **options)


def test_nothing_to_score(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TextError, match="None of 5 documents has a token to score; expected more than 100 tokens"):
        evaluate(tokenizer, skip_tokens=100)
    with pytest.raises(TextError, match="None of 0 documents"):
        evaluate(tokenizer, [])


def test_a_tokenizer_without_offsets(tokenizer: PreTrainedTokenizerFast) -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ConfigurationError, match="Slow does not say which characters"):
        evaluate_perplexity(FakeModel(), Slow(), DOCUMENTS)


def test_the_real_model_on_a_tiny_base(tokenizer: PreTrainedTokenizerFast) -> None:
    """The protocol on a HippoFormer itself: off is the plain base, and every condition reads what it says."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, bos_token_id=START, eos_token_id=None, **sizes))
    with torch.no_grad():
        plain = [
            base(torch.tensor([ids_of(tokenizer, TEXTS[index])])).logits.double().log_softmax(-1) for index in SCORED
        ]
    expected = [
        -sum(float(log_probs[0, t - 1, token]) for t, token in enumerate(ids_of(tokenizer, TEXTS[index])) if t)
        for index, log_probs in zip(SCORED, plain, strict=True)
    ]
    config = HippoFormerConfig(
        **{"memory_layer": -1, "residual_readout": True, "marginal_weight": 0.0},
        **{"base_model_name": "tiny", "window": 8, "sink_tokens": 1, "segment_len": 4},
        **{"buffer_size": 16, "recall_n_heads": 2, "recall_head_dim": 16, "salience_n_heads": 2},
    )
    model = HippoFormer(config, base)
    fresh = evaluate_perplexity(model, tokenizer, DOCUMENTS, resamples=10, batch_size=2)
    for document in fresh.documents:
        assert len(set(document.nll.values())) == 1  # nothing is trained: recall changes nothing yet
    with torch.no_grad():
        for parameter in model.hippocampus.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    report = evaluate_perplexity(model, tokenizer, DOCUMENTS, resamples=10, batch_size=2)
    for document, before in zip(report.documents, fresh.documents, strict=True):
        assert document.nll["off"] == before.nll["off"]
        if document.tokens_read > config.window + config.sink_tokens:
            assert len(set(document.nll.values())) == 4
        else:
            assert document.nll["off"] == pytest.approx(expected[report.documents.index(document)], rel=1e-5)
            assert document.nll["memory"] == document.nll["window-only"]  # nothing has left the window
    assert 0 < report["memory"].memory_nbytes == report["other-document"].memory_nbytes


@pytest.mark.parametrize("options", [{}, {"marginal_weight": 0.75}], ids=["episodes", "and marginals"])
@torch.no_grad()
def test_conditions_read_together_are_those_read_alone(options: dict[str, Any]) -> None:
    model = awake(residual_readout=False, **options)
    texts, elsewhere = ([text(rows=1, length=n, seed=n)[0] for n in lengths] for lengths in ((50, 33, 7), (40, 20, 9)))
    batch = [EncodedDocument(i, Document(f"{i}", "", ""), ids, 1, 0, 0) for i, ids in enumerate(texts)]
    read: list[int] = []
    body = model.window.body
    counter = body.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    asked = KNOWN_CONDITIONS if options else CONDITIONS
    together = score_together(model, asked, batch, elsewhere)
    counter.remove()
    assert sum(read) == 50 + 40, "the base has read more than the documents and the others, once each"
    for condition, found in zip(asked, together, strict=True):
        alone = score_batch(model, condition, batch, elsewhere)
        for one, other in zip(found.log_probs, alone.log_probs, strict=True):
            torch.testing.assert_close(one, other, rtol=0.0, atol=1e-4)
        assert found.nll == pytest.approx(alone.nll, abs=1e-3)
        assert (found.window_nbytes, found.memory_nbytes) == (alone.window_nbytes, alone.memory_nbytes)
    assert len({round(found.nll[0], 3) for found in together}) == len(asked), "two conditions are the same"


def test_memories_follow_one_reading_only_from_its_beginning() -> None:
    model, ids = awake(residual_readout=False), text(rows=1, length=10)
    cache = model.new_cache(1)
    model(ids, past_key_values=cache)
    with pytest.raises(InputError, match="from its beginning"):
        next(model.stream(ids, [10], cache, [model.new_cache(1)]))
    with pytest.raises(InputError, match="without the residual"):
        touched = awake()
        next(touched.stream(ids, [10], touched.new_cache(1), [touched.new_cache(1)]))
