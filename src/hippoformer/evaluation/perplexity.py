"""Perplexity of a stream with a memory, measured so that the number means what it says.

Every document is read in order, from its first token, as one stream; the state is empty at the start of each; every
token after the first is scored exactly once; all averages are over tokens, never over documents or batches. Documents
are read side by side in ragged rows, which do not see each other. The base reads a batch once for all conditions, each
with a memory of its own (once for each where a residual read-out changes the base's states). First of all the model
must show that it does not look ahead (`causality`).

    report = evaluate_perplexity(model, tokenizer, read_documents("wiki.test.raw"))
    rich.print(report.to_table())
    report.save("results.json")
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from hippoformer.data import Document
from hippoformer.errors import ConfigurationError, TextError
from hippoformer.evaluation.causality import check
from hippoformer.evaluation.perplexity_report import ConditionResult, DocumentResult, PerplexityReport
from hippoformer.evaluation.provenance import provenance
from hippoformer.evaluation.scoring import (
    CONDITIONS,
    KNOWN_CONDITIONS,
    BatchScores,
    EncodedDocument,
    batches,
    describe,
    encode,
    other_rows,
    reading,
    score_batches,
)
from hippoformer.evaluation.statistics import LEVEL, RESAMPLES, paired_ratio, perplexity_interval
from hippoformer.text import start_tokens

Progress = Callable[[int, int], None]
T = TypeVar("T")


def evaluate_perplexity(
    model: Any,
    tokenizer: Any,
    documents: Sequence[Document],
    conditions: Sequence[str] = CONDITIONS,
    batch_size: int = 4,
    limit_tokens: int | None = None,
    skip_tokens: int = 0,
    max_documents: int | None = None,
    other_documents: Sequence[Document] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    progress: Progress | None = None,
    command: str | None = None,
    on_scores: Callable[[str, EncodedDocument, Tensor], None] | None = None,
) -> PerplexityReport:
    """Streams documents under each condition and reports perplexity, its interval, and the bytes of state.

    A model that looks ahead is refused before anything is scored.

    Args:
        model: a HippoFormer; its training mode is put back afterwards.
        tokenizer: its fast tokenizer.
        documents: texts to read, each with a state of its own.
        conditions: some of memory, off, window-only, other-document, marginals. With off among them, each other
            condition is also compared with it, document by document.
        batch_size: documents read side by side.
        limit_tokens: read only the first so many tokens of each document.
        skip_tokens: read but do not score the first so many tokens of each document.
        max_documents: score only the first so many documents; the next ones may still serve as other documents.
        other_documents: what `other-document` reads first; the documents that follow in the list where it is None.
        seed, resamples: of the bootstrap over documents.
        progress: called with (tokens read so far, tokens in all) after each batch, every condition counted.
        command: recorded in the report; the process's own command line where it is None.
        on_scores: called with a condition, a document, and log p of each of its tokens but the first, (T - 1,).

    Raises:
        ConfigurationError: an unknown or repeated condition, an option out of range, no other document to read.
        TextError: no document long enough to score a token.
        CausalityError: the model looks ahead; see `hippoformer.evaluation.causality`.
        NonFiniteError: a scored token has probability zero or NaN.
    """
    _check(conditions, batch_size, limit_tokens, skip_tokens, max_documents)
    wanted = documents[:max_documents]
    encoded = [encode(tokenizer, document, i, limit_tokens, skip_tokens) for i, document in enumerate(wanted)]
    scored = [document for document in encoded if document.tokens_scored > 0]
    left_out = [document for document in encoded if document.tokens_scored == 0]
    if not scored:
        raise TextError(
            f"None of {len(encoded)} documents has a token to score; expected more than {max(1, skip_tokens)} tokens. "
            "Name a longer text, or lower the number of tokens that are skipped."
        )
    plan = batches(scored, batch_size)
    others: list[list[Tensor]] = [[] for _ in plan]
    if "other-document" in conditions:
        longest = max(document.tokens_read for document in scored)
        if other_documents is None:
            pool = encoded + _encode_enough(tokenizer, documents[len(wanted) :], len(wanted), longest)
        else:
            pool = _encode_enough(tokenizer, other_documents, len(wanted), longest)
        others = [other_rows(batch, pool, cyclic=other_documents is None) for batch in plan]
    scores: dict[str, list[BatchScores]] = {condition: [] for condition in conditions}
    with reading(model):
        causality = check(model, scored[0].input_ids)
        for condition, batch, found in score_batches(model, conditions, plan, others, progress):
            scores[condition].append(found)
            if on_scores is not None:
                for document, log_probs in zip(batch, found.log_probs, strict=True):
                    on_scores(condition, document, log_probs)
    nll = {condition: _in_order(plan, [score.nll for score in scores[condition]]) for condition in conditions}
    lengths = [[len(row) for row in rows] for rows in others]
    other_tokens = _in_order(plan, lengths) if "other-document" in conditions else [None] * len(scored)
    results = [
        _condition_result(condition, scored, nll, scores[condition], seed, resamples) for condition in conditions
    ]
    return PerplexityReport(
        model=describe(model),
        settings={
            "batch_size": batch_size,
            "limit_tokens": limit_tokens,
            "skip_tokens": skip_tokens,
            "max_documents": max_documents,
            "other_documents": None if other_documents is None else [document.title for document in other_documents],
            "seed": seed,
            "resamples": resamples,
            "level": LEVEL,
            "start_tokens": start_tokens(tokenizer),
            "causality": causality.to_dict(),
        },
        conditions=tuple(results),
        documents=tuple(
            DocumentResult(
                title=document.document.title,
                source=document.document.source,
                tokens_read=document.tokens_read,
                tokens_scored=document.tokens_scored,
                words=document.words,
                utf8_bytes=document.utf8_bytes,
                other_tokens=other_tokens[place],
                nll={condition: nll[condition][place] for condition in conditions},
            )
            for place, document in enumerate(scored)
        ),
        left_out=tuple(document.document.title for document in left_out),
        provenance=provenance(seed=seed, documents=wanted, command=command),
    )


def _condition_result(
    condition: str,
    documents: Sequence[EncodedDocument],
    nll: dict[str, list[float]],
    scores: Sequence[BatchScores],
    seed: int,
    resamples: int,
) -> ConditionResult:
    tokens = [document.tokens_scored for document in documents]
    compared = condition != "off" and "off" in nll
    return ConditionResult(
        condition=condition,
        nll=sum(nll[condition]),
        tokens_scored=sum(tokens),
        tokens_read=sum(document.tokens_read for document in documents),
        words=sum(document.words for document in documents),
        utf8_bytes=sum(document.utf8_bytes for document in documents),
        token_perplexity=perplexity_interval(nll[condition], tokens, seed, resamples),
        window_nbytes=max(score.window_nbytes for score in scores),
        memory_nbytes=max(score.memory_nbytes for score in scores),
        seconds=sum(score.seconds for score in scores),
        against_off=paired_ratio(nll[condition], nll["off"], tokens, seed, resamples) if compared else None,
    )


def _encode_enough(tokenizer: Any, documents: Sequence[Document], first: int, tokens: int) -> list[EncodedDocument]:
    """The first documents that together have so many tokens; more of them would never be read."""
    encoded: list[EncodedDocument] = []
    for index, document in enumerate(documents, start=first):
        if tokens <= 0:
            break
        encoded.append(encode(tokenizer, document, index))
        tokens -= encoded[-1].tokens_read
    return encoded


def _in_order(plan: Sequence[Sequence[EncodedDocument]], values: Sequence[Sequence[T]]) -> list[T]:
    """One value a document, in the order of the list, whatever the order the documents were read in."""
    by_index = {
        document.index: value
        for batch, batch_values in zip(plan, values, strict=True)
        for document, value in zip(batch, batch_values, strict=True)
    }
    return [by_index[index] for index in sorted(by_index)]


def _check(
    conditions: Sequence[str],
    batch_size: int,
    limit_tokens: int | None,
    skip_tokens: int,
    max_documents: int | None,
) -> None:
    unknown = [condition for condition in conditions if condition not in KNOWN_CONDITIONS]
    if unknown or not conditions or len(set(conditions)) < len(conditions):
        raise ConfigurationError(
            f"conditions={list(conditions)}; expected some of {', '.join(KNOWN_CONDITIONS)}, none of them twice."
        )
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("limit_tokens", limit_tokens, 2),
        ("skip_tokens", skip_tokens, 0),
        ("max_documents", max_documents, 1),
    ):
        if value is not None and value < least:
            raise ConfigurationError(f"{name}={value}; expected at least {least}.")
    if limit_tokens is not None and skip_tokens >= limit_tokens:
        raise ConfigurationError(
            f"limit_tokens={limit_tokens} and skip_tokens={skip_tokens} leave nothing to score; "
            "expected fewer skipped tokens than the limit."
        )
