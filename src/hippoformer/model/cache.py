"""The cache object: everything a HippoFormer knows about what it has read, one row a sequence.

It is the `past_key_values` of transformers: the window's keys and values, the episodes, and how far each row has read.
Its size is bounded by `window` and `buffer_size`, whatever the length of the stream. It can be saved, loaded, reset,
frozen, and given the memory of another stream.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hippoformer.errors import InputError
from hippoformer.hippocampus.circuit import MemoryState
from hippoformer.model.configuration import HippoFormerConfig
from hippoformer.model.window import WindowCache

if TYPE_CHECKING:
    from hippoformer.model.modeling import HippoFormer


@dataclass(frozen=True)
class Episode:
    """One memory, for people to read.

    Attributes:
        token: id of the token that was read at `position` of the row's own text.
        context: ids of stored tokens that lead up to it without a gap, itself the last.
        salience, priority, age, strength, credit: see `hippoformer.hippocampus.episodes.Episodes`.
        in_window: True while the base model still sees the token itself.
    """

    token: int
    context: tuple[int, ...]
    position: int
    salience: float
    priority: float
    age: float
    strength: float
    credit: float
    in_window: bool


class HippoCache(WindowCache):
    """State of R rows. Made by `HippoFormer.new_cache`, updated in place by every call that is handed it.

    Attributes:
        model: that this state belongs to. config: its options.
        memory: episodes and what encoding carries from token to token.
        lengths: tokens read, per row.
        columns: width read so far, padding included; what transformers calls the sequence length.
        last_output: (R, D) final hidden state of each row's last token, from which its next token is predicted.
        frozen: True while the store is read-only.
        written: False until the first episode is written.
        drift: what loading this memory measured; empty for one that was not loaded.
        notes: short texts that whoever uses the cache wants to find again; saved and copied along, gone on reset.
    """

    def __init__(self, window: WindowCache, memory: MemoryState, last_output: Tensor, model: "HippoFormer") -> None:
        super().__init__(window.layers, window.tokens)
        self.model = model
        self.config: HippoFormerConfig = model.config
        self.memory = memory
        self.last_output = last_output
        self.lengths = [0] * window.tokens.shape[0]
        self.columns = 0
        self.frozen = False
        self.written = False
        self.drift: dict[str, float | bool] = {}
        self.notes: dict[str, str] = {}

    @property
    def batch_size(self) -> int:
        """R."""
        return len(self.lengths)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns read so far, as `generate` counts them."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """No limit on the stream."""
        return -1

    def new_turn(self) -> None:
        """Lets the next call be handed only what is new, without what was read before.

        `generate` takes the first `get_seq_length()` columns of its input for what the cache has read. A stream of any
        length need not be kept for that: after this call it counts from 0 again. Nothing is forgotten.
        """
        self.columns = 0

    @property
    def window_nbytes(self) -> int:
        """Bytes of the window: keys, values and tokens of every slot."""
        slots = sum(_nbytes(layer.keys) + _nbytes(layer.values) for layer in self.layers if layer.is_initialized)
        return slots + _nbytes(self.tokens) + _nbytes(self.last_output)

    @property
    def memory_nbytes(self) -> int:
        """Bytes of the episodes, the marginals, and what encoding carries."""
        return sum(_nbytes(tensor) for tensor in self.memory.tensors().values())

    @property
    def marginals_nbytes(self) -> int:
        """Bytes of the marginals, which are part of the memory."""
        return sum(_nbytes(tensor) for tensor in self.memory.marginals.tensors().values())

    @property
    def nbytes(self) -> int:
        """Bytes of all state, the same for any length of the stream."""
        return self.window_nbytes + self.memory_nbytes

    def episodes(self, row: int = 0, stored_only: bool = False) -> list[Episode]:
        """What a row remembers, oldest first.

        Args:
            row: which sequence.
            stored_only: leave out the episodes that are still within the window.

        Raises:
            InputError: no such row.
        """
        if not 0 <= row < self.batch_size:
            raise InputError(f"row {row} does not exist: the cache holds {self.batch_size} rows, from 0")
        fields = {name: t[row].tolist() for name, t in self.memory.episodes.tensors().items() if t.dim() == 2}
        working = self.config.buffer_size
        found: list[Episode] = []
        context: list[int] = []
        for slot, position in enumerate(fields["position"]):
            if position < 0 or (stored_only and slot >= working):
                continue
            if not (found and found[-1].position == position - 1):
                context = []
            context = [*context, fields["token"][slot]]
            found.append(
                Episode(
                    token=fields["token"][slot],
                    context=tuple(context[-16:]),
                    position=position,
                    in_window=slot >= working,
                    **{name: fields[name][slot] for name in ("salience", "priority", "age", "strength", "credit")},
                )
            )
        return found

    def passages(
        self,
        cue_ids: Tensor,
        attention_mask: Tensor | None = None,
        n_tokens: int = 256,
        span: int = 6,
    ) -> tuple[Tensor, Tensor]:
        """What each row remembers of a cue, as text: the passages that hold its rarest words, and those that what is
        found there leads to, in their old order.

        Args:
            cue_ids: (R, Q) a question, say. attention_mask: (R, Q), 0 at padding.
            n_tokens: of a row's passages together, at most. span: tokens on either side of a passage's middle.

        Returns:
            (R, L) ids, padded on the left, and their mask (R, L); L is 0 where no row remembers anything of it.

        Raises:
            InputError: as for a call of the model; also a number out of range.
        """
        from hippoformer.model.rereading import passages

        return passages(self, cue_ids, attention_mask, n_tokens, span)

    def places(
        self, cue_ids: Tensor, attention_mask: Tensor | None = None, n_tokens: int = 256, span: int = 6
    ) -> list[list[int]]:
        """Where each row read the tokens of `passages`, counted from the beginning of its own text."""
        from hippoformer.model.rereading import places

        return places(self, cue_ids, attention_mask, n_tokens, span)

    def reminded_of(self, cue_ids: Tensor, attention_mask: Tensor | None = None, **options: int) -> "HippoCache":
        """A copy that has read again what it remembers of a cue, and in which the cue can be read next.

        Recall answers in the words of the text; with the passages back in the window all of the base model can work on
        them. Use the copy for the answer, best under `model.memory_off()`, since recall would rather go on with the
        text; and read on with this cache: nothing is stored twice.

        Args:
            cue_ids, attention_mask, options: as for `passages`.
        """
        from hippoformer.model.rereading import reminded

        return reminded(self, *self.passages(cue_ids, attention_mask, **options))

    def freeze_memory(self, frozen: bool = True) -> None:
        """Makes the store read-only (or writable again): nothing is admitted, replayed or forgotten."""
        self.frozen = frozen

    def adopt_memory(self, other: "HippoCache") -> None:
        """Replaces store and marginals by those of another cache of the same model; window and working episodes stay.

        Args:
            other: of the same number of rows, or of one row that every row here gets.

        Raises:
            InputError: another number of rows, or episodes of other shapes.
        """
        theirs, mine = other.memory.episodes.tensors(), self.memory.episodes.tensors()
        if theirs["key"].shape[1:] != mine["key"].shape[1:] or other.batch_size not in (1, self.batch_size):
            raise InputError(
                f"a memory of {other.batch_size} rows with keys {tuple(theirs['key'].shape[1:])} does not fit a cache "
                f"of {self.batch_size} rows with keys {tuple(mine['key'].shape[1:])}: use caches of one model"
            )
        for name, tensor in mine.items():
            tensor[:, : self.config.buffer_size] = theirs[name][:, : self.config.buffer_size]
        for name, tensor in self.memory.marginals.tensors().items():
            tensor[:] = other.memory.marginals.tensors()[name]
        self.memory.stored_bound = other.memory.stored_bound
        self.written = self.written or other.written

    def reset(self, rows: list[int] | None = None) -> None:
        """Forgets everything: the given rows (default: all) are as new."""
        rows = list(range(self.batch_size)) if rows is None else rows
        index = torch.tensor(rows, device=self.tokens.device)
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys, layer.values = layer.keys.index_fill(0, index, 0), layer.values.index_fill(0, index, 0)
        self.tokens, self.last_output = self.tokens.index_fill(0, index, 0), self.last_output.index_fill(0, index, 0)
        self.memory = self.memory.without_rows(index)
        self.lengths = [0 if row in set(rows) else done for row, done in enumerate(self.lengths)]
        if len(rows) == self.batch_size:
            self.columns, self.frozen, self.written = 0, False, False
            self.notes = {}

    def detach(self) -> None:
        """Cuts the state from the graph that made it: gradients of later calls stop here."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        self.last_output = self.last_output.detach()
        self.memory = self.memory.map(Tensor.detach)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state by name: `memory.*`, `window.*`."""
        tensors = {f"memory.{name}": tensor for name, tensor in self.memory.tensors().items()}
        tensors |= {"window.tokens": self.tokens, "window.last_output": self.last_output}
        for number, layer in enumerate(self.layers):
            if layer.is_initialized:
                tensors |= {f"window.{number}.keys": layer.keys, f"window.{number}.values": layer.values}
        return tensors

    def restore(self, tensors: dict[str, Tensor], stored_bound: int) -> None:
        """Puts back what `tensors` gave; layers that are missing there are left as they are."""
        device = self.model.device
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        memory = {name.removeprefix("memory."): t for name, t in tensors.items() if name.startswith("memory.")}
        self.memory = self.memory.with_tensors(memory, stored_bound)
        self.tokens, self.last_output = tensors["window.tokens"], tensors["window.last_output"]
        for number, layer in enumerate(self.layers):
            if f"window.{number}.keys" in tensors:
                layer.fill(tensors[f"window.{number}.keys"], tensors[f"window.{number}.values"])

    def save(self, path: str | Path) -> None:
        """Writes the whole state to one safetensors file, atomically; see `hippoformer.model.memory_file`."""
        from hippoformer.model.memory_file import save_memory

        save_memory(self, path)

    @classmethod
    def load(cls, path: str | Path, model: "HippoFormer") -> "HippoCache":
        """Reads a file written by `save`; see `hippoformer.model.memory_file.load_memory`."""
        from hippoformer.model.memory_file import load_memory

        return load_memory(path, model)

    def __deepcopy__(self, memo: dict) -> "HippoCache":
        return self.copy()  # of the state alone, not of the model

    def copy(self) -> "HippoCache":
        """An independent copy: what is read into one never shows in the other."""
        return self._with_rows(Tensor.clone, self.lengths)

    def select_rows(self, index: Tensor) -> "HippoCache":
        """A new cache of the chosen rows, (J,) int64, copied."""
        chosen = index.tolist()
        return self._with_rows(
            lambda tensor: tensor.index_select(0, index.to(tensor.device)), [self.lengths[i] for i in chosen]
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i becomes what row beam_idx[i] was."""
        self.__dict__.update(self.select_rows(beam_idx).__dict__)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the chosen rows."""
        self.__dict__.update(self.select_rows(indices).__dict__)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, neighbours together."""
        index = torch.arange(self.batch_size).repeat_interleave(repeats)
        self.__dict__.update(self.select_rows(index).__dict__)

    def crop(self, *args: object) -> None:
        """Not possible: what consolidation did to a memory cannot be undone.

        Raises:
            InputError: always.
        """
        raise InputError(
            "a HippoCache cannot be cropped, so assisted generation and prompt look-up do not work with it: generate "
            "without an assistant, or keep a copy() of the cache from before"
        )

    def _with_rows(self, function, lengths: list[int]) -> "HippoCache":  # type: ignore[no-untyped-def]
        layers = []
        for layer in self.layers:
            new = copy.copy(layer)
            if layer.is_initialized:
                new.keys, new.values = function(layer.keys), function(layer.values)
            layers.append(new)
        new_cache = copy.copy(self)
        new_cache.layers = layers
        new_cache.tokens, new_cache.last_output = function(self.tokens), function(self.last_output)
        new_cache.memory = self.memory.map(function)
        new_cache.lengths, new_cache.notes = list(lengths), dict(self.notes)
        return new_cache


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
