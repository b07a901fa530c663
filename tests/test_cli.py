"""Commands hand their options to the right function, and errors of the package become one line."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import hippoformer
import hippoformer.evaluation
from hippoformer.cli import app
from hippoformer.errors import HippoFormerError, MemoryFileError, TextError
from hippoformer.evaluation import ConditionResult, DocumentResult, Interval, PerplexityReport
from hippoformer.model.cache import Episode, HippoCache

TEXT = "= One =\n\nSome text.\n= Two =\n\nOther text.\n"


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="hippoformer")


def install(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    """A module in place of one that a command imports when it runs."""
    module = ModuleType(name)
    for key, value in members.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)
    parent, _, child = name.rpartition(".")
    monkeypatch.setattr(importlib.import_module(parent), child, module, raising=False)


def report(conditions: list[str]) -> PerplexityReport:
    interval = Interval(20.0, 19.0, 21.0, 0.95, 10, 0)
    results = [ConditionResult(name, 30.0, 10, 11, 5, 40, interval, 1000, 2000, 0.5, None) for name in conditions]
    return PerplexityReport(
        model={"base_model_name": "b", "window": 512, "sink_tokens": 4, "segment_len": 256, "buffer_size": 2048},
        settings={"level": 0.95},
        conditions=tuple(results),
        documents=(DocumentResult("One", "texts", 11, 10, 5, 40, None, dict.fromkeys(conditions, 30.0)),),
        left_out=(),
        provenance={},
    )


class Calls(dict[str, Any]):
    """What `hippoformer.load` and `evaluate_perplexity` were called with."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    seen = Calls()

    def load(name: str, **options: Any) -> tuple[Any, str]:
        seen["load"] = {"name": name, **options}
        return SimpleNamespace(to=lambda device: f"model on {device}"), "tokenizer"

    def evaluate(model: Any, tokenizer: str, documents: list[Any], **options: Any) -> PerplexityReport:
        options["progress"](1, 2)
        seen["evaluate"] = {"model": model, "tokenizer": tokenizer, "documents": documents, **options}
        return report(options["conditions"])

    monkeypatch.setattr(hippoformer, "load", load, raising=False)
    monkeypatch.setattr(hippoformer.evaluation, "evaluate_perplexity", evaluate)
    return seen


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "articles.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_perplexity_with_every_option(calls: Calls, text: Path, tmp_path: Path) -> None:
    import torch

    output = tmp_path / "results.json"
    result = run(
        *("eval", "perplexity", "--model", "smollm2-135m", "--text", text, "--window", "256", "--sink-tokens", "2"),
        *("--buffer-size", "64", "--conditions", "memory, off", "--limit-tokens", "100", "--skip-tokens", "10"),
        *("--documents", "1", "--batch-size", "3", "--output", output, "--seed", "5", "--device", "cpu"),
        *("--dtype", "bfloat16", "--split", "headings", "--decay-rate", "0.75"),
    )
    assert result.exit_code == 0, result.output
    assert calls["load"] == {
        **{"name": "smollm2-135m", "window": 256, "sink_tokens": 2, "buffer_size": 64, "seed": 5},
        "decay_rate": 0.75,
        "dtype": torch.bfloat16,
    }
    asked = calls["evaluate"]
    assert [document.title for document in asked.pop("documents")] == ["One", "Two"]
    asked.pop("progress")
    assert asked == {
        **{
            "model": "model on cpu",
            "tokenizer": "tokenizer",
            "conditions": ["memory", "off"],
            "batch_size": 3,
            "seed": 5,
        },
        **{"limit_tokens": 100, "skip_tokens": 10, "max_documents": 1},
    }
    assert set(json.loads(output.read_text(encoding="utf-8"))["conditions"]) == {"memory", "off"}
    assert "20.00 [19.00, 21.00]" in result.stdout
    assert "Results written to" in result.stdout


def test_options_not_given_are_left_to_the_model(calls: Calls, text: Path) -> None:
    assert run("eval", "perplexity", "--model", "folder", "--text", text).exit_code == 0
    assert calls["load"] == {"name": "folder", "seed": 0}
    assert calls["evaluate"]["conditions"] == ["memory", "off", "window-only", "other-document"]


def test_a_single_document_has_no_other(calls: Calls, text: Path) -> None:
    assert run("eval", "perplexity", "--model", "m", "--text", text, "--split", "file").exit_code == 0
    assert calls["evaluate"]["conditions"] == ["memory", "off", "window-only"]


def test_texts_can_follow_one_another(calls: Calls, text: Path, tmp_path: Path) -> None:
    second = tmp_path / "second.txt"
    second.write_text("A text.", encoding="utf-8")
    for arguments in (("--text", text, second), ("--text", text, "--text", second)):
        assert run("eval", "perplexity", "--model", "m", *arguments).exit_code == 0
        titles = [document.title for document in calls["evaluate"]["documents"]]
        assert titles == ["One", "Two", "second"]


