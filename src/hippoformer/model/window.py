"""The base model behind a sliding window with sinks, at positions that never leave its trained range.

Every row owns C = sinks + window + segment key/value slots, and a token's slot *is* its rotary position. Tokens of a
segment fill slots from the left; at a segment end what has left the window is dropped, the rest moves up, and the
moved keys are turned to their new positions (StreamingLLM's sinks, Xiao et al. 2023, arXiv:2309.17453). Everything is
aligned to the row's own segments, so any chunking of a stream gives the same numbers, and no position exceeds C.

Models with learned absolute positions cannot turn their keys: they read the kept tokens again at their new positions.

Nothing here goes by a model's name: `inspect_base` measures how each layer moves its keys.
"""

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from hippoformer.configuration import HippoFormerConfig
from hippoformer.errors import ConfigurationError, InputError, UnsupportedArchitectureError
from hippoformer.model.inspection import inspect_base
from hippoformer.model.weights import computing_device, vocabulary_size
from hippoformer.ops import Rotation, additive, column_of, put, take, window_mask

NO_CHECKPOINTING = (
    "transformers' gradient checkpointing takes the key/value cache away from the layers, and the window is one: leave "
    "it off; call hippoformer.training.readers.checkpoint_layers(model) (hippoformer train --gradient_checkpointing)"
)
# Who listens to which layer in calls of the current thread. A layer gets one permanent hook, which looks its listener
# up here, so that nothing of a call lives on the shared base.
_LISTENERS: ContextVar[Mapping[nn.Module, Callable[[Any], None]]] = ContextVar("listeners")
_HOOKING, _HOOKED = threading.Lock(), "_hippoformer_tap"
# Tokens whose logits exist at once: large enough for a good matrix product, small enough for the cache.
_HEAD_BLOCK = 64


def window_fill(done: int, config: HippoFormerConfig) -> int:
    """Key/value slots in use after `done` tokens: sinks and window at the last segment end, and the tokens since."""
    since = done % config.segment_len
    return min(done - since, config.sink_tokens + config.window) + since


@dataclass
class Placement:
    """Where the tokens of one step go: set on the cache for the time of one call of the base model.

    Attributes:
        slots: (R, N) slot of each token; padding goes to the spare slot behind the last.
        limit: slots that any row uses, old and new.
        contiguous: first slot, where all rows write the same slots without padding.
    """

    slots: Tensor
    limit: int
    contiguous: int | None


class WindowLayer(CacheLayerMixin):
    """Key/value slots of one attention layer: (R, key/value heads, C + 1, head size), the last one spare."""

    is_sliding = False
    is_croppable = False  # see HippoCache.crop
    keys: Tensor
    values: Tensor

    def __init__(self, n_slots: int) -> None:
        super().__init__()
        self.n_slots = n_slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates the slots like the first keys and values, (R, heads, N, head size)."""
        of = (key_states, value_states)
        self.fill(*(like.new_zeros(*like.shape[:2], self.n_slots + 1, like.shape[3]) for like in of))

    def update(
        self, key_states: Tensor, value_states: Tensor, placement: Placement, **_: object
    ) -> tuple[Tensor, Tensor]:
        """Writes N new keys and values where the placement says; returns all slots in use."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = _write(self.keys, key_states, placement)
        self.values = _write(self.values, value_states, placement)
        return self.keys[:, :, : placement.limit], self.values[:, :, : placement.limit]

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Takes whole slot tensors, (R, heads, C + 1, head size)."""
        self.keys, self.values, self.dtype, self.device = keys, values, keys.dtype, keys.device
        self.is_initialized = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Key length and offset; the masks are made here, so only the outermost length matters."""
        return self.n_slots, 0

    def get_seq_length(self) -> int:
        """Slots allocated; positions are derived by the cache, not by its layers."""
        return self.n_slots if self.is_initialized else 0

    def get_max_length(self) -> int:
        """No limit on the stream."""
        return -1

    get_max_cache_shape = get_max_length  # its name in the first releases of transformers 5, where it is abstract


def _write(slots: Tensor, new: Tensor, placement: Placement) -> Tensor:
    if torch.is_grad_enabled():
        slots = slots.clone()  # a graph may still need the old values: attention keeps keys for the queries' gradients
    if placement.contiguous is not None:
        slots[:, :, placement.contiguous : placement.contiguous + new.shape[2]] = new
    else:
        rows = torch.arange(new.shape[0], device=new.device).unsqueeze(-1)
        slots[rows, :, placement.slots] = new.transpose(1, 2)
    return slots


