"""What a HippoFormer offers to the parts that it calls itself: state, files, card. They need not import it for that."""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hippoformer.configuration import HippoFormerConfig
from hippoformer.hippocampus.circuit import Hippocampus
from hippoformer.hippocampus.spelling import Spelling
from hippoformer.model.window import WindowedBase


class Model(Protocol):
    """See `hippoformer.model.modeling.HippoFormer`. A state is a `HippoCache`, which itself holds such a model."""

    config: HippoFormerConfig
    base: PreTrainedModel
    hippocampus: Hippocampus
    window: WindowedBase
    spelling: Spelling | None
    generation_config: Any

    @property
    def dtype(self) -> torch.dtype:
        """Of the base."""

    @property
    def device(self) -> torch.device:
        """Where the base reads its tokens."""

    def state_dict(self) -> dict[str, Any]:
        """All tensors by name."""

    def take_vocabulary(self) -> None:
        """Follows a base whose embeddings were resized."""

    def anchors(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the drift probes."""

    def new_cache(self, batch_size: int = 1) -> Any:
        """An empty state."""

    def score(self, input_ids: Tensor, *, attention_mask: Tensor | None = None, past_key_values: Any = None) -> Tensor:
        """Reads into a state."""

    def save_memory(self, cache: Any, path: str | Path) -> None:
        """Writes a state to a file."""

    def load_memory(self, path: str | Path) -> Any:
        """Reads a state from a file."""
