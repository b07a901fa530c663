"""Numbers about a memory and a gate, for `return_memory_stats` and for logs."""

from typing import Any

import torch
from torch import Tensor

from hippoformer.model.cache import HippoCache


def memory_stats(cache: HippoCache, reactivated: int) -> dict[str, Any]:
    """State of the store after a call, means over all rows.

    Returns:
        utilisation (share of `buffer_size`), stored (episodes per row), mean priority, effective priority and age of
        stored episodes (0 for an empty store), `reactivated` by replay in this call, and bytes of state.
    """
    n_stored = cache.config.buffer_size
    store = cache.memory.episodes.slots(0, n_stored)
    valid = store.valid
    count = valid.sum().clamp_min(1)

    def mean(values: Tensor) -> float:
        return float(torch.where(valid, values, 0.0).sum() / count)

    return {
        "stored": valid.sum(-1).tolist(),
        "utilisation": float(valid.float().mean()) if n_stored else 0.0,
        "mean_priority": mean(store.priority),
        "mean_effective_priority": mean(store.effective_priority(cache.config.decay)),
        "mean_age": mean(store.age),
        "reactivated": reactivated,
        "window_nbytes": cache.window_nbytes,
        "memory_nbytes": cache.memory_nbytes,
    }


def salience_stats(salience: Tensor) -> dict[str, float]:
    """Mean, standard deviation and tagged share (above 0.5) of the salience of real tokens, a flat tensor."""
    return {
        "mean": float(salience.mean()),
        "std": float(salience.std(unbiased=False)),
        "tagged_share": float((salience > 0.5).float().mean()),
    }
