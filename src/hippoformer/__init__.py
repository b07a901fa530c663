"""HippoFormer: a hippocampus for any Hugging Face causal language model.

import hippoformer

model, tokenizer = hippoformer.load("smollm2-135m", window=512, buffer_size=2048)
"""

from transformers import AutoConfig, AutoModelForCausalLM

from hippoformer.chat import Conversation
from hippoformer.hippocampus.drift import EmbeddingDriftCalibrator
from hippoformer.hippocampus.episodes import Episodes
from hippoformer.hippocampus.losses import ConsolidationRScore, HippoFormerLoss
from hippoformer.hippocampus.salience import SalienceGate
from hippoformer.model.cache import Episode, HippoCache
from hippoformer.model.configuration import HippoFormerConfig
from hippoformer.model.loading import load
from hippoformer.model.modeling import HippoFormer
from hippoformer.model.outputs import HippoFormerOutput

__version__ = "0.1.0"

# The name this had in the original research code.
DifferentiablePriorityBuffer = Episodes

AutoConfig.register(HippoFormerConfig.model_type, HippoFormerConfig, exist_ok=True)
AutoModelForCausalLM.register(HippoFormerConfig, HippoFormer, exist_ok=True)

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
