"""`scripts/lora.py`: its commands are those of the package, and only what is missing is made."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.main import get_command

from hippoformer import cli
from hippoformer.training.arguments import parse
from script_files import record_runs, script_at


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    return script_at("lora", tmp_path, monkeypatch)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    return record_runs(monkeypatch, "by hand", 7)


def test_every_seed_is_trained_alike_and_both_texts_are_read(script: ModuleType, ran: list[list[str]]) -> None:
    assert script.main(["--seeds", "1", "2"]) == 0
    assert [line[3] for line in ran[:-1]] == ["train", "eval", "eval"] * 2
    assert ran[-1][-1] == "scripts/readme_results.py"
    first, second = (parse(line[4:]) for line in ran[:-1] if line[3] == "train")
    assert first.memory_off and first.lora_r == 16 and (first.seed, second.seed) == (1, 2)
    assert vars(first) | {"seed": 2, "output_dir": second.output_dir} == vars(second)
    root: Any = get_command(cli.app)
    options = {o for p in root.commands["eval"].commands["perplexity"].params for o in p.opts}
    for line in (line for line in ran[:-1] if line[3] == "eval"):
        assert {word for word in line if word.startswith("--")} <= options
        assert line[line.index("--model") + 1] in (first.output_dir, second.output_dir)
    assert len({line[-1] for line in ran[:-1]}) == 6


def test_what_is_there_is_not_made_again(script: ModuleType, ran: list[list[str]], tmp_path: Path) -> None:
    for made in ("runs/lora-1/config.json", "results/lora_1_novels_test.json"):
        (tmp_path / made).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / made).write_text("{}")
    assert script.main(["--seeds", "1"]) == 0
    assert [line[-1] for line in ran[:-1]] == ["results/lora_1_articles_test.json"]


def test_a_command_that_fails_ends_it(
    script: ModuleType, ran: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "reading", lambda seed, name: ["eval", "by hand"])
    assert script.main(["--seeds", "1"]) == 7 and len(ran) == 2
