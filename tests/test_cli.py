"""Commands hand their options to the right function, and errors of the package become one line."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import hippoformer
from hippoformer import cli
from hippoformer.errors import HippoFormerError, MemoryFileError
from hippoformer.evaluation import Options
from hippoformer.model.cache import Episode, HippoCache

TEXT = "= One =\n\nSome text.\n= Two =\n\nOther text.\n"
PERPLEXITY = ("eval", "perplexity", "--model", "m")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `hippoformer.load` and a stand-in for `eval perplexity` were called with."""
    seen: dict[str, Any] = {}

    def load(name: str, **options: Any) -> tuple[Any, str]:
        seen["load"] = {"name": name, **options}
        return SimpleNamespace(to=lambda device: f"model on {device}"), "tokenizer"

    def measure(model: Any, tokenizer: str, documents: list[Any], options: Options) -> Any:
        seen["run"] = (model, tokenizer, [document.title for document in documents], options)
        return {"memory": [4.0], "off": [5.0]}

    monkeypatch.setattr(hippoformer, "load", load, raising=False)
    monkeypatch.setattr("hippoformer.cli.eval.measure", measure)
    monkeypatch.setattr("hippoformer.cli.eval.figures", lambda of: {"perplexity": of[0]})
    monkeypatch.setattr("hippoformer.cli.eval.result_file", lambda *given: {"name": given[0], "rows": given[3]})
    return seen


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "articles.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_an_evaluation_with_every_option(
    calls: dict[str, Any], text: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    (second, output) = (tmp_path / "second.txt", tmp_path / "results.json")
    second.write_text("A text.", encoding="utf-8")
    done = command(
        *(*PERPLEXITY, "--text", text, "--text", second, "--window", 256, "--sink_tokens", 2, "--batch-size", 3),
        *("--buffer-size", 64, "--decay-rate", 0.75, "--device", "cpu", "--dtype", "bfloat16", "--output", output),
    )
    assert done.code == 0 and "| memory    | 4          | -20            |" in done.out, done
    assert calls["load"] == {
        **{"name": "m", "window": 256, "sink_tokens": 2, "buffer_size": 64, "decay_rate": 0.75},
        "dtype": "bfloat16",
    }
    assert calls["run"] == ("model on cpu", "tokenizer", ["One", "Two", "second"], Options(batch_size=3))
    record = json.loads(output.read_text(encoding="utf-8"))
    assert record["name"] == "perplexity" and [row["value"] for row in record["rows"]] == [4.0, pytest.approx(-20), 5.0]


@pytest.mark.parametrize("there", [True, False])
def test_options_not_given_are_left_to_the_model_and_the_machine(
    calls: dict[str, Any], text: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert command(*PERPLEXITY, "--text", text).code == 0
    assert calls["load"] == {"name": "m"} and calls["run"][2:] == (["One", "Two"], Options())
    assert (calls["run"][0] == "model on cuda") == there


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "{folder}/nowhere.txt"], "Error: {folder}/nowhere.txt does not exist"),
        (["--text", "{text}", "--device", "abacus"], "Error: --device abacus cannot be used here"),
        (["--text", "{text}", "--output", "{folder}"], "Error: --output {folder} cannot be written"),
        (["--text", "{text}", "--output", "{folder}/no/r.json"], "Error: --output {folder}/no/r.json cannot be"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    calls: dict[str, Any], text: Path, arguments: list[str], message: str, command: Callable[..., Any]
) -> None:
    names = {"folder": text.parent, "text": text}
    done = command(*PERPLEXITY, *(argument.format(**names) for argument in arguments))
    assert done.code == 2 and done.err.startswith(message.format(**names)) and len(done.err.splitlines()) == 1
    assert "run" not in calls, "something was read before the error"


def test_lines_that_name_no_command_or_option(calls: dict[str, Any], command: Callable[..., Any]) -> None:
    assert command("sing") == (2, "", f"Error: there is no command sing: choose one of {', '.join(cli.COMMANDS)}\n")
    for words in (
        ("eval", "recall", *PERPLEXITY[2:]),
        (*PERPLEXITY[:2], "--text", "a"),
        (*PERPLEXITY, "--windw", 3),
        (*PERPLEXITY, "--dtype", "int3"),
        ("memory", "eat"),
    ):
        done = command(*words)
        assert done.code == 2 and "error: " in done.err and "Traceback" not in done.err


