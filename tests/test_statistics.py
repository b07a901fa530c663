"""Intervals and tests against computations by another way; provenance and the writing of results."""

import itertools
import json
import math
import os
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from evaluation.common.results import Row, table
from evaluation.common.statistics import (
    TestResult,
    bootstrap,
    change,
    corrected,
    over_seeds,
    paired_test,
    perplexity,
    share,
    unpaired_test,
)
from hippoformer.data import Document
from hippoformer.errors import ConfigurationError, HippoFormerError, InputError
from hippoformer.files import _commit, provenance, write_json

DRAW = np.random.default_rng(0)
NORMAL, SKEWED = DRAW.normal(size=20), DRAW.exponential(size=20) ** 3


def sample(documents: int = 40, seed: int = 0) -> tuple[list[float], list[float], list[int]]:
    """(sums of a run, sums of its reference, tokens): documents of different difficulty, the run 0.05 nats better."""
    generator = random.Random(seed)
    tokens = [generator.randint(50, 5000) for _ in range(documents)]
    difficulty = [generator.gauss(3.0, 0.4) for _ in range(documents)]
    reference = [count * nats for count, nats in zip(tokens, difficulty, strict=True)]
    run = [count * (nats - 0.05 + generator.gauss(0, 0.01)) for count, nats in zip(tokens, difficulty, strict=True)]
    return run, reference, tokens


def test_perplexity_weighs_tokens_and_not_documents() -> None:
    # 9 tokens of probability 1/2 and one of 1/1000: (2^9 · 1000)^(1/10).
    value, low, high = bootstrap(perplexity, [9 * math.log(2), math.log(1000)], [9, 1])
    assert value == pytest.approx((2**9 * 1000) ** 0.1) and low is not None and high is not None
    assert bootstrap(perplexity, [2.0], [1]) == (pytest.approx(math.exp(2)), None, None)


