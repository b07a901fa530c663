"""Two ways of reading texts: the same pieces, the same numbers, at the price of what learns.

`CachedReader` takes a frozen base's hidden states from disk: they do not depend on the memory, so each document is read
by the base once, with the episodes off, and training takes minutes. `LiveReader` runs the base, with LoRA or full
gradients. Both carry the state of R rows from piece to piece and reset a row where a document begins.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from hippoformer.errors import TextError
from hippoformer.hippocampus.fusion import mix_target
from hippoformer.hippocampus.hippocampus import BaseReading, StepOutput
from hippoformer.model.checkpoint import write_tensors
from hippoformer.model.modeling import HippoFormer
from hippoformer.model.weights import base_fingerprint
from hippoformer.model.window import WindowCache
from hippoformer.ops import shifted
from hippoformer.training.streams import Piece, StreamedTexts, whole_documents

_DOCUMENTS_HELD = 64


@dataclass
class ReadDocument:
    """A document of T tokens as the base read it, or spans of R documents with rows in front.

    Attributes:
        tokens: (T,) int64. hidden: (T, n D), what the hippocampus reads, in the base's dtype.
        base_log_prob, log_prob: (T,) float32, of each token under the base, and after unigram adaptation; 0 for the
            first token.
    """

    tokens: Tensor
    hidden: Tensor
    base_log_prob: Tensor
    log_prob: Tensor

    def __len__(self) -> int:
        return self.tokens.shape[0]


def of_like_length(numbers: Sequence[int], lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Documents in groups of `rows`, those of like length together, so that few rows wait."""
    alike = sorted(numbers, key=lambda number: lengths[number])
    return [alike[low : low + rows] for low in range(0, len(alike), rows)]


class HiddenStateCache(Sequence[ReadDocument]):
    """Documents with their hidden states, a safetensors file each.

    Args:
        model: whose base reads. documents: token ids of each document.
        folder: of all caches; each gets a subfolder, named by a digest of everything that the numbers depend on. Files
            that exist are not computed again, so an interrupted run continues where it was.
        batch_size: documents read side by side. Several processes divide the reading.
    """

    def __init__(self, model: HippoFormer, documents: Sequence[Tensor], folder: Path, batch_size: int = 8) -> None:
        if not documents:
            raise TextError("no documents to read: expected at least one with two tokens or more")
        config = model.config
        facts = {
            "base": base_fingerprint(model.base),
            "window": [config.window, config.sink_tokens, config.segment_len],
            "layers": config.memory_layers,
            "unigrams": config.unigram_weight,
            "dtype": str(model.dtype),
        }
        self.folder = Path(folder) / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        names = [hashlib.sha256(ids.to(torch.int32).numpy().tobytes()).hexdigest()[:24] for ids in documents]
        self._files = [self.folder / f"{name}.safetensors" for name in names]
        self.texts, self.lengths = documents, [len(ids) for ids in documents]
        processes, everything = PartialState(), range(len(documents))
        self._fill(model, everything[processes.process_index :: processes.num_processes], batch_size)
        processes.wait_for_everyone()
        self._fill(model, everything, batch_size)  # what another machine has read may lie on a disk of its own

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> ReadDocument:  # type: ignore[override]
        tensors = load_file(self._files[number])
        return ReadDocument(**tensors | {"tokens": tensors["tokens"].long()})

    @torch.no_grad()
    def _fill(self, model: HippoFormer, mine: range, batch_size: int) -> None:
        """Reads what is missing of some documents."""
        missing = [number for number in mine if not self._files[number].is_file()]
        if not missing:
            return
        total = sum(self.lengths[number] for number in missing)
        with tqdm(total=total, desc="reading with the base", unit="token", disable=None) as bar:
            for chosen in of_like_length(missing, self.lengths, batch_size):
                parts: list[list[ReadDocument]] = [[] for _ in chosen]
                lengths, cache = [self.lengths[number] for number in chosen], model.new_cache(len(chosen))
                ids = pad_sequence([self.texts[number].long() for number in chosen], batch_first=True).to(model.device)
                with model.episodes_off():
                    for step in model.stream(ids, lengths, cache):
                        for row, (low, n) in enumerate(zip(step.start, step.new, strict=True)):
                            read = (step.hidden, step.base_log_prob, step.target_log_prob)
                            tokens = ids[row, low : low + n].int().cpu()
                            parts[row].append(ReadDocument(tokens, *(tensor[row, :n].cpu() for tensor in read)))
                        bar.update(sum(step.new))
                for number, part in zip(chosen, parts, strict=True):
                    names = vars(part[0])
                    write_tensors(self._files[number], {n: torch.cat([getattr(p, n) for p in part]) for n in names})


