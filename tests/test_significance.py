"""Tests between runs: against scipy called directly, against sums over all permutations, and against Holm by hand."""

import itertools

import numpy as np
import pytest
from scipy import stats

from hippoformer.errors import ConfigurationError, InputError, MissingPackageError
from hippoformer.evaluation.packages import needed
from hippoformer.evaluation.significance import TestResult, corrected, over_seeds, paired_test, unpaired_test

DRAW = np.random.default_rng(0)
NORMAL = DRAW.normal(size=20)
SKEWED = DRAW.exponential(size=20) ** 3


def test_a_paired_test_is_chosen_by_the_differences() -> None:
    base = DRAW.normal(size=20)
    chosen = paired_test(base + NORMAL, base)
    assert chosen.test == "paired t" and chosen.p == pytest.approx(stats.ttest_1samp(NORMAL, 0.0).pvalue)
    assert chosen.effect == pytest.approx(NORMAL.mean() / np.sqrt(((NORMAL - NORMAL.mean()) ** 2).sum() / 19))
    assert paired_test(base + SKEWED, base).test == "Wilcoxon signed rank"
    assert paired_test([1.0, 2.0, 4.0], [0.0, 0.0, 0.0]).test == "Wilcoxon signed rank", "too few to call normal"


def test_wilcoxon_is_the_share_of_sign_patterns_that_are_as_extreme() -> None:
    difference = np.array([0.3, -0.1, 0.7, 0.9, 0.2, 1.4])
    result = paired_test(difference, np.zeros(6), "wilcoxon")
    ranks = stats.rankdata(np.abs(difference))
    observed = abs((ranks * np.sign(difference)).sum())
    patterns = [abs((ranks * np.array(signs)).sum()) for signs in itertools.product((-1, 1), repeat=6)]
    assert result.p == pytest.approx(np.mean([pattern >= observed for pattern in patterns]))
    assert result.effect == pytest.approx((ranks * np.sign(difference)).sum() / 21)


def test_groups_without_pairs() -> None:
    other = DRAW.normal(size=15) + 1.0
    chosen = unpaired_test(NORMAL, other)
    assert chosen.test == "Welch's t" and chosen.effect < 0
    ranks = unpaired_test(SKEWED, other)
    assert ranks.test == "Mann-Whitney U"
    wins = np.mean([float(a > b) - float(a < b) for a in SKEWED for b in other])
    assert ranks.effect == pytest.approx(wins)


def test_nothing_to_test() -> None:
    for result in (paired_test([1.0], [2.0]), paired_test([1.0, 2.0], [1.0, 2.0]), unpaired_test([1.0], [2.0, 3.0])):
        assert result.test == "none" and result.p is None
    same = paired_test([2.0] * 9, [1.0] * 9, "t")
    assert same.test == "Wilcoxon signed rank" and same.effect == 1.0


def given(*p: float | None) -> list[TestResult]:
    return [TestResult("a test", None, value, None, None, None, None, 5) for value in p]


def test_corrections() -> None:
    p = (0.01, 0.04, 0.03, None, 0.005)
    assert [r.p_corrected for r in corrected(given(*p), "bonferroni")] == pytest.approx([0.04, 0.16, 0.12, None, 0.02])
    # Holm by hand: 4 x 0.005, 3 x 0.01, 2 x 0.03, 1 x 0.04 lifted to the one before.
    assert [r.p_corrected for r in corrected(given(*p), "holm")] == pytest.approx([0.03, 0.06, 0.06, None, 0.02])
    # Benjamini and Hochberg by hand: 4/1 x 0.005, 4/2 x 0.01, 4/3 x 0.03, 4/4 x 0.04.
    assert [r.p_corrected for r in corrected(given(*p), "fdr")] == pytest.approx([0.02, 0.04, 0.04, None, 0.02])
    assert [r.p_corrected for r in corrected(given(0.9, 0.8), "holm")] == [1.0, 1.0]
    assert corrected(given(None))[0].correction is None


def test_seeds() -> None:
    found = over_seeds([1.0, 2.0, 4.0])
    assert found.mean == pytest.approx(7 / 3) and found.std == pytest.approx(np.std([1, 2, 4], ddof=1))
    half = stats.t.ppf(0.975, 2) * found.std / 3**0.5
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half))
    assert over_seeds([5.0]).low is None


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(InputError, match="same documents"):
        paired_test([1.0, 2.0], [1.0])
    with pytest.raises(InputError, match="finite"):
        unpaired_test([1.0, np.nan], [1.0])
    with pytest.raises(InputError, match="no seed"):
        over_seeds([])
    for call in (lambda: paired_test([1.0], [1.0], "z"), lambda: corrected([], "sidak")):
        with pytest.raises(ConfigurationError, match="choose one of"):
            call()


def test_a_missing_package_is_named() -> None:
    with pytest.raises(MissingPackageError, match=r"no_such_package.*hippoformer\[evaluate\]"):
        needed("no_such_package.part")
