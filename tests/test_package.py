"""What a user gets who installs the package."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*words: object, **options: object) -> str:
    line = [str(word) for word in words]
    return subprocess.run(line, check=True, capture_output=True, text=True, **options).stdout  # type: ignore[call-overload]


def test_the_wheel_installs_one_package_and_the_shipped_weights(tmp_path: Path) -> None:
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path, cwd=ROOT)
    (wheel,) = tmp_path.iterdir()
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"hippoformer"}
    assert "hippoformer/pretrained/smollm2-135m/model.safetensors" in names


@pytest.mark.slow
@pytest.mark.real
def test_the_base_install_in_an_empty_environment_reads_and_answers(tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    bin_, text = tmp_path / "venv" / "bin", tmp_path / "book.txt"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run(bin_ / "pip", "install", "torch==2.13.0", ROOT, env=environment)
    installed = run(bin_ / "pip", "list")
    assert not [name for name in ("peft", "datasets", "scipy", "prompt_toolkit", "matplotlib") if name in installed]
    assert "usage: hippoformer" in run(bin_ / "hippoformer", "--help", cwd=tmp_path, env=environment)
    text.write_text("Mrs Lane keeps the key of the boat house.\n\n" + 150 * "It rained, and nobody came.\n")
    asked = (bin_ / "hippoformer", "ask", text, "Who keeps the key?", "--model", "smollm2-135m")
    answer, *passages = run(*asked, cwd=tmp_path, env=environment).splitlines()[1:]
    assert answer and any("Mrs Lane keeps the key" in line for line in passages)


def test_the_originals_command_runs_from_a_checkout() -> None:
    assert "--checkpoint" in run(sys.executable, "-m", "evaluation.comprehensive_eval", "--help", cwd=ROOT)
