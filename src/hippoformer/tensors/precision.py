"""Numbers as they ought to be: multiplied in the precision of what is multiplied (weights are kept in float32, hidden
states come as the base's), and the same to the last bit whatever else is computed beside them.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

# Numbers that PyTorch's loops on a processor take at once, at most; what is left over goes through other code.
_WHOLE = 64


def project(layer: nn.Linear, hidden: Tensor) -> Tensor:
    """`layer(hidden)`: in the dtype of `hidden` where nothing is learnt, in that of the weights where it is."""
    weight, bias = layer.weight, layer.bias
    if torch.is_grad_enabled() or hidden.dtype == weight.dtype:
        return layer(hidden.to(weight.dtype))
    # As one matrix: stretches cut out of a longer sequence would each be multiplied by a copy of the weights.
    flat = linear(hidden.flatten(0, -2), weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
    return flat.unflatten(0, hidden.shape[:-1])


def in_whole_vectors(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """An elementwise `function` of (R, P), P being any number that depends on the text.

    On a processor the last few numbers of a tensor are rounded otherwise than the same numbers further in front: one
    would hang on how many come after it. Here none is among the last.
    """
    count = values.shape[-1]
    return function(pad(values, (0, -count % _WHOLE), value=1.0))[..., :count]
