"""Perplexity of a text that is read as a stream, with and without memory.

Every document is read in order from its first token, from an empty state. Each token after the first is scored once,
and averages are over tokens, never over documents or batches. Words and bytes are those of the text that the scored tokens cover, so bits per byte stay right under a limit
on the tokens. What `memory` gains over `window-only` is owed to the episodes, and to those of this document only if
`other-document` does not gain it as well.

Shapes: R rows (documents side by side), T tokens, padded on the right.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hippoformer.data.documents import Document
from hippoformer.errors import ConfigurationError, NonFiniteError, TextError
from hippoformer.evaluation import Result, Row, bootstrap
from hippoformer.tensors.ragged import place
from hippoformer.text import start_tokens, token_spans


@dataclass(frozen=True)
class Condition:
    """What memory a document is read with. Conditions that differ only in `log_prob` share one reading.

    Attributes:
        log_prob: field of `Step` with the log-probabilities. nbytes: field of the cache with the bytes of memory.
        frozen: the memory is read only. other_document: as many tokens of other documents as the document has are read
            first, and what was remembered of them stands behind an empty window.
    """

    log_prob: str = "target_log_prob"
    nbytes: str | None = "memory_nbytes"
    frozen: bool = False
    other_document: bool = False


CONDITIONS = {
    "memory": Condition(),
    "off": Condition("base_log_prob", None),
    "unigram": Condition("prior_log_prob", "marginals_nbytes"),
    "window-only": Condition(frozen=True),
    "other-document": Condition(frozen=True, other_document=True),
}


@dataclass
class Options:
    """How a perplexity is measured."""

    conditions: list[str] = field(
        default_factory=lambda: ["memory", "off"], metadata={"help": f"some of {', '.join(CONDITIONS)}"}
    )
    batch_size: int = field(default=4, metadata={"help": "documents read side by side"})
    limit_tokens: int | None = field(default=None, metadata={"help": "read the first N tokens of each document"})
    skip_tokens: int = field(default=0, metadata={"help": "read but do not score the first N tokens of each"})
    documents: int | None = field(default=None, metadata={"help": "score the first N documents"})
    seed: int = field(default=0, metadata={"help": "of the bootstrap over documents"})

    def check(self) -> None:
        """Raises ConfigurationError for an unknown or repeated condition, or a number out of range."""
        if not self.conditions or not set(self.conditions) <= set(CONDITIONS):
            raise ConfigurationError(f"conditions={self.conditions}; expected some of {', '.join(CONDITIONS)}")
        if len(set(self.conditions)) < len(self.conditions):
            raise ConfigurationError(f"conditions={self.conditions}; expected each of them once")
        low = {"batch_size": 1, "limit_tokens": 2, "skip_tokens": 0, "documents": 1}
        for name, least in low.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ConfigurationError(f"{name}={value}; expected at least {least}")
        if self.limit_tokens is not None and self.skip_tokens >= self.limit_tokens:
            raise ConfigurationError(
                f"skip_tokens={self.skip_tokens} leaves nothing to score of limit_tokens={self.limit_tokens}"
            )


@dataclass(frozen=True)
class EncodedDocument:
    """A document as the model reads it.

    Attributes:
        index: its place in the list. document: the document. input_ids: (T,) int64, cut at the limit.
        first_scored: index of the first scored token. words, utf8_bytes: of the text that the scored tokens cover.
    """

    index: int
    document: Document
    input_ids: Tensor
    first_scored: int
    words: int
    utf8_bytes: int

    @property
    def tokens_scored(self) -> int:
        return max(0, len(self.input_ids) - self.first_scored)


@dataclass(frozen=True)
class Scored:
    """One document under one condition: log_probs (T - 1,) float32 of tokens 1 … T - 1, bytes of state, and its share
    of the seconds of the reading, which several conditions may share.
    """

    document: EncodedDocument
    condition: str
    log_probs: Tensor
    window_nbytes: int
    memory_nbytes: int
    seconds: float

    @property
    def nll(self) -> float:
        """Sum of -log p of the scored tokens, in nats."""
        return -float(self.log_probs[self.document.first_scored - 1 :].double().sum())


def encode(
    tokenizer: Any, document: Document, index: int = 0, limit_tokens: int | None = None, skip_tokens: int = 0
) -> EncodedDocument:
    """Tokenises a document, with the start token in front where the tokenizer puts one there.

    Raises:
        ConfigurationError: a tokenizer without offsets. TextError: see `hippoformer.text.encode`.
    """
    tokens, spans = token_spans(tokenizer, document.text)
    start = start_tokens(tokenizer)
    ids = [*start, *tokens][:limit_tokens]
    ends = [*(0 for _ in start), *(end for _, end in spans)]
    first = max(1, skip_tokens)
    text = ""
    if len(ids) > first:
        # A whole document is scored to its last character, also where the tokenizer drops trailing blanks.
        text = document.text[ends[first - 1] : ends[len(ids) - 1] if len(ids) < len(ends) else None]
    return EncodedDocument(index, document, torch.tensor(ids).long(), first, len(text.split()), len(text.encode()))


def encode_all(
    tokenizer: Any, documents: Sequence[Document], limit_tokens: int | None = None, skip_tokens: int = 0
) -> list[EncodedDocument]:
    """The documents that have a token to score.

    Raises:
        TextError: none has. Others as `encode`.
    """
    encoded = [encode(tokenizer, document, i, limit_tokens, skip_tokens) for i, document in enumerate(documents)]
    if not (scored := [document for document in encoded if document.tokens_scored > 0]):
        raise TextError(
            f"none of {len(encoded)} documents has a token to score; expected more than {max(1, skip_tokens)} tokens. "
            "Name a longer text, or skip fewer tokens."
        )
    return scored


@contextmanager
def reading(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; the mode of before comes back, also after an error."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def score(
    model: Any,
    documents: Sequence[EncodedDocument],
    conditions: Sequence[str] = ("memory",),
    batch_size: int = 4,
    others: Sequence[EncodedDocument] | None = None,
) -> Iterator[Scored]:
    """Reads every document from an empty state under every condition.

    Args:
        model: a HippoFormer. documents: each with a token to score. conditions: names from `CONDITIONS`.
        batch_size: documents of similar length side by side, the longest first.
        others: what `other-document` reads first: the documents after the scored one, then those before it.

    Yields:
        A score per condition and document.

    Raises:
        ConfigurationError: `other-document` without another document.
        NonFiniteError: a scored token has probability zero or NaN; the message names the document.
    """
    readings: dict[tuple[bool, bool], list[str]] = {}
    for name in conditions:
        readings.setdefault((CONDITIONS[name].frozen, CONDITIONS[name].other_document), []).append(name)
    ordered = sorted(documents, key=lambda document: (-len(document.input_ids), document.index))
    for first in range(0, len(ordered), batch_size):
        batch = ordered[first : first + batch_size]
        for (frozen, elsewhere), names in readings.items():
            with reading(model):
                cache = model.new_cache(len(batch))
                if elsewhere:
                    other = model.new_cache(len(batch))
                    _read(model, [_other_row(document, others or documents) for document in batch], other, [])
                    cache.adopt_memory(other)
                if frozen:
                    cache.freeze_memory()
                began = time.perf_counter()
                found = _read(model, [document.input_ids for document in batch], cache, names)
                seconds = (time.perf_counter() - began) / len(batch)
            for name, log_probs in found.items():
                kept = CONDITIONS[name].nbytes
                nbytes = cache.window_nbytes // len(batch), getattr(cache, kept) // len(batch) if kept else 0
                for document, row in zip(batch, log_probs, strict=True):
                    yield _checked(Scored(document, name, row[: len(document.input_ids) - 1], *nbytes, seconds))


def _read(model: Any, rows: Sequence[Tensor], cache: Any, conditions: Sequence[str]) -> dict[str, Tensor]:
    """(R, T - 1) log p of the tokens on the CPU for each condition; the cache moves along."""
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True).to(model.device)
    columns = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    found = {name: torch.zeros(ids.shape, device=ids.device) for name in conditions}
    for step in model.stream(ids, [len(row) for row in rows], cache):
        for name, log_probs in found.items():
            place(log_probs, getattr(step, CONDITIONS[name].log_prob), step.start, step.new, columns)
    return {name: log_probs[:, 1:].cpu() for name, log_probs in found.items()}


def _other_row(document: EncodedDocument, pool: Sequence[EncodedDocument]) -> Tensor:
    """As many tokens of other documents as the document has."""
    others = [other for other in pool if other.index > document.index]
    others += [other for other in pool if other.index < document.index]
    if not others:
        raise ConfigurationError(
            "other-document needs a document beside the scored one; name a second text, or leave this condition out"
        )
    return torch.cat([other.input_ids for other in others])[: len(document.input_ids)]


def _checked(scored: Scored) -> Scored:
    if not math.isfinite(scored.nll):
        document = scored.document.document
        raise NonFiniteError(
            f"A token of {document.title!r} ({document.source}) has probability zero or NaN under the condition "
            f"{scored.condition}; check the weights, and the precision they are loaded in."
        )
    return scored


def perplexity(nll: Any, tokens: Any, axis: int = -1) -> Any:
    """exp of nats per token of all documents together: nll and tokens (..., D) → (...)."""
    return np.exp(np.sum(nll, axis) / np.sum(tokens, axis))


def change(nll: Any, reference: Any, tokens: Any, axis: int = -1) -> Any:
    """Perplexity against that of the reference on the same tokens, in percent; below 0 is better."""
    return 100 * (np.exp((np.sum(nll, axis) - np.sum(reference, axis)) / np.sum(tokens, axis)) - 1)


def compare(nll: dict[str, Sequence[float]], tokens: Sequence[int], reference: str, seed: int = 0) -> Iterator[Row]:
    """Perplexity of each condition, and its change against the reference, document by document.

    Args:
        nll: condition → nats of each document, (D,). tokens: (D,) scored tokens. reference: one of the conditions, or
            of none of them: no comparison.
    """
    for name, of in nll.items():
        yield Row(name, "perplexity", *bootstrap(perplexity, of, tokens, seed=seed), n=len(tokens))
        if name != reference and reference in nll:
            against = nll[reference]
            found = bootstrap(change, of, against, tokens, seed=seed)
            yield Row(name, f"against {reference}, %", *found, n=len(tokens))
            better = sum(mine < other for mine, other in zip(of, against, strict=True))
            yield Row(name, "documents better", better, n=len(tokens))


def run(model: Any, tokenizer: Any, documents: Sequence[Document], options: Options) -> Result:
    """Perplexity, bits per byte and bytes of state under each condition; with `off`, the change against it.

    Raises:
        ConfigurationError: an option out of range, no other document. TextError: no token to score.
        NonFiniteError: a token of probability zero or NaN.
    """
    options.check()
    encoded = encode_all(tokenizer, documents[: options.documents], options.limit_tokens, options.skip_tokens)
    others = encoded
    if "other-document" in options.conditions:
        others = [encode(tokenizer, document, i, options.limit_tokens) for i, document in enumerate(documents)]
    scores = list(score(model, encoded, options.conditions, options.batch_size, others))
    by = {(scored.condition, scored.document.index): scored for scored in scores}
    tokens = [document.tokens_scored for document in encoded]
    nll = {name: [by[name, document.index].nll for document in encoded] for name in options.conditions}
    rows = list(compare(nll, tokens, "off", options.seed))
    n, nbytes = len(encoded), sum(document.utf8_bytes for document in encoded)
    words = sum(document.words for document in encoded)
    for name, of in nll.items():
        mine = [by[name, document.index] for document in encoded]
        nats = sum(of) / words if words else math.inf
        rows += [
            Row(name, "word perplexity", math.exp(nats) if nats < 700 else None, n=n),
            Row(name, "bits/byte", sum(of) / math.log(2) / nbytes if nbytes else None, n=n),
            Row(name, "window, bytes", max(scored.window_nbytes for scored in mine), n=n),
            Row(name, "memory, bytes", max(scored.memory_nbytes for scored in mine), n=n),
            Row(name, "tokens/s", sum(len(d.input_ids) for d in encoded) / sum(scored.seconds for scored in mine), n=n),
        ]
    told = [
        {"title": d.document.title, "source": d.document.source, "tokens": d.tokens_scored, "bytes": d.utf8_bytes}
        | {"nll": {name: of[place] for name, of in nll.items()}}
        for place, d in enumerate(encoded)
    ]
    return Result(rows, {"documents": told})
