"""Key/value selection, the other way to spend bytes on the past.

The base keeps sinks, window, and `budget` older keys and values per layer and head, chosen at segment ends among those
kept before and those that leave the window:

    h2o      by the attention received since (heavy hitters; Zhang et al. 2023, arXiv:2306.14048)
    snapkv   by the attention of the last queries that saw them, smoothed (Li et al. 2024, arXiv:2404.14469)
    random   by a number drawn when they were read

It reads one row with full attention weights. Keys are rotated to compact positions as in the window, so streams are
unbounded here too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d, pad

from hippoformer.configuration import HippoFormerConfig
from hippoformer.errors import ConfigurationError, UnsupportedArchitectureError
from hippoformer.model.window import WindowCache, WindowedBase, window_fill
from hippoformer.ops import hashed_uniform

METHODS = ("h2o", "snapkv", "random")
_OBSERVED = 32  # queries that SnapKV asks
_POOLED = 7  # neighbours whose attention it averages


class SelectedKeys:
    """A base model behind window, sinks and selected keys; holds the state of the one row it reads.

    Args:
        base: a causal language model with rotary positions.
        config: window, sinks and segment.
        method: how keys are chosen. budget: how many in each head. seed: of the random choice.

    Raises:
        ConfigurationError: an unknown method, a negative budget, or more slots than the base has positions.
        UnsupportedArchitectureError: a base without rotary positions, or whose attention layers cannot be found.
    """

    def __init__(self, base: Any, config: HippoFormerConfig, method: str, budget: int, seed: int = 0) -> None:
        if method not in METHODS or budget < 0:
            raise ConfigurationError(
                f"KV selection {method}:{budget}; expected one of {', '.join(METHODS)}, and 0 keys or more"
            )
        self.base, self.method, self.budget, self.seed = base, method, budget, seed
        self.sinks = config.sink_tokens
        # What is always visible: the sinks, and behind them the selected.
        self.config = HippoFormerConfig(**(config.to_dict() | {"sink_tokens": self.sinks + budget}))
        self.window = WindowedBase(base, self.config)
        if self.window.rotations is None:
            raise UnsupportedArchitectureError(
                f"{type(base).__name__} has learned positions, so its keys cannot move: name one with rotary positions"
            )
        layers = [m for m in self.window.body.modules() if isinstance(getattr(m, "layer_idx", None), int)]
        self.attention = sorted(
            (m for m in layers if type(m).__name__.endswith("Attention")),
            key=lambda m: int(m.layer_idx),  # type: ignore[arg-type]
        )
        if len(self.attention) != self.window.n_layers:
            raise UnsupportedArchitectureError(
                f"{type(base).__name__} has {len(self.attention)} attention modules for {self.window.n_layers} layers: "
                "whose keys receive attention cannot be told"
            )
        self.vocab_size, self.dtype = self.window.vocab_size, base.dtype
        self._begin()

    @torch.no_grad()
    def logits(self, ids: Tensor, chunk: int | None = None) -> Tensor:
        """(T, V) logits after each of T tokens, read from the beginning, `chunk` at a time."""
        return torch.cat([self.window.head(hidden)[0] for hidden in self._read(ids, chunk)])

    @torch.no_grad()
    def scores(self, ids: Tensor) -> Tensor:
        """(T - 1,) log p of each token but the first."""
        found, last, start = [], None, 0
        for hidden in self._read(ids, None):
            stop = start + hidden.shape[1]
            before = hidden[:, :-1] if last is None else torch.cat((last, hidden[:, :-1]), dim=1)
            targets = ids[max(start, 1) : stop].unsqueeze(0).to(hidden.device)
            if targets.shape[1]:
                found.append(self.window.log_prob_of(before, targets)[0])
            last, start = hidden[:, -1:], stop
        return torch.cat(found)

    @property
    def nbytes(self) -> tuple[int, int]:
        """Bytes of keys, values and tokens, and of what the choice is made by."""
        kept = sum(t.numel() * t.element_size() for layer in self.cache.layers for t in (layer.keys, layer.values))
        kept += self.cache.tokens.numel() * self.cache.tokens.element_size()
        return kept, self.mass.numel() * self.mass.element_size() if self.method == "h2o" else 0

    def _begin(self) -> None:
        """An empty state."""
        self.cache: WindowCache = self.window.new_cache(1, self.base.device)
        self.done = 0
        self.mass = torch.zeros(0)  # (layers, heads, slots + 1) what each kept key is worth
        self.origin = torch.zeros(0)  # (layers, heads, slots + 1) the position each was read at
        self.recent = torch.zeros(0)  # (layers, heads, queries, slots + 1) attention of the last queries

    def _read(self, ids: Tensor, chunk: int | None) -> Iterator[Tensor]:
        """(1, n, D) final hidden states, piece by piece; pieces end at segment ends."""
        self._begin()
        ids, segment_len, start = ids.to(self.base.device), self.config.segment_len, 0
        with self._weights_returned(), self._listening() as seen:
            while start < len(ids):
                n = min(chunk or len(ids), len(ids) - start, segment_len - self.done % segment_len)
                first = window_fill(self.done, self.config)
                yield self.window.read(self.cache, ids[None, start : start + n], [self.done], [n])[0]
                self._note(seen, first, n)
                start, self.done = start + n, self.done + n
                if self.done % segment_len == 0:
                    self._select()

    @contextmanager
    def _weights_returned(self) -> Iterator[None]:
        """Attention that returns its weights; the base's own comes back."""
        before = self.base.config._attn_implementation
        self.base.set_attn_implementation("eager")
        try:
            yield
        finally:
            self.base.set_attn_implementation(before)

    @contextmanager
    def _listening(self) -> Iterator[dict[int, Tensor]]:
        """Collects the attention weights of each layer, (H, N, slots), at every call within."""
        seen: dict[int, Tensor] = {}

        def listen(number: int) -> Any:
            def note(module: nn.Module, args: Any, output: Any) -> None:
                seen[number] = output[1][0]

            return note

        handles = [module.register_forward_hook(listen(i)) for i, module in enumerate(self.attention)]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, seen: dict[int, Tensor], first: int, n: int) -> None:
        """Counts the attention of n queries, whose own keys went into the slots from `first` on."""
        heads, slots = self.cache.layers[0].keys.shape[1], self.config.window_slots + 1
        if self.done == 0:
            self.mass = torch.zeros(len(seen), heads, slots, device=self.base.device)
            self.origin = torch.full(self.mass.shape, -1, device=self.base.device)
            self.recent = torch.zeros(len(seen), heads, 0, slots, device=self.base.device)
        self.origin[..., first : first + n] = torch.arange(self.done, self.done + n, device=self.base.device)
        # Queries of one key/value head vote together.
        weights = torch.stack([seen[i].float().unflatten(0, (heads, -1)).sum(1) for i in range(len(seen))])
        weights = pad(weights, (0, slots - weights.shape[-1]))  # (layers, heads, n, slots)
        if self.method == "h2o":
            self.mass += weights.sum(2)
        elif self.method == "snapkv":
            # What leaves now was last seen a segment ago.
            self.recent = torch.cat((self.recent, weights), dim=2)[:, :, -(self.config.segment_len + _OBSERVED) :]
        else:
            # A number of its own for each head and position, whatever the pieces that are read.
            head = torch.arange(len(seen) * heads, device=self.mass.device).view(len(seen), heads, 1)
            self.mass[..., first : first + n] = hashed_uniform(self.seed, head, self.origin[..., first : first + n])

    def _select(self) -> None:
        """What the segment end keeps: the best of the selected and of those that leave the window."""
        config, sinks, spare = self.config, self.sinks, self.config.window_slots
        leaving = window_fill(self.done - 1, config) + 1 - window_fill(self.done, config)
        if leaving <= 0:
            return
        end = sinks + self.budget + leaving
        worth = self.mass
        if self.method == "snapkv":
            worth = avg_pool1d(self._asked(), _POOLED, 1, _POOLED // 2)
        kept = worth[..., sinks:end].topk(self.budget, dim=-1).indices.sort(-1).values + sinks
        slot = torch.arange(spare + 1, device=kept.device).expand(*kept.shape[:2], -1)
        nothing = torch.full((*kept.shape[:2], leaving), spare, device=kept.device)
        source = torch.cat((slot[..., :sinks], kept, slot[..., end:], nothing), dim=-1)  # (layers, heads, slots + 1)
        moved = torch.where(source == spare, 0, slot - source)
        assert self.window.rotations is not None
        for number, (layer, rotation) in enumerate(zip(self.cache.layers, self.window.rotations, strict=True)):
            index = source[number][None, :, :, None]
            keys = layer.keys.gather(2, index.expand(-1, -1, -1, layer.keys.shape[3]))
            flat = keys.reshape(-1, 1, 1, keys.shape[3])  # every key moves by a distance of its own
            layer.keys = rotation.shift(flat, moved[number].reshape(-1)).reshape(keys.shape)
            layer.values = layer.values.gather(2, index.expand(-1, -1, -1, layer.values.shape[3]))
        self.mass, self.origin = self.mass.gather(2, source), self.origin.gather(2, source)
        self.recent = self.recent.gather(3, source.unsqueeze(2).expand(-1, -1, self.recent.shape[2], -1))

    def _asked(self) -> Tensor:
        """(layers, heads, slots + 1) mean attention that the last queries gave each key, of those that could see it."""
        queries = torch.arange(self.done - self.recent.shape[2], self.done, device=self.recent.device).unsqueeze(-1)
        origin = self.origin.unsqueeze(2)  # (layers, heads, 1, slots + 1)
        always = torch.arange(origin.shape[-1], device=origin.device) < self.config.sink_tokens
        sees = (origin >= 0) & (origin <= queries) & (always | (origin > queries - self.config.window))
        last = sees & (sees.flip(2).cumsum(2).flip(2) <= _OBSERVED)
        return (self.recent * last).sum(2) / last.sum(2).clamp_min(1)
