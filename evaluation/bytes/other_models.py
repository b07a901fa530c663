"""Any causal language model of transformers as a baseline: read through overlapping windows, or through its recurrent
state where it has one (Mamba).
"""

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hippoformer.errors import BaseModelNotFoundError, ConfigurationError
from hippoformer.model.base_models import load_base_model, load_tokenizer

_LONGEST_WINDOW = 1_024
_RECURRENT_PIECE = 512


class OtherModel:
    """A model that scores text.

    Args:
        model: in evaluation mode. window: tokens read at once; None for a model with a recurrent state.
        overlap: tokens of a window that were scored before and are read again as context.
    """

    def __init__(self, model: Any, window: int | None, overlap: int) -> None:
        self.model, self.window, self.overlap = model, window, overlap
        self.vocab_size: int = model.get_input_embeddings().weight.shape[0]
        self.dtype: torch.dtype = model.dtype
        self.nbytes = (0, 0)
        # Older transformers continue a recurrent state one token at a time, and must be told the token's position.
        self.positions_given = "cache_position" in inspect.signature(model.forward).parameters
        self.piece = 1 if self.positions_given else _RECURRENT_PIECE
        if window is None and not self._continues():
            self.piece = 1

    @torch.no_grad()
    def scores(self, ids: Tensor) -> Tensor:
        """(T - 1,) log p of each token but the first."""
        found, start, ids = [], 0, ids.to(self.model.device)
        for logits in self._pieces(ids, None):
            targets = ids[start + 1 : start + 1 + len(logits)]  # the last of a piece predicts the first of the next
            found.append(torch.log_softmax(logits[: len(targets)].float(), -1).gather(-1, targets[:, None]).squeeze(-1))
            start += len(logits)
        return torch.cat(found)

    @torch.no_grad()
    def logits(self, ids: Tensor, chunk: int | None = None) -> Tensor:
        """(T, V) logits after each token."""
        return torch.cat(list(self._pieces(ids.to(self.model.device), chunk)))

    def _pieces(self, ids: Tensor, chunk: int | None) -> Iterator[Tensor]:
        return self._recur(ids, chunk) if self.window is None else self._slide(ids, chunk, self.window)

    def _slide(self, ids: Tensor, chunk: int | None, window: int) -> Iterator[Tensor]:
        """The first window gives all its logits, each later one those of its new tokens."""
        done, stride, longest = 0, window - self.overlap, 0
        while done < len(ids):
            # Windows end where they end for a whole text, however little of it is at hand.
            start = 0 if done < window else ((done - window) // stride + 1) * stride
            stop = min(start + window, len(ids)) if chunk is None else min(start + window, len(ids), done + chunk)
            output = self.model(input_ids=ids[None, start:stop], use_cache=True)
            if stop - start > longest:
                longest, self.nbytes = stop - start, (_nbytes(output.past_key_values), 0)
            yield output.logits[0, done - start :]
            done = stop

    def _recur(self, ids: Tensor, chunk: int | None) -> Iterator[Tensor]:
        state, read = None, 0
        for part in ids.split(min(chunk or self.piece, self.piece)):
            more = {}
            if read and self.positions_given:  # these versions expect one beyond the convolution's kernel
                position = max(read, getattr(self.model.config, "conv_kernel", 0))
                more = {"cache_position": torch.tensor([position], device=ids.device)}
            output = self.model(input_ids=part[None], cache_params=state, use_cache=True, **more)
            state, read = output.cache_params, read + len(part)
            yield output.logits[0]
        self.nbytes = (_nbytes(state), 0)

    @torch.no_grad()
    def _continues(self) -> bool:
        """Whether the state carries over the edge of a piece, which not every version of transformers does."""
        ids = torch.arange(12, device=self.model.device) % self.vocab_size
        whole, parts = (torch.cat(list(self._recur(ids, chunk))).float() for chunk in (None, 5))
        return bool((whole - parts).abs().max() <= 1e-3 * whole.abs().max())


def load_other(name: str, window: int | None = None, overlap: int | None = None, device: Any = None) -> Any:
    """(OtherModel, tokenizer) of a hub repository, a folder, a short name, or the folder of a peft adapter.

    Args:
        window: tokens read at once; by default what the model was made for, at most 1,024. overlap: half of it.

    Raises:
        BaseModelNotFoundError: not to be had. ConfigurationError: a window or overlap out of range.
    """
    adapter = Path(name) / "adapter_config.json"
    if adapter.is_file():
        model, base = _adapted(adapter)
    else:
        model, base = load_base_model(name, attn_implementation=None), name
    model, tokenizer = model.to(device).eval(), load_tokenizer(base)
    if "cache_params" in inspect.signature(model.forward).parameters:
        return OtherModel(model, None, 0), tokenizer
    text = model.config.get_text_config(decoder=True)
    most = getattr(text, "max_position_embeddings", None) or _LONGEST_WINDOW
    window = min(most, _LONGEST_WINDOW) if window is None else window
    overlap = window // 2 if overlap is None else overlap
    if not 2 <= window <= most or not 0 <= overlap < window:
        raise ConfigurationError(
            f"{name}: window={window}, overlap={overlap}; expected 2 to {most} tokens, less overlap"
        )
    return OtherModel(model, window, overlap), tokenizer


def _adapted(config: Path) -> tuple[Any, str]:
    """A base with its adapter, and the base's name."""
    try:
        base = str(json.loads(config.read_text("utf-8"))["base_model_name_or_path"])
        model = load_base_model(base)
        model.load_adapter(str(config.parent))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise BaseModelNotFoundError(
            f"the adapter {config.parent} could not be loaded ({str(error).splitlines()[0]}); expected a folder "
            "written by peft, whose adapter_config.json names a base that is at hand"
        ) from error
    return model, base


def _nbytes(value: Any) -> int:
    """Bytes of every tensor in a cache of transformers."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (list, tuple)):
        return sum(map(_nbytes, value))
    if isinstance(value, dict):
        return sum(map(_nbytes, value.values()))
    layers = getattr(value, "layers", None)
    if layers is not None:
        return sum(_nbytes(vars(layer)) for layer in layers)
    return _nbytes(vars(value)) if type(value).__name__.endswith("Cache") else 0
