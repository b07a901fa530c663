"""The tables of docs/support.md: a real report of pytest in, and nothing called working that no passing test shows."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import support_table

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

@pytest.mark.supports
def test_tried(shows):
    shows(refused="mamba")

@pytest.mark.supports(refused="rwkv")
def test_refused():
    assert False
"""


def test_only_what_passed_is_marked_as_working(tmp_path: Path) -> None:
    (tmp_path / "test_made_up.py").write_text(SUITE, encoding="utf-8")
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path)]
    command += ["-p", "no:cacheprovider", f"--junitxml={tmp_path}/report.xml", str(tmp_path)]
    paths = os.pathsep.join(str(ROOT / name) for name in ("tests", "src"))  # conftest.py imports from both
    subprocess.run(command, capture_output=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths}, check=False)
    assert support_table.render(tmp_path / "report.xml").splitlines() == [
        "## Base architectures",
        "",
        "| architecture | sampling | beam search | greedy |",
        "| --- | --- | --- | --- |",
        "| llama | ✓ | ✓ | ✓ |",
        "| phi | ✗ |  |  |",
        "",
        "## Refused, with an error that says why",
        "",
        "mamba",
    ], "what was skipped shows nothing: neither gpt2 nor the streamer"
