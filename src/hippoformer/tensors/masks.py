"""Who may look at whom: the base model's window with sinks, and recall's view of the episodes."""

import torch
from torch import Tensor


def window_mask(query_slots: Tensor, n_slots: int, window: int, sink_tokens: int, padded: Tensor) -> Tensor:
    """Attention of a sliding window with sinks, over slots whose index is also their position.

    A query in slot q sees slot k when k <= q and k is one of the last `window` slots (q itself included) or a sink.
    A padded query sees slot 0 alone: its output is thrown away, but a softmax over nothing would be NaN.

    Args:
        query_slots: (R, N) slot of each query.
        n_slots: number of key slots, from slot 0.
        window: span of the window in tokens, the query included.
        sink_tokens: number of leading slots that stay visible (Xiao et al. 2023, arXiv:2309.17453).
        padded: (R, N) bool, True where the query is padding.

    Returns:
        (R, 1, N, n_slots) bool, True where attention is allowed.
    """
    slots = torch.arange(n_slots, device=query_slots.device)
    query = query_slots.unsqueeze(-1)  # (R, N, 1)
    visible = (slots <= query) & ((slots > query - window) | (slots < sink_tokens))
    visible = torch.where(padded.unsqueeze(-1), slots == 0, visible)
    return visible.unsqueeze(1)


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