@pytest.mark.parametrize("failure", [HippoFormerError("no\n  such model"), RuntimeError("a bug")])
def test_only_errors_of_the_package_are_shortened(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, text: Path, command: Callable[..., Any]
) -> None:
    def load(name: str, **options: Any) -> None:
        raise failure

    monkeypatch.setattr(hippoformer, "load", load, raising=False)
    if isinstance(failure, HippoFormerError):
        assert command(*PERPLEXITY, "--text", text) == (2, "", "Error: no such model\n")
    with pytest.raises(type(failure)):
        command(*(["--debug"] if isinstance(failure, HippoFormerError) else []), *PERPLEXITY, "--text", text)


@pytest.mark.parametrize("extra", [name for name, (_, extra, _) in cli.COMMANDS.items() if extra])
def test_a_package_that_is_missing_is_named_with_its_extra(
    extra: str, monkeypatch: pytest.MonkeyPatch, command: Callable[..., Any]
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'x.y'", name="x.y")

    monkeypatch.setattr(cli, "import_module", missing)
    advice = f"pip install 'hippoformer[{cli.COMMANDS[extra][1]}]'"
    assert command(extra).err == f"Error: {extra} needs the package x.y: {advice}\n"


def test_commands_with_parsers_of_their_own_get_their_words(
    monkeypatch: pytest.MonkeyPatch, command: Callable[..., Any]
) -> None:
    seen: list[Any] = []
    for name in ("train", "lm_eval"):
        module = ModuleType(f"hippoformer.{name}")
        module.main = lambda words: seen.append(words) or 3  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert command("train", "--text", "a", "--help").code == command("lm-eval", "--tasks", "x").code == 3
    assert seen == [["--text", "a", "--help"], ["--tasks", "x"]]


def test_demo(monkeypatch: pytest.MonkeyPatch, command: Callable[..., Any]) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("hippoformer.demo.main", lambda *given: seen.append(given))
    assert command("demo").code == command("demo", "--minutes", "1", "a.txt", "b.txt", "--model", "m").code == 0
    assert seen == [([], "smollm2-135m", 3.0), ([Path("a.txt"), Path("b.txt")], "m", 1.0)]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A memory of two rows; the first has three episodes, of which the second has aged."""

    def episode(token: int, position: int, salience: float, priority: float, age: float) -> Episode:
        return Episode(token, (1, 2, token), position, salience, priority, age, 0.0, in_window=position > 6)

    rows = [
        [episode(10, 5, 0.2, 3.0, 0), episode(11, 6, 0.9, 5.0, 9), episode(12, 7, 0.5, 2.5, 0)],
        [],
    ]

    def load_cache(path: Path, model: Any) -> Any:
        if path.name != "memory.safetensors":
            raise MemoryFileError(f"{path} is truncated.")
        return SimpleNamespace(episodes=lambda row: rows[row], batch_size=2)

    def load(name: str, **options: Any) -> Any:
        tokenizer = SimpleNamespace(decode=lambda ids: "".join(f"[t{token}]\n" for token in ids))
        model = SimpleNamespace(config=SimpleNamespace(decay=0.9))
        model.to = lambda device: model
        return model, tokenizer

    monkeypatch.setattr(HippoCache, "load", load_cache)
    monkeypatch.setattr(hippoformer, "load", load, raising=False)


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize(
    ("options", "order"),
    [
        ((), [10, 12, 11]),  # 3.0, 2.5, and 5.0 · 0.9^9 = 1.94
        (("--sort", "salience"), [11, 12, 10]),
        (("--sort", "position"), [10, 11, 12]),
        (("--limit", "1"), [10]),
        (("--row", "1"), []),
    ],
)
def test_memory_show(options: tuple[str, ...], order: list[int], command: Callable[..., Any]) -> None:
    done = command("memory", "show", "memory.safetensors", "--model", "m", *options)
    assert done.code == 0, done
    _, _, *rows = (line.split() for line in done.out.splitlines())
    assert [row[-1] for row in rows] == [f"[t1]⏎[t2]⏎[t{token}]⏎" for token in order]
    if 11 in order:
        assert rows[order.index(11)][:-1] == ["6", "store", "0.900", "5.00", "9", "1.94"]


@pytest.mark.usefixtures("memory")
def test_memories_that_cannot_be_shown(command: Callable[..., Any]) -> None:
    show = ("memory", "show", "--model", "m")
    assert command(*show, "other.safetensors") == (2, "", "Error: other.safetensors is truncated.\n")
    for row in (2, -1):
        assert "holds 2 rows" in command(*show, "memory.safetensors", "--row", row).err
