"""UnigramCounts: what is counted, what predictions make of it, and that nothing of it leaks."""

import math
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hippoformer.model.cache import HippoCache
from hippoformer.model.modeling import HippoFormer
from hippoformer.training.readers import HiddenStateCache, score_documents
from tiny import VARIANTS, VOCAB, after, awake, fresh, text

KEPT = VARIANTS["unigram"]
TOLERANCE = {"rtol": 0.0, "atol": 1e-4}


def by_hand(model: HippoFormer, ids: Tensor) -> Tensor:
    """(R, T, V) of a fresh model: the base's predictions moved row by row, count by count."""
    with torch.no_grad(), model.memory_off():
        base = model(ids).logits
    weight, prior, segment = model.config.unigram_weight, 2.0, model.config.segment_len
    moved = torch.empty_like(base)
    for row, t, v in product(range(len(ids)), range(ids.shape[1]), range(VOCAB)):
        done = (t + 1) // segment * segment  # tokens in the segments that have ended when token t was read
        count = sum(int(ids[row, i] == v) for i in range(1, done))
        expected = sum(float(base[row, i - 1, v].exp()) for i in range(1, done))
        shift = weight * math.log((count + prior) / (expected + prior))
        moved[row, t, v] = base[row, t, v] + max(shift, -1.0)
    return moved.log_softmax(-1)


@torch.no_grad()
def test_predictions_move_by_what_came_against_what_was_expected() -> None:
    model, ids = fresh(**KEPT), text(rows=2, length=20)
    found = model(ids).logits
    torch.testing.assert_close(found, by_hand(model, ids), **TOLERANCE)
    with model.memory_off():
        assert (found - model(ids).logits)[:, 6:].abs().amax(-1).min() > 0.05, "nothing is moved"


@torch.no_grad()
def test_a_long_run_silences_no_other_token() -> None:
    """The base goes on expecting others all along; they become less likely by a factor of e at most."""
    model = fresh(**KEPT)
    cache = after(model, torch.full((1, 300), 5))
    unigram = cache.memory.unigram
    others = torch.arange(VOCAB) != 5
    assert unigram.expected[0, others].max() > 10 and not unigram.count[0, others].any()
    assert unigram.shift.min() == -1.0 and unigram.shift[0, 5] > 1.0


@torch.no_grad()
def test_off_is_the_base_to_the_last_bit() -> None:
    ids = text(rows=2, length=40)
    kept, plain = fresh(**KEPT), fresh(residual_readout=False)
    with kept.memory_off():
        assert torch.equal(kept(ids).logits, plain(ids).logits)
    assert plain.new_cache(1).memory.unigram.shift.shape == (1, 0)
    with kept.episodes_off():
        torch.testing.assert_close(kept(ids).logits, fresh(**KEPT)(ids).logits, **TOLERANCE)


@torch.no_grad()
def test_they_are_frozen_reset_adopted_and_saved_with_the_memory(tmp_path: Path) -> None:
    model, ids, ahead = awake(**KEPT), text(rows=1, length=40), text(rows=1, length=20, seed=3)
    cache = after(model, ids)
    cache.save(tmp_path / "memory.safetensors")
    again = HippoCache.load(tmp_path / "memory.safetensors", model)
    frozen, elsewhere = cache.copy(), model.new_cache(1)
    frozen.freeze_memory()
    elsewhere.adopt_memory(cache)
    kept = frozen.memory.unigram.tensors()
    model(ahead, past_key_values=frozen)
    for name, tensor in frozen.memory.unigram.tensors().items():
        assert torch.equal(tensor, kept[name]), f"{name} changed though it was frozen"
        assert torch.equal(again.memory.unigram.tensors()[name], kept[name]), f"{name} was not saved"
        assert torch.equal(elsewhere.memory.unigram.tensors()[name], kept[name]), f"{name} was not adopted"
    model(ahead, past_key_values=elsewhere)
    assert not torch.equal(elsewhere.memory.unigram.count, cache.memory.unigram.count)
    assert torch.equal(again.memory.unigram.count, cache.memory.unigram.count), "adopted is not copied"
    cache.reset()
    assert all(not tensor.any() for tensor in cache.memory.unigram.tensors().values())


@pytest.mark.parametrize("writes", [True, False], ids=["to a model without", "from a model without"])
@torch.no_grad()
def test_a_memory_moves_between_models_with_and_without(writes: bool, tmp_path: Path) -> None:
    with_, without = awake(**KEPT), awake(residual_readout=False)
    writer, reader = (with_, without) if writes else (without, with_)
    cache = after(writer, text(rows=1, length=40))
    cache.save(tmp_path / "memory.safetensors")
    loaded = HippoCache.load(tmp_path / "memory.safetensors", reader)
    assert torch.equal(loaded.memory.episodes.token, cache.memory.episodes.token)
    assert not loaded.memory.unigram.count.any()


@torch.no_grad()
def test_cached_states_give_the_same_numbers_and_are_not_read_twice(tmp_path: Path) -> None:
    model = awake(**KEPT)
    documents = [text(rows=1, length=n, seed=n)[0] for n in (50, 33)]
    scores = score_documents(model, HiddenStateCache(model, documents, tmp_path), range(2), rows=1)
    for document, (_, fused, base) in zip(documents, scores.tolist(), strict=True):
        assert fused == pytest.approx(float(model.score(document[None]).sum()), rel=1e-5)
        with model.memory_off():
            assert base == pytest.approx(float(model.score(document[None]).sum()), rel=1e-5)
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    HiddenStateCache(model, documents, tmp_path)
    assert files == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}


def test_the_base_learns_through_them() -> None:
    """A step's loss has the gradient of the moved prediction, and none through what was counted."""
    model, ids = awake(**KEPT), text(rows=2, length=30)
    model.base.requires_grad_(True)
    model(ids, labels=ids).loss.backward()
    by_logits = model.base.get_input_embeddings().weight.grad.clone()
    model.zero_grad()
    cache = model.new_cache(2)
    sum(-step.target_log_prob.sum() for step in model.stream(ids, [30, 30], cache)).div(58).backward()
    torch.testing.assert_close(model.base.get_input_embeddings().weight.grad, by_logits, rtol=1e-3, atol=1e-5)
