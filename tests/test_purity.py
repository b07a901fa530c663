"""Invariant 5: a call changes nothing but the cache it is handed, and the same call twice gives the same logits."""

import copy

import pytest
import torch
from torch import Tensor

from hippoformer import HippoFormer
from tiny import ARCHITECTURES, after, awake, same_state, state_of, text


def everything(model: HippoFormer) -> dict[str, Tensor]:
    """Parameters and all buffers, also those that are not saved."""
    return {n: t.detach().clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}


def changed(before: dict[str, Tensor], model: HippoFormer) -> list[str]:
    after = everything(model)
    return [name for name in before if not torch.equal(before[name], after[name])]


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_a_call_leaves_the_model_and_the_input_alone(name: str) -> None:
    model, ids = awake(name), text(rows=2, length=50)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    before, options, given = everything(model), model.config.to_dict(), (ids.clone(), mask.clone())
    random_state = torch.get_rng_state()
    first = model(ids, attention_mask=mask, labels=ids, return_salience=True, return_memory_stats=True)
    model.score(ids, mask)
    model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0)
    with model.memory_off():
        model(ids)
    after(model, ids).copy()
    assert not changed(before, model)
    assert torch.equal(torch.get_rng_state(), random_state), "replay draws from the global generator"
    assert model.config.to_dict() == options and not model.training
    assert torch.equal(ids, given[0]) and torch.equal(mask, given[1])
    second = model(ids, attention_mask=mask, labels=ids)
    assert torch.equal(first.logits, second.logits) and torch.equal(first.loss, second.loss)


def test_reading_in_train_mode_leaves_the_model_alone() -> None:
    """Training changes parameters by the optimizer alone: no running averages, no counters."""
    model, ids = awake().train(), text(rows=2, length=50)
    before = everything(model)
    model(ids, labels=ids).loss.backward()
    assert not changed(before, model)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
@torch.no_grad()
def test_caches_do_not_touch_each_other(name: str) -> None:
    model, ids = awake(name), text(rows=2, length=50)
    cache, bystander = model.new_cache(2), model.new_cache(2)
    model(text(rows=2, length=40, seed=8), past_key_values=bystander)
    before = state_of(bystander)
    model(ids, past_key_values=cache)
    assert not same_state(before, state_of(bystander))
    assert same_state(before, state_of(cache)), "a cache that was read into has to change"
    cache.adopt_memory(bystander)
    model(ids, past_key_values=cache)
    assert not same_state(before, state_of(bystander)), "adopted is not copied"
    # Interleaved reading of two streams is each stream on its own.
    one, two = model.new_cache(2), model.new_cache(2)
    mixed = []
    for part, other in zip(ids.split(9, dim=1), text(rows=2, length=50, seed=8).split(9, dim=1), strict=True):
        mixed.append(model(part, past_key_values=one).logits)
        model(other, past_key_values=two)
    alone = model.new_cache(2)
    expected = [model(part, past_key_values=alone).logits for part in ids.split(9, dim=1)]
    assert torch.equal(torch.cat(mixed, 1), torch.cat(expected, 1))


@pytest.mark.parametrize("duplicate", [lambda cache: cache.copy(), copy.deepcopy], ids=["copy", "deepcopy"])
@torch.no_grad()
def test_a_copy_is_independent(duplicate) -> None:
    model, ids, ahead = awake(), text(rows=2, length=47), text(rows=2, length=20, seed=4)
    cache = after(model, ids)
    before, lengths, columns = state_of(cache), list(cache.lengths), cache.columns
    twin = duplicate(cache)
    assert twin.model is model, "a copy of the state must not copy the model"
    assert not same_state(before, state_of(twin))
    first = model(ahead, past_key_values=twin).logits
    assert not same_state(before, state_of(cache)) and (cache.lengths, cache.columns) == (lengths, columns)
    assert torch.equal(model(ahead, past_key_values=cache).logits, first)
    cache.reset()
    assert not same_state(state_of(twin), state_of(duplicate(twin))) and twin.lengths == [67, 67]


@torch.no_grad()
def test_reset_is_as_new() -> None:
    model, ids = awake(), text(rows=2, length=47)
    cache = after(model, ids)
    cache.reset()
    assert cache.lengths == [0, 0] and cache.get_seq_length() == 0 and cache.episodes(0) == []
    assert torch.equal(model(ids, past_key_values=cache).logits, model(ids).logits)


@torch.no_grad()
def test_a_frozen_store_is_read_and_not_written() -> None:
    model, ids, ahead = awake(), text(rows=2, length=47), text(rows=2, length=31, seed=6)
    cache = after(model, ids)
    cache.freeze_memory()
    store = slice(0, model.config.buffer_size)
    names = ("key", "value", "token", "position", "salience", "priority", "age")
    before = {name: getattr(cache.memory.episodes, name)[:, store].clone() for name in names}
    logits = model(ahead, past_key_values=cache).logits
    for name in names:
        assert torch.equal(getattr(cache.memory.episodes, name)[:, store], before[name]), name
    with model.memory_off():
        off = model(torch.cat((ids, ahead), 1)).logits[:, -31:]
    assert (logits - off).abs().max() > 0.1
    cache.freeze_memory(False)
    model(text(rows=2, length=31, seed=7), past_key_values=cache)
    assert not torch.equal(cache.memory.episodes.position[:, store], before["position"])
