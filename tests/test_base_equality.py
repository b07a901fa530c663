"""Invariant 4: memory off, or freshly initialised, is exactly the base model with the same window.

What "the same window" means is said here a second time, slowly: the whole text through the base's own forward under an
explicit mask, or, where sinks make positions move, keys turned by transformers' own rotation.
"""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hippoformer import HippoFormer
from tiny import ARCHITECTURES, ROTARY, after, awake, fresh, text

TOLERANCE = {"rtol": 0.0, "atol": 1e-4}
LENGTH = 53


def off(model: HippoFormer, ids: Tensor) -> Tensor:
    with torch.no_grad(), model.memory_off():
        return model(ids).logits


def window_mask_by_hand(n: int, window: int, sinks: int, narrower: int | None = None) -> Tensor:
    """(1, 1, n, n) bool: who sees whom in one long text at unmoved positions."""
    mask = torch.zeros(1, 1, n, n, dtype=torch.bool)
    for query in range(n):
        for key in range(query + 1):
            near = query - key < window or key < sinks
            mask[0, 0, query, key] = near and (narrower is None or query - key < narrower)
    return mask


def base_masks(base: PreTrainedModel, n: int, window: int, sinks: int) -> Tensor | dict[str, Tensor]:
    """The masks a base takes: one for each kind of layer where it has several kinds, to be added where it is eager."""
    narrow = getattr(base.config, "sliding_window", None)
    full, near = window_mask_by_hand(n, window, sinks), window_mask_by_hand(n, window, sinks, narrow)
    if base.config._attn_implementation == "eager":
        full, near = (torch.zeros(mask.shape).masked_fill(~mask, -1e30) for mask in (full, near))
    kinds = set(getattr(base.config, "layer_types", None) or [])
    if base.config.model_type == "mistral":
        return near
    if kinds == {"full_attention", "sliding_attention"}:
        return {"full_attention": full, "sliding_attention": near}
    return full


def log_probs(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), dim=-1)


@pytest.mark.supports(architecture="{name}", mode="fresh: the base")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fresh_is_memory_off_to_the_last_bit(name: str) -> None:
    model, ids = fresh(name), text(rows=2, length=LENGTH)
    with torch.no_grad():
        out = model(ids, return_memory_stats=True)
    assert torch.equal(out.logits, off(model, ids))
    assert out.memory_stats["utilisation"] > 0, "a fresh memory does store"
    assert torch.equal(off(model, ids), off(awake(name), ids)), "memory off depends on the hippocampus"


@pytest.mark.supports(architecture="{name}", mode="memory off: the base")
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_within_the_window_it_is_the_base(name: str) -> None:
    """The base's own forward over the whole text, nothing masked by hand; to the last bit within a segment."""
    model, ids = awake(name, window=60), text(rows=2, length=LENGTH)
    torch.testing.assert_close(off(model, ids), log_probs(model.base(ids).logits), **TOLERANCE)
    assert torch.equal(off(model, ids[:, :6]), log_probs(model.base(ids[:, :6]).logits))


@pytest.mark.parametrize(
    ("name", "sinks", "length"), [(n, 0, LENGTH) for n in ROTARY] + [(n, 2, 18) for n in ARCHITECTURES]
)
@torch.no_grad()
def test_beyond_the_window_it_is_the_base_under_a_band(name: str, sinks: int, length: int) -> None:
    """Without sinks rotary positions are relative, so moving them changes nothing: one forward, one banded mask. With
    them nothing moves before token 18, the window and a segment.
    """
    model, ids = awake(name, sink_tokens=sinks), text(rows=2, length=length)

    def base(window: int, sinks: int) -> Tensor:
        mask = base_masks(model.base, length, window, sinks)
        return log_probs(model.base(ids, attention_mask=mask, use_cache=False).logits)

    expected, other = base(12, sinks), base(12 if sinks else 60, 0)
    torch.testing.assert_close(off(model, ids), expected, **TOLERANCE)
    if name != "mistral-narrow":  # whose own window of 7 is the narrower one
        least = 1e-3 if sinks else 0.1
        assert (other - expected)[:, 14:].abs().max() > least, "window or sinks do not matter to this base"


def kept_at(done: int, window: int, sinks: int) -> list[int]:
    """Tokens of a text that are still held after `done` of them: sinks and window."""
    return [t for t in range(done) if t < sinks or t >= done - window]


