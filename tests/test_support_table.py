"""The tables of docs/support.md: a real report of pytest in, and nothing called working that no passing test shows."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from script_files import load_script

ROOT = Path(__file__).resolve().parents[1]

SUITE = """
import pytest

@pytest.mark.supports(architecture="{name}", mode=("greedy", "beam search"))
@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.skip)])
def test_generate(name):
    pass

@pytest.mark.supports(architecture="{name}", mode="sampling")
@pytest.mark.parametrize("name", ["llama", "phi"])
def test_sampling(name):
    assert name == "llama"

@pytest.mark.supports(architecture="llama", mode="streamer")
@pytest.mark.xfail(strict=True)
def test_streamer():
    assert False

@pytest.mark.supports(trainer="frozen base")
@pytest.mark.parametrize("dtype", [pytest.param(1, marks=pytest.mark.supports(precision="bfloat16"))])
def test_training(dtype):
    pass

@pytest.mark.supports
def test_tried(shows):
    shows(refused="mamba")

@pytest.mark.supports(refused="rwkv")
def test_refused():
    assert False

def test_without_a_mark():
    pass
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("support_table")


def run(folder: Path, suite: str) -> tuple[Path, str]:
    (folder / "test_made_up.py").write_text(suite, encoding="utf-8")
    shutil.copy(ROOT / "tests" / "conftest.py", folder)
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(folder)]
    command += ["-p", "no:cacheprovider", f"--junitxml={report}", str(folder)]
    paths = os.pathsep.join(str(ROOT / name) for name in ("tests", "src"))  # conftest.py imports from both
    environment = os.environ | {"PYTHONPATH": paths}
    return report, subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment, check=False
    ).stderr


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("suite"), SUITE)[0]


def test_only_what_passed_is_marked_as_working(script: ModuleType, report: Path) -> None:
    lines = script.render(script.read_report(report)).splitlines()
    table = lines[lines.index("## Base architectures") + 2 :][:5]
    assert table == [
        "| architecture | sampling | beam search | greedy |",
        "| --- | --- | --- | --- |",
        "| llama | ✓ | ✓ | ✓ |",
        "| phi | ✗ |  |  |",
        "",
    ], "what was skipped shows nothing: neither gpt2 nor the streamer"
    assert "| frozen base | ✓ |" in lines
    assert lines[lines.index("## Refused, with an error that says why") + 2] == "mamba"
    assert "| mode | greedy | test_made_up.py: test_generate |" in lines
    assert not [line for line in lines if "without_a_mark" in line]
