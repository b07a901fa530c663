"""Every evaluation runs from the command line and leaves tidy rows; one more is a file and a line."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

import hippoformer
from evaluation import comprehensive_eval, seeds
from evaluation.__main__ import main
from evaluation.registry import EVALUATIONS
from tiny_texts import text, tiny_load

TINY: dict[str, list[str]] = {
    "perplexity": ["--by-position", "--conditions", "memory", "off", "--documents", "1"],
    "recall": ["--distances", "100", "--facts", "1", "--kinds", "home", "--spacing", "50", "--streams", "1"],
    "variants": ["--variant", "as it is", "small:buffer_size=8", "--limit-tokens", "100"],
    "recall_variants": ["--distances", "100", "--facts", "1", "--kinds", "home", "--streams", "1", "--variant", "as"],
    "bytes": ["--buffers", "8", "--kv", "random:4", "--limit-characters", "200"],
    "dynamics": ["--limit_tokens", "100"],
}


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(hippoformer, "load", tiny_load)
    files = [tmp_path / f"{i}.txt" for i in range(2)]
    for i, file in enumerate(files):
        file.write_text(text(i, 300))
    return [str(file) for file in files]


def run(name: str, texts: list[str], *words: str) -> dict[str, Any]:
    output = Path(texts[0]).with_name(f"{name}.json")
    assert main([name, "--model", "tiny", "--text", *texts, "--output", str(output), *words]) == 0
    content: dict[str, Any] = json.loads(output.read_text(), parse_constant=pytest.fail)
    return content


@pytest.mark.parametrize("name", TINY)
def test_an_evaluation_leaves_rows_and_where_they_came_from(
    name: str, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    content = run(name, texts, *TINY[name])
    assert content["format"] == "hippoformer.rows/1" and content["rows"]
    shown = capsys.readouterr().out
    for row in content["rows"]:
        assert list(row) == ["evaluation", "model", "condition", "metric", "value", "low", "high", "n"]
        assert (row["evaluation"], row["model"]) == (name, "tiny")
        assert row["metric"] in shown and row["condition"] in shown
    assert content["provenance"]["data"]["documents"] == 2 and content["model"]["config"]["window"] == 48
    assert set(content["settings"]) == set(importlib.import_module(EVALUATIONS[name]).Options.__dataclass_fields__)


def test_every_evaluation_says_what_it_asks() -> None:
    for name, module in EVALUATIONS.items():
        page = Path(importlib.import_module(module).__file__ or "").with_name("README.md").read_text()
        assert f"python -m evaluation {name}" in page


MINE = '''"""How long the texts are."""
from dataclasses import dataclass
from evaluation.common.results import Result, Row

@dataclass
class Options:
    scale: float = 1.0

def run(model, tokenizer, documents, options):
    return Result([Row("all", "characters", options.scale * sum(len(d.text) for d in documents), n=len(documents))])
'''


def test_an_evaluation_is_a_file_and_a_line(
    texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_lengths.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(EVALUATIONS, "lengths", "my_lengths")
    (row,) = run("lengths", texts, "--scale", "0.5")["rows"]
    assert (row["value"], row["n"], row["evaluation"]) == (
        0.5 * sum(len(Path(t).read_text()) for t in texts),
        2,
        "lengths",
    )
    assert main([]) == 0 and "lengths" in capsys.readouterr().out
    sys.modules.pop("my_lengths")


def test_errors_are_one_line_and_status_2(texts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["recall", "--model", "tiny"], "no text"),
        (["perplexity", "--model", "tiny", "--text", *texts, "--limit-tokens", "1"], "limit_tokens"),
        (["perplexity", "--model", "tiny", "--text", *texts, "--output", "/nowhere/x.json"], "cannot be written"),
        (["riddles"], "Names: perplexity"),
    ):
        assert main(words) == 2
        said = capsys.readouterr()
        assert message in said.err + said.out and "Traceback" not in said.err


def test_the_original_s_command_goes_on_where_it_was(
    texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results.json"
    words = ["--checkpoint", "tiny", "--output", str(output), "--device", "cpu", "--samples", "1"]
    words += ["--text", *texts, "--max-seq-length", "150", "--parts", "perplexity", "dynamics"]
    assert comprehensive_eval.main(words) == 0
    content = json.loads(output.read_text())
    assert {row["evaluation"] for row in content["rows"]} == {"perplexity", "dynamics"}
    assert content["evaluations"]["perplexity"]["settings"]["documents"] == 1
    assert content["evaluations"]["dynamics"]["settings"]["limit_tokens"] == 150
    assert "## perplexity" in capsys.readouterr().out
    (tmp_path / "results" / "dynamics.json").unlink()
    monkeypatch.setattr("evaluation.perplexity.run.run", lambda *of: pytest.fail("it is there already"))
    assert comprehensive_eval.main(words) == 0
    again = json.loads(output.read_text())
    assert again["evaluations"]["perplexity"] == content["evaluations"]["perplexity"]
    assert comprehensive_eval.main([*words[:-3], "--parts", "sleep"]) == 2
    assert "choose among perplexity" in capsys.readouterr().err


def test_seeds_are_put_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for seed, value in enumerate((1.0, 2.0, 4.0)):
        row = {"evaluation": "e", "model": "m", "condition": "memory", "metric": "perplexity", "value": value}
        other = row | {"metric": f"only in {seed}"}
        files.append(tmp_path / f"{seed}.json")
        files[-1].write_text(json.dumps({"rows": [row, other]}))
    output = tmp_path / "together.json"
    assert seeds.main([*map(str, files), "--output", str(output)]) == 0
    (row,) = json.loads(output.read_text())["rows"]
    assert row["value"] == pytest.approx(7 / 3) and row["n"] == 3 and row["low"] < row["value"] < row["high"]
    assert "perplexity" in capsys.readouterr().out
    files[0].write_text("{}")
    assert seeds.main([*map(str, files)]) == 2 and "holds no rows" in capsys.readouterr().err
