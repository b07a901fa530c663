"""Bases that were not loaded in the ordinary way, or that changed after they were wrapped: they work, or an error names
the cause.
"""

from pathlib import Path

import pytest
import torch

from hippoformer import HippoCache, HippoFormer
from hippoformer.errors import InputError
from tiny import VOCAB, awake, read_in_chunks, same_state, small_config, state_of, text, tiny_base

MARGINALS = {"marginal_weight": 0.5, "residual_readout": False}
WITH_NEW = torch.tensor([[5, VOCAB + 2, 7, VOCAB, 5, VOCAB + 2, 7, VOCAB, 11]])


def resize(model: HippoFormer, size: int) -> None:
    model.base.resize_token_embeddings(size, mean_resizing=False)


# ---------------------------------------------------------------- resized embeddings


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_a_base_that_is_resized_after_wrapping(name: str, tmp_path: Path) -> None:
    """Is what a base that was resized before would be, for old text and new tokens; and its memories are saved."""
    torch.manual_seed(0)
    model = awake(name, **MARGINALS)
    resize(model, VOCAB + 3)
    before = tiny_base(name)
    before.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    before.load_state_dict(model.base.state_dict())
    other = HippoFormer(small_config(**MARGINALS), before)
    other.hippocampus.load_state_dict(awake(name, **MARGINALS).hippocampus.state_dict() | _vocabulary_of(other))
    ids = torch.cat((text(1, 40), WITH_NEW), dim=1)
    assert torch.equal(model(ids).logits, other(ids).logits)
    assert torch.equal(model.score(ids), other.score(ids))
    assert model(ids).logits.shape[-1] == model.config.vocab_size == VOCAB + 3
    assert model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, ids.shape[1] + 3)
    cache = model.new_cache()
    model(ids, past_key_values=cache)
    cache.passages(WITH_NEW)
    cache.save(tmp_path / "memory.safetensors")
    assert not same_state(state_of(cache), state_of(HippoCache.load(tmp_path / "memory.safetensors", model)))
    model.save_pretrained(tmp_path / "model")
    again = HippoFormer.from_pretrained(tmp_path / "model", base_model=before)
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("size", [VOCAB + 3, VOCAB - 1])
@torch.no_grad()
def test_a_checkpoint_from_before_a_resize(size: int, tmp_path: Path) -> None:
    """Nothing that was learnt hangs on the number of tokens."""
    model, ids = awake(), text(2, 50).clamp_max(VOCAB - 2)
    model.save_pretrained(tmp_path)
    resize(model, size)
    with pytest.warns(UserWarning, match=f"vocabulary of 97 tokens, the base has {size}"):
        again = HippoFormer.from_pretrained(tmp_path, base_model=model.base)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_checkpoint_of_a_resized_model_that_was_not_called(tmp_path: Path) -> None:
    model = awake()
    resize(model, VOCAB + 3)
    model.save_pretrained(tmp_path)
    assert HippoFormer.from_pretrained(tmp_path, base_model=model.base).config.vocab_size == VOCAB + 3


def _vocabulary_of(model: HippoFormer) -> dict[str, torch.Tensor]:
    names = ("recall.word_of_token", "recall.ending_of_token", "drift_calibrator.anchor_ids")
    return {name: tensor for name, tensor in model.hippocampus.state_dict().items() if name in names}


@pytest.mark.parametrize("size", [VOCAB + 3, VOCAB - 1])
@torch.no_grad()
def test_a_cache_from_before_a_resize_goes_on(size: int) -> None:
    """As one that was made after it: nothing was known of the new tokens, and the old ones keep their embeddings."""
    ids, ahead = text(2, 50).clamp_max(VOCAB - 2), text(2, 9, seed=3).clamp_max(VOCAB - 2)
    model = awake(**MARGINALS)
    cache = model.new_cache(2)
    model(ids, past_key_values=cache)
    resize(model, size)
    cache.passages(ahead)
    found = model(ahead, past_key_values=cache).logits
    assert found.shape[-1] == cache.memory.marginals.shift.shape[-1] == size
    expected = model(torch.cat((ids, ahead), dim=1)).logits[:, 50:]
    # The base's expectations were of another vocabulary, so marginals differ a little.
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.2)
    with model.memory_off():
        assert (model(ahead).logits - expected).abs().max() > 1.0, "what was read before does not matter"


@torch.no_grad()
def test_a_cache_that_holds_tokens_which_are_no_more_is_refused() -> None:
    model, ids = awake(), text(2, 50)
    cache = model.new_cache(2)
    model(ids, past_key_values=cache)
    resize(model, 60)
    with pytest.raises(InputError, match=r"resized from 97 to 60 tokens.*resize them back"):
        model(ids.clamp_max(59), past_key_values=cache)
    with pytest.raises(InputError, match="ids 0 to 59"):
        model(ids)
    assert read_in_chunks(model, ids.clamp_max(59), 7).shape[-1] == 60
