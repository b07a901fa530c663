"""The same model under another gate, or under other options: the controls that it has to beat.

A view shares all weights with the model itself, which stays as it is.
"""

import copy
from typing import Any

import torch

from hippoformer.hippocampus.salience import SalienceGate
from hippoformer.model.configuration import HippoFormerConfig
from hippoformer.model.window import WindowedBase


def untrained_gate(model: Any, seed: int = 0) -> Any:
    """The model with a gate as it is before training, plain surprise left out: what knowing nothing gives."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        gate = SalienceGate(model.hippocampus.width, model.hippocampus.config).to(model.device).eval()
    gate.surprise_weight.data.zero_()
    return _with_gate(model, gate)


def unsmoothed_gate(model: Any) -> Any:
    """The model with its own gate, smoothing over time switched off: each transition is judged by itself."""
    gate = copy.deepcopy(model.hippocampus.salience_gate)
    with torch.no_grad():
        gate.smoothing.zero_()
        gate.smoothing[-1] = 1.0
    return _with_gate(model, gate)


def with_options(model: Any, **options: Any) -> Any:
    """The model with another window, buffer, or other options that shape no weights.

    Raises:
        ConfigurationError: options that contradict each other, or a window beyond the base's positions.
    """
    other, hippocampus = copy.copy(model), copy.copy(model.hippocampus)
    other._modules = dict(model._modules)
    other.config = hippocampus.config = HippoFormerConfig(**(model.config.to_dict() | options))
    other.window = WindowedBase(model.base, other.config)
    other._modules["hippocampus"] = hippocampus
    return other


def _with_gate(model: Any, gate: SalienceGate) -> Any:
    other, hippocampus = copy.copy(model), copy.copy(model.hippocampus)
    other._modules, hippocampus._modules = dict(model._modules), dict(model.hippocampus._modules)
    hippocampus._modules["salience_gate"] = gate
    other._modules["hippocampus"] = hippocampus
    return other
