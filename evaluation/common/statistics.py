"""Intervals, tests of a difference, effect sizes, corrections; documents or questions are the units."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from evaluation.common.results import Row
from hippoformer.errors import ConfigurationError, InputError

RESAMPLES = 10_000
LEVEL = 0.95
_BATCH_NUMBERS = 10_000_000  # numbers that one batch of resamples holds: 80 MB


def bootstrap(
    statistic: Callable[..., Any], *samples: ArrayLike, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float | None, float | None]:
    """A statistic with its percentile bootstrap interval over documents (Efron 1979).

    Tokens of one document depend on each other, documents hardly do.

    Args:
        statistic: called with all samples and `axis`, over which it reduces.
        samples: one figure a document each, (D,); resampled together (paired).

    Returns:
        (value, low, high); no ends for a single document, which cannot be resampled.

    Raises:
        InputError: no document, lengths that differ, or a figure that is not finite.
    """
    arrays = [_finite(sample) for sample in samples]
    if not arrays[0].size or any(array.shape != arrays[0].shape for array in arrays):
        raise InputError(f"samples of {[len(a) for a in arrays]} figures; expected as many in each, one a document")
    value, documents = float(statistic(*arrays, axis=-1)), len(arrays[0])
    if documents < 2:
        return value, None, None
    found = stats.bootstrap(
        arrays,
        statistic,
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=resamples,
        confidence_level=LEVEL,
        batch=max(1, min(resamples, _BATCH_NUMBERS // documents)),
        rng=np.random.default_rng(seed),
    )
    return value, float(found.confidence_interval.low), float(found.confidence_interval.high)


def share(hits: Sequence[bool]) -> tuple[float, float, float]:
    """Percent of cases that hit, and the ends of the interval by Wilson's formula (Wilson 1927)."""
    interval = stats.binomtest(sum(hits), len(hits)).proportion_ci(LEVEL, "wilson")
    return 100 * sum(hits) / len(hits), 100 * float(interval.low), 100 * float(interval.high)


def ratio(sums: Any, weights: Any, axis: int = -1) -> Any:
    """The mean of figures that are sums over so many units each, (D,)."""
    return np.sum(sums, axis) / np.sum(weights, axis)


def perplexity(nll: Any, tokens: Any, axis: int = -1) -> Any:
    """exp of nats per token over all documents together; nll and tokens are (D,)."""
    return np.exp(ratio(nll, tokens, axis))


def change(nll: Any, reference: Any, tokens: Any, axis: int = -1) -> Any:
    """By how many percent the perplexity differs from that of the reference on the same tokens; below 0 is better."""
    return 100 * np.expm1(ratio(nll - reference, tokens, axis))


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


@dataclass(frozen=True)
class TestResult:
    """One two-sided test.

    Attributes:
        test: its name; "none" for fewer than two values, or no difference anywhere. p: None for "none".
        effect: Cohen's d for t tests, else the rank-biserial correlation. n: pairs, or values of both groups.
        corrected: p with the other tests taken into account, see `corrected`.
    """

    __test__ = False  # not a test of pytest's

    test: str
    p: float | None
    effect: float | None
    n: int
    corrected: float | None = None

    def rows(self, condition: str, against: str) -> list[Row]:
        """p (corrected where it is) and effect size as rows of a condition; none without a test."""
        if self.p is None:
            return []
        p = self.p if self.corrected is None else self.corrected
        return [
            Row(condition, f"p against {against}", p, n=self.n),
            Row(condition, f"effect size against {against}", self.effect, n=self.n),
        ]


