"""`scripts/results.py`: every piece is a command that the package understands, and only missing files are made."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.main import get_command

from hippoformer import HippoFormerConfig, cli
from hippoformer.training.arguments import config_options
from script_files import record_runs, script_at

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    return script_at("results", tmp_path, monkeypatch)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    return record_runs(monkeypatch, "broken", 1)


def options_of(line: list[str]) -> set[str]:
    return {word for word in line if word.startswith("--")}


def test_every_piece_is_a_command_of_the_package(script: ModuleType) -> None:
    root: Any = get_command(cli.app)
    for piece in script.PIECES:
        if piece.command[0] == "eval":
            known = {o for p in root.commands["eval"].commands[piece.command[1]].params for o in p.opts}
            assert options_of(piece.line()) <= known
        else:
            assert (ROOT / "benchmarks" / "speed.py").is_file() and piece.command[0] == "--parts"
    for option in (*script.VARIANTS, *script.REPLAY):
        named = config_options([pair for pair in option.partition(":")[2].split(",") if pair])
        HippoFormerConfig(**named)


def test_only_missing_files_are_made_and_the_tables_follow(
    script: ModuleType, ran: list[list[str]], tmp_path: Path
) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "novels_test.json").write_text("{}")
    assert script.main([]) == 0
    assert len(ran) == len(script.PIECES)  # one left out, and the tables at the end
    assert not any("results/novels_test.json" in line for line in ran)
    assert ran[-1][-1] == "scripts/readme_results.py"
    ran.clear()
    assert script.main(["--quick"]) == 0
    assert [line[-1] for line in ran[:-1]] == [
        f"results/{p.file}" for p in script.PIECES if p.headline and p.name != "novels_test"
    ]
    ran.clear()
    assert script.main(["novels"]) == 0 and "results/novels_test.json" in ran[0]


def test_a_failure_stops_the_run_and_unknown_pieces_are_told(
    script: ModuleType, ran: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces = (script.Piece("a.json", ("--parts", "broken"), 1), script.Piece("b.json", ("--parts", "write"), 1))
    monkeypatch.setattr(script, "PIECES", pieces)
    assert script.main([]) == 1 and len(ran) == 1
    assert "exit status 1: benchmarks/speed.py --parts broken" in capsys.readouterr().err
    assert script.main(["--list"]) == 0 and "--parts write" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        script.main(["nothing"])
