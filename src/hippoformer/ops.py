"""Pure functions on tensors. No parameters, no state, no knowledge of language models.

Shape letters used in the whole package: R rows (sequences), N tokens of one step, C window slots, E episode slots,
M stored episodes (`buffer_size`), H heads, D hidden size, K key width, U value width, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

# ---------------------------------------------------------------- masks


def window_mask(query_slots: Tensor, n_slots: int, window: int, sink_tokens: int, padded: Tensor) -> Tensor:
    """Attention of a sliding window with sinks (Xiao et al. 2023, arXiv:2309.17453), over slots whose index is also
    their position.

    A query in slot q sees slot k when k <= q and k is one of the last `window` slots (q itself included) or a sink.
    A padded query sees slot 0 alone: its output is thrown away, but a softmax over nothing would be NaN.

    Args:
        query_slots: (R, N) slot of each query. padded: (R, N) bool, True where it is padding.

    Returns:
        (R, 1, N, n_slots) bool, True where attention is allowed.
    """
    slots = torch.arange(n_slots, device=query_slots.device)
    query = query_slots.unsqueeze(-1)  # (R, N, 1)
    visible = (slots <= query) & ((slots > query - window) | (slots < sink_tokens))
    return torch.where(padded.unsqueeze(-1), slots == 0, visible).unsqueeze(1)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The same mask as numbers to add to scores: 0 where allowed, the lowest finite number elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def recall_mask(valid: Tensor, first_new: Tensor, n_queries: int) -> Tensor:
    """Which episodes each query of a step may recall.

    The step's new episodes lie in slots first_new, first_new + 1, ... of their row. Query i (query 0 is the token
    before the step) has seen exactly i of them; everything stored earlier it has seen as a whole.

    Args:
        valid: (R, E) bool, slots that hold an episode.
        first_new: (R,) slot of the first episode written in this step.
        n_queries: number of queries, new tokens + 1.

    Returns:
        (R, n_queries, E) bool.
    """
    slots = torch.arange(valid.shape[1], device=valid.device)
    seen = first_new.unsqueeze(-1) + torch.arange(n_queries, device=valid.device)  # (R, N+1)
    return valid.unsqueeze(1) & (slots < seen.unsqueeze(-1))


# ---------------------------------------------------------------- slots of a buffer


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
    """Uniform draws in (0, 1), float32, that depend on nothing but their integer keys, at least one of them a tensor.

    A counter-based generator: the draw for (seed, segment, round, position) is the same in any batch, after any
    reload and in any order, which a stateful generator cannot promise. Mixing: the finaliser of MurmurHash3
    (Appleby 2011), on 32-bit words kept in int64.
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


# ---------------------------------------------------------------- rows of different lengths in one tensor


def column_of(numbers: list[int], device: torch.device) -> Tensor:
    """One number per row as (R, 1)."""
    return torch.tensor(numbers, device=device).unsqueeze(-1)


def piece(sequence: Tensor, start: list[int], new: list[int], fill: int = 0) -> Tensor:
    """Each row's own tokens start..start+new, (R, max new), `fill` where a row has fewer."""
    width = max(new)
    if len(set(start)) == 1 and min(new) == width:
        return sequence[:, start[0] : start[0] + width]
    column = torch.arange(width, device=sequence.device)
    index = (column_of(start, sequence.device) + column).clamp_max(sequence.shape[1] - 1)
    return sequence.gather(1, index).masked_fill(column >= column_of(new, sequence.device), fill)


def place(target: Tensor, values: Tensor, start: list[int], new: list[int], order: Tensor) -> None:
    """The inverse: values (R, N, ...) of tokens start..start+new go to their column of `target` (R, T, ...).

    Args:
        order: (R, T) column of each of a row's tokens in the padded input, negative for columns that `target` lacks.
    """
    width = max(new)
    column = torch.arange(width, device=target.device)
    index = column_of(start, target.device) + column  # (R, N)
    index = order.gather(1, index.clamp_max(order.shape[1] - 1))
    wanted = (column < column_of(new, target.device)) & (index >= 0)
    rows = torch.arange(target.shape[0], device=target.device).unsqueeze(-1).expand_as(index)
    target[rows[wanted], index[wanted]] = values[:, :width][wanted].to(target.dtype)


