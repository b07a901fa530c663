"""The same model under another gate, or under other options: the controls that it has to beat.

A view shares all weights with the model itself, which stays as it is.
"""

import copy
from typing import Any

import torch
from torch import nn

from hippoformer.configuration import HippoFormerConfig
from hippoformer.hippocampus.salience import SalienceGate
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
    hippocampus = model.hippocampus
    # Recall and fusion keep options of their own, so the view needs its own of both.
    hippocampus = _view(hippocampus, recall=_view(hippocampus.recall), fusion=_view(hippocampus.fusion))
    hippocampus.configure(HippoFormerConfig(**(model.config.to_dict() | options)))
    other = _view(model, hippocampus=hippocampus)
    other.config = hippocampus.config
    other.window = WindowedBase(model.base, other.config)
    return other


def _with_gate(model: Any, gate: SalienceGate) -> Any:
    return _view(model, hippocampus=_view(model.hippocampus, salience_gate=gate))


def _view(module: Any, **replaced: nn.Module) -> Any:
    """A copy of a module that shares its weights, some of its modules replaced."""
    other = copy.copy(module)
    other._modules = module._modules | replaced
    return other
