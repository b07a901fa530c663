"""Two ways to give the hippocampus something to read while it learns.

`CachedReader` takes a frozen base's hidden states from disk; `LiveReader` runs the base, with LoRA or full gradients.
Both carry the state of R rows from piece to piece, reset a row where a document begins, and cut the graph on request.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hippoformer.hippocampus.circuit import MemoryState, StepOutput
from hippoformer.hippocampus.fusion import mix_target
from hippoformer.model.cache import HippoCache
from hippoformer.model.modeling import HippoFormer
from hippoformer.training.hidden_states import HiddenStateCache, ReadDocument, of_like_length, side_by_side
from hippoformer.training.streaming import StreamedTexts
from hippoformer.training.streams import Piece, whole_documents

_DOCUMENTS_HELD = 64


@dataclass
class Reading:
    """A piece as the model read it; N is the longest row, padding on the right.

    Attributes:
        found: what the hippocampus found; None with the memory off.
        target_log_prob, base_log_prob: (R, N) fused and base log p of the tokens.
        counted: (R, N) bool, tokens with a prediction.
        tokens: (R, N).
    """

    found: StepOutput | None
    target_log_prob: Tensor
    base_log_prob: Tensor
    counted: Tensor
    tokens: Tensor


class Reader(Protocol):
    """What the trainer needs of a reader."""

    def read(self, piece: Piece) -> Reading:
        """Reads a piece in every row, with gradients where the mode has them."""

    def cut(self) -> None:
        """Ends the graph: the state stays, gradients of what follows stop here."""

    def state(self) -> dict[str, Tensor]:
        """Everything carried, for an exact resume."""

    def restore(self, tensors: dict[str, Tensor], bound: int) -> None:
        """Puts back what `state` gave."""

    @property
    def bound(self) -> int:
        """Host-side counter of the state (`MemoryState.stored_bound`)."""

    @property
    def memory(self) -> MemoryState:
        """What the rows remember."""


class CachedReader:
    """Reads hidden states that a frozen base computed before.

    Args:
        model: whose hippocampus trains. documents: cached. rows: R.
    """

    def __init__(self, model: HippoFormer, documents: HiddenStateCache, rows: int) -> None:
        self.model, self.documents = model, documents
        config = model.hippocampus.config  # for now it may differ from the model's, see `credit.reconfigured`
        self.memory = MemoryState.empty(rows, model.hippocampus.width, config, model.dtype, model.device)
        self._held: OrderedDict[int, ReadDocument] = OrderedDict()

    def read(self, piece: Piece) -> Reading:
        """See `Reader`."""
        model, device = self.model, self.model.device
        if piece.fresh:
            self.memory = self.memory.without_rows(torch.tensor(piece.fresh, device=device))
        parts = [self._document(d) for d in piece.documents]
        spans = [slice(s, s + n) for s, n in zip(piece.start, piece.length, strict=True)]
        read = side_by_side(parts, spans, device)
        hidden, tokens, log_prob = read.hidden, read.tokens, read.log_prob
        before = self.memory
        found, self.memory = model.hippocampus.step(before, piece.start, hidden, tokens, -log_prob, piece.length)
        counted = _counted(piece, tokens)
        if found.residual is not None:
            log_prob = self._touched_log_prob(hidden, found, before.last_hidden, tokens)
        fused = mix_target(log_prob, found.prior_mixture, found.prior_nothing, found.hit)
        self._sleep(piece)
        return Reading(found, torch.where(counted, fused, 0.0), read.base_log_prob, counted, tokens)

    def through(self, numbers: Sequence[int]) -> Iterator[Reading]:
        """Reads a document in each row from its beginning to its end, piece by piece; rows that are done wait."""
        lengths = [self.documents.lengths[number] for number in numbers]
        for piece in whole_documents(numbers, lengths, self.model.config.segment_len):
            yield self.read(piece)

    def _touched_log_prob(self, hidden: Tensor, found: StepOutput, last: Tensor, tokens: Tensor) -> Tensor:
        """log p of the tokens after the residual; the step's first token is judged without it, its touched state is
        gone.
        """
        assert found.residual is not None
        touched = hidden + found.residual.to(hidden.dtype)
        return self.model.window.log_prob_of(torch.cat((last.unsqueeze(1), touched[:, :-1]), dim=1), tokens)

    def _sleep(self, piece: Piece) -> None:
        done = [s + n for s, n in zip(piece.start, piece.length, strict=True)]
        ended = [r for r, d in enumerate(done) if piece.length[r] and d % self.model.config.segment_len == 0]
        if ended:
            self.memory, _ = self.model.hippocampus.end_segment(self.memory, done, ended)

    def _document(self, number: int) -> ReadDocument:
        if number not in self._held:
            self._held[number] = self.documents[number]
            if len(self._held) > _DOCUMENTS_HELD:
                self._held.popitem(last=False)
        self._held.move_to_end(number)
        return self._held[number]

    def cut(self) -> None:
        """See `Reader`."""
        self.memory = self.memory.map(Tensor.detach)

    @property
    def bound(self) -> int:
        """See `Reader`."""
        return self.memory.stored_bound

    def state(self) -> dict[str, Tensor]:
        """See `Reader`."""
        return self.memory.tensors()

    def restore(self, tensors: dict[str, Tensor], bound: int) -> None:
        """See `Reader`."""
        self.memory = self.memory.with_tensors(tensors, bound)


class LiveReader:
    """Runs the base itself: for LoRA, for full fine-tuning, or where no disk is to be used.

    Args:
        model: trains. documents: token ids (T,). rows: R.
    """

    def __init__(self, model: HippoFormer, documents: Sequence[Tensor] | StreamedTexts, rows: int) -> None:
        self.model, self.documents = model, documents
        self.cache: HippoCache = model.new_cache(rows)

    @property
    def memory(self) -> MemoryState:
        """See `Reader`."""
        return self.cache.memory

    def read(self, piece: Piece) -> Reading:
        """See `Reader`."""
        if piece.fresh:
            self.cache.reset(piece.fresh)
        spans = zip(piece.documents, piece.start, piece.length, strict=True)
        tokens = torch.nn.utils.rnn.pad_sequence([self.documents[d][s : s + n].long() for d, s, n in spans], True)
        tokens = tokens.to(self.model.device)
        (step,) = self.model.stream(tokens, piece.length, self.cache)  # a piece is one step
        counted = _counted(piece, tokens)
        return Reading(step.found, torch.where(counted, step.target_log_prob, 0.0), step.base_log_prob, counted, tokens)

    def cut(self) -> None:
        """See `Reader`."""
        self.cache.detach()

    @property
    def bound(self) -> int:
        """See `Reader`."""
        return self.cache.memory.stored_bound

    def state(self) -> dict[str, Tensor]:
        """See `Reader`."""
        return self.cache.tensors() | {"lengths": torch.tensor(self.cache.lengths)}

    def restore(self, tensors: dict[str, Tensor], bound: int) -> None:
        """See `Reader`."""
        self.cache.restore(tensors, bound)
        self.cache.lengths = tensors["lengths"].tolist()


@dataclass
class CachedScore:
    """A document as a model predicts it: summed -log p of its tokens but the first, fused and of the base alone."""

    tokens: int
    nll: float
    base_nll: float
    memory_nbytes: int


@torch.no_grad()
def score_cached(
    model: HippoFormer, documents: HiddenStateCache, numbers: Sequence[int] | None = None, rows: int = 1
) -> list[CachedScore]:
    """Streams each document from an empty memory; the base's part comes from the cache.

    Args:
        model: in evaluation mode. documents: read by its base, with its window.
        numbers: of the documents to score; all of them where it is None.
        rows: documents side by side, those of like length.
    """
    chosen = list(range(len(documents)) if numbers is None else numbers)
    found: dict[int, CachedScore] = {}
    for group in of_like_length(chosen, documents.lengths, rows):
        reader, scores = CachedReader(model, documents, len(group)), [CachedScore(0, 0.0, 0.0, 0) for _ in group]
        for reading in reader.through(group):
            base = torch.where(reading.counted, reading.base_log_prob, 0.0)
            sums = (reading.counted, reading.target_log_prob.double(), base.double())
            for score, tokens, fused, alone in zip(scores, *(of.sum(-1).tolist() for of in sums), strict=True):
                score.tokens += tokens
                score.nll -= fused
                score.base_nll -= alone
        held = sum(t.numel() * t.element_size() for t in reader.memory.tensors().values())
        for number, score in zip(group, scores, strict=True):
            score.memory_nbytes = held // len(group)
            found[number] = score
    return [found[number] for number in chosen]


@torch.no_grad()
def score_live(
    model: HippoFormer, documents: Sequence[Tensor], numbers: Sequence[int] | None = None
) -> Iterator[CachedScore]:
    """The same with the base reading; for a base that learns."""
    for number in range(len(documents)) if numbers is None else numbers:
        cache, ids = model.new_cache(), documents[number].to(model.device).long().unsqueeze(0)
        score = CachedScore(ids.shape[1] - 1, 0.0, 0.0, cache.memory_nbytes)
        for step in model.stream(ids, [ids.shape[1]], cache):
            score.nll -= float(step.target_log_prob.double().sum())
            score.base_nll -= float(step.base_log_prob.double().sum())
        yield score


def _counted(piece: Piece, tokens: Tensor) -> Tensor:
    column = torch.arange(tokens.shape[1], device=tokens.device)
    length = torch.tensor(piece.length, device=tokens.device).unsqueeze(-1)
    start = torch.tensor(piece.start, device=tokens.device).unsqueeze(-1)
    return (column < length) & (start + column > 0)