def shifted(last: Tensor, states: Tensor) -> Tensor:
    """(R, N, D) the state before each token: `last` (R, D), then `states` (R, N, D) but for their last."""
    return torch.cat((last.unsqueeze(1), states[:, :-1]), dim=1)


def last_of(hidden: Tensor, new: list[int], before: Tensor) -> Tensor:
    """(R, D): the hidden state of each row's last new token, or `before` where it has none."""
    index = column_of([max(n - 1, 0) for n in new], hidden.device).unsqueeze(-1).expand(-1, 1, hidden.shape[-1])
    last = hidden.gather(1, index).squeeze(1).to(before.dtype)
    return torch.where(column_of(new, hidden.device) > 0, last, before)


# ---------------------------------------------------------------- precision and rotation


def project(layer: nn.Linear, hidden: Tensor) -> Tensor:
    """`layer(hidden)`: in the dtype of `hidden` at inference, in that of the weights under autograd."""
    weight, bias = layer.weight, layer.bias
    if torch.is_grad_enabled() or hidden.dtype == weight.dtype:
        return layer(hidden.to(weight.dtype))
    # As one matrix: stretches cut out of a longer sequence would each be multiplied by a copy of the weights.
    flat = linear(hidden.flatten(0, -2), weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
    return flat.unflatten(0, hidden.shape[:-1])


@dataclass(frozen=True)
class Rotation:
    """How one attention layer rotates its keys (Su et al. 2021, arXiv:2104.09864): a key at position p is its content
    turned by p times fixed frequencies.

    Attributes:
        frequencies: (F,) radians a position; the first 2F channels of a head rotate, the rest are left alone.
        interleaved: pairs are channels (2i, 2i+1) when True, (i, i+F) when False.
    """

    frequencies: Tensor
    interleaved: bool

    def shift(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Moves rotated keys (R, H, C, head size) by `positions` (R,), a signed distance for each row."""
        angles = positions.to(torch.float32).unsqueeze(-1) * self.frequencies.to(keys.device)  # (R, F)
        cos, sin = angles.cos()[:, None, None], angles.sin()[:, None, None]  # (R, 1, 1, F)
        n_pairs = self.frequencies.shape[0]
        rotated, rest = keys[..., : 2 * n_pairs].float(), keys[..., 2 * n_pairs :]
        shape, dim = ((n_pairs, 2), -1) if self.interleaved else ((2, n_pairs), -2)
        first, second = rotated.unflatten(-1, shape).unbind(dim)
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=dim).flatten(-2)
        return torch.cat((turned.to(keys.dtype), rest), dim=-1)


def explain_shift(
    before: Tensor, after: Tensor, distance: int, frequencies: list[Tensor], noise: float = 0.0
) -> Rotation | None:
    """Finds the rotation that carries one layer's keys from one position to another.

    Args:
        before, after: (1, H, C, head size) keys of the same tokens, `distance` positions apart.
        frequencies: the frequency tables the model owns.
        noise: relative error that is allowed where it is more than rounding.

    Returns:
        The rotation that explains them best, or None when even that one leaves more unexplained.
    """
    best, least = None, max(noise, 0.25 if before.dtype in (torch.float16, torch.bfloat16) else 1e-2)
    size = after.float().norm().clamp_min(1e-12)
    fitting = [table for table in frequencies if 2 * table.shape[0] <= before.shape[-1]]
    for rotation in (Rotation(table, interleaved) for table in fitting for interleaved in (False, True)):
        moved = rotation.shift(before, torch.full((before.shape[0],), distance, device=before.device))
        error = ((moved.float() - after.float()).norm() / size).item()
        if error < least:
            best, least = rotation, error
    return best
