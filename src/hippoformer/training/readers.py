"""Two ways to give the hippocampus something to read while it learns.

`CachedReader` takes a frozen base's hidden states from disk; `LiveReader` runs the base, with LoRA or full gradients.
Both carry the state of R rows from piece to piece and reset a row where a document begins.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hippoformer.hippocampus.circuit import BaseReading, StepOutput
from hippoformer.hippocampus.fusion import mix_target
from hippoformer.hippocampus.state import MemoryState
from hippoformer.model.modeling import HippoFormer
from hippoformer.training.hidden_states import HiddenStateCache, ReadDocument, of_like_length
from hippoformer.training.streams import Piece, StreamedTexts, whole_documents

_DOCUMENTS_HELD = 64


def cut(documents: Sequence[ReadDocument], piece: Piece, device: torch.device) -> tuple[BaseReading, Tensor]:
    """A piece of each of R documents, and (R, N) log p of its tokens under the base alone."""
    parts = zip(*(vars(document).values() for document in documents), strict=True)
    spans = ([tensor[span] for tensor, span in zip(part, piece.spans, strict=True)] for part in parts)
    read = ReadDocument(*(pad_sequence(rows, batch_first=True).to(device) for rows in spans))
    return BaseReading(read.tokens, read.hidden, read.log_prob, piece.read, piece.new), read.base_log_prob


@dataclass
class Reading:
    """A piece as the model read it.

    Attributes:
        found: what the hippocampus found; None with the memory off.
        target_log_prob, base_log_prob: (R, N) fused and base log p of the tokens.
        counted: (R, N) bool, tokens with a prediction.
    """

    found: StepOutput | None
    target_log_prob: Tensor
    base_log_prob: Tensor
    counted: Tensor


class Reader:
    """The state of R rows, which moves along as pieces are read.

    Args:
        model: reads. documents: what pieces are of. rows: R.
    """

    def __init__(self, model: HippoFormer, documents: Any, rows: int) -> None:
        self.model, self.documents, self.cache = model, documents, model.new_cache(rows)

    def read(self, piece: Piece) -> Reading:
        """Reads a piece in every row, with gradients where the mode has them."""
        raise NotImplementedError

    @property
    def memory(self) -> MemoryState:
        """What the rows remember."""
        return self.cache.memory

    def detach(self) -> None:
        """Ends the graph: the state stays, gradients of what follows stop here."""
        self.cache.detach()

    def state(self) -> dict[str, Tensor]:
        """Everything that is carried, by name, with a row in front."""
        lengths = torch.tensor(self.cache.lengths)
        bound = torch.full_like(lengths, self.memory.stored_bound)
        return self.cache.tensors() | {"lengths": lengths, "bound": bound}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Puts back what `state` gave."""
        self.cache.restore(tensors, int(tensors["bound"].max()))
        self.cache.lengths = tensors["lengths"].tolist()

    def through(self, numbers: Sequence[int]) -> Iterator[Reading]:
        """Reads a document in each row from its beginning to its end, piece by piece; rows that are done wait."""
        lengths = [
            self.documents.lengths[n] if isinstance(self.documents, HiddenStateCache) else len(self.documents[n])
            for n in numbers
        ]
        for piece in whole_documents(numbers, lengths, self.model.config.segment_len):
            yield self.read(piece)


