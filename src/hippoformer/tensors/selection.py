"""Choosing and moving rows of a buffer: ordered top-k, gathering, and draws that need no generator."""

import torch
from torch import Tensor


def take(buffer: Tensor, index: Tensor) -> Tensor:
    """Gathers slots: buffer (R, E, ...), index (R, J) int64 -> (R, J, ...)."""
    return buffer.flatten(0, 1).index_select(0, _flat(buffer, index)).unflatten(0, index.shape)


def put(buffer: Tensor, index: Tensor, new: Tensor) -> Tensor:
    """Writes slots: buffer (R, E, ...) with new (R, J, ...) at index (R, J).

    In place without autograd (the buffer is state and owned by the caller), on a copy where a graph may still need the
    old values.
    """
    if torch.is_grad_enabled():
        buffer = buffer.clone()
    new = new.to(buffer.dtype).flatten(0, 1)
    buffer.view(buffer.shape[0] * buffer.shape[1], *buffer.shape[2:]).index_copy_(0, _flat(buffer, index), new)
    return buffer


def _flat(buffer: Tensor, index: Tensor) -> Tensor:
    """Slots (R, J) as slots of all rows laid end to end, (R J): whole slots are then copied, not single numbers."""
    first = torch.arange(buffer.shape[0], device=buffer.device).unsqueeze(-1) * buffer.shape[1]
    return (index + first).flatten()


def winners(score: Tensor, k: int) -> Tensor:
    """The k best slots of each row, in their old order, empty ones first.

    Args:
        score: (R, J) float, slots laid out from old to new; -inf marks a slot that cannot win. Equal scores go to the
            newer slot.
        k: number of winners, at most J.

    Returns:
        (R, k) int64 indices into J. Where fewer than k slots can win, the leading indices point to slots whose score
        is -inf.
    """
    last = score.shape[1] - 1
    # A stable sort of the slots laid out newest first breaks ties towards the newer slot on every device.
    chosen = last - score.flip(-1).argsort(dim=-1, descending=True, stable=True)[:, :k]
    empty = score.gather(-1, chosen).isneginf()
    return chosen.gather(-1, chosen.masked_fill(empty, -1).argsort(dim=-1, stable=True))


def hashed_uniform(*keys: Tensor | int) -> Tensor:
    """Uniform draws in (0, 1) that depend on nothing but their integer keys.

    A counter-based generator: the draw for (seed, segment, round, position) is the same in any batch, after any
    reload and in any order, which a stateful generator cannot promise. Mixing: the finaliser of MurmurHash3
    (Appleby 2011), on 32-bit words kept in int64.

    Args:
        keys: integers or int64 tensors that broadcast together; at least one tensor.

    Returns:
        float32 tensor of the broadcast shape.
    """
    mask = 0xFFFFFFFF
    state: Tensor | int = 0x9E3779B9
    for key in keys:
        state = (state ^ (key & mask)) & mask
        state = ((state ^ (state >> 16)) * 0x85EBCA6B) & mask
        state = ((state ^ (state >> 13)) * 0xC2B2AE35) & mask
        state = state ^ (state >> 16)
    if not isinstance(state, Tensor):
        raise TypeError("hashed_uniform needs at least one tensor key, so that the draw has a shape")
    return ((state >> 8).to(torch.float32) + 0.5) / 2.0**24
