"""Intervals and comparisons against computations by another way; provenance and the writing of results."""

import json
import math
import os
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest

import hippoformer.cli
from hippoformer.data import Document
from hippoformer.errors import HippoFormerError, InputError
from hippoformer.evaluation import (
    documents_sha256,
    paired_ratio,
    perplexity_interval,
    provenance,
    token_perplexity,
    write_json,
)
from hippoformer.evaluation.provenance import _commit, code_sha256


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
    assert token_perplexity([9 * math.log(2), math.log(1000)], [9, 1]) == pytest.approx((2**9 * 1000) ** 0.1)
    assert perplexity_interval([9 * math.log(2), math.log(1000)], [9, 1]).estimate == pytest.approx(
        (2**9 * 1000) ** 0.1
    )


def test_interval_agrees_with_a_plain_loop() -> None:
    run, _, tokens = sample()
    interval = perplexity_interval(run, tokens, seed=7, resamples=4000)
    generator = random.Random(1)
    found = []
    for _ in range(4000):
        chosen = generator.choices(range(len(tokens)), k=len(tokens))
        found.append(math.exp(sum(run[i] for i in chosen) / sum(tokens[i] for i in chosen)))
    found.sort()
    width = found[3900] - found[99]
    assert interval.low == pytest.approx(found[99], abs=0.1 * width)
    assert interval.high == pytest.approx(found[3899], abs=0.1 * width)
    assert interval.low < interval.estimate < interval.high


def test_a_wider_level_is_a_wider_interval_and_the_seed_decides() -> None:
    run, _, tokens = sample()
    narrow, wide = (perplexity_interval(run, tokens, level=level, resamples=2000) for level in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high
    again = perplexity_interval(run, tokens, level=0.5, resamples=2000)
    other = perplexity_interval(run, tokens, level=0.5, resamples=2000, seed=1)
    assert again == narrow
    assert (other.low, other.high) != (narrow.low, narrow.high)


def test_batches_of_resamples_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    run, _, tokens = sample()
    whole = perplexity_interval(run, tokens, resamples=1000)
    monkeypatch.setattr("hippoformer.evaluation.statistics._BATCH_NUMBERS", 400)
    assert perplexity_interval(run, tokens, resamples=1000) == whole


def test_paired_ratio_against_a_plain_loop() -> None:
    run, reference, tokens = sample()
    comparison = paired_ratio(run, reference, tokens, resamples=4000)
    expected = math.exp(sum(run) / sum(tokens)) / math.exp(sum(reference) / sum(tokens))
    assert comparison.ratio.estimate == pytest.approx(expected)
    generator = random.Random(2)
    found = []
    for _ in range(4000):
        chosen = generator.choices(range(len(tokens)), k=len(tokens))
        total = sum(tokens[i] for i in chosen)
        found.append(math.exp(sum(run[i] for i in chosen) / total - sum(reference[i] for i in chosen) / total))
    found.sort()
    width = found[3899] - found[99]
    assert comparison.ratio.low == pytest.approx(found[99], abs=0.1 * width)
    assert comparison.ratio.high == pytest.approx(found[3899], abs=0.1 * width)
    # What differs between documents is common to both runs: unpaired, the intervals overlap; paired, the gain is clear.
    assert comparison.ratio.high < 1
    assert perplexity_interval(run, tokens).high > perplexity_interval(reference, tokens).low


def test_documents_are_compared_one_by_one() -> None:
    comparison = paired_ratio([1.0, 4.0, 2.0], [2.0, 3.0, 2.0], [1, 2, 5])
    assert (comparison.documents, comparison.documents_better) == (3, 1)
    assert comparison.document_ratios == pytest.approx([math.exp(-1), math.exp(0.5), 1.0])


def test_one_document_has_no_interval() -> None:
    interval = perplexity_interval([2.0], [1])
    assert interval.estimate == pytest.approx(math.exp(2))
    assert (interval.low, interval.high) == (None, None)
    assert paired_ratio([2.0], [3.0], [1]).ratio.low is None


@pytest.mark.parametrize(
    ("nll", "tokens", "message"),
    [
        ([], [], "one number a document"),
        ([1.0], [1, 2], "one number a document"),
        ([1.0, math.nan], [1, 2], "NaN or infinite"),
        ([1.0, math.inf], [1, 2], "NaN or infinite"),
        ([1.0, 0.0], [1, 0], "no scored token"),
    ],
)
def test_sums_that_have_no_perplexity(nll: list[float], tokens: list[int], message: str) -> None:
    for call in (token_perplexity, perplexity_interval, lambda a, b: paired_ratio(a, a, b)):
        with pytest.raises(InputError, match=message):
            call(nll, tokens)


# Provenance


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_that_of_our_own_checkout(tmp_path: Path) -> None:
    package = tmp_path / "src" / "hippoformer"
    package.mkdir(parents=True)
    (package / "module.py").write_text("pass\n")
    assert _commit(package) == (None, None)
    git(tmp_path, "init", "-q")
    assert _commit(package)[0] is None  # a checkout without a commit
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert _commit(package) == (head, False)
    (tmp_path / "results.json").write_text("{}")
    assert _commit(package) == (head, False)  # a result beside the package changes no code
    (package / "module.py").write_text("pass  # changed\n")
    assert _commit(package) == (head, True)
    installed = tmp_path / ".venv" / "site-packages" / "hippoformer"
    installed.mkdir(parents=True)
    assert _commit(installed) == (None, None)


def test_the_code_is_told_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "module.py").write_text("one")
    first = code_sha256(tmp_path)
    (tmp_path / "notes.txt").write_text("no code")
    assert code_sha256(tmp_path) == first != code_sha256()
    (tmp_path / "inner" / "module.py").write_text("two")
    assert code_sha256(tmp_path) != first


def test_provenance_names_what_a_figure_depends_on(tmp_path: Path) -> None:
    text = "= A =\nä\n"
    documents = [Document("A", text[:3], "a.jsonl:1"), Document("B", text[3:], "a.jsonl:2")]
    (tmp_path / "a").write_bytes(text.encode("utf-8"))
    facts = provenance(seed=3, documents=documents, command="a command")
    assert facts["seed"] == 3
    assert facts["command"] == "a command"
    assert facts["packages"]["numpy"] == np.__version__
    assert facts["torch_threads"] >= 1
    assert facts["cpu"]
    assert facts["data"]["documents"] == 2
    assert facts["data"]["sources"] == ["a.jsonl"]
    assert facts["data"]["utf8_bytes"] == 9
    tool = subprocess.run(["sha256sum", str(tmp_path / "a")], check=True, capture_output=True, text=True)
    assert facts["data"]["sha256"] == documents_sha256(documents) == tool.stdout.split()[0]
    json.dumps(facts, allow_nan=False)


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
    assert json.loads(path.read_text(encoding="utf-8"))["value"] == 1
    assert os.listdir(tmp_path) == ["results.json"]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(HippoFormerError, match="could not be written"):
        write_json(tmp_path / "missing" / "results.json", {})


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["/somewhere/bin/hippoformer", "eval", "a file"], "hippoformer eval 'a file'"),
        ([str(Path(hippoformer.cli.__file__).with_name("__main__.py")), "eval"], "hippoformer eval"),
        (["benchmarks/speed.py", "--long"], "benchmarks/speed.py --long"),
        ([str(Path.cwd() / "benchmarks" / "speed.py")], "benchmarks/speed.py"),
        (["/elsewhere/tool.py"], "tool.py"),
    ],
)
def test_the_command_names_no_place_of_this_machine(
    argv: list[str], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", argv)
    assert provenance()["command"] == command