class CachedReader(Reader):
    """Reads hidden states that a frozen base computed before (a `HiddenStateCache`)."""

    def __init__(self, model: HippoFormer, documents: HiddenStateCache, rows: int) -> None:
        super().__init__(model, documents, rows)
        # The hippocampus' options may differ from the model's, see `credit.reconfigured`.
        self.cache.memory = model.hippocampus.empty_state(rows, model.dtype, model.device)
        self._document = lru_cache(_DOCUMENTS_HELD)(documents.__getitem__)

    def read(self, piece: Piece) -> Reading:
        """See `Reader`."""
        if piece.fresh:
            self.cache.reset(piece.fresh)
        parts = [self._document(number) for number in piece.documents]
        reading, base_log_prob = cut(parts, piece, self.model.device)
        last, log_prob = self.memory.last_hidden, reading.log_prob
        found, self.cache.memory = self.model.hippocampus.read(self.memory, reading)
        if found.residual is not None:  # the first token is judged without it: its touched state is gone
            touched = reading.hidden + found.residual.to(reading.hidden.dtype)
            before = torch.cat((last.unsqueeze(1), touched[:, :-1]), dim=1)
            log_prob = self.model.window.log_prob_of(before, reading.tokens)
        fused = mix_target(log_prob, found.prior_mixture, found.prior_nothing, found.hit)
        return _reading(piece, found, fused, base_log_prob)


class LiveReader(Reader):
    """Runs the base itself on token ids: for LoRA, for full fine-tuning, or where no disk is to be used."""

    def read(self, piece: Piece) -> Reading:
        """See `Reader`."""
        if piece.fresh:
            self.cache.reset(piece.fresh)
        spans = [self.documents[number][span].long() for number, span in zip(piece.documents, piece.spans, strict=True)]
        tokens = pad_sequence(spans, batch_first=True).to(self.model.device)
        (step,) = self.model.stream(tokens, piece.new, self.cache)  # a piece is one step
        return _reading(piece, step.found, step.target_log_prob, step.base_log_prob)


def _reading(piece: Piece, found: StepOutput | None, fused: Tensor, base: Tensor) -> Reading:
    read, new = torch.tensor([piece.read, piece.new], device=fused.device).unsqueeze(-1)
    column = torch.arange(fused.shape[1], device=fused.device)
    counted = (column < new) & (read + column > 0)  # nothing predicts a document's first token
    return Reading(found, torch.where(counted, fused, 0.0), base, counted)


def new_reader(model: HippoFormer, documents: HiddenStateCache | Sequence[Tensor] | StreamedTexts, rows: int) -> Reader:
    """The reader of these documents."""
    if isinstance(documents, HiddenStateCache):
        return CachedReader(model, documents, rows)
    return LiveReader(model, documents, rows)


@dataclass
class DocumentScore:
    """A document as a model predicts it: summed -log p of its tokens but the first, fused and of the base alone."""

    tokens: int = 0
    nll: float = 0.0
    base_nll: float = 0.0
    memory_nbytes: int = 0


@torch.no_grad()
def score_documents(
    model: HippoFormer,
    documents: HiddenStateCache | Sequence[Tensor],
    numbers: Sequence[int] | None = None,
    rows: int = 1,
) -> list[DocumentScore]:
    """Reads each document from an empty memory.

    Args:
        model: in evaluation mode. documents: cached by its base with its window, or token ids (T,) each.
        numbers: of the documents to score; None for all. rows: documents side by side.
    """
    lengths = documents.lengths if isinstance(documents, HiddenStateCache) else [len(ids) for ids in documents]
    chosen = range(len(lengths)) if numbers is None else numbers
    scores = {number: DocumentScore() for number in chosen}
    for group in of_like_length(chosen, lengths, rows):
        reader = new_reader(model, documents, len(group))
        for reading in reader.through(group):
            base = torch.where(reading.counted, reading.base_log_prob, 0.0)
            sums = (reading.counted, reading.target_log_prob.double(), base.double())
            for number, tokens, fused, alone in zip(group, *(of.sum(-1).tolist() for of in sums), strict=True):
                score = scores[number]
                score.tokens, score.nll, score.base_nll = (
                    score.tokens + tokens,
                    score.nll - fused,
                    score.base_nll - alone,
                )
        held = sum(tensor.nbytes for tensor in reader.memory.tensors().values())
        for number in group:
            scores[number].memory_nbytes = held // len(group)
    return [scores[number] for number in chosen]