Documents = HiddenStateCache | Sequence[Tensor]


def lengths_of(documents: Documents) -> list[int]:
    """Tokens of each document."""
    return documents.lengths if isinstance(documents, HiddenStateCache) else [len(ids) for ids in documents]


def cut(documents: Sequence[ReadDocument], piece: Piece, device: torch.device) -> tuple[BaseReading, Tensor]:
    """A piece of each of R documents, and (R, N) log p of its tokens under the base alone."""
    parts = zip(*(vars(document).values() for document in documents), strict=True)
    spans = ([tensor[span] for tensor, span in zip(part, piece.spans, strict=True)] for part in parts)
    read = ReadDocument(*(pad_sequence(rows, batch_first=True).to(device) for rows in spans))
    return BaseReading(read.tokens, read.hidden, read.log_prob, piece.read, piece.new), read.base_log_prob


@dataclass
class Reading:
    """A piece as the model read it: (R, N) log p of the tokens, and which of them have a prediction."""

    found: StepOutput | None  # by the hippocampus; None with the memory off
    target_log_prob: Tensor  # fused
    base_log_prob: Tensor
    counted: Tensor


class LiveReader:
    """Runs the base itself on token ids: for LoRA, for full fine-tuning, or where no disk is to be used.

    Args:
        model: reads. documents: what pieces are of. rows: R. Their state, `cache`, moves along as pieces are read.
    """

    def __init__(self, model: HippoFormer, documents: Any, rows: int) -> None:
        self.model, self.documents, self.cache = model, documents, model.new_cache(rows)

    def read(self, piece: Piece) -> Reading:
        """Reads a piece in every row, with gradients where the mode has them."""
        if piece.fresh:
            self.cache.reset(piece.fresh)
        found, fused, base = self._read(piece)
        read, new = torch.tensor([piece.read, piece.new], device=fused.device).unsqueeze(-1)
        column = torch.arange(fused.shape[1], device=fused.device)
        counted = (column < new) & (read + column > 0)  # nothing predicts a document's first token
        return Reading(found, torch.where(counted, fused, 0.0), base, counted)

    def _read(self, piece: Piece) -> tuple[StepOutput | None, Tensor, Tensor]:
        """What was found, and the fused and base log p of the tokens."""
        spans = [self.documents[number][span].long() for number, span in zip(piece.documents, piece.spans, strict=True)]
        tokens = pad_sequence(spans, batch_first=True).to(self.model.device)
        (step,) = self.model.stream(tokens, piece.new, self.cache)  # a piece is one step
        return step.found, step.target_log_prob, step.base_log_prob

    def state(self) -> dict[str, Tensor]:
        """Everything that is carried, by name, with a row in front."""
        lengths = torch.tensor(self.cache.lengths)
        bound = torch.full_like(lengths, self.cache.memory.stored_bound)
        return self.cache.tensors() | {"lengths": lengths, "bound": bound}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Puts back what `state` gave."""
        self.cache.restore(tensors, int(tensors["bound"].max()))
        self.cache.lengths = tensors["lengths"].tolist()


class CachedReader(LiveReader):
    """Reads hidden states that a frozen base computed before (a `HiddenStateCache`)."""

    def __init__(self, model: HippoFormer, documents: HiddenStateCache, rows: int) -> None:
        super().__init__(model, documents, rows)
        self._document = lru_cache(_DOCUMENTS_HELD)(documents.__getitem__)

    def _read(self, piece: Piece) -> tuple[StepOutput | None, Tensor, Tensor]:
        cache, parts = self.cache, [self._document(number) for number in piece.documents]
        reading, base_log_prob = cut(parts, piece, self.model.device)
        last, log_prob = cache.memory.last_hidden, reading.log_prob
        found, cache.memory = self.model.hippocampus.read(cache.memory, reading)
        if found.residual is not None:  # the first token is judged without it: its touched state is gone
            touched = reading.hidden + found.residual.to(reading.hidden.dtype)
            log_prob = self.model.window.log_prob_of(shifted(last, touched), reading.tokens)
        return found, mix_target(log_prob, found.prior_mixture, found.prior_nothing, found.hit), base_log_prob


def new_reader(model: HippoFormer, documents: Documents | StreamedTexts, rows: int) -> LiveReader:
    """The reader of these documents."""
    if isinstance(documents, HiddenStateCache):
        return CachedReader(model, documents, rows)
    return LiveReader(model, documents, rows)


@torch.no_grad()
def score_documents(model: HippoFormer, documents: Documents, numbers: Sequence[int], rows: int) -> Tensor:
    """(D, 3) float64 of D documents, read `rows` at a time, each from an empty memory.

    The columns are the number of predicted tokens, and their summed fused and base log p.
    """
    lengths = lengths_of(documents)
    sums = {number: torch.zeros(3, dtype=torch.float64) for number in numbers}
    for group in of_like_length(numbers, lengths, rows):
        reader = new_reader(model, documents, len(group))
        for piece in whole_documents(group, [lengths[number] for number in group], model.config.segment_len):
            read = reader.read(piece)
            of = (read.counted, read.target_log_prob, torch.where(read.counted, read.base_log_prob, 0.0))
            for number, parts in zip(group, torch.stack([x.double().sum(-1).cpu() for x in of], 1), strict=True):
                sums[number] += parts
    return torch.stack([*sums.values()]) if sums else torch.zeros(0, 3, dtype=torch.float64)


def checkpoint_layers(model: HippoFormer) -> None:
    """From now on the base's layers keep their input alone and recompute the rest in the backward pass.

    transformers' own gradient checkpointing takes the key/value cache away, and the window is one. Here a layer's slots
    are part of its input and output: it runs on a cache of its own that holds the slots as they were, so it can run
    once more and write the same (Chen et al. 2016, arXiv:1604.06174).
    """
    for number in range(model.window.n_layers):
        layer = model.window.layer(number + 1)
        layer.forward = _checkpointed(layer.forward, number)


def _checkpointed(forward: Callable[..., Any], number: int) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, WindowCache)), None)
        if cache is None or not torch.is_grad_enabled() or not cache.layers[number].is_initialized:
            return forward(*args, **kwargs)  # the very first piece makes the slots, and is kept whole

        def again(keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
            own = copy.copy(before)
            own.layers = [*before.layers]
            own.layers[number] = copy.copy(before.layers[number])
            own.layers[number].fill(keys, values)
            args = tuple(own if value is cache else value for value in args)
            kwargs = {name: own if value is cache else value for name, value in kwargs.items()}
            return forward(*args, **kwargs), own.layers[number].keys, own.layers[number].values

        before = copy.copy(cache)  # with the placement of now
        layer = cache.layers[number]
        output, keys, values = checkpoint(again, layer.keys, layer.values, *args, use_reentrant=False, **kwargs)
        layer.fill(keys, values)
        return output

    return run