@pytest.mark.parametrize(("there", "where"), [(True, "model on cuda"), (False, None)])
def test_a_model_goes_to_the_gpu_where_there_is_one(
    calls: Calls, text: Path, monkeypatch: pytest.MonkeyPatch, there: bool, where: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    run("eval", "perplexity", "--model", "m", "--text", str(text))
    assert (calls["evaluate"]["model"] == where) == there


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "{folder}/nowhere.txt"], "Error: {folder}/nowhere.txt does not exist"),
        (["--text", "{text}", "--dtype", "int3"], "Error: --dtype int3 is unknown"),
        (["--text", "{text}", "--device", "abacus"], "Error: --device abacus cannot be used here"),
        (["--text", "{text}", "--output", "{folder}"], "Error: --output {folder} cannot be written"),
        (["--text", "{text}", "--output", "{folder}/no/r.json"], "Error: --output {folder}/no/r.json cannot be"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(calls: Calls, text: Path, arguments: list[str], message: str) -> None:
    names = {"folder": text.parent, "text": text}
    result = run("eval", "perplexity", "--model", "m", *(argument.format(**names) for argument in arguments))
    assert result.exit_code == 2
    assert result.stderr.startswith(message.format(**names))
    assert len(result.stderr.splitlines()) == 1
    assert "evaluate" not in calls  # told before anything was read


def test_debug_lets_the_traceback_through(calls: Calls, tmp_path: Path) -> None:
    result = run("--debug", "eval", "perplexity", "--model", "m", "--text", tmp_path / "nowhere.txt")
    assert isinstance(result.exception, TextError)


def test_an_error_of_several_lines_with_brackets(monkeypatch: pytest.MonkeyPatch, text: Path) -> None:
    def load(name: str, **options: Any) -> None:
        raise HippoFormerError("no [red]such[/red]\n  model")

    monkeypatch.setattr(hippoformer, "load", load, raising=False)
    result = run("eval", "perplexity", "--model", "m", "--text", text)
    assert (result.exit_code, result.stderr) == (2, "Error: no [red]such[/red] model\n")


def test_other_exceptions_are_not_hidden(monkeypatch: pytest.MonkeyPatch, text: Path) -> None:
    def load(name: str, **options: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(hippoformer, "load", load, raising=False)
    assert isinstance(run("eval", "perplexity", "--model", "m", "--text", text).exception, RuntimeError)


def test_train_hands_on_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    install(monkeypatch, "hippoformer.train", run=seen.append)
    assert run("train", "--no-wandb", "--max-steps=3", "--text", "a", "b").exit_code == 0
    (arguments,) = seen
    assert (arguments.text, arguments.max_steps, arguments.no_wandb) == (["a", "b"], 3, True)
    result = run("train", "--text", "a", "--dataset", "b")
    assert result.exit_code == 2 and "Error: say what to train on" in result.stderr
    assert len(seen) == 1


def test_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    install(monkeypatch, "hippoformer.demo", main=lambda *given: seen.append(given))
    assert run("demo").exit_code == 0
    assert run("demo", "--minutes", "1", "--model", "m", "--text", "a.txt", "b.txt").exit_code == 0
    assert seen == [([], "smollm2-135m", 3.0), ([Path("a.txt"), Path("b.txt")], "m", 1.0)]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A memory of two rows; the first has three episodes, of which the second has aged."""

    def episode(token: int, position: int, *numbers: float) -> Episode:
        salience, priority, age, strength = numbers
        return Episode(token, (1, 2, token), position, salience, priority, age, strength, 0.0, in_window=position > 6)

    rows = [
        [episode(10, 5, 0.2, 3.0, 0, 1), episode(11, 6, 0.9, 5.0, 9, 2), episode(12, 7, 0.5, 2.5, 0, 3)],
        [],
    ]

    def load_cache(path: Path, model: Any) -> Any:
        if path.name != "memory.safetensors":
            raise MemoryFileError(f"{path} is truncated.")
        return SimpleNamespace(episodes=lambda row: rows[row])

    def load(name: str, **options: Any) -> Any:
        tokenizer = SimpleNamespace(decode=lambda ids: "".join(f"[t{token}]\n" for token in ids))
        return SimpleNamespace(config=SimpleNamespace(decay=0.9)), tokenizer

    monkeypatch.setattr(HippoCache, "load", load_cache)
    monkeypatch.setattr(hippoformer, "load", load, raising=False)


def tokens_shown(output: str) -> list[str]:
    """First column of the table."""
    cells = [line.split("│")[1].strip() for line in output.splitlines() if line.startswith("│")]
    return [cell for cell in cells if cell]


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize(
    ("options", "order"),
    [
        ((), [10, 12, 11]),  # 3.0, 2.5, and 5.0 · 0.9^9 = 1.94
        (("--sort", "salience"), [11, 12, 10]),
        (("--sort", "strength"), [12, 11, 10]),
        (("--sort", "position"), [10, 11, 12]),
        (("--limit", "1"), [10]),
        (("--row", "1"), []),
    ],
)
def test_memory_show(options: tuple[str, ...], order: list[int]) -> None:
    result = run("memory", "show", "memory.safetensors", "--model", "m", *options)
    assert result.exit_code == 0, result.output
    assert tokens_shown(result.stdout) == [f"[t{token}]⏎" for token in order]
    if 11 in order:
        row = next(line for line in result.stdout.splitlines() if line.startswith("│ [t11]"))
        cells = [cell.strip() for cell in row.split("│")[1:-1]]
        assert cells == ["[t11]⏎", "[t1]⏎[t2]⏎[t11]⏎", "store", "6", "0.900", "5.00", "9", "1.94", "2"]


@pytest.mark.usefixtures("memory")
def test_a_memory_that_cannot_be_read() -> None:
    result = run("memory", "show", "other.safetensors", "--model", "m")
    assert (result.exit_code, result.stderr) == (2, "Error: other.safetensors is truncated.\n")