class WindowedBase:
    """How to read through a base model's window. Holds no state of any stream.

    Args:
        base: a causal language model of transformers.
        config: window, sinks and segment.

    Raises:
        UnsupportedArchitectureError, ConfigurationError, NonFiniteError: see `inspect_base`.
    """

    def __init__(self, base: PreTrainedModel, config: HippoFormerConfig) -> None:
        self.base, self.config = base, config
        self.body: nn.Module = base.base_model
        renamed = "cache" in inspect.signature(type(self.body).forward).parameters  # from transformers 5.24 on
        self.cache_name = "cache" if renamed else "past_key_values"
        text = base.config.get_text_config(decoder=True)
        self.n_layers: int = text.num_hidden_layers
        self.vocab_size = vocabulary_size(base)
        self.hidden_size: int = text.hidden_size
        self._sliding: int | None = getattr(text, "sliding_window", None)
        self._layer_types: set[str] = set(getattr(text, "layer_types", None) or ())
        if not getattr(text, "use_sliding_window", True):
            self._sliding = None
        self._soft_cap: float | None = getattr(text, "final_logit_softcapping", None)
        self._logit_scale = (getattr(text, "logit_scale", None) or 1.0) / (getattr(text, "logits_scaling", None) or 1.0)
        limit = getattr(text, "max_position_embeddings", None)
        if limit and config.window_slots > limit:
            raise ConfigurationError(
                f"window={config.window} + sink_tokens={config.sink_tokens} + segment_len={config.segment_len} need "
                f"{config.window_slots} positions, but the base model was trained for {limit}: make the window smaller"
            )
        self._computes_on = computing_device(base)
        self._dtype, self._tables = base.dtype, _frequency_buffers(self.body)
        if base.device.type != "meta":
            self.rotations  # noqa: B018, what cannot be read through a window is refused now

    @cached_property
    def rotations(self) -> list[Rotation] | None:
        """How each layer moves its keys, measured on the base's own weights; see `inspect_base`."""
        return inspect_base(self)

    def follow_dtype(self) -> None:
        """Measures anew how keys move where the base's dtype or the numbers of its rotary tables have changed since."""
        dtype, before = self.base.dtype, self._tables
        if dtype == self._dtype and all(getattr(module, name) is table for module, name, table in before):
            return
        tables = _frequency_buffers(self.body)
        # A wrapper may put other tensors of the same numbers there, and cannot run what the measurement runs.
        same = dtype == self._dtype and len(before) == len(tables)
        for (*_, old), (*_, new) in zip(before, tables, strict=False):
            same = same and not old.is_meta and old.dtype == new.dtype and torch.equal(old, new.to(old.device))
        self._dtype, self._tables = dtype, tables
        if not same:
            self.rotations = inspect_base(self)

    @property
    def device(self) -> torch.device:
        """Where the base computes, also where its weights are offloaded in between."""
        here = next(self.base.parameters()).device
        return self._computes_on if here.type == "meta" else here

    def new_cache(self, rows: int, device: torch.device) -> "WindowCache":
        """Empty slots for every layer."""
        tokens = torch.zeros(rows, self.config.window_slots + 1, dtype=torch.int32, device=device)
        return WindowCache([WindowLayer(self.config.window_slots) for _ in range(self.n_layers)], tokens)

    def read(self, cache: "WindowCache", ids: Tensor, done: list[int], new: list[int]) -> tuple[Tensor, Tensor]:
        """Hidden states of up to a segment's worth of tokens; keys and values go into the cache.

        Args:
            ids: (R, N), padding on the right.
            done, new: tokens each row has read, and how many of the N are real.

        Returns:
            (R, N, D), after the base's final norm; and (R, N, n D), what the hippocampus reads.
        """
        with self.tapped() as states:
            final = self.read_at(cache, ids, [window_fill(d, self.config) for d in done], new)
        return final, states(final)

    def read_at(self, cache: "WindowCache", ids: Tensor, fill: list[int], new: list[int]) -> Tensor:
        """The final hidden states alone, from given slots on: `fill` says how many each row has in use.

        Raises:
            ConfigurationError: gradient checkpointing of transformers is on.
        """
        if self.body.training and any(
            getattr(module, "gradient_checkpointing", False) for module in self.body.modules()
        ):
            raise ConfigurationError(NO_CHECKPOINTING)
        n = ids.shape[1]
        column = torch.arange(n, device=ids.device)
        padded = column >= column_of(new, ids.device)
        slots = (column_of(fill, ids.device) + column).masked_fill(padded, self.config.window_slots)
        limit = max(f + m for f, m in zip(fill, new, strict=True))
        same = len(set(fill)) == 1 and min(new) == n
        cache.placement = Placement(slots, limit, fill[0] if same else None)
        cache.tokens = put(cache.tokens, slots, ids)
        output = self.body(
            input_ids=ids,
            attention_mask=self._masks(slots, limit, padded),
            position_ids=slots.clamp_max(self.config.window_slots - 1),  # the spare slot is not a position
            use_cache=True,
            **{self.cache_name: cache},
            **({} if cache.wanted_states is False else {"output_hidden_states": cache.wanted_states}),
        )
        cache.placement = None
        cache.hidden_states = None if cache.wanted_states is False else output.hidden_states
        return output.last_hidden_state

    def _masks(self, slots: Tensor, limit: int, padded: Tensor) -> Tensor | dict[str, Tensor]:
        config = self.config
        full = window_mask(slots, limit, config.window, config.sink_tokens, padded)
        masks = {"full_attention": full, "sliding_attention": full}
        if self._sliding is not None and self._sliding < config.window_slots:
            # A layer with a narrower window of its own keeps it; slots are its positions.
            near = torch.arange(limit, device=slots.device) > slots.unsqueeze(-1) - self._sliding
            masks["sliding_attention"] = torch.where(padded[:, None, :, None], full, full & near.unsqueeze(1))
        if getattr(self.base.config, "_attn_implementation", "sdpa") == "eager":  # it may be changed at any time
            dtype = self.base.dtype
            masks = {kind: additive(mask, dtype) for kind, mask in masks.items()}
        if len(self._layer_types) > 1:
            return {kind: masks[kind] for kind in self._layer_types}
        only_sliding = self._layer_types == {"sliding_attention"} or not self._layer_types
        return masks["sliding_attention" if only_sliding else "full_attention"]

    def head(self, hidden: Tensor) -> Tensor:
        """Next-token logits (R, N, V) of final hidden states, exactly as the base computes them."""
        logits = self.base.get_output_embeddings()(hidden)
        if self._logit_scale != 1.0:
            logits = logits * self._logit_scale
        if self._soft_cap is not None:
            logits = torch.tanh(logits / self._soft_cap) * self._soft_cap
        return logits

    def log_prob_of(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Log-probability (R, N) float32 of one token each under the head's distribution for hidden (R, N, D).

        In blocks, so that the distributions over the vocabulary never exist all at once.
        """

        def of_block(states: Tensor, targets: Tensor) -> Tensor:
            logits = self.head(states).float()
            return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - torch.logsumexp(logits, dim=-1)

        blocks = zip(hidden.flatten(0, 1).split(_HEAD_BLOCK), ids.flatten().split(_HEAD_BLOCK), strict=True)
        return torch.cat(_of_blocks(of_block, blocks)).view(ids.shape)

    def moved_log_prob_of(
        self, hidden: Tensor, ids: Tensor, shift: Tensor, counted: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of one token each with and without numbers added to a row's logits, in one pass.

        Args:
            hidden: (R, N, D). ids: (R, N). shift: (R, V), added to the logits.
            counted: (R, N), which places the sum is over.

        Returns:
            (R, N) float32 under the head; (R, N) under the head with the shift; and (R, V) the probabilities of every
            token under the head, summed over the places that count.
        """

        def of_block(states: Tensor, targets: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits = self.head(states).float()
            logits = logits - logits.amax(-1, keepdim=True)
            likelihood = torch.exp(logits)
            total = likelihood.sum(-1)
            own = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
            moved = own + shift.gather(1, targets) - (likelihood @ factors).squeeze(-1).log()
            expected = ((chosen / total).unsqueeze(1) @ likelihood).squeeze(1)
            return own - total.log(), moved, expected.detach()

        factors = torch.exp(shift).unsqueeze(-1)  # (R, V, 1)
        columns = max(1, _HEAD_BLOCK // hidden.shape[0])
        blocks = zip(*(part.split(columns, dim=1) for part in (hidden, ids, counted)), strict=True)
        plain, moved, expected = zip(*_of_blocks(of_block, blocks), strict=True)
        return torch.cat(plain, dim=1), torch.cat(moved, dim=1), torch.stack(expected).sum(0)

    def layer(self, number: int) -> nn.Module:
        """Decoder layer `number`, counted from 1."""
        stacks = [m for m in self.body.children() if isinstance(m, nn.ModuleList) and len(m) == self.n_layers]
        if len(stacks) != 1:
            raise UnsupportedArchitectureError(
                f"{type(self.base).__name__} has no single stack of {self.n_layers} layers: use memory_layer=-1"
            )
        return stacks[0][number - 1]

    def hidden_of(self, ids: Tensor) -> Tensor:
        """(R, N, n D) what the hippocampus reads of short texts, from position 0."""
        with self.tapped() as states:
            final = self.body(input_ids=ids, use_cache=False).last_hidden_state
        return states(final)

    @contextmanager
    def tapped(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Listens to the memory layers during the one call within, in this thread; gives a function from that call's
        final hidden states (R, N, D) to those of the memory layers side by side (R, N, n D).
        """
        layers, outputs = self.config.memory_layers, dict[int, Tensor]()

        def note(layer: int, output: Any) -> None:
            outputs[layer] = output[0] if isinstance(output, tuple) else output

        def states(final: Tensor) -> Tensor:
            parts = [final if layer == -1 else outputs[layer] for layer in layers]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

        listeners = {self.layer(layer): partial(note, layer) for layer in layers if layer != -1}
        with _HOOKING:
            for module in listeners:
                if not hasattr(module, _HOOKED):
                    module.register_forward_hook(_tell_listener)
                    setattr(module, _HOOKED, True)
        token = _LISTENERS.set(listeners)
        try:
            yield states
        finally:
            _LISTENERS.reset(token)

    def end_segment(self, cache: "WindowCache", done: list[int], rows: list[int]) -> None:
        """Drops what left the window of the given rows, each at a segment end, and moves the rest up."""
        config = self.config
        shift = {r: window_fill(done[r] - 1, config) + 1 - window_fill(done[r], config) for r in rows}
        rows = [r for r in rows if shift[r] > 0]
        if not rows:
            return
        index = torch.tensor(rows, device=cache.tokens.device)
        moved = torch.tensor([shift[r] for r in rows], device=cache.tokens.device)
        slot = torch.arange(config.window_slots + 1, device=cache.tokens.device)
        source = torch.where(slot < config.sink_tokens, slot, slot + moved.unsqueeze(-1))  # (r, C + 1)
        source = source.clamp_max(config.window_slots)
        everyone = len(rows) == cache.tokens.shape[0]

        def picked(slots: Tensor) -> Tensor:
            """Keys or values of the rows, moved up."""
            slots = slots if everyone else slots.index_select(0, index)
            return slots.gather(2, source[:, None, :, None].expand(-1, slots.shape[1], -1, slots.shape[3]))

        def store(tensor: Tensor, new: Tensor) -> Tensor:
            return new if everyone else tensor.index_copy(0, index, new)

        tokens = take(cache.tokens if everyone else cache.tokens.index_select(0, index), source)
        cache.tokens = store(cache.tokens, tokens)
        if self.rotations is None:
            fresh = self.new_cache(len(rows), tokens.device)
            kept = config.sink_tokens + config.window
            self.read_at(fresh, tokens[:, :kept].long(), [0] * len(rows), [kept] * len(rows))
            for layer, new in zip(cache.layers, fresh.layers, strict=True):
                layer.keys, layer.values = store(layer.keys, new.keys), store(layer.values, new.values)
            return
        sinks = config.sink_tokens
        for layer, rotation in zip(cache.layers, self.rotations, strict=True):
            keys = picked(layer.keys)
            keys = torch.cat((keys[:, :, :sinks], rotation.shift(keys[:, :, sinks:], -moved)), dim=2)
            layer.keys, layer.values = store(layer.keys, keys), store(layer.values, picked(layer.values))


def _of_blocks(function: Callable[..., Any], blocks: Iterable[tuple[Tensor, ...]]) -> list[Any]:
    """A function of each block; with gradients it is computed again on the way back."""
    if torch.is_grad_enabled():
        return [checkpoint(function, *block, use_reentrant=False) for block in blocks]
    return [function(*block) for block in blocks]


def _tell_listener(layer: nn.Module, args: object, output: Any) -> None:
    if listener := _LISTENERS.get({}).get(layer):
        listener(output)


def _frequency_buffers(body: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Module, name and tensor of each rotary table."""
    return [
        (module, name, table)
        for module in body.modules()
        for name, table in module.named_buffers(recurse=False)
        if name.endswith("inv_freq")
    ]


class WindowCache(Cache):
    """The key/value slots of all layers with the token of each slot: the window part of a row's state.

    Attributes:
        tokens: (R, C + 1) int32, the token in each slot.
        placement: where the step in progress writes; None between steps.
        wanted_states: `output_hidden_states` of the call in progress, set by it; False between calls.
        hidden_states: those of the last step, of the embeddings and of every layer, each (R, N, D), where wanted.
    """

    layers: list[WindowLayer]  # type: ignore[assignment]

    def __init__(self, layers: list[WindowLayer], tokens: Tensor) -> None:
        super().__init__(layers=list(layers))
        self.tokens = tokens
        self.placement: Placement | None = None
        self.wanted_states: bool | int | list[int] = False
        self.hidden_states: tuple[Tensor | None, ...] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Called by the base's attention layers."""
        if self.placement is None:
            raise InputError("the window's cache is written by HippoFormer alone; call the model, not its base")
        return self.layers[layer_idx].update(key_states, value_states, self.placement)
