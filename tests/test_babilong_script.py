"""`scripts/babilong.py`: its commands are those of the package, and only what is missing is made."""

import json
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.main import get_command

from hippoformer import cli
from hippoformer.model.loading import shipped_hippocampus
from hippoformer.training.arguments import parse
from script_files import script_at

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    return script_at("babilong", tmp_path, monkeypatch)


@pytest.fixture
def ran(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The commands; those that make a file make one."""
    lines: list[list[str]] = []

    def run(line: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
        lines.append(line)
        made = tmp_path / line[line.index("--output") + 1] if "--output" in line else tmp_path / "log"
        made.parent.mkdir(exist_ok=True)
        context = "Mary left. " if "qa1" in str(made) else "John took the football there. "
        rows = [{"context": context * (1 + 40 * (i % 2)), "question": f"{i}?", "answers": ["a"]} for i in range(800)]
        made.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return subprocess.CompletedProcess(line, 0)

    monkeypatch.setattr(subprocess, "run", run)
    return lines


@pytest.mark.parametrize("large", [False, True])
def test_the_commands_are_those_of_the_package(script: ModuleType, ran: list[list[str]], large: bool) -> None:
    assert script.main(["--large"] if large else []) == 0
    scale = script.LARGE if large else script.SMALL
    root: Any = get_command(cli.app)
    trained = []
    for line in ran[:-1]:
        assert line[1:3] == ["-m", "hippoformer.cli"]
        if line[3] == "train":
            arguments = parse(line[4:])
            if arguments.memory_off:
                assert arguments.questions == [f"runs/{scale.name}-stories.jsonl"] and arguments.lora_r == 16
            else:
                assert arguments.questions == [f"{arguments.output_dir}.jsonl"]
                assert arguments.base_model == f"runs/{scale.name}-base"
                assert (arguments.recall_share < 1.0) == (arguments.credit_documents > 0)
                trained.append((arguments.output_dir, arguments.hippocampus, arguments.credit_documents > 0))
            assert arguments.hippocampus == "runs/babi-memory" or shipped_hippocampus(arguments.hippocampus)
            continue
        command = root.commands["eval"].commands[line[4]] if line[3] == "eval" else root.commands[line[3]]
        assert {word for word in line if word.startswith("--")} <= {o for p in command.params for o in p.opts}
    adapts = [*["hide-stories"] * len(scale.learned), "train", "export-base"]
    learns = [*["hide-stories"] * len(scale.remembered), "train"]
    if large:
        assert trained == [("runs/babi-large-memory", script.SHIPPED, True)]
    else:
        memory = ("runs/babi-memory", script.SHIPPED, False)
        assert trained == [memory, ("runs/babi-credit", "runs/babi-memory", True)]
        learns += ["hide-stories", "train"]
    assert [line[3] for line in ran[:-1]] == [*adapts, *learns, *["eval"] * len(scale.asked)]
    asked = [line[line.index("--model") + 1] for line in ran[:-1] if line[3] == "eval"]
    small = [*["runs/babi"] * 3, *["runs/babi-memory"] * 2, "runs/babi-credit"]
    assert asked == (["runs/babi-large-memory"] * 2 if large else small)
    assert ran[-1][-1] == "scripts/readme_results.py"


def test_short_stories_of_both_tasks_are_learned(script: ModuleType, ran: list[list[str]], tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    script.adapt(script.SMALL)
    rows = [json.loads(line) for line in (tmp_path / "runs" / "babi-stories.jsonl").read_text().splitlines()]
    assert len(ran) == 4 and len(rows) == 380 + 150
    assert max(len(row["context"]) for row in rows) < 1_000
    assert sum("football" in row["context"] for row in rows) == 150
    assert any("football" in row["context"] for row in rows[:50]), "shuffled"


def test_what_is_there_is_not_made_again(
    script: ModuleType, ran: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done = ("base", "memory", "credit")
    for made in (*(f"runs/babi-{stage}/config.json" for stage in done), "results/babilong_test.json"):
        (tmp_path / made).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / made).write_text("{}")
    assert script.main([]) == 0
    assert [line[3] for line in ran[:-1]] == ["eval"] * 5
    assert not any("results/babilong_test.json" in line for line in ran)

    def fails(line: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(line, 3)

    monkeypatch.setattr(subprocess, "run", fails)
    assert script.main([]) == 3
