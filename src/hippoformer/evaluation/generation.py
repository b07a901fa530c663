"""Greedy continuations of rows that were read from empty memories, and how long they took."""

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hippoformer.model.rereading import left_padded, reread


@dataclass(frozen=True)
class Speed:
    """Wall time of a batch.

    Attributes:
        prompt_tokens_per_second: of reading the prompts, all rows together.
        seconds_to_first_token: from the first prompt token handed over to the first new token.
        seconds_per_token: of every later step, which makes one token in each row.
        tokens_per_second: new tokens of all rows in the time after the first.
    """

    prompt_tokens_per_second: float
    seconds_to_first_token: float
    seconds_per_token: float
    tokens_per_second: float


@torch.no_grad()
def continued(
    model: Any, prompts: Sequence[Sequence[int]], new_tokens: int, memory: bool = True
) -> tuple[list[list[int]], Speed]:
    """The `new_tokens` likeliest next tokens of each prompt, one after the other.

    Args:
        model: a HippoFormer in evaluation mode.
        prompts: token ids of each row; rows end together, padded on the left.
        new_tokens: to add to each. memory: whether it is read and written.

    Returns:
        The new ids of each row, and the speed.
    """
    ids, mask = left_padded(prompts, model.device)
    cache = model.new_cache(len(prompts))
    made: list[Tensor] = []
    with nullcontext() if memory else model.memory_off():
        began = time.perf_counter()
        first = began
        for token in _likeliest(model, cache, ids, mask, new_tokens):
            made.append(token)
            if len(made) == 1:
                first = time.perf_counter()
        ended = time.perf_counter()
    rows, later = len(prompts), max(new_tokens - 1, 1)
    after = max(ended - first, 1e-9)
    speed = Speed(
        prompt_tokens_per_second=sum(map(len, prompts)) / max(first - began, 1e-9),
        seconds_to_first_token=first - began,
        seconds_per_token=after / later,
        tokens_per_second=rows * later / after,
    )
    return torch.cat(made, dim=1).tolist(), speed


@torch.no_grad()
def decoded(model: Any, cache: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """The `new_tokens` likeliest next tokens of each row after its prompt, one after the other; `cache` goes on."""
    ids, mask = left_padded(prompts, model.device)
    return torch.cat(list(_likeliest(model, cache, ids, mask, new_tokens)), dim=1).tolist()


def _likeliest(model: Any, cache: Any, ids: Tensor, mask: Tensor, new_tokens: int) -> Iterator[Tensor]:
    """(R, 1) of each step, on the host: whoever has it knows that the device is done."""
    token = ids
    for _ in range(new_tokens):
        logits = model(token, attention_mask=mask, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        token = logits.argmax(-1, keepdim=True)
        mask = torch.ones_like(token)
        yield token.cpu()


def read_texts(model: Any, texts: Sequence[Sequence[int]]) -> Any:
    """The state after the texts, each read from nothing."""
    ids, mask = left_padded(texts, model.device)
    cache = model.new_cache(len(texts))
    model.score(ids, attention_mask=mask, past_key_values=cache)
    return cache


def reminded(cache: Any, cues: Sequence[Sequence[int]], n_tokens: int) -> Any:
    """A copy of the state that has read again what fits the cue of each row, `n_tokens` at most."""
    return reread(cache, *left_padded(cues, cache.model.device), n_tokens=n_tokens)


def first_line(tokenizer: Any, ids: Sequence[int]) -> str:
    """What was said up to the end of its line."""
    return tokenizer.decode(ids).strip().partition("\n")[0].strip()
