"""Perplexity of texts that are read as streams, with and without memory.

Every document is read in order from an empty state. Each token after the first is scored once, and averages are over
tokens, never over documents. Words and bytes are those of the text that the scored tokens cover. What `memory` gains
over `window-only` is owed to episodes, and to those of this document if `other-document` does not gain it as well.

Shapes: R rows (documents side by side), T tokens, D documents.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hippoformer.data.documents import Document
from hippoformer.errors import ConfigurationError, NonFiniteError, TextError
from hippoformer.evaluation import Result, Row, bootstrap
from hippoformer.ops import place
from hippoformer.text import start_tokens, token_spans


@dataclass(frozen=True)
class Condition:
    """What memory a document is read with; conditions that differ only in `log_prob` share one reading.

    Attributes:
        log_prob, nbytes: fields of `Step` and of the cache. frozen: the memory is read only.
        other_document: first, as many tokens of others are read; their memory then stands behind an empty window.
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

    def __post_init__(self) -> None:
        if not self.conditions or len(set(self.conditions) & set(CONDITIONS)) < len(self.conditions):
            raise ConfigurationError(
                f"conditions={self.conditions}; expected some of {', '.join(CONDITIONS)}, each of them once"
            )
        limit = math.inf if self.limit_tokens is None else self.limit_tokens
        few = self.documents is not None and self.documents < 1
        if self.batch_size < 1 or few or not 0 <= self.skip_tokens < limit or limit < 2:
            raise ConfigurationError(
                f"batch_size={self.batch_size}, documents={self.documents}, limit_tokens={self.limit_tokens}, "
                f"skip_tokens={self.skip_tokens}; expected positive numbers, and something left to score"
            )


@dataclass(frozen=True)
class EncodedDocument:
    """A document as token ids (T,), with words and UTF-8 bytes of the text that the scored tokens cover."""

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
    """A document under a condition: log p (T - 1,) of tokens 1 … T - 1, bytes of its state, its share of the time."""

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
    """Tokenises a document, with a start token where the tokenizer puts one; raises as `text.token_spans`."""
    tokens, spans = token_spans(tokenizer, document.text)
    start = start_tokens(tokenizer)
    ids = [*start, *tokens][:limit_tokens]
    ends = [*(0 for _ in start), *(end for _, end in spans)]
    first, text = max(1, skip_tokens), ""
    if len(ids) > first:
        # A whole document is scored to its last character, also where the tokenizer drops trailing blanks.
        text = document.text[ends[first - 1] : ends[len(ids) - 1] if len(ids) < len(ends) else None]
    return EncodedDocument(index, document, torch.tensor(ids).long(), first, len(text.split()), len(text.encode()))


def encode_all(
    tokenizer: Any, documents: Sequence[Document], limit_tokens: int | None = None, skip_tokens: int = 0
) -> list[EncodedDocument]:
    """The documents that have a token to score; TextError if none has."""
    encoded = [encode(tokenizer, document, i, limit_tokens, skip_tokens) for i, document in enumerate(documents)]
    if not (kept := [document for document in encoded if document.tokens_scored]):
        raise TextError(f"none of {len(encoded)} documents has more than {max(1, skip_tokens)} tokens; name a longer")
    return kept


