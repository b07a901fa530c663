"""Can this base model be read through a window? Measured on a few tokens, not looked up by name.

Two questions: how does each layer move its keys when the positions move, and does reading through slots, in pieces,
give what the model itself gives? A model that fails either is refused with a message that names what is supported.
"""

import inspect
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from hippoformer.configuration import HippoFormerConfig
from hippoformer.errors import ConfigurationError, HippoFormerError, NonFiniteError, UnsupportedArchitectureError
from hippoformer.model.weights import offloaded_owner
from hippoformer.ops import Rotation, explain_shift

SUPPORTED = (
    "Supported are decoders of transformers whose layers all keep ordinary key/value caches, with rotary positions "
    "(Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma 2, Gemma 3, Phi, GPT-NeoX/Pythia and their like) or with a learned "
    "position table (GPT-2)."
)
_PROBE_TOKENS = 6
_PROBE_SHIFT = 37
# What is read through a window may be this many times as far from the base as the base is from itself, ...
_NOISES = 4.0
# ... if that is no further than this: otherwise it mixes its rows, or its pieces.
_NOISIEST = 0.1
_FAILURES = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
# Names under which transformers keeps a learned position table.
_POSITION_TABLES = ("wpe", "position_embeddings", "embed_positions")


class Windowed(Protocol):
    """What is inspected: a `hippoformer.model.window.WindowedBase`, which asks for it."""

    base: PreTrainedModel
    body: nn.Module
    config: HippoFormerConfig
    n_layers: int
    cache_name: str
    vocab_size: int

    @property
    def device(self) -> torch.device: ...
    def head(self, hidden: Tensor) -> Tensor: ...
    def new_cache(self, rows: int, device: torch.device) -> Any: ...
    def read_at(self, cache: Any, ids: Tensor, fill: list[int], new: list[int]) -> Tensor: ...


@torch.no_grad()
def inspect_base(window: Windowed) -> list[Rotation] | None:
    """Measures on a few tokens how a base model places its keys, and that it can be read through slots.

    Returns:
        The rotation of each layer, or None for a model with a learned position table.

    Raises:
        UnsupportedArchitectureError: not a decoder with ordinary caches, keys that no rotation explains, or other
            numbers through slots than the model's own. ConfigurationError: no weights, or a model that does not run by
            itself.
        NonFiniteError: NaN or infinity in what the model computes from ordinary tokens.
    """
    base, body = window.base, window.body
    name = type(base).__name__
    if base.config.is_encoder_decoder or base.get_output_embeddings() is None:
        raise UnsupportedArchitectureError(f"{name} is not a decoder with a language-model head. {SUPPORTED}")
    if "position_ids" not in inspect.signature(body.forward).parameters:
        raise UnsupportedArchitectureError(f"{name} does not take position_ids. {SUPPORTED}")
    for weight, parameter in base.named_parameters():
        if parameter.is_meta and offloaded_owner(base, weight) is None:
            raise ConfigurationError(
                f"{name} has no weights: {weight} is on the meta device; load them (from_pretrained) before wrapping"
            )
    was_training = base.training
    base.eval()
    # Two rows of different texts, so that a model which mixes rows or counts columns is found out.
    ids = torch.arange(2 * _PROBE_TOKENS, device=window.device).view(2, -1) * 7 % window.vocab_size
    logits = None
    try:
        logits = base(input_ids=ids, use_cache=False).logits
        return _measure(window, ids, logits, name)
    except (torch.OutOfMemoryError, HippoFormerError):
        raise
    except _FAILURES as error:
        if logits is None:
            raise ConfigurationError(
                f"{name} does not run by itself ({error!r}): its device, dtype or quantisation must be mended before "
                "it is wrapped"
            ) from error
        raise UnsupportedArchitectureError(
            f"{name} cannot be read through a window ({error!r}). {SUPPORTED}"
        ) from error
    finally:
        base.train(was_training)


