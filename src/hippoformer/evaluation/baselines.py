"""Who HippoFormer is compared with, and how each of them reads a long text.

hippoformer     with its memory, and with other buffers
window          the base alone, with shorter and longer windows
kv selection    the base with keys chosen by attention (`kv_selection`)
model           any causal language model, by its name or folder: through a window that slides with overlap, or
                through its recurrent state where it has one (Mamba)
adapter         a base with a saved LoRA adapter, read like a model
"""

import inspect
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from hippoformer.errors import BaseModelNotFoundError, ConfigurationError
from hippoformer.evaluation.causality import check
from hippoformer.evaluation.comparison import Contestant, Scored
from hippoformer.evaluation.kv_selection import Method, SelectedKeys
from hippoformer.evaluation.scoring import describe, reading
from hippoformer.evaluation.views import with_options
from hippoformer.model.base_models import load_base_model, load_tokenizer
from hippoformer.model.memory_file import fingerprint
from hippoformer.model.weights import base_fingerprint

_RECURRENT_PIECE = 512
_LONGEST_WINDOW = 1_024
_PROBE = 12
_CLOSE = 1e-3


@dataclass
class Streamed:
    """A HippoFormer, with its memory or without: its base behind the same window.

    Attributes:
        model: a HippoFormer, or a view of one. memory: whether it is read and written.
    """

    name: str
    kind: str
    options: dict[str, Any]
    tokenizer: Any
    model: Any
    memory: bool = True

    def score(self, ids: Tensor) -> Scored:
        """See `Contestant`."""
        with self._reading():
            cache, began = self.model.new_cache(1), time.perf_counter()
            nll = _nll(self.model.score(ids.unsqueeze(0).to(self.model.device), past_key_values=cache)[0])
            seconds = time.perf_counter() - began
        return Scored(nll, cache.window_nbytes, cache.memory_nbytes if self.memory else 0, seconds)

    def check(self, ids: Tensor) -> None:
        """See `Contestant`."""
        with self._reading():
            check(self.model, ids)

    def depends_on(self) -> dict[str, Any]:
        """See `Contestant`."""
        return fingerprint(self.model) | describe(self.model) | {"memory": self.memory}

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with reading(self.model), nullcontext() if self.memory else self.model.memory_off():
            yield


@dataclass
class Selecting:
    """The base with selected keys."""

    name: str
    options: dict[str, Any]
    tokenizer: Any
    selected: SelectedKeys
    kind: str = "kv selection"

    def score(self, ids: Tensor) -> Scored:
        """See `Contestant`."""
        began = time.perf_counter()
        nll = _nll(self.selected.scores(ids))
        return Scored(nll, *self.selected.nbytes, time.perf_counter() - began)

    def check(self, ids: Tensor) -> None:
        """See `Contestant`."""
        check(self.selected, ids)

    def depends_on(self) -> dict[str, Any]:
        """See `Contestant`."""
        of = self.selected
        choice = {"method": of.method, "budget": of.budget, "seed": of.seed, "config": of.config.to_dict()}
        return choice | _weights(of.base)


