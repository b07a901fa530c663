"""Numbers as they ought to be: multiplied in the precision of what is multiplied (weights are kept in float32, hidden
states come as the base's).
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


def project(layer: nn.Linear, hidden: Tensor) -> Tensor:
    """`layer(hidden)`: in the dtype of `hidden` where nothing is learnt, in that of the weights where it is."""
    weight, bias = layer.weight, layer.bias
    if torch.is_grad_enabled() or hidden.dtype == weight.dtype:
        return layer(hidden.to(weight.dtype))
    # As one matrix: stretches cut out of a longer sequence would each be multiplied by a copy of the weights.
    flat = linear(hidden.flatten(0, -2), weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
    return flat.unflatten(0, hidden.shape[:-1])