def _measure(window: Windowed, ids: Tensor, logits: Tensor, name: str) -> list[Rotation] | None:
    """See `inspect_base`; `logits` are what the base itself makes of the probe."""
    here, expected = _keys_at(window, ids, 0)
    there, _ = _keys_at(window, ids, _PROBE_SHIFT)
    if not torch.isfinite(expected).all():
        raise NonFiniteError(f"{name} computes NaN or infinity from ordinary tokens: its weights are damaged")

    buffers = window.body.named_buffers()
    tables = [b.float() for n, b in buffers if n.endswith("inv_freq") and "original" not in n]
    tables.append(torch.zeros(0, device=ids.device))  # of layers without positions
    pairs = list(zip(here, there, strict=True))
    rotations = [explain_shift(old, new, _PROBE_SHIFT, tables) for old, new in pairs]
    modules = window.body.named_modules()
    has_table = any(n.split(".")[-1] in _POSITION_TABLES for n, m in modules if isinstance(m, nn.Embedding))
    if None in rotations and (any(rotations) or not has_table):
        noise = _noise(window, ids, here, expected)
        rotations = [explain_shift(old, new, _PROBE_SHIFT, tables, _allowed(noise)) for old, new in pairs]
        if None in rotations:
            raise UnsupportedArchitectureError(
                f"{name}: no rotary rule explains the keys of its layers, which themselves differ by a relative "
                f"{noise:.2g} between two ways to read one text. {SUPPORTED}"
            )
    if window.config.window >= _PROBE_TOKENS:
        tolerance = 8.0 * torch.finfo(expected.dtype).eps ** 0.75
        for mine, theirs in ((_read_raggedly(window, ids), expected), (window.head(expected), logits)):
            error = _relative_error(mine, theirs)
            if not error <= tolerance and not error <= _allowed(own := _noise(window, ids, here, expected)):
                raise UnsupportedArchitectureError(
                    f"{name}: read in pieces through a window it computes other numbers than as a whole (relative "
                    f"error {error:.2g}; its own, between two ways to read one text, is {own:.2g}). {SUPPORTED}"
                )
    known = [rotation for rotation in rotations if rotation is not None]
    return known if len(known) == len(rotations) else None


def _allowed(noise: float) -> float:
    """The relative error that a base of this noise may have through a window; none where it is too much for noise."""
    return _NOISES * noise if noise <= _NOISIEST else 0.0


def _noise(window: Windowed, ids: Tensor, keys: list[Tensor], states: Tensor) -> float:
    """How far a base is from itself where each row is read alone, in two pieces: relative, the most of all layers' keys
    and the final states.

    It is rounding, unless activations are rounded to few bits by a scale that the whole batch shares.
    """
    cuts = (_PROBE_TOKENS // 3, _PROBE_TOKENS - 1)
    alone = [_keys_at(window, row.unsqueeze(0), 0, cut) for row, cut in zip(ids, cuts, strict=True)]
    rows = [torch.cat(parts) for parts in zip(*(one[0] for one in alone), strict=True)]
    rows.append(torch.cat([one[1] for one in alone]))
    return max(_relative_error(mine, theirs) for mine, theirs in zip(rows, (*keys, states), strict=True))


def _relative_error(mine: Tensor, theirs: Tensor) -> float:
    return ((mine - theirs).float().norm() / theirs.float().norm().clamp_min(1e-12)).item()


def _read_raggedly(window: Windowed, ids: Tensor) -> Tensor:
    """Final hidden states of the probe, its two rows read in pieces of different lengths."""
    cache = window.new_cache(2, ids.device)
    few, many = _PROBE_TOKENS // 3, _PROBE_TOKENS - 1
    first = window.read_at(cache, ids[:, :many], [0, 0], [few, many])
    rest = torch.stack((ids[0, few:], ids[1, many:].expand(_PROBE_TOKENS - few)))  # padding of row 1 is not looked at
    second = window.read_at(cache, rest, [few, many], [_PROBE_TOKENS - few, _PROBE_TOKENS - many])
    rows = (torch.cat((first[0, :few], second[0])), torch.cat((first[1], second[1, : _PROBE_TOKENS - many])))
    return torch.stack(rows)


def _keys_at(window: Windowed, ids: Tensor, offset: int, cut: int = 0) -> tuple[list[Tensor], Tensor]:
    """Keys of every layer and the final hidden state of the probe tokens, read from position `offset` on, in one piece
    or in two.
    """
    cache, position_ids = DynamicCache(), torch.arange(ids.shape[1], device=ids.device).unsqueeze(0) + offset
    states = [
        window.body(input_ids=part, position_ids=where, use_cache=True, **{window.cache_name: cache}).last_hidden_state
        for part, where in zip(ids.tensor_split([cut], 1), position_ids.tensor_split([cut], 1), strict=True)
        if part.shape[1]
    ]
    layers = getattr(cache, "layers", [])
    ordinary = [layer for layer in layers if isinstance(layer, DynamicLayer) and layer.is_initialized]
    if len(ordinary) != window.n_layers or any(
        layer.keys is None or layer.keys.shape[2] != ids.shape[1] for layer in ordinary
    ):
        raise UnsupportedArchitectureError(
            f"{type(window.base).__name__} keeps {len(ordinary)} ordinary key/value caches for {window.n_layers} "
            f"layers. {SUPPORTED}"
        )
    return [layer.keys for layer in ordinary if layer.keys is not None], torch.cat(states, dim=1)
