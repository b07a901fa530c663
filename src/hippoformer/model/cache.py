"""The cache object: everything a HippoFormer knows about what it has read, one row a sequence.

It is the `past_key_values` of transformers: the window's keys and values, the episodes, and how far each row has read.
Its size is bounded by `window` and `buffer_size`, whatever the length of the stream. It can be saved, loaded, reset,
frozen, and given the memory of another stream.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hippoformer.configuration import HippoFormerConfig
from hippoformer.errors import InputError
from hippoformer.hippocampus.passages import Passage, Passages
from hippoformer.hippocampus.retrieval import mentions, retrieve
from hippoformer.hippocampus.state import MemoryState
from hippoformer.model.pretrained import HippoFormerPreTrainedModel
from hippoformer.model.weights import active_adapters
from hippoformer.model.window import WindowCache


@dataclass(frozen=True)
class Episode:
    """One memory, for people to read.

    Attributes:
        token: id of the token that was read at `position` of the row's own text.
        context: ids of stored tokens that lead up to it without a gap, itself the last.
        salience, priority, age, credit: see `hippoformer.hippocampus.episodes.Episodes`.
        in_window: True while the base model still sees the token itself.
    """

    token: int
    context: tuple[int, ...]
    position: int
    salience: float
    priority: float
    age: float
    credit: float
    in_window: bool


class HippoCache(WindowCache):
    """State of R rows. Made by `HippoFormer.new_cache`, updated in place by every call that is handed it.

    Attributes:
        model: that this state belongs to. config: its options.
        memory: episodes and what encoding carries from token to token.
        vocab_size: of the model when this state last followed it. dtype, adapters: of the model that reads it, the
            names of its active adapters.
        lengths: tokens read, per row.
        columns: width read so far, padding included; what transformers calls the sequence length.
        passages: what was read, word for word, in whole sentences, lines and turns; None without a spelled vocabulary
            (`HippoFormer.set_tokenizer`; `hippoformer.load` sets it) or with `passage_tokens=0`.
        last_output: (R, D) final hidden state of each row's last token, from which its next token is predicted.
        digest: (R,) int64, a running hash of the tokens read since `new_turn`; None where that is not known.
        frozen: True while the store is read-only.
        written: False until the first episode is written.
        drift: what loading this memory measured; empty for one that was not loaded.
        notes: short texts that whoever uses the cache wants to find again; saved and copied along, gone on reset.
    """

    def __init__(
        self,
        window: WindowCache,
        memory: MemoryState,
        last_output: Tensor,
        model: HippoFormerPreTrainedModel,
        passages: Passages | None = None,
    ) -> None:
        super().__init__(window.layers, window.tokens)
        self.model = model
        self.config: HippoFormerConfig = model.config
        self.memory, self.last_output, self.passages = memory, last_output, passages
        self.vocab_size, self.dtype = model.config.vocab_size, model.dtype
        self.adapters = active_adapters(model.base)
        self.lengths = [0] * window.tokens.shape[0]
        self.columns = 0
        self.digest: Tensor | None = torch.zeros_like(window.tokens[:, 0], dtype=torch.int64)
        self.frozen = self.written = False
        self.drift: dict[str, float | bool] = {}
        self.notes: dict[str, str] = {}

    @property
    def batch_size(self) -> int:
        """R."""
        return len(self.lengths)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns read so far, as `generate` counts them."""
        return self.columns

    def new_turn(self) -> None:
        """Lets the next call be handed only what is new: `generate` takes the first `get_seq_length()` columns of its
        input for what the cache has read, and after this call they count from 0 again. Nothing is forgotten.
        """
        self.columns = 0
        self.digest = torch.zeros_like(self.tokens[:, 0], dtype=torch.int64)

    def check_prompt(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Whether a prompt begins with exactly what this cache has read since `new_turn`.

        Args:
            input_ids: (R, T). attention_mask: (R, T), 0 at padding.

        Raises:
            InputError: the prompt is shorter than what was read, or differs from it.
        """
        advice = "pass the text read so far with what is new behind it, or call new_turn() and pass only what is new"
        if input_ids.shape[1] < self.columns:
            raise InputError(
                f"the prompt has {input_ids.shape[1]} tokens, but the cache has read {self.columns} since its last "
                f"new_turn(): {advice}"
            )
        if self.digest is None or self.columns == 0:
            return
        head = input_ids[:, : self.columns].to(self.digest.device).long()
        real = torch.ones_like(head) if attention_mask is None else (attention_mask[:, : self.columns] != 0).to(head)
        order = (1 - real).argsort(dim=1, stable=True)
        read = hashed(torch.zeros_like(self.digest), head.gather(1, order), real.sum(1))
        different = (read != self.digest).nonzero().flatten().tolist()
        if different:
            raise InputError(
                f"rows {different} of the prompt do not begin with the {self.columns} tokens that the cache has read "
                f"since its last new_turn(); their first tokens would be skipped: {advice}"
            )

    def count(self, ids: Tensor, lengths: list[int]) -> None:
        """Counts the columns (R, T) of a call that was read, padding on the right of each row's `lengths` tokens."""
        self.columns += ids.shape[1]
        if self.digest is not None:
            self.digest = hashed(self.digest, ids, torch.tensor(lengths, device=ids.device))

    def leave_inference_mode(self) -> None:
        """Makes tensors that were written under `torch.inference_mode()` ordinary ones, outside of it."""
        if not torch.is_inference_mode_enabled() and any(tensor.is_inference() for tensor in self.tensors().values()):
            self.become(self.copy())

    def become(self, other: "HippoCache") -> None:
        """Takes over the whole state of another cache, its number of rows included; the other is not used again."""
        self.__dict__.update(other.__dict__)

    def follow_model(self) -> None:
        """Follows resized embeddings; called by every call that reads into this state.

        Raises:
            InputError: the model's dtype, device or active adapters are no longer those that this state was read with,
                or this state holds tokens that the vocabulary has no more.
        """
        self.model.take_vocabulary()
        change = self.change_of_model()
        if change is None and self.tokens.device != self.model.device:
            change = f"its cache is on {self.tokens.device}, the model now on {self.model.device}"
        if change is not None:
            raise InputError(
                f"{change}: change the model back, save this cache and load it again (HippoCache.load), which reads "
                "its window again, or start with model.new_cache()"
            )
        size = self.model.config.vocab_size
        if size == self.vocab_size:
            return
        held = max(int(t.max()) for t in (self.tokens, self.memory.episodes.token, self.memory.vote.token))
        if held >= size:
            raise InputError(
                f"the base's embeddings were resized from {self.vocab_size} to {size} tokens, and this cache holds "
                f"token {held}: resize them back to read on, or start with model.new_cache()"
            )
        self.memory = replace(self.memory, unigram=self.memory.unigram.resized(size))
        self.vocab_size = size
        if self.passages is not None and self.model.spelling is not None:
            self.passages.spelling = self.model.spelling

    def change_of_model(self) -> str | None:
        """What makes the model compute other numbers than those that this state was read with; None if nothing does."""
        if self.model.dtype != self.dtype:
            return f"its cache was read in {self.dtype}, the model is now in {self.model.dtype}"
        if (adapters := active_adapters(self.model.base)) != self.adapters:
            return f"its cache was read with adapters {list(self.adapters)}, now active are {list(adapters)}"
        return None

    @property
    def window_nbytes(self) -> int:
        """Bytes of the window: keys, values and tokens of every slot, and the last states."""
        return _nbytes({name: tensor for name, tensor in self.tensors().items() if name.startswith("window.")})

    @property
    def memory_nbytes(self) -> int:
        """Bytes of the episodes, the unigram counts, and what encoding carries."""
        return _nbytes(self.memory.tensors())

    @property
    def unigram_nbytes(self) -> int:
        """Bytes of the unigram counts, which are part of the memory."""
        return _nbytes(self.memory.unigram.tensors())

    @property
    def passages_nbytes(self) -> int:
        """Bytes of the passages: 4 a token that is kept, at most `passage_tokens`, and 64 a passage."""
        return 0 if self.passages is None else self.passages.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of all state, bounded for any length of the stream."""
        return self.window_nbytes + self.memory_nbytes + self.passages_nbytes

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
        for slot, (position, token) in enumerate(zip(fields["position"], fields["token"], strict=True)):
            if position < 0 or (stored_only and slot >= working):
                continue
            joined = found and found[-1].position == position - 1
            context = (*found[-1].context, token)[-16:] if joined else (token,)
            numbers = {name: fields[name][slot] for name in ("salience", "priority", "age", "credit")}
            found.append(Episode(token, context, position, in_window=slot >= working, **numbers))
        return found

    def retrieve(
        self,
        query_ids: Tensor,
        attention_mask: Tensor | None = None,
        n_tokens: int = 256,
        beyond_window: bool = False,
    ) -> list[list[Passage]]:
        """The passages of each row that fit a query best, by their words.

        Args:
            query_ids: (R, Q) a question, say. attention_mask: (R, Q), 0 at padding.
            n_tokens: of a row's passages together, at most.
            beyond_window: leave out what the base still sees.

        Returns:
            For each row its passages, best first; none where it has read no word of the query.

        Raises:
            InputError: another number of rows, a mask of another shape, `n_tokens` below 1; no passages are kept.
        """
        passages = self._kept_passages()
        mask = torch.ones_like(query_ids) if attention_mask is None else attention_mask
        if query_ids.dim() != 2 or query_ids.shape[0] != self.batch_size or mask.shape != query_ids.shape:
            raise InputError(
                f"query_ids of shape {tuple(query_ids.shape)} with a mask of {tuple(mask.shape)}; expected both "
                f"({self.batch_size}, tokens): a query for each row of the cache"
            )
        if n_tokens < 1:
            raise InputError(f"n_tokens={n_tokens}; expected at least 1")
        found = []
        for row, (ids, real) in enumerate(zip(query_ids.tolist(), (mask != 0).tolist(), strict=True)):
            query = passages.spelling.text(token for token, counts in zip(ids, real, strict=True) if counts)
            seen_from = self.lengths[row] - self.config.window if beyond_window else self.lengths[row]
            kept = [passage for passage in passages.of_row(row) if passage.stop <= seen_from]
            found.append(retrieve(kept, query, n_tokens, passages.spelling))
        return found

    def forget(
        self,
        words: str | None = None,
        *,
        passages: Sequence[Passage] | None = None,
        start: int | None = None,
        stop: int | None = None,
        row: int = 0,
    ) -> list[Passage]:
        """Deletes what a row remembers of something: passages, and the episodes read within them. What the base still
        sees stays until it leaves the window; the counts of single tokens (`unigram`) stay.

        Args:
            words: all passages that have all of these words. passages: these, as `retrieve` gave them.
            start, stop: all that was read from token `start` up to `stop` of the row's own text; one may be left out.
            row: of which sequence.

        Returns:
            The passages that were deleted.

        Raises:
            InputError: not exactly one way of naming them, no such row, or a cache without passages.
        """
        kept = self._kept_passages()
        kept.of_row(row)  # refuses a row that is not there
        if [words is not None, passages is not None, (start, stop) != (None, None)].count(True) != 1:
            raise InputError("name what to forget in one way: words=, passages=, or start= and stop=")
        spans: list[tuple[int, int]] = []
        if words is not None:
            gone = kept.forget(row, mentions(words, kept.spelling))
        elif passages is not None:
            starts = {passage.start for passage in passages}
            gone = kept.forget(row, lambda passage: passage.start in starts)
        else:
            low, high = start or 0, self.lengths[row] if stop is None else stop
            gone = kept.forget(row, lambda passage: low < passage.stop and passage.start < high)
            spans.append((low, high))
        self.leave_inference_mode()
        position = self.memory.episodes.position[row]
        lost = torch.zeros_like(position, dtype=torch.bool)
        for first, last in [*spans, *((passage.start, passage.stop) for passage in gone)]:
            lost |= (position >= first) & (position < last)
        self.memory = self.memory.without_episodes(row, lost)
        return gone

    def _kept_passages(self) -> Passages:
        if self.passages is None:
            raise InputError(
                "this cache keeps no passages: load the model with hippoformer.load, or tell it how its tokens are "
                "spelled by model.set_tokenizer(tokenizer), leave passage_tokens above 0, and read into a new cache"
            )
        return self.passages

    def freeze_memory(self, frozen: bool = True) -> None:
        """Makes the store read-only (or writable again): nothing is admitted, replayed or forgotten."""
        self.frozen = frozen

    def adopt_memory(self, other: "HippoCache") -> None:
        """Replaces store, passages and unigram counts by those of another cache of the same model; window and working
        episodes stay.

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
        self.leave_inference_mode()
        for name, tensor in self.memory.episodes.tensors().items():
            tensor[:, : self.config.buffer_size] = theirs[name][:, : self.config.buffer_size]
        for name, tensor in self.memory.unigram.tensors().items():
            tensor[:] = other.memory.unigram.tensors()[name]
        if self.passages is not None and other.passages is not None:
            self.passages.adopt(other.passages)
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
        self.digest = None if self.digest is None else self.digest.index_fill(0, index, 0)
        self.memory = self.memory.without_rows(index)
        if self.passages is not None:
            self.passages.reset(rows)
        self.lengths = [0 if row in set(rows) else done for row, done in enumerate(self.lengths)]
        if len(rows) == self.batch_size:
            self.new_turn()
            self.frozen, self.written, self.notes = False, False, {}

    def detach(self) -> None:
        """Cuts the state from the graph that made it: gradients of later calls stop here."""
        self.become(self._with_rows(Tensor.detach, range(self.batch_size)))

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
        self.model.save_memory(self, path)

    @classmethod
    def load(cls, path: str | Path, model: HippoFormerPreTrainedModel) -> "HippoCache":
        """Reads a file written by `save`; see `hippoformer.model.memory_file.load_memory`."""
        return model.load_memory(path)

    def __deepcopy__(self, memo: dict) -> "HippoCache":
        return self.copy()  # of the state alone, not of the model

    def copy(self) -> "HippoCache":
        """An independent copy: what is read into one never shows in the other."""
        return self._with_rows(Tensor.clone, range(self.batch_size))

    def select_rows(self, index: Tensor) -> "HippoCache":
        """A new cache of the chosen rows, (J,) int64, copied."""
        return self._with_rows(lambda tensor: tensor.index_select(0, index.to(tensor.device)), index.tolist())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was, (J,) int64."""
        self.become(self.select_rows(beam_idx))

    batch_select_indices = reorder_cache  # type: ignore[assignment]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, neighbours together."""
        self.become(self.select_rows(torch.arange(self.batch_size).repeat_interleave(repeats)))

    def crop(self, *args: object) -> None:
        """Raises InputError: what consolidation did to a memory cannot be undone."""
        raise InputError(
            "a HippoCache cannot be cropped, so assisted generation and prompt look-up do not work with it: generate "
            "without an assistant, or keep a copy() of the cache from before"
        )

    def _with_rows(self, function: Callable[[Tensor], Tensor], rows: Sequence[int]) -> "HippoCache":
        new_cache = copy.copy(self)
        new_cache.layers = [copy.copy(layer) for layer in self.layers]
        for layer in new_cache.layers:
            if layer.is_initialized:
                layer.keys, layer.values = function(layer.keys), function(layer.values)
        new_cache.tokens, new_cache.last_output = function(self.tokens), function(self.last_output)
        new_cache.digest = None if self.digest is None else function(self.digest)
        new_cache.memory = self.memory.map(function)
        new_cache.passages = None if self.passages is None else self.passages.select_rows(rows)
        new_cache.lengths, new_cache.notes = [self.lengths[row] for row in rows], dict(self.notes)
        return new_cache


# Odd, and large: of the multiplier of a well-known linear congruential generator.
_BASE = 6364136223846793005


def hashed(before: Tensor, ids: Tensor, length: Tensor) -> Tensor:
    """(R,) the running hash of rows that read on: a polynomial in the tokens modulo 2**64, so any chunking agrees.

    Args:
        before: (R,) int64. ids: (R, N) int64, padding on the right. length: (R,) real tokens of each row.
    """
    left = length.unsqueeze(-1) - 1 - torch.arange(ids.shape[1], device=ids.device)  # (R, N) tokens that follow
    base = torch.full_like(left, _BASE)
    terms = torch.where(left >= 0, (ids + 1) * base.pow(left.clamp_min(0)), 0)
    return before * base[:, 0].pow(length) + terms.sum(1)


def _nbytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
