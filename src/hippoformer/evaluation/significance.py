"""Is a difference real? Paired and unpaired tests with effect sizes, corrected where several are made at once.

Documents are the units: one figure each under two conditions, or one of each of two groups. The numbers are scipy's;
this file chooses the test, adds the size of the effect, and says both in words.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from hippoformer.errors import ConfigurationError, InputError

PairedMethod = Literal["auto", "t", "wilcoxon"]
UnpairedMethod = Literal["auto", "t", "mann-whitney"]
Correction = Literal["bonferroni", "holm", "fdr"]

# A test of normality says nothing about very few values, and the t test needs them normal.
_FEWEST_FOR_NORMALITY = 8
_NORMALITY = 0.05


@dataclass(frozen=True)
class TestResult:
    """One comparison.

    Attributes:
        test: "paired t", "Wilcoxon signed rank", "Welch's t", "Mann-Whitney U", or "none": fewer than two values, or no
            difference anywhere.
        statistic, p: of the test, two-sided; None for "none".
        p_corrected, correction: with the other comparisons taken into account, see `corrected`; None before.
        effect_name, effect: Cohen's d (of the differences where they are paired), or the rank-biserial correlation.
        n: pairs, or values of both groups together.
    """

    __test__ = False  # not a test of pytest's

    test: str
    statistic: float | None
    p: float | None
    p_corrected: float | None
    correction: str | None
    effect_name: str | None
    effect: float | None
    n: int


@dataclass(frozen=True)
class SeedSummary:
    """A figure over several training seeds: mean, standard deviation, and a t interval of the mean."""

    mean: float
    std: float | None
    low: float | None
    high: float | None
    level: float
    seeds: int


def paired_test(values: ArrayLike, reference: ArrayLike, method: PairedMethod = "auto") -> TestResult:
    """Two-sided test of the differences values - reference, (D,) each, pair by pair.

    Args:
        values, reference: of the same documents in the same order.
        method: "t", "wilcoxon" (exact for few pairs without ties), or "auto": t where there are at least 8 differences
            and Shapiro and Wilk find them normal, Wilcoxon otherwise.

    Raises:
        InputError: lengths that differ, or a value that is not finite. ConfigurationError: an unknown method.
    """
    first, second = _finite(values), _finite(reference)
    if first.shape != second.shape:
        raise InputError(f"{len(first)} values against {len(second)}; a paired test needs the same documents in both.")
    _known(method, ("auto", "t", "wilcoxon"))
    difference = first - second
    if len(difference) < 2 or not difference.any():
        return _no_test(len(difference))
    if method == "auto":
        method = "t" if _normal(difference) else "wilcoxon"
    if method == "t":
        spread = float(difference.std(ddof=1))
        if spread == 0:  # the same difference everywhere: t would be infinite
            return paired_test(first, second, "wilcoxon")
        found = stats.ttest_rel(first, second)
        return _result("paired t", found, "Cohen's d", float(difference.mean()) / spread, len(difference))
    found = stats.wilcoxon(first, second)
    ranks = stats.rankdata(np.abs(difference[difference != 0]))
    signs = np.sign(difference[difference != 0])
    return _result(
        "Wilcoxon signed rank", found, "rank-biserial", float((ranks * signs).sum() / ranks.sum()), len(difference)
    )


def unpaired_test(values: ArrayLike, reference: ArrayLike, method: UnpairedMethod = "auto") -> TestResult:
    """Two-sided test of two groups that share no documents, as Welch's t or Mann and Whitney's U.

    Args:
        values, reference: (A,) and (B,).
        method: "auto" takes t where both groups have at least 8 values and look normal.

    Raises:
        InputError: a value that is not finite. ConfigurationError: an unknown method.
    """
    first, second = _finite(values), _finite(reference)
    _known(method, ("auto", "t", "mann-whitney"))
    n = len(first) + len(second)
    if min(len(first), len(second)) < 2 or len(np.unique(np.concatenate((first, second)))) == 1:
        return _no_test(n)
    if method == "auto":
        method = "t" if _normal(first) and _normal(second) else "mann-whitney"
    if method == "t":
        pooled = ((len(first) - 1) * first.var(ddof=1) + (len(second) - 1) * second.var(ddof=1)) / (n - 2)
        if pooled == 0:
            return unpaired_test(first, second, "mann-whitney")
        found = stats.ttest_ind(first, second, equal_var=False)
        return _result("Welch's t", found, "Cohen's d", float((first.mean() - second.mean()) / pooled**0.5), n)
    found = stats.mannwhitneyu(first, second)
    effect = 2.0 * float(found.statistic) / (len(first) * len(second)) - 1.0
    return _result("Mann-Whitney U", found, "rank-biserial", effect, n)


def corrected(results: Sequence[TestResult], method: Correction = "holm") -> list[TestResult]:
    """The same results with p values corrected for their number; those without a test stay without.

    Args:
        results: all comparisons that were made at once.
        method: "bonferroni", "holm" (Holm 1979), or "fdr" (Benjamini and Hochberg 1995).

    Raises:
        ConfigurationError: an unknown method.
    """
    _known(method, ("bonferroni", "holm", "fdr"))
    p = np.array([result.p for result in results if result.p is not None])
    if not len(p):
        return list(results)
    if method == "fdr":
        adjusted = stats.false_discovery_control(p)
    elif method == "bonferroni":
        adjusted = np.minimum(1.0, p * len(p))
    else:
        order = np.argsort(p, kind="stable")
        stepped = np.maximum.accumulate(
            (len(p) - np.arange(len(p))) * p[order]
        )  # a smaller p never ends above a larger
        adjusted = np.empty_like(p)
        adjusted[order] = np.minimum(1.0, stepped)
    values = iter(adjusted.tolist())
    return [
        result if result.p is None else replace(result, p_corrected=next(values), correction=method)
        for result in results
    ]


def over_seeds(values: ArrayLike, level: float = 0.95) -> SeedSummary:
    """One figure over several seeds, (S,): mean, sample standard deviation, t interval of the mean.

    Raises:
        InputError: no value, or one that is not finite.
    """
    figures = _finite(values)
    if not len(figures):
        raise InputError("no seed to summarise: expected one figure a seed")
    mean = float(figures.mean())
    if len(figures) < 2:
        return SeedSummary(mean, None, None, None, level, len(figures))
    std = float(figures.std(ddof=1))
    low, high = (mean, mean) if std == 0 else stats.t.interval(level, len(figures) - 1, mean, stats.sem(figures))
    return SeedSummary(mean, std, float(low), float(high), level, len(figures))


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not np.isfinite(array).all():
        raise InputError(f"figures of shape {array.shape}; expected a list of finite numbers, one a document.")
    return array


def _known(method: str, known: tuple[str, ...]) -> None:
    if method not in known:
        raise ConfigurationError(f"method={method!r}; choose one of {', '.join(known)}.")


def _normal(values: NDArray[np.float64]) -> bool:
    if len(values) < _FEWEST_FOR_NORMALITY or values.std() == 0:
        return False
    return float(stats.shapiro(values).pvalue) > _NORMALITY


def _no_test(n: int) -> TestResult:
    return TestResult("none", None, None, None, None, None, None, n)


def _result(test: str, found: object, effect_name: str, effect: float, n: int) -> TestResult:
    statistic, p = float(found.statistic), float(found.pvalue)  # type: ignore[attr-defined]
    return TestResult(test, statistic, p, None, None, effect_name, effect, n)
