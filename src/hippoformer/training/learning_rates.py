"""How fast each parameter learns: the parameter groups of AdamW.

The two learning rates of the original (the memory's; the base's a tenth of it), and one for scalars and vectors among
the parameters of the memory: scales, biases and thresholds must travel far, are few, and are not decayed.
"""

from typing import Any

from torch import nn

from hippoformer.model.modeling import HippoFormer

_SCALAR_RATE = 10.0
_BASE_RATE = 0.1


def parameter_groups(module: nn.Module, rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """A part of the memory: matrices at the rate, scalars and vectors at ten times the rate and without decay."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "lr": rate, "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "lr": _SCALAR_RATE * rate, "weight_decay": 0.0},
    ]


def model_parameter_groups(model: HippoFormer) -> list[dict[str, Any]]:
    """The whole model at the rates of its config; no group is empty."""
    config = model.config
    base = {
        "params": [p for p in model.base.parameters() if p.requires_grad],
        "lr": _BASE_RATE * config.learning_rate,
        "weight_decay": config.weight_decay,
    }
    groups = [*parameter_groups(model.hippocampus, config.learning_rate, config.weight_decay), base]
    return [group for group in groups if group["params"]]