@torch.no_grad()
def test_sinks_beyond_the_window_by_turning_keys() -> None:
    """Segment by segment on a plain DynamicCache, whose keys transformers' own rotation moves to compact positions."""
    model, ids = awake("llama"), text(rows=1, length=LENGTH)
    config, base = model.config, model.base
    cache, held, expected = DynamicCache(), [], []
    for start in range(0, LENGTH, config.segment_len):
        part = ids[:, start : start + config.segment_len]
        new = list(range(start, start + part.shape[1]))
        seen = [*held, *new]
        mask = torch.tensor(
            [[[[k <= q and (q - k < config.window or k < config.sink_tokens) for k in seen] for q in new]]]
        )
        out = base(
            part,
            attention_mask=mask,
            position_ids=torch.arange(len(held), len(seen)).unsqueeze(0),
            past_key_values=cache,
            use_cache=True,
        )
        expected.append(log_probs(out.logits))
        keep = kept_at(seen[-1] + 1, config.window, config.sink_tokens)
        index = torch.tensor([seen.index(token) for token in keep])
        moved = torch.tensor([[place - seen.index(token) for place, token in enumerate(keep)]])
        turned = DynamicCache()
        for number, layer in enumerate(cache.layers):
            keys = layer.keys[:, :, index]
            cos, sin = base.model.rotary_emb(keys, moved)
            keys, _ = apply_rotary_pos_emb(keys, keys, cos, sin)
            turned.update(keys, layer.values[:, :, index], number)
        cache, held = turned, keep
    torch.testing.assert_close(off(model, ids), torch.cat(expected, 1), **TOLERANCE)


@pytest.mark.parametrize("sinks", [0, 2])
@torch.no_grad()
def test_a_position_table_reads_again(sinks: int) -> None:
    """GPT-2: each segment is read after the kept tokens as one text from position 0."""
    model, ids = awake("gpt2", sink_tokens=sinks), text(rows=2, length=LENGTH)
    config, expected = model.config, []
    for start in range(0, LENGTH, config.segment_len):
        part = ids[:, start : start + config.segment_len]
        kept = ids[:, kept_at(start, config.window, sinks)]
        whole = torch.cat((kept, part), dim=1)
        mask = window_mask_by_hand(whole.shape[1], config.window, sinks)
        expected.append(log_probs(model.base(whole, attention_mask=mask, use_cache=False).logits[:, kept.shape[1] :]))
    torch.testing.assert_close(off(model, ids), torch.cat(expected, 1), **TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "mistral-narrow", "gemma3", "gpt2"])
@torch.no_grad()
def test_eager_attention_sees_the_same_window(name: str) -> None:
    """Eager attention adds its mask where sdpa chooses by it; Gemma 2, with its soft caps, is eager by itself."""
    model, ids = awake(name), text(rows=2, length=LENGTH)
    expected = off(model, ids)
    model.base.set_attn_implementation("eager")
    for reader in (model, HippoFormer(model.config, model.base)):  # changed under a model, and before it was made
        torch.testing.assert_close(off(reader, ids), expected, **TOLERANCE)


@torch.no_grad()
def test_memory_can_be_switched_within_a_stream() -> None:
    """The window goes on under memory_off, nothing is stored; on again, recall works on what was stored before."""
    model, ids = awake(), text(rows=2, length=LENGTH)
    cache = model.new_cache(2)
    with model.memory_off():
        model(ids, past_key_values=cache)
    assert cache.episodes(0) == [] and cache.lengths == [LENGTH, LENGTH]
    model(ids, past_key_values=cache)
    remembered = [e.position for e in cache.episodes(0)]
    assert remembered and min(remembered) >= LENGTH, "what was read with the memory off was stored after all"
    cache = after(model, ids)
    stored = [e.position for e in cache.episodes(0, stored_only=True)]
    ahead = text(rows=2, length=10, seed=7)
    with model.memory_off():
        plain = model(ahead, past_key_values=cache).logits
    unread = off(model, torch.cat((ids, ahead), 1))[:, LENGTH:]
    torch.testing.assert_close(plain, unread, **TOLERANCE)
    assert set(stored) <= {e.position for e in cache.episodes(0)}
    with pytest.raises(ZeroDivisionError), model.memory_off():
        1 / 0  # noqa: B018
    again = model(ahead, past_key_values=cache.copy()).logits
    with model.memory_off():
        silent = model(ahead, past_key_values=cache.copy()).logits
    assert (again - silent).abs().max() > 0.1, "the memory stayed off after an error"
