"""Invariant 3: one prefill = chunks of any size = token by token. What `generate` makes of it: test_generation.py."""

import itertools

import pytest
import torch

from hippoformer import HippoCache
from hippoformer.errors import InputError
from tiny import ARCHITECTURES, VARIANTS, after, awake, read_in_chunks, same_state, state_of, text

TOLERANCE = {"rtol": 0.0, "atol": 1e-4}
SOME = ["llama", "mistral-narrow", "gemma2", "gemma3", "smollm3", "gpt2"]


@pytest.mark.supports(architecture="{name}", mode="read in chunks")
@pytest.mark.parametrize(
    ("name", "option", "size"),
    [(name, "default", size) for name in ARCHITECTURES for size in (1, 7)]
    + [("llama", "default", size) for size in (13, 24, 52)]
    + [("llama", option, size) for option in VARIANTS for size in (1, 6, 7) if option != "default" or size == 6],
)
@torch.no_grad()
def test_chunks_of_any_size_give_the_same_numbers(name: str, option: str, size: int) -> None:
    model, ids = awake(name, **VARIANTS[option]), text(rows=2, length=53)
    torch.testing.assert_close(read_in_chunks(model, ids, size), model(ids).logits, **TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
@torch.no_grad()
def test_chunks_leave_the_same_state(name: str) -> None:
    model, ids = awake(name), text(rows=2, length=53)
    whole, pieces = model.new_cache(2), model.new_cache(2)
    model(ids, past_key_values=whole)
    for part in ids.split(7, dim=1):
        model(part, past_key_values=pieces)
    assert whole.lengths == pieces.lengths and whole.columns == pieces.columns
    for name_, tensor in whole.tensors().items():
        torch.testing.assert_close(pieces.tensors()[name_], tensor, **TOLERANCE, msg=lambda m, n=name_: f"{n}: {m}")


@torch.no_grad()
def test_chunks_of_a_ragged_batch_and_the_last_logits_alone() -> None:
    """Padding inside chunks, on either side, moves nothing."""
    model, ids = awake(), text(rows=3, length=50)
    mask = torch.ones(3, 50, dtype=torch.long)
    mask[1, :17], mask[2, 31:] = 0, 0
    whole, cache, sizes = model(ids, attention_mask=mask).logits, model.new_cache(3), (20, 1, 11, 18)
    pairs = zip(ids.split(sizes, dim=1), mask.split(sizes, dim=1), strict=True)
    parts = [model(part, attention_mask=real, past_key_values=cache).logits for part, real in pairs]
    torch.testing.assert_close(torch.cat(parts, 1), whole, **TOLERANCE)
    for keep in (1, 9, 50):
        kept = model(ids, attention_mask=mask, logits_to_keep=keep).logits
        torch.testing.assert_close(kept, whole[:, -keep:], **TOLERANCE)


@pytest.mark.parametrize(
    ("name", "option"),
    [(name, option) for name in SOME for option in ("default", "inner layer")]
    + [("llama", option) for option in VARIANTS if option not in ("default", "inner layer")],
)
@torch.no_grad()
def test_score_is_the_logits_of_forward(name: str, option: str) -> None:
    model, ids = awake(name, **VARIANTS[option]), text(rows=2, length=53)
    logits = model(ids).logits
    expected = logits[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    assert logits.exp().sum(-1).sub(1).abs().max() < 1e-5, "not a distribution"
    torch.testing.assert_close(model.score(ids), expected, **TOLERANCE)
    cache = model.new_cache(2)  # and continued: only the first token of a row has no prediction
    model.score(ids[:, :20], past_key_values=cache)
    torch.testing.assert_close(model.score(ids[:, 20:], past_key_values=cache), expected[:, 20:], **TOLERANCE)


@pytest.mark.supports(architecture="{name}", mode="goes on from a saved cache")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_a_saved_cache_goes_on_as_if_never_saved(name: str, tmp_path) -> None:
    model, ids, ahead = awake(name), text(rows=2, length=47), text(rows=2, length=20, seed=5)
    cache = after(model, ids)
    cache.save(tmp_path / "memory.safetensors")
    loaded = HippoCache.load(tmp_path / "memory.safetensors", model)
    assert not same_state(state_of(cache), state_of(loaded))
    one, two = (model(ahead, past_key_values=c).logits for c in (cache, loaded))
    assert torch.equal(one, two)
    assert not same_state(state_of(cache), state_of(loaded))


@torch.no_grad()
def test_a_cache_is_what_generate_thinks_it_is() -> None:
    model, ids = awake(), text(rows=2, length=47)
    cache = model.new_cache(2)
    assert cache.get_seq_length() == 0
    for done, part in zip(itertools.accumulate((20, 27)), ids.split((20, 27), dim=1), strict=True):
        out = model(part, past_key_values=cache)
        assert cache.get_seq_length() == done and out.past_key_values is cache
    with pytest.raises(InputError, match="cropped"):
        cache.crop(10)


@torch.no_grad()
def test_a_match_goes_on_across_every_edge() -> None:
    """A passage comes again; token by token it is recognised as surely as in one call."""
    model = awake("llama")
    model.hippocampus.recall.follow_gate.bias.fill_(-6.0)  # it takes several tokens in a row
    model.hippocampus.recall.match_weight.fill_(5.0)
    ids = text(rows=1, length=50)
    ids[:, 34:44] = ids[:, 4:14]
    whole, cache = model(ids).logits, model.new_cache(1)
    steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(50)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, **TOLERANCE)