@pytest.mark.parametrize("paired", [False, True])
def test_intervals_agree_with_a_plain_loop(paired: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    run, reference, tokens = sample()
    samples = (run, reference, tokens) if paired else (run, tokens)
    value, low, high = bootstrap(change if paired else perplexity, *samples, seed=7, resamples=4000)
    generator, found = random.Random(1), []
    for _ in range(4000):
        chosen = generator.choices(range(len(tokens)), k=len(tokens))
        mine, theirs, total = (sum(of[i] for i in chosen) for of in (run, reference, tokens))
        own = math.exp(mine / total)
        found.append(100 * (own / math.exp(theirs / total) - 1) if paired else own)
    found.sort()
    width = found[3899] - found[99]
    assert (low, high) == (pytest.approx(found[99], abs=0.1 * width), pytest.approx(found[3899], abs=0.1 * width))
    assert low is not None and high is not None and low < value < high
    if paired:
        assert high < 0, "what differs between documents is common to both"
    monkeypatch.setattr("evaluation.common.statistics._BATCH_NUMBERS", 400)
    again = bootstrap(change if paired else perplexity, *samples, seed=7, resamples=4000)
    assert again == (value, low, high), "batches of resamples change nothing"
    assert bootstrap(change if paired else perplexity, *samples, seed=8, resamples=4000) != again


def test_a_paired_test_is_chosen_by_the_differences() -> None:
    base = DRAW.normal(size=20)
    chosen = paired_test(base + NORMAL, base)
    assert chosen.test == "paired t" and chosen.p == pytest.approx(stats.ttest_1samp(NORMAL, 0.0).pvalue)
    assert chosen.effect == pytest.approx(NORMAL.mean() / np.sqrt(((NORMAL - NORMAL.mean()) ** 2).sum() / 19))
    assert paired_test(base + SKEWED, base).test == "Wilcoxon signed rank"
    assert paired_test([1.0, 2.0, 4.0], [0.0, 0.0, 0.0]).test == "Wilcoxon signed rank", "too few to call normal"
    assert [row.value for row in chosen.rows("run", "base")] == [chosen.p, chosen.effect]


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
    chosen, ranks = unpaired_test(NORMAL, other), unpaired_test(SKEWED, other)
    assert chosen.test == "Welch's t" and chosen.effect is not None and chosen.effect < 0
    wins = np.mean([float(a > b) - float(a < b) for a in SKEWED for b in other])
    assert ranks.test == "Mann-Whitney U" and ranks.effect == pytest.approx(wins)


def test_nothing_to_test() -> None:
    for result in (paired_test([1.0], [2.0]), paired_test([1.0, 2.0], [1.0, 2.0]), unpaired_test([1.0], [2.0, 3.0])):
        assert result.test == "none" and result.p is None and result.rows("a", "b") == []
    same = paired_test([2.0] * 9, [1.0] * 9, "t")
    assert same.test == "Wilcoxon signed rank" and same.effect == 1.0


def test_corrections() -> None:
    def adjusted(method: str, *p: float | None) -> list[float | None]:
        return [one.corrected for one in corrected([TestResult("a test", value, 0.0, 5) for value in p], method)]

    p = (0.01, 0.04, 0.03, None, 0.005)
    assert adjusted("bonferroni", *p) == pytest.approx([0.04, 0.16, 0.12, None, 0.02])
    # Holm by hand: 4 x 0.005, 3 x 0.01, 2 x 0.03, 1 x 0.04 lifted to the one before.
    assert adjusted("holm", *p) == pytest.approx([0.03, 0.06, 0.06, None, 0.02])
    # Benjamini and Hochberg by hand: 4/1 x 0.005, 4/2 x 0.01, 4/3 x 0.03, 4/4 x 0.04.
    assert adjusted("fdr", *p) == pytest.approx([0.02, 0.04, 0.04, None, 0.02])
    assert adjusted("holm", 0.9, 0.8) == [1.0, 1.0] and adjusted("holm", None) == [None] and corrected([]) == []


def test_seeds_and_shares() -> None:
    mean, low, high = over_seeds([1.0, 2.0, 4.0])
    half = stats.t.ppf(0.975, 2) * np.std([1, 2, 4], ddof=1) / 3**0.5
    assert (mean, low, high) == pytest.approx((7 / 3, 7 / 3 - half, 7 / 3 + half))
    assert over_seeds([5.0]) == (5.0, None, None)
    percent, low, high = share([True, False, False, False])
    assert percent == 25.0 and (low, high) == pytest.approx((4.559, 69.936), abs=1e-3)  # Wilson by hand


def test_what_cannot_be_compared_is_refused() -> None:
    for wrong, message in (
        (lambda: paired_test([1.0, 2.0], [1.0]), "same documents"),
        (lambda: unpaired_test([1.0, np.nan], [1.0]), "finite"),
        (lambda: over_seeds([]), "no seed"),
        (lambda: bootstrap(perplexity, [], []), "one a document"),
        (lambda: bootstrap(perplexity, [1.0], [1, 2]), "one a document"),
        (lambda: bootstrap(perplexity, [math.nan, 1.0], [1, 2]), "one a document"),
    ):
        with pytest.raises(InputError, match=message):
            wrong()
    for call in (lambda: paired_test([1.0], [1.0], "z"), lambda: corrected([], "sidak")):
        with pytest.raises(ConfigurationError, match="choose one of"):
            call()


def test_a_table_takes_the_orientation_with_fewer_columns() -> None:
    narrow = table([Row(condition, "perplexity", 2.5, 2.0, 3.0) for condition in ("memory", "off")])
    assert narrow.splitlines()[2].split() == ["|", "memory", "|", "2.5", "[2,", "3]", "|"]
    wide = table([Row("memory", f"metric {i}", 12345.0) for i in range(9)])
    assert len(wide.splitlines()) == 2 + 9 and "12,345" in wide
    assert "two, memory" in table([Row("memory", "x", None, model=name) for name in ("one", "two")])


def test_the_commit_is_that_of_the_checkout(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "module.py").write_text("pass\n")
    assert _commit(tmp_path) == (None, None)
    git("init", "-q")
    assert _commit(tmp_path)[0] is None  # a checkout without a commit
    git("add", ".")
    git("commit", "-q", "-m", "first")
    head = git("rev-parse", "HEAD")
    assert _commit(tmp_path) == (head, False)
    (tmp_path / "results.json").write_text("{}")
    assert _commit(tmp_path) == (head, False)  # a result changes no code
    (tmp_path / "src" / "module.py").write_text("pass  # changed\n")
    assert _commit(tmp_path) == (head, True) and _commit(tmp_path / "src") == (None, None)


def test_provenance_names_what_a_figure_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "= A =\nä\n"
    (tmp_path / "a").write_bytes(text.encode("utf-8"))
    documents = [Document("A", text[:3], "a.jsonl:1"), Document("B", text[3:], "a.jsonl:2")]
    facts = provenance(documents)
    assert facts["packages"]["numpy"] == np.__version__ and facts["cpu"] and facts["packages"]["scipy"]
    tool = subprocess.run(["sha256sum", str(tmp_path / "a")], check=True, capture_output=True, text=True)
    sha256 = tool.stdout.split()[0]
    assert facts["data"] == {"sha256": sha256, "documents": 2, "utf8_bytes": 9, "sources": ["a.jsonl"]}
    json.dumps(facts, allow_nan=False)
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/python", "a file"])
    assert "/somewhere" not in provenance()["command"] and provenance()["command"].endswith("'a file'")


def test_results_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"value": 1, "text": "ä"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"value": 1, "text": "ä"}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"value": math.nan})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(HippoFormerError, match=r"results\.json could not be written \(No space left on device\)"):
        write_json(path, {"value": 2})
    assert json.loads(path.read_text(encoding="utf-8"))["value"] == 1 and os.listdir(tmp_path) == ["results.json"]
    with pytest.raises(HippoFormerError, match="could not be written"):
        write_json(tmp_path / "missing" / "results.json", {})
