"""docs/figures.md tells the truth: it names every figure, and its commands run one after the other."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import hippoformer
from hippoformer.cli import app
from hippoformer.figures import FIGURES
from result_files import PASSAGE, loud_model

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "figures.md").read_text(encoding="utf-8")


def test_every_figure_is_explained() -> None:
    assert re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE) == list(FIGURES)


def test_the_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, **options: Any) -> Any:
        assert (name, options) == ("smollm2-135m", {})
        return loud_model()

    monkeypatch.setattr(hippoformer, "load", load)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "book.txt").write_text(PASSAGE * 3, encoding="utf-8")
    (block,) = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    for line in block.splitlines():
        program, *arguments = shlex.split(line)
        result = CliRunner().invoke(app, arguments)
        assert program == "hippoformer" and result.exit_code == 0, result.output
    drawn = {"architecture", "salience", "memory_dynamics", "replay"}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        f"{name}.{form}" for name in drawn for form in ("png", "pdf", "svg")
    }
    assert "Reading along" in (tmp_path / "report.html").read_text(encoding="utf-8")
