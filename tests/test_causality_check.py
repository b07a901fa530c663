"""The check that every perplexity begins with: models that look ahead are caught, those that do not are let through."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hippoformer.errors import CausalityError, InputError
from hippoformer.evaluation import evaluate_perplexity
from hippoformer.evaluation.causality import check
from tiny import awake
from tiny_texts import documents, tiny_load


class Double:
    """A HippoFormer with one of its two ways to predict replaced."""

    def __init__(
        self, model: Any, forward: Callable[..., Any] | None = None, score: Callable[..., Tensor] | None = None
    ) -> None:
        self.model, self.forward, self.changed_score = model, forward, score

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, input_ids: Tensor, **options: Any) -> Any:
        output = self.model(input_ids, **options)
        return output if self.forward is None else SimpleNamespace(logits=self.forward(output.logits, input_ids))

    def score(self, input_ids: Tensor, **options: Any) -> Tensor:
        log_probs = self.model.score(input_ids, **options)
        return log_probs if self.changed_score is None else self.changed_score(log_probs, input_ids)


def peek(logits: Tensor, ids: Tensor) -> Tensor:
    """Logits that know the next token wherever the call holds it."""
    known = logits.clone()
    known[:, :-1].scatter_(-1, ids[:, 1:, None], 5.0)
    return known


def pool(logits: Tensor, ids: Tensor) -> Tensor:
    """What the original did: one query pooled over the whole sequence, here a very faint one."""
    return logits + 1e-3 * logits.mean(dim=1, keepdim=True)


def flatter(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Scores that no distribution backs: every token is likelier than the model says."""
    return 0.9 * log_probs


def test_a_model_that_looks_at_nothing_later_is_let_through() -> None:
    found = check(awake(), torch.arange(3, 90))
    assert found.future == 0.0 and found.rounding < 1e-3
    assert found.chunks == (None, 7) and len(found.cuts) == 3 and found.context >= 12
    assert check(awake("gpt2")).future == 0.0


@pytest.mark.parametrize("leak", [peek, pool])
def test_logits_that_depend_on_what_follows_are_found(leak: Callable[..., Tensor]) -> None:
    with pytest.raises(CausalityError, match="looks ahead"):
        check(Double(awake(), forward=leak), torch.arange(3, 90))


def test_a_leak_that_needs_several_tokens_at_once_is_found_in_chunks_too() -> None:
    with pytest.raises(CausalityError, match="7 tokens at a time"):
        check(Double(awake(), forward=peek), chunks=(7,))


def test_scores_that_no_distribution_backs_are_found() -> None:
    with pytest.raises(CausalityError, match="scores differ"):
        check(Double(awake(), score=flatter), torch.arange(3, 90))


def test_a_leak_has_no_perplexity() -> None:
    model, tokenizer = tiny_load()
    texts = documents(300, 200)
    report = evaluate_perplexity(model, tokenizer, texts, resamples=10)
    assert report.settings["causality"]["future"] == 0.0
    for double in (Double(model, forward=peek), Double(model, score=lambda log_probs, ids: 0.0 * log_probs)):
        with pytest.raises(CausalityError):
            evaluate_perplexity(double, tokenizer, texts, resamples=10)


def test_a_predictor_of_ones_own() -> None:
    class Bigram:
        vocab_size, dtype = 11, torch.float32
        table = torch.randn(11, 11, generator=torch.Generator().manual_seed(0))
        ahead = False

        def logits(self, ids: Tensor, chunk: int | None) -> Tensor:
            parts = ids.split(chunk or len(ids))
            return torch.cat([self.table[part.roll(-1) if self.ahead else part] for part in parts])

        def scores(self, ids: Tensor) -> Tensor:
            return self.table.log_softmax(-1)[ids[:-1], ids[1:]]

    model = Bigram()
    assert check(model, torch.arange(11)).context == 0
    model.ahead = True
    with pytest.raises(CausalityError):
        check(model, torch.arange(11))


def test_a_text_too_short() -> None:
    with pytest.raises(InputError, match="T >= 2"):
        check(awake(), torch.tensor([1]))
