"""The same model with other weights: what a memory may have to be read by."""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from hippoformer.errors import CheckpointError, ConfigurationError
from hippoformer.model.modeling import HippoFormer

_GROUP = 32  # weights that share a scale


def over_another_base(model: HippoFormer, base: PreTrainedModel) -> HippoFormer:
    """A model's hippocampus, and nothing else of it, over another base of the same shape.

    Raises:
        CheckpointError: a base of another shape.
    """
    config = copy.deepcopy(model.config)
    config.use_lora = False
    other = HippoFormer(config, base)
    try:
        other.hippocampus.load_state_dict(model.hippocampus.state_dict())
    except RuntimeError as error:
        raise CheckpointError(f"the hippocampus does not fit the other base: {error}") from error
    other.spelling = model.spelling
    return other


def round_weights(base: PreTrainedModel, bits: int) -> None:
    """Other weights of the same model: every linear layer but the head rounded to `bits` bits, in place.

    Round to nearest between the smallest and the largest weight of each group of 32 in a row, as the simplest
    quantisations do.

    Raises:
        ConfigurationError: no such number of bits.
    """
    if not 1 <= bits <= 8:
        raise ConfigurationError(f"bits={bits}; expected a number from 1 to 8")
    head = base.get_output_embeddings()
    for layer in base.modules():
        if isinstance(layer, nn.Linear) and layer is not head:
            for group in layer.weight.data.split(_GROUP, dim=1):
                low, high = group.float().aminmax(dim=1, keepdim=True)
                step = ((high - low) / (2**bits - 1)).clamp_min(torch.finfo(torch.float32).tiny)
                group.copy_(((group.float() - low) / step).round() * step + low)
