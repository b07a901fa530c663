"""Gradient checkpointing: decoder layers of a live base that keep less for the backward pass.

transformers' own gradient checkpointing takes the key/value cache away, and the window is one. Here a layer's slots are
part of its input and output: it runs on a cache of its own that holds the slots as they were, so it can run once more
in the backward pass and write the same (Chen et al. 2016, arXiv:1604.06174).
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hippoformer.model.modeling import HippoFormer
from hippoformer.model.window import WindowCache


def checkpoint_layers(model: HippoFormer) -> None:
    """From now on the base's layers keep their input alone and recompute the rest in the backward pass."""
    for number in range(model.window.n_layers):
        layer = model.window.layer(number + 1)
        layer.forward = _checkpointed(layer.forward, number)


def _checkpointed(forward: Callable[..., Any], number: int) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, WindowCache)), None)
        if cache is None or not torch.is_grad_enabled() or not cache.layers[number].is_initialized:
            return forward(*args, **kwargs)  # the very first piece makes the slots, and is kept whole

        def again(keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
            own = copy.copy(before)
            own.layers = [*before.layers]
            own.layers[number] = copy.copy(before.layers[number])
            own.layers[number].fill(keys, values)
            args = tuple(own if value is cache else value for value in args)
            kwargs = {name: own if value is cache else value for name, value in kwargs.items()}
            return forward(*args, **kwargs), own.layers[number].keys, own.layers[number].values

        before = copy.copy(cache)  # with the placement of now
        layer = cache.layers[number]
        output, keys, values = checkpoint(again, layer.keys, layer.values, *args, use_reentrant=False, **kwargs)
        layer.fill(keys, values)
        return output

    return run
