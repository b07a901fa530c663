"""Invariant 5, in time: calls from several threads, each with its own cache, give what each gives alone."""

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TextIteratorStreamer

from hippoformer import HippoFormer
from tiny import VARIANTS, VOTES, awake, same_state, state_of, text
from tiny_texts import tiny_load


@pytest.fixture(autouse=True)
def _threads_alternate_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def side_by_side(*jobs: Callable[[], Any]) -> list[Any]:
    """What each job gives, all of them started at the same moment in threads of their own."""
    found: list[Any] = [None] * len(jobs)
    together = threading.Barrier(len(jobs))

    def run(number: int) -> None:
        together.wait()
        try:
            found[number] = jobs[number]()
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in found:
        if isinstance(one, Exception):
            raise one
    return found


def read(model: HippoFormer, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of a text read in chunks, and the state after it."""
    cache = model.new_cache()
    with torch.no_grad():
        logits = [model(part, past_key_values=cache).logits for part in ids.split(7, dim=1)]
    return torch.cat(logits, dim=1), state_of(cache)


@pytest.mark.parametrize("option", ["default", "inner layer", "two layers"])
def test_each_reads_as_if_alone(option: str) -> None:
    model = awake(**VARIANTS[option])
    texts = [text(rows=1, length=60, seed=seed) for seed in range(4)]
    alone = [read(model, ids) for ids in texts]
    together = side_by_side(*(lambda ids=ids: read(model, ids) for ids in texts))
    for (logits, state), (expected, before) in zip(together, alone, strict=True):
        assert torch.equal(logits, expected)
        assert not same_state(state, before)


def test_two_models_on_one_base_read_their_own_layers() -> None:
    one = awake(**VOTES, memory_layer=1)
    other = HippoFormer(awake(**VOTES, memory_layer=2).config, one.base)
    other.hippocampus.load_state_dict(one.hippocampus.state_dict())
    ids = text(rows=1, length=60)
    alone = [read(model, ids)[0] for model in (one, other)]
    together = side_by_side(lambda: read(one, ids)[0], lambda: read(other, ids)[0])
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    assert not torch.equal(*alone)


def test_memory_is_off_in_one_thread_alone() -> None:
    model, ids = awake(residual_readout=False, unigram_weight=0.5), text(rows=1, length=60)

    def off() -> Tensor:
        with model.memory_off():
            return read(model, ids)[0]

    def without_episodes() -> Tensor:
        with model.episodes_off():
            return read(model, ids)[0]

    jobs = (off, without_episodes, lambda: read(model, ids)[0])
    alone = [job() for job in jobs]
    together = side_by_side(*jobs)
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    assert not any(torch.equal(alone[a], alone[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    with model.memory_off():
        assert not model.episodes_on and not model.unigram_on
        assert side_by_side(lambda: model.episodes_on and model.unigram_on) == [True]
    other = awake()
    with pytest.raises(RuntimeError, match="enough"), model.memory_off(), model.episodes_off():
        assert not model.episodes_on and other.episodes_on and other.unigram_on
        raise RuntimeError("enough")
    assert model.episodes_on and model.unigram_on


@pytest.mark.supports(architecture="llama", mode="streamer")
def test_streamers_of_two_generations_get_their_own_text() -> None:
    """As servers do it: `generate` in a thread, its text read from a `TextIteratorStreamer` in another."""
    model, tokenizer = tiny_load()
    prompts = [text(rows=1, length=40, seed=seed) for seed in range(3)]

    def generate(prompt: Tensor, streamer: TextIteratorStreamer | None = None) -> Tensor:
        mask = torch.ones_like(prompt)
        options = {"do_sample": False, "no_repeat_ngram_size": 2, "max_new_tokens": 12, "pad_token_id": 0}
        return model.generate(
            prompt, attention_mask=mask, past_key_values=model.new_cache(), streamer=streamer, **options
        )

    def streamed(prompt: Tensor) -> str:
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
        thread = threading.Thread(target=generate, args=(prompt, streamer))
        thread.start()
        told = "".join(streamer)
        thread.join()
        return told

    alone = [tokenizer.decode(generate(prompt)[0, prompt.shape[1] :]) for prompt in prompts]
    assert side_by_side(*(lambda prompt=prompt: streamed(prompt) for prompt in prompts)) == alone
    assert len(set(alone)) == 3
