"""The leak check before every perplexity: models that look ahead are caught, those that do not are let through."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from evaluation.common.causality import check_model
from evaluation.perplexity.run import Options, run
from hippoformer.errors import CausalityError, InputError
from tiny import awake
from tiny_texts import documents, tiny_load

IDS = torch.arange(3, 90)


class Double:
    """A HippoFormer with one of its two ways to predict replaced."""

    def __init__(self, model: Any, forward: Callable[..., Any] | None = None, factor: float = 1.0) -> None:
        self.model, self.forward, self.factor = model, forward, factor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, input_ids: Tensor, **options: Any) -> Any:
        logits = self.model(input_ids, **options).logits
        return SimpleNamespace(logits=logits if self.forward is None else self.forward(logits, input_ids))

    def score(self, input_ids: Tensor, **options: Any) -> Tensor:
        return self.factor * self.model.score(input_ids, **options)


def peek(logits: Tensor, ids: Tensor) -> Tensor:
    """Logits that know the next token wherever the call holds it."""
    known = logits.clone()
    known[:, :-1].scatter_(-1, ids[:, 1:, None], 5.0)
    return known


def pool(logits: Tensor, ids: Tensor) -> Tensor:
    """What the original did: one query pooled over the whole sequence, here a very faint one."""
    return logits + 1e-3 * logits.mean(dim=1, keepdim=True)


def peek_in_chunks(logits: Tensor, ids: Tensor) -> Tensor:
    return peek(logits, ids) if 1 < ids.shape[1] < 40 else logits


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_that_looks_at_nothing_later_is_let_through(name: str) -> None:
    found = check_model(awake(name), IDS)
    assert found["future"] == 0.0 and found["rounding"] < 1e-3


@pytest.mark.parametrize(
    ("leak", "message"), [(peek, "at once"), (pool, "looks ahead"), (peek_in_chunks, "7 tokens at a time")]
)
def test_logits_that_depend_on_what_follows_are_found(leak: Callable[..., Tensor], message: str) -> None:
    with pytest.raises(CausalityError, match=message):
        check_model(Double(awake(), forward=leak), IDS)


def test_a_leak_has_no_perplexity() -> None:
    model, tokenizer = tiny_load()
    with pytest.raises(InputError, match="T >= 2"):
        check_model(model, torch.tensor([1]))
    for double, message in ((Double(model, forward=peek), "logits"), (Double(model, factor=0.9), "scores differ")):
        with pytest.raises(CausalityError, match=message):
            run(double, tokenizer, documents(300, 200), Options())