def paired_test(values: ArrayLike, reference: ArrayLike, method: str = "auto") -> TestResult:
    """Test of the differences values - reference, (D,) each.

    Args:
        values, reference: of the same documents in the same order.
        method: "t", "wilcoxon", or "auto": t where at least 8 differences look normal (Shapiro and Wilk).

    Raises:
        InputError: lengths that differ, or a value that is not finite. ConfigurationError: an unknown method.
    """
    first, second = _finite(values), _finite(reference)
    if first.shape != second.shape:
        raise InputError(f"{len(first)} values against {len(second)}; a paired test needs the same documents in both")
    _check_method(method, "wilcoxon")
    difference = first - second
    if len(difference) < 2 or not difference.any():
        return TestResult("none", None, None, len(difference))
    spread = difference.std(ddof=1)
    if spread > 0 and (method == "t" or (method == "auto" and _normal(difference))):
        p = stats.ttest_rel(first, second).pvalue
        return TestResult("paired t", float(p), float(difference.mean() / spread), len(difference))
    changed = difference[difference != 0]
    ranks = stats.rankdata(np.abs(changed))
    effect = float((ranks * np.sign(changed)).sum() / ranks.sum())
    return TestResult("Wilcoxon signed rank", float(stats.wilcoxon(first, second).pvalue), effect, len(difference))


def unpaired_test(values: ArrayLike, reference: ArrayLike, method: str = "auto") -> TestResult:
    """Test of two groups that share no documents, (A,) and (B,): Welch's t or Mann and Whitney's U.

    Args:
        values, reference: the groups. method: "t", "mann-whitney", or "auto": t where both have at least 8 values that
            look normal.

    Raises:
        InputError: a value that is not finite. ConfigurationError: an unknown method.
    """
    first, second = _finite(values), _finite(reference)
    _check_method(method, "mann-whitney")
    n = len(first) + len(second)
    if min(len(first), len(second)) < 2 or len(np.unique(np.concatenate((first, second)))) == 1:
        return TestResult("none", None, None, n)
    pooled = ((len(first) - 1) * first.var(ddof=1) + (len(second) - 1) * second.var(ddof=1)) / (n - 2)
    if pooled > 0 and (method == "t" or (method == "auto" and _normal(first) and _normal(second))):
        p = stats.ttest_ind(first, second, equal_var=False).pvalue
        return TestResult("Welch's t", float(p), float((first.mean() - second.mean()) / pooled**0.5), n)
    found = stats.mannwhitneyu(first, second)
    effect = 2.0 * float(found.statistic) / (len(first) * len(second)) - 1.0
    return TestResult("Mann-Whitney U", float(found.pvalue), effect, n)


def corrected(results: Sequence[TestResult], method: str = "holm") -> list[TestResult]:
    """The results with p corrected for their number.

    Args:
        results: all tests that were made at once; those with p None stay as they are.
        method: "bonferroni", "holm" (Holm 1979), or "fdr" (Benjamini and Hochberg 1995).

    Raises:
        ConfigurationError: an unknown method.
    """
    p = np.array([result.p for result in results if result.p is not None])
    order = np.argsort(p, kind="stable")
    if method == "bonferroni":
        adjusted = p * len(p)
    elif method == "holm":
        adjusted = np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order])[np.argsort(order)]
    elif method == "fdr":
        adjusted = stats.false_discovery_control(p) if len(p) else p
    else:
        raise ConfigurationError(f"method={method!r}; choose one of bonferroni, holm, fdr")
    values = iter(np.minimum(1.0, adjusted).tolist())
    return [result if result.p is None else replace(result, corrected=next(values)) for result in results]


def over_seeds(values: ArrayLike) -> tuple[float, float | None, float | None]:
    """(mean, low, high) of one figure a seed, (S,), by the t interval; no ends for a single seed.

    Raises:
        InputError: no value, or one that is not finite.
    """
    figures = _finite(values)
    if not len(figures):
        raise InputError("no seed to summarise: expected one figure a seed")
    mean = float(figures.mean())
    if len(figures) < 2:
        return mean, None, None
    if figures.std() == 0:
        return mean, mean, mean
    low, high = stats.t.interval(LEVEL, len(figures) - 1, mean, stats.sem(figures))
    return mean, float(low), float(high)


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not np.isfinite(array).all():
        raise InputError(f"figures of shape {array.shape}; expected a list of finite numbers, one a document")
    return array


def _check_method(method: str, other: str) -> None:
    if method not in ("auto", "t", other):
        raise ConfigurationError(f"method={method!r}; choose one of auto, t, {other}")


def _normal(values: NDArray[np.float64]) -> bool:
    """Whether a t test applies; a test of normality says nothing about very few values."""
    return len(values) >= 8 and values.std() > 0 and float(stats.shapiro(values).pvalue) > 0.05
