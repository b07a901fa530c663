"""How sure a perplexity is, and how sure a difference between two runs is.

Perplexity is token-weighted: exp(sum of −log p / number of tokens) over all documents together, so a long document
counts by its length and not as one vote. Tokens of one document are far from independent; documents nearly are. So
intervals come from resampling whole documents (percentile bootstrap; Efron 1979), and two runs over the same documents
are compared on the same resamples (paired), where most of the spread between documents cancels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from hippoformer.errors import InputError

RESAMPLES = 10_000
LEVEL = 0.95

# Numbers that one batch of resamples may hold: 80 MB of float64, whatever the number of documents.
_BATCH_NUMBERS = 10_000_000


@dataclass(frozen=True)
class Interval:
    """An estimate with its bootstrap interval.

    Attributes:
        estimate: on the data as they are.
        low, high: ends of the interval; None with a single document, which cannot be resampled.
        level: share of resamples inside.
        resamples: number of resamples.
        seed: of the resampling.
    """

    estimate: float
    low: float | None
    high: float | None
    level: float
    resamples: int
    seed: int


@dataclass(frozen=True)
class PairedComparison:
    """One run against another over the same documents.

    Attributes:
        ratio: perplexity of the run divided by that of the reference; below 1 the run is better.
        documents: number of documents.
        documents_better: documents in which the run's perplexity is the lower one.
        document_ratios: the ratio in each document, in their order.
    """

    ratio: Interval
    documents: int
    documents_better: int
    document_ratios: tuple[float, ...]


def token_perplexity(nll: ArrayLike, tokens: ArrayLike) -> float:
    """Perplexity of all documents together.

    Args:
        nll: (D,) sum of −log p of the scored tokens of each document, in nats.
        tokens: (D,) number of scored tokens of each document.

    Raises:
        InputError: lengths that differ, no document, a document without tokens, or a value that is not finite.
    """
    sums, counts = _checked(nll, tokens)  # (D,), (D,)
    return float(np.exp(sums.sum() / counts.sum()))


def perplexity_interval(
    nll: ArrayLike, tokens: ArrayLike, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> Interval:
    """Token-weighted perplexity with a percentile bootstrap interval over documents.

    Args:
        nll, tokens: as for `token_perplexity`.
        seed: of the resampling.
        resamples: number of resamples.
        level: share of resamples inside the interval.

    Raises:
        InputError: as for `token_perplexity`.
    """
    sums, counts = _checked(nll, tokens)  # (D,), (D,)

    def perplexity(nll: NDArray[Any], tokens: NDArray[Any], axis: int = -1) -> NDArray[Any]:
        return np.asarray(np.exp(nll.sum(axis) / tokens.sum(axis)))

    return bootstrap_interval((sums, counts), perplexity, seed, resamples, level)


def paired_ratio(
    nll: ArrayLike,
    reference_nll: ArrayLike,
    tokens: ArrayLike,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> PairedComparison:
    """Ratio of the perplexities of two runs over the same tokens, with a paired bootstrap over documents.

    Args:
        nll, reference_nll: (D,) summed −log p of each document under the run and under the reference, in nats.
        tokens: (D,) scored tokens of each document, the same for both.
        seed, resamples, level: as for `perplexity_interval`.

    Raises:
        InputError: as for `token_perplexity`.
    """
    sums, counts = _checked(nll, tokens)  # (D,), (D,)
    reference_sums, _ = _checked(reference_nll, tokens)

    def ratio(nll: NDArray[Any], reference: NDArray[Any], tokens: NDArray[Any], axis: int = -1) -> NDArray[Any]:
        return np.asarray(np.exp((nll.sum(axis) - reference.sum(axis)) / tokens.sum(axis)))

    ratios = np.exp((sums - reference_sums) / counts)
    return PairedComparison(
        ratio=bootstrap_interval((sums, reference_sums, counts), ratio, seed, resamples, level),
        documents=len(counts),
        documents_better=int((sums < reference_sums).sum()),
        document_ratios=tuple(float(value) for value in ratios),
    )


def mean_interval(values: ArrayLike, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL) -> Interval:
    """Mean of one figure a document, (D,), each document counting once, with a percentile bootstrap interval."""
    return bootstrap_interval((np.asarray(values, dtype=np.float64),), np.mean, seed, resamples, level)


def share(hits: Sequence[bool], level: float = LEVEL) -> tuple[float, float, float]:
    """How many of the cases hit: the share, and the ends of its interval by Wilson's formula (Wilson 1927)."""
    found = sum(hits)
    interval = stats.binomtest(found, len(hits)).proportion_ci(level, "wilson")
    return found / len(hits), float(interval.low), float(interval.high)


def weighted_mean_interval(
    sums: ArrayLike, weights: ArrayLike, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> Interval:
    """sum(sums) / sum(weights) over documents, (D,) each, with a percentile bootstrap interval over documents."""

    def mean(sums: NDArray[Any], weights: NDArray[Any], axis: int = -1) -> NDArray[Any]:
        return np.asarray(sums.sum(axis) / weights.sum(axis))

    arrays = (np.asarray(sums, dtype=np.float64), np.asarray(weights, dtype=np.float64))
    return bootstrap_interval(arrays, mean, seed, resamples, level)


def bootstrap_interval(
    samples: Sequence[NDArray[Any]],
    statistic: Any,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Interval:
    """Any statistic of whole documents with its percentile interval.

    Args:
        samples: arrays of one figure a document, (D,) each, resampled together.
        statistic: called with all of them and `axis`, over which it reduces.
        seed, resamples, level: as for `perplexity_interval`.
    """
    estimate = float(statistic(*samples))
    documents = len(samples[0])
    if documents < 2:
        return Interval(estimate, None, None, level, resamples, seed)
    result = stats.bootstrap(
        samples,
        statistic,
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=resamples,
        confidence_level=level,
        batch=max(1, min(resamples, _BATCH_NUMBERS // documents)),
        rng=np.random.default_rng(seed),
    )
    interval = result.confidence_interval
    return Interval(estimate, float(interval.low), float(interval.high), level, resamples, seed)


def _checked(nll: ArrayLike, tokens: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    sums, counts = np.asarray(nll, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    if sums.ndim != 1 or sums.shape != counts.shape or not len(sums):
        raise InputError(
            f"Sums of shape {sums.shape} and token counts of shape {counts.shape}; "
            "expected two lists of the same length, one number a document."
        )
    if not np.isfinite(sums).all():
        raise InputError("A document's sum of −log p is NaN or infinite; find the document before averaging.")
    if not (counts >= 1).all():
        raise InputError("A document has no scored token; leave it out before averaging.")
    return sums, counts