@contextmanager
def reading(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; the mode of before comes back."""
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
    """Reads every document from an empty state under every condition, those of similar length side by side.

    Args:
        model: a HippoFormer. documents: each with a token to score. conditions: of `CONDITIONS`.
        others: what `other-document` reads first: of these the documents after the scored one, then those before it.

    Raises:
        ConfigurationError: no other document. NonFiniteError: a scored token has probability zero or NaN.
    """
    readings: dict[tuple[bool, bool], list[str]] = {}
    for name in conditions:
        readings.setdefault((CONDITIONS[name].frozen, CONDITIONS[name].other_document), []).append(name)
    ordered = sorted(documents, key=lambda document: (-len(document.input_ids), document.index))
    for batch in (ordered[first : first + batch_size] for first in range(0, len(ordered), batch_size)):
        for (frozen, elsewhere), names in readings.items():
            alone = all(CONDITIONS[name].nbytes is None for name in names)  # nothing of a memory is asked for
            with reading(model), model.memory_off() if alone else nullcontext():
                cache = model.new_cache(len(batch))
                if elsewhere:
                    other = model.new_cache(len(batch))
                    _read(model, [_other_tokens(document, others or documents) for document in batch], other, [])
                    cache.adopt_memory(other)
                cache.freeze_memory(frozen)
                began = time.perf_counter()
                found = _read(model, [document.input_ids for document in batch], cache, names)
                seconds = (time.perf_counter() - began) / len(batch)
            for name, log_probs in found.items():
                kept = CONDITIONS[name].nbytes
                sizes = cache.window_nbytes // len(batch), getattr(cache, kept) // len(batch) if kept else 0
                for document, row in zip(batch, log_probs, strict=True):
                    scored = Scored(document, name, row[: len(document.input_ids) - 1], *sizes, seconds)
                    if not math.isfinite(scored.nll):
                        raise NonFiniteError(
                            f"a token of {document.document.title!r} ({document.document.source}) has probability zero "
                            f"or NaN under {name}; check the weights, and the precision they are loaded in"
                        )
                    yield scored


def _read(model: Any, rows: Sequence[Tensor], cache: Any, conditions: Sequence[str]) -> dict[str, Tensor]:
    """(R, T - 1) log p of the tokens on the CPU for each condition; the cache moves along."""
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True).to(model.device)
    columns = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    found = {name: torch.zeros(ids.shape, device=ids.device) for name in conditions}
    for step in model.stream(ids, [len(row) for row in rows], cache):
        for name, log_probs in found.items():
            place(log_probs, getattr(step, CONDITIONS[name].log_prob), step.start, step.new, columns)
    return {name: log_probs[:, 1:].cpu() for name, log_probs in found.items()}


def _other_tokens(document: EncodedDocument, pool: Sequence[EncodedDocument]) -> Tensor:
    """As many tokens of other documents as the document has, or all that there are."""
    after = [other.input_ids for other in pool if other.index > document.index]
    before = [other.input_ids for other in pool if other.index < document.index]
    if not after + before:
        raise ConfigurationError("other-document needs a second document: name another text, or leave it out")
    return torch.cat(after + before)[: len(document.input_ids)]


def perplexity(nll: Any, tokens: Any, axis: int = -1) -> Any:
    """exp of nats per token over all documents together; nll and tokens are (D,)."""
    return np.exp(nll.sum(axis) / tokens.sum(axis))


def change(nll: Any, reference: Any, tokens: Any, axis: int = -1) -> Any:
    """By how many percent the perplexity differs from that of the reference on the same tokens; below 0 is better."""
    return 100 * np.expm1((nll.sum(axis) - reference.sum(axis)) / tokens.sum(axis))


def compare(nll: Mapping[str, Sequence[float]], tokens: Sequence[int], reference: str, seed: int = 0) -> Iterator[Row]:
    """Perplexity of each condition, and where the reference is among them the change against it.

    Args:
        nll: condition → nats of each document, (D,). tokens: (D,) scored. seed: of the bootstrap.
    """
    for name, own in nll.items():
        yield Row(name, "perplexity", *bootstrap(perplexity, own, tokens, seed=seed), n=len(tokens))
        if name != reference and (against := nll.get(reference)):
            found = bootstrap(change, own, against, tokens, seed=seed)
            yield Row(name, f"against {reference}, %", *found, n=len(tokens))
            better = sum(mine < other for mine, other in zip(own, against, strict=True))
            yield Row(name, "documents better", better, n=len(tokens))


def run(
    model: Any,
    tokenizer: Any,
    documents: Sequence[Document],
    options: Options,
    on_score: Callable[[Scored], None] = lambda scored: None,
) -> Result:
    """Perplexity, bits per byte and bytes of state under each condition; with `off`, the change against it.

    Args:
        on_score: called with every score, for what is computed from the same reading.

    Raises:
        TextError: no token to score. Others as `score`.
    """
    encoded = encode_all(tokenizer, documents[: options.documents], options.limit_tokens, options.skip_tokens)
    others = None
    if "other-document" in options.conditions:
        others = [encode(tokenizer, document, i, options.limit_tokens) for i, document in enumerate(documents)]
    found: dict[str, dict[int, Scored]] = {name: {} for name in options.conditions}
    for scored in score(model, encoded, options.conditions, options.batch_size, others):
        found[scored.condition][scored.document.index] = scored
        on_score(scored)
    nll = {name: [of[document.index].nll for document in encoded] for name, of in found.items()}
    n, tokens = len(encoded), [document.tokens_scored for document in encoded]
    words, nbytes = (sum(getattr(document, unit) for document in encoded) for unit in ("words", "utf8_bytes"))
    rows = list(compare(nll, tokens, "off", options.seed))
    for name, of in found.items():
        nats, read = sum(nll[name]), sum(len(document.input_ids) for document in encoded)
        a_word = nats / words if words else math.inf
        rows += [
            Row(name, "word perplexity", math.exp(a_word) if a_word < 700 else None, n=n),
            Row(name, "bits/byte", nats / math.log(2) / nbytes if nbytes else None, n=n),
            Row(name, "window, bytes", max(scored.window_nbytes for scored in of.values()), n=n),
            Row(name, "memory, bytes", max(scored.memory_nbytes for scored in of.values()), n=n),
            Row(name, "tokens/s", read / sum(scored.seconds for scored in of.values()), n=n),
        ]
    per_document = [
        {"title": d.document.title, "tokens": d.tokens_scored, "words": d.words, "bytes": d.utf8_bytes}
        | {"nll": {name: of[i] for name, of in nll.items()}}
        for i, d in enumerate(encoded)
    ]
    return Result(rows, {"documents": per_document})
