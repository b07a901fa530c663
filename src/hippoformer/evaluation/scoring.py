"""What it means to read a document under a condition, and what is counted in it.

A document is tokenised whole and read as one stream from an empty state. Every token but the first is scored once. What
the scored tokens cover of the text (whitespace words, UTF-8 bytes) is measured on the text itself by the tokenizer's
offsets, so word perplexity and bits per byte stay right under a limit on the tokens.

The conditions differ only in the memory they hand to the model:

    memory          the memory as it is: written, replayed and recalled while reading
    off             no memory: the base model with the same window and sinks
    window-only     recall over the working window, with a store that stays empty
    other-document  a far store of the same size about something else: as many tokens of other documents as the document
                    itself has are read first, and what was remembered of them is put, read-only, behind an empty window
    marginals       no episodes: the base's predictions as the marginals of the text move them; on request

What `memory` gains over `window-only` is owed to the far store, and only if `other-document` does not gain it as well.

Shapes: R rows (documents read side by side, independent of each other), T tokens, padded on the right.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hippoformer.data import Document
from hippoformer.errors import ConfigurationError, NonFiniteError
from hippoformer.tensors.ragged import place
from hippoformer.text import start_tokens, token_spans
from hippoformer.training.hidden_states import HiddenStateCache

CONDITIONS = ("memory", "off", "window-only", "other-document")
KNOWN_CONDITIONS = (*CONDITIONS, "marginals")


@dataclass(frozen=True)
class EncodedDocument:
    """A document as the model reads it.

    Attributes:
        index: its place in the list of documents.
        document: the document.
        input_ids: (T,) int64 token ids, cut at the limit.
        first_scored: index of the first scored token; tokens before it are read only.
        words: whitespace words in the text that the scored tokens cover.
        utf8_bytes: UTF-8 bytes of that text.
    """

    index: int
    document: Document
    input_ids: Tensor
    first_scored: int
    words: int
    utf8_bytes: int

    @property
    def tokens_read(self) -> int:
        return len(self.input_ids)

    @property
    def tokens_scored(self) -> int:
        return max(0, self.tokens_read - self.first_scored)


@dataclass(frozen=True)
class BatchScores:
    """Scores of R documents read side by side.

    Attributes:
        nll: R sums of −log p over the scored tokens, in nats.
        log_probs: R tensors (T - 1,) float32, log p of each token but the first, also of those that only were read.
        window_nbytes, memory_nbytes: bytes of state of one row at the end of the batch; no memory under `off`.
        seconds: wall time of reading the documents, under all conditions that were read together; without the reading
            of other documents.
    """

    nll: list[float]
    log_probs: list[Tensor]
    window_nbytes: int
    memory_nbytes: int
    seconds: float


def encode(
    tokenizer: Any, document: Document, index: int = 0, limit_tokens: int | None = None, skip_tokens: int = 0
) -> EncodedDocument:
    """Tokenises a document, with the start token in front where the tokenizer itself puts one there.

    Args:
        tokenizer: a fast tokenizer of transformers.
        document: what to read.
        index: its place in the list.
        limit_tokens: read only the first so many tokens.
        skip_tokens: read the first so many tokens without scoring them.

    Raises:
        ConfigurationError: a tokenizer without offsets. TextError: see `hippoformer.text.encode`.
    """
    tokens, spans = token_spans(tokenizer, document.text)
    start = start_tokens(tokenizer)
    ids = [*start, *tokens][:limit_tokens]
    ends = [*(0 for _ in start), *(end for _, end in spans)]
    first_scored = max(1, skip_tokens)
    text = ""
    if len(ids) > first_scored:
        # A whole document is scored to its last character, also where the tokenizer drops trailing blanks.
        text = document.text[ends[first_scored - 1] : ends[len(ids) - 1] if len(ids) < len(ends) else None]
    return EncodedDocument(
        index=index,
        document=document,
        input_ids=torch.tensor(ids, dtype=torch.int64),
        first_scored=first_scored,
        words=len(text.split()),
        utf8_bytes=len(text.encode("utf-8")),
    )


def batches(documents: Sequence[EncodedDocument], batch_size: int) -> list[list[EncodedDocument]]:
    """Documents of similar length side by side, the longest first: little padding, and want of memory shows at once."""
    ordered = sorted(documents, key=lambda document: (-document.tokens_read, document.index))
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def other_rows(batch: Sequence[EncodedDocument], pool: Sequence[EncodedDocument], cyclic: bool) -> list[Tensor]:
    """For each document as many tokens of other documents: those that follow it in the pool, joined as far as needed.

    Args:
        batch: the documents to be scored.
        pool: where the others are taken from.
        cyclic: the pool is the list of documents itself: begin after the document, go round, and never take itself.
            Otherwise begin at the front of the pool.

    Raises:
        ConfigurationError: no other document in the pool.
    """
    rows = []
    for document in batch:
        others = [other for other in pool if other.index > document.index] if cyclic else list(pool)
        if cyclic:
            others += [other for other in pool if other.index < document.index]
        if not others:
            raise ConfigurationError(
                "The condition other-document needs a document beside the scored one; name a second text, "
                "or choose the conditions memory, off and window-only."
            )
        pieces, missing = [], document.tokens_read
        for other in others:
            pieces.append(other.input_ids[:missing])
            missing -= len(pieces[-1])
            if missing == 0:
                break
        rows.append(torch.cat(pieces))
    return rows


def score_batch(
    model: Any, condition: str, batch: Sequence[EncodedDocument], others: Sequence[Tensor] = ()
) -> BatchScores:
    """Reads R documents from an empty state under a condition.

    Args:
        model: a HippoFormer in evaluation mode.
        condition: one of `KNOWN_CONDITIONS`.
        batch: R documents, each with at least one scored token.
        others: R rows of token ids for `other-document`, from `other_rows`.

    Raises:
        ConfigurationError: an unknown condition.
        NonFiniteError: a probability of a scored token is NaN or zero; the message names the document.
    """
    cache = _new_cache(model, condition, len(batch), others)
    with contextlib.ExitStack() as silent:
        if condition == "off":
            silent.enter_context(model.memory_off())
        elif condition == "marginals":
            silent.enter_context(model.episodes_off())
        log_probs, seconds = _timed_score(model, [document.input_ids for document in batch], cache)
    return _batch_scores(condition, batch, log_probs, cache, cache, seconds)


def score_together(
    model: Any, conditions: Sequence[str], batch: Sequence[EncodedDocument], others: Sequence[Tensor] = ()
) -> list[BatchScores]:
    """The same under several conditions: the base reads once for all, unless recall changes its own states."""
    # Of the memory's own reading the base and its marginals are known by the way.
    own = [condition for condition in conditions if condition not in ("memory", "off", "marginals")]
    if len(conditions) == 1 or "memory" not in conditions or model.config.residual_readout:
        return [score_batch(model, condition, batch, others) for condition in conditions]
    caches = {condition: _new_cache(model, condition, len(batch), others) for condition in ("memory", *own)}
    first, *beside = caches.values()
    ids, lengths = _padded([document.input_ids for document in batch], model.device)
    columns = torch.arange(ids.shape[1], device=model.device).expand(ids.shape)
    log_probs = {condition: torch.zeros(ids.shape, device=model.device) for condition in [*caches, "off", "marginals"]}
    began = time.perf_counter()
    for step in model.stream(ids, lengths.tolist(), first, beside):
        found = [step.target_log_prob, *(other.target_log_prob for other in step.beside)]
        found += [step.base_log_prob, step.prior_log_prob]
        for score, part in zip(log_probs.values(), found, strict=True):
            place(score, part, step.start, step.new, columns)
    cut = {condition: score[:, 1:].cpu() for condition, score in log_probs.items()}  # waits for the device
    seconds = time.perf_counter() - began
    return [
        _batch_scores(condition, batch, cut[condition], first, caches.get(condition, first), seconds)
        for condition in conditions
    ]


def _new_cache(model: Any, condition: str, rows: int, others: Sequence[Tensor]) -> Any:
    """The state that a condition begins with.

    Raises:
        ConfigurationError: an unknown condition.
    """
    if condition not in KNOWN_CONDITIONS:
        raise ConfigurationError(f"The condition {condition!r} is unknown; choose among {', '.join(KNOWN_CONDITIONS)}.")
    cache = model.new_cache(rows)
    if condition == "other-document":
        elsewhere = model.new_cache(rows)
        _timed_score(model, others, elsewhere)
        cache.adopt_memory(elsewhere)
    if condition in ("window-only", "other-document"):
        cache.freeze_memory()
    return cache


def _batch_scores(
    condition: str,
    batch: Sequence[EncodedDocument],
    log_probs: Tensor,
    window: Any,
    memory: Any,
    seconds: float,
) -> BatchScores:
    """Of (R, T - 1) log p, column j of token j + 1, by the caches that hold the window and the memory.

    Raises:
        NonFiniteError: a probability of a scored token is NaN or zero; the message names the document.
    """
    nll = []
    for document, log_prob in zip(batch, log_probs.double(), strict=True):
        scored = log_prob[document.first_scored - 1 : document.tokens_read - 1]
        if not torch.isfinite(scored).all():
            raise NonFiniteError(
                f"A token of {document.document.title!r} ({document.document.source}) has probability zero or NaN "
                f"under the condition {condition}; check the weights, and the precision they are loaded in."
            )
        nll.append(-float(scored.sum()))
    return BatchScores(
        nll=nll,
        log_probs=[row[: document.tokens_read - 1].clone() for document, row in zip(batch, log_probs, strict=True)],
        window_nbytes=window.window_nbytes // len(batch),
        # Where a condition does without a memory, the cache still holds room for one; it is no part of what is needed.
        memory_nbytes=_needed_nbytes(condition, memory) // len(batch),
        seconds=seconds,
    )


def _needed_nbytes(condition: str, cache: Any) -> int:
    if condition == "off":
        return 0
    return int(cache.marginals_nbytes if condition == "marginals" else cache.memory_nbytes)


def score_batches(
    model: Any,
    conditions: Sequence[str],
    plan: Sequence[Sequence[EncodedDocument]],
    others: Sequence[Sequence[Tensor]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[str, Sequence[EncodedDocument], BatchScores]]:
    """Reads every batch of a plan under every condition, all conditions of a batch before the next batch begins, and
    together where one reading of the base serves them all.

    Args:
        model, conditions: as for `score_batch`.
        plan: from `batches`.
        others: per batch, the rows for `other-document`.
        progress: called with (tokens read so far, tokens in all) after each batch, every condition counted.

    Yields:
        The condition, the batch, and its scores.
    """
    done, total = 0, len(conditions) * sum(document.tokens_read for batch in plan for document in batch)
    for number, batch in enumerate(plan):
        together = score_together(model, conditions, batch, others[number] if others else ())
        for condition, found in zip(conditions, together, strict=True):
            yield condition, batch, found
        done += len(conditions) * sum(document.tokens_read for document in batch)
        if progress is not None:
            progress(done, total)


def check_untouched(config: Any) -> None:
    """Whether the base's states are the same whatever is recalled.

    Raises:
        ConfigurationError: recall changes the base's own layers.
    """
    if config.memory_layers != (-1,) and config.residual_readout:
        raise ConfigurationError(
            f"a residual at layer {config.memory_layer} changes the base's layers above it, so its states cannot be "
            "read once for all: evaluate this model by perplexity, long-range, dynamics, quality and recall"
        )


def hidden_states(model: Any, documents: Sequence[EncodedDocument], folder: Path) -> HiddenStateCache:
    """The documents as the base reads them, kept on disk: for what is read many times under other options.

    Raises:
        ConfigurationError: as `check_untouched`.
    """
    check_untouched(model.config)
    return HiddenStateCache(model, [document.input_ids for document in documents], folder)


@contextlib.contextmanager
def reading(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; the mode of before comes back, also after an error."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def describe(model: Any) -> dict[str, Any]:
    """What a report says of the model it measured."""
    config = model.config
    return {
        "base_model_name": config.base_model_name,
        "window": config.window,
        "sink_tokens": config.sink_tokens,
        "segment_len": config.segment_len,
        "buffer_size": config.buffer_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        # A configuration may hold what JSON has no word for (a dtype, infinity): its name is what counts here.
        "config": json.loads(json.dumps(config.to_dict(), default=str), parse_constant=str),
    }


def _timed_score(model: Any, rows: Sequence[Tensor], cache: Any) -> tuple[Tensor, float]:
    """((R, T-1) log p(x_t | x_<t) on the CPU, seconds); the cache is updated in place."""
    input_ids, lengths = _padded(rows, model.device)
    column = torch.arange(input_ids.shape[1], device=model.device)
    attention_mask = (column < lengths.unsqueeze(-1)).to(torch.int64)  # (R, T)
    began = time.perf_counter()
    log_probs = model.score(input_ids, attention_mask=attention_mask, past_key_values=cache)
    log_probs = log_probs.cpu()  # waits for the device
    return log_probs, time.perf_counter() - began


def _padded(rows: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (R, T), padded on the right, and the rows' lengths (R,)."""
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    return ids.to(device), torch.tensor([len(row) for row in rows], device=device)
