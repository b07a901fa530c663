"""Invariant 6: the size of the state is bounded by `buffer_size` and `window`, for any length of the stream."""

import pytest
import torch

from tiny import ARCHITECTURES, after, awake, text


@pytest.mark.supports(architecture="{name}", mode="bounded state")
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_state_stays_the_same_size_over_many_segments(name: str) -> None:
    model = awake(name)
    config, cache = model.config, model.new_cache(2)
    ids = text(rows=2, length=20 * config.segment_len)
    shapes = set()
    for part in ids.split(config.segment_len, dim=1):
        model(part, past_key_values=cache)
        tensors = cache.tensors()
        shapes.add((cache.nbytes, *((key, tensor.shape, tensor.dtype) for key, tensor in tensors.items())))
        # Views of larger buffers would hold what `nbytes` does not count.
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()
        }
        assert sum(storages.values()) <= cache.nbytes
    assert len(shapes) == 1
    assert cache.nbytes == cache.window_nbytes + cache.memory_nbytes
    assert cache.nbytes == sum(t.numel() * t.element_size() for t in cache.tensors().values())


@pytest.mark.parametrize(("size", "room"), [(1, 16), (5, 16), (6, 16), (17, 16), (7, 0)])
@torch.no_grad()
def test_stored_and_seen_never_exceed_their_bounds(size: int, room: int) -> None:
    model = awake(buffer_size=room)
    config, cache = model.config, model.new_cache(1)
    positions, keys, body = [], [], model.window.body
    body.register_forward_pre_hook(lambda *call: positions.append(int(call[2]["position_ids"].max())), with_kwargs=True)
    body.layers[0].self_attn.register_forward_hook(lambda *_: keys.append(cache.placement.limit))
    for done, part in enumerate(text(rows=1, length=120).split(size, dim=1), start=1):
        model(part, past_key_values=cache)
        episodes = cache.episodes(0)
        stored = cache.episodes(0, stored_only=True)
        assert len(stored) <= config.buffer_size
        assert len(episodes) <= config.buffer_size + config.working_slots
        assert len({e.position for e in episodes}) == len(episodes)
        assert all(0 < e.position < done * size for e in episodes)
    assert max(positions) < config.window_slots, "a position beyond the slots"
    assert max(keys) <= config.window_slots
    assert len(stored) == config.buffer_size, "the store never filled: the bound was not tested"


@torch.no_grad()
def test_size_follows_the_options() -> None:
    """Twice the buffer is twice the bytes of the store; an episode's bytes are what its fields say."""

    def nbytes(**options: int) -> tuple[int, int]:
        model = awake(**options)
        cache = after(model, text(rows=1, length=30))
        return cache.memory_nbytes, cache.window_nbytes

    small, double = (nbytes(buffer_size=size) for size in (16, 32))
    assert small[1] == double[1]
    episode = (32 + 8) * 4 + 2 * 4 + 5 * 4  # key and value; token and position; five counters
    vote = 2 * 4
    assert double[0] - small[0] == 16 * (episode + vote)
    wider = nbytes(window=24)
    one_slot = 2 * 2 * 2 * 8 * 4 + 4  # layers, keys and values, heads, head size, float32; the token
    assert wider[1] - small[1] == 12 * one_slot