@dataclass
class Foreign:
    """Any causal language model of transformers.

    Attributes:
        model: in evaluation mode. window: tokens it reads at once; None for what has a recurrent state.
        overlap: tokens of a window that were scored before and are read again as context.
    """

    name: str
    tokenizer: Any
    model: Any
    window: int | None
    overlap: int
    kind: str = "model"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.vocab_size: int = self.model.get_input_embeddings().weight.shape[0]
        self.dtype: torch.dtype = self.model.dtype
        self.options = {"window": self.window, "overlap": self.overlap} if self.window else {"recurrent": True}
        self._nbytes = self._tokens_kept = 0
        # Older versions go on from a state one token at a time, and have to be told which that is.
        self._told_where = "cache_position" in inspect.signature(self.model.forward).parameters
        self._piece = self._largest_piece() if self.window is None else 0

    def score(self, ids: Tensor) -> Scored:
        """See `Contestant`."""
        began = time.perf_counter()
        nll = _nll(self.scores(ids))
        return Scored(nll, self._nbytes, 0, time.perf_counter() - began)

    def check(self, ids: Tensor) -> None:
        """See `Contestant`."""
        check(self, ids)

    def depends_on(self) -> dict[str, Any]:
        """See `Contestant`."""
        return self.options | _weights(self.model)

    @torch.no_grad()
    def scores(self, ids: Tensor) -> Tensor:
        """(T - 1,) log p of each token but the first."""
        found, start, ids = [], 0, ids.to(self.model.device)
        for logits in self._pieces(ids, None):
            targets = ids[start + 1 : start + 1 + len(logits)]  # the last of a piece foretells the first of the next
            found.append(torch.log_softmax(logits[: len(targets)].float(), -1).gather(-1, targets[:, None]).squeeze(-1))
            start += len(logits)
        return torch.cat(found)

    @torch.no_grad()
    def logits(self, ids: Tensor, chunk: int | None = None) -> Tensor:
        """(T, V) logits after each token."""
        return torch.cat(list(self._pieces(ids.to(self.model.device), chunk)))

    def _pieces(self, ids: Tensor, chunk: int | None) -> Any:
        """Logits of the tokens in order, as many at a time as are read at once."""
        yield from self._recurrent(ids, chunk) if self.window is None else self._sliding(ids, chunk)

    def _sliding(self, ids: Tensor, chunk: int | None) -> Any:
        """Windows that overlap: the first gives all its logits, each later one those of its new tokens."""
        assert self.window is not None
        done = 0
        while done < len(ids):
            # Windows end where they end for a whole text, however little of it is at hand.
            start = 0 if done < self.window else self._start_of(done)
            stop = min(start + self.window, len(ids))
            upto = stop if chunk is None else min(stop, done + chunk)
            output = self.model(input_ids=ids[None, start:upto], use_cache=True)
            if upto - start > self._tokens_kept:
                self._tokens_kept = upto - start
                self._nbytes = _state_nbytes(output.past_key_values)
            yield output.logits[0, done - start :]
            done = upto

    def _start_of(self, token: int) -> int:
        """Where the window begins that reads a token for the first time."""
        assert self.window is not None
        stride = self.window - self.overlap
        return ((token - self.window) // stride + 1) * stride

    def _recurrent(self, ids: Tensor, chunk: int | None) -> Any:
        state, size, read = None, min(chunk or self._piece, self._piece), 0
        for part in ids.split(size):
            where = {}
            if read and self._told_where:  # from a first piece as long as the kernel on, which it always is to them
                place = max(read, getattr(self.model.config, "conv_kernel", 0))
                where = {"cache_position": torch.tensor([place], device=ids.device)}
            output = self.model(input_ids=part.unsqueeze(0), cache_params=state, use_cache=True, **where)
            state, read = output.cache_params, read + len(part)
            yield output.logits[0]
        self._nbytes = _state_nbytes(state)

    @torch.no_grad()
    def _largest_piece(self) -> int:
        """How many tokens can be read at once from a state: not every version carries it over a piece's edge."""
        if self._told_where:
            return 1
        self._piece = _RECURRENT_PIECE
        ids = torch.arange(_PROBE, device=self.model.device) % self.vocab_size
        whole = torch.cat(list(self._recurrent(ids, None))).float()
        parts = torch.cat(list(self._recurrent(ids, 5))).float()
        return _RECURRENT_PIECE if (whole - parts).abs().max() <= _CLOSE * whole.abs().max() else 1


def foreign(
    name: str, window: int | None = None, overlap: int | None = None, dtype: Any = None, device: Any = None
) -> Foreign:
    """A model by its name or folder, with its own tokenizer; a folder with an adapter is a base with LoRA.

    Args:
        name: hub repository, folder of a model, folder of a peft adapter, or short name.
        window: tokens read at once; at most what the model was made for, 1,024 by default.
        overlap: tokens read again as context; half the window by default.

    Raises:
        BaseModelNotFoundError: not to be had. ConfigurationError: a window or overlap out of range.
    """
    adapter = (Path(name) / "adapter_config.json").is_file()
    if adapter:
        model, tokenizer = _adapted(name, dtype)
    else:
        model, tokenizer = load_base_model(name, dtype=dtype, attn_implementation=None), load_tokenizer(name)
    if device is not None:
        model.to(device)
    options: dict[str, Any] = {"name": name, "tokenizer": tokenizer, "model": model.eval()}
    options["kind"] = "adapter" if adapter else "model"
    if "cache_params" in inspect.signature(model.forward).parameters:
        return Foreign(**options, window=None, overlap=0)
    text = model.config.get_text_config(decoder=True)
    most = getattr(text, "max_position_embeddings", None) or _LONGEST_WINDOW
    window = min(most, _LONGEST_WINDOW) if window is None else window
    overlap = window // 2 if overlap is None else overlap
    if not 2 <= window <= most or not 0 <= overlap < window:
        raise ConfigurationError(
            f"{name}: window={window}, overlap={overlap}; expected 2 to {most} tokens, and an overlap below the window"
        )
    return Foreign(**options, window=window, overlap=overlap)


def contestants(
    model: Any,
    tokenizer: Any,
    windows: Sequence[int] = (),
    buffers: Sequence[int] = (),
    selections: Sequence[tuple[Method, int]] = (),
    models: Sequence[str] = (),
    model_window: int | None = None,
    dtype: Any = None,
) -> list[Contestant]:
    """Everybody for one comparison; the HippoFormer itself is the first, its base with the same window the second.

    Args:
        model, tokenizer: a HippoFormer and its tokenizer.
        windows: of the base alone. buffers: of the HippoFormer. selections: (method, budget) of selected keys.
        models: names or folders, see `foreign`; model_window: tokens each reads at once.

    Raises:
        ConfigurationError, UnsupportedArchitectureError, BaseModelNotFoundError: as what is asked for raises them.
    """
    config = model.config
    facts = {"window": config.window, "sink_tokens": config.sink_tokens, "buffer_size": config.buffer_size}
    own = {name: value for name, value in facts.items() if name != "buffer_size"}
    found: list[Contestant] = [
        Streamed("hippoformer", "hippoformer", facts, tokenizer, model),
        Streamed(f"base, window {config.window}", "window", own, tokenizer, model, memory=False),
    ]
    for window in windows:
        if window != config.window:
            view = with_options(model, window=window)
            found.append(
                Streamed(f"base, window {window}", "window", own | {"window": window}, tokenizer, view, memory=False)
            )
    for size in buffers:
        if size != config.buffer_size:
            view = with_options(model, buffer_size=size)
            options = facts | {"buffer_size": size}
            found.append(Streamed(f"hippoformer, buffer {size}", "hippoformer", options, tokenizer, view))
    for method, budget in selections:
        selected = SelectedKeys(model.base, config, method, budget, config.seed)
        name = f"base, window {config.window} + {budget} by {method}"
        found.append(Selecting(name, own | {"method": method, "budget": budget}, tokenizer, selected))
    found += [foreign(name, model_window, dtype=dtype, device=model.device) for name in models]
    return found


def _nll(log_probs: Tensor) -> float:
    """Sum of -log p; on the way to the CPU it waits for the device."""
    return -float(log_probs.cpu().double().sum())


def _weights(model: Any) -> dict[str, Any]:
    """What a model of transformers computes with."""
    return {"weights": base_fingerprint(model), "of": model.config.to_dict(), "device": str(model.device)}


def _adapted(folder: str, dtype: Any) -> tuple[Any, Any]:
    """A base with the adapter of a folder, and the base's tokenizer."""
    try:
        base_name = json.loads((Path(folder) / "adapter_config.json").read_text("utf-8"))["base_model_name_or_path"]
        base = load_base_model(str(base_name), dtype=dtype)
        base.load_adapter(folder)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise BaseModelNotFoundError(
            f"the adapter {folder} could not be loaded ({str(error).splitlines()[0]}); expected a folder written by "
            "peft, whose adapter_config.json names a base that is at hand"
        ) from error
    return base, load_tokenizer(str(base_name))


def _state_nbytes(state: Any) -> int:
    """Bytes of every tensor in a cache of transformers: keys and values, or convolution and recurrent states."""
    layers = state.layers if isinstance(state, DynamicCache) or hasattr(state, "layers") else [state]
    return sum(_tensors_nbytes(vars(layer)) for layer in layers)


def _tensors_nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(_tensors_nbytes, value.values()))
    return sum(map(_tensors_nbytes, value)) if isinstance(value, (list, tuple)) else 0
