"""HippoFormer: a hippocampus for any Hugging Face causal language model.

import hippoformer

model, tokenizer = hippoformer.load("smollm2-135m", window=512, buffer_size=2048)

Importing this imports neither torch nor transformers: the names below are imported when they are first used, and the
Auto classes of transformers learn of the model when they are imported (`registration`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hippoformer.registration import register_with_transformers

if TYPE_CHECKING:
    from hippoformer.chat import Conversation
    from hippoformer.configuration import HippoFormerConfig
    from hippoformer.hippocampus.drift import EmbeddingDriftCalibrator
    from hippoformer.hippocampus.episodes import Episodes
    from hippoformer.hippocampus.episodes import Episodes as DifferentiablePriorityBuffer
    from hippoformer.hippocampus.salience import SalienceGate
    from hippoformer.model.cache import Episode, HippoCache
    from hippoformer.model.loading import load
    from hippoformer.model.modeling import HippoFormer
    from hippoformer.model.outputs import HippoFormerOutput
    from hippoformer.training.credit import ConsolidationRScore, HippoFormerLoss

__version__ = "0.1.0"

_MODULES = {
    "ConsolidationRScore": "training.credit",
    "Conversation": "chat",
    "EmbeddingDriftCalibrator": "hippocampus.drift",
    "Episode": "model.cache",
    "Episodes": "hippocampus.episodes",
    "HippoCache": "model.cache",
    "HippoFormer": "model.modeling",
    "HippoFormerConfig": "configuration",
    "HippoFormerLoss": "training.credit",
    "HippoFormerOutput": "model.outputs",
    "SalienceGate": "hippocampus.salience",
    "load": "model.loading",
}
# Names in the original research code.
_ALIASES = {"DifferentiablePriorityBuffer": "Episodes"}

__all__ = [
    "ConsolidationRScore",
    "Conversation",
    "DifferentiablePriorityBuffer",
    "EmbeddingDriftCalibrator",
    "Episode",
    "Episodes",
    "HippoCache",
    "HippoFormer",
    "HippoFormerConfig",
    "HippoFormerLoss",
    "HippoFormerOutput",
    "SalienceGate",
    "load",
]


def __getattr__(name: str) -> Any:
    known = _ALIASES.get(name, name)
    if known not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[known]}"), known)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_transformers()
