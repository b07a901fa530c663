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


def test_one_failure_outweighs_any_number_of_passes(script: ModuleType) -> None:
    assert script.verdict({"passed", "failed"}) == script.FAILS
    assert script.verdict({"passed"}) == script.WORKS
    assert script.verdict(set()) == ""


def test_the_page_is_filled_and_checked(
    script: ModuleType, report: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "support.md"
    page.write_text(f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n", encoding="utf-8")
    arguments = [str(report), "--page", str(page)]
    assert script.main([*arguments, "--check"]) == 1
    assert "make support" in capsys.readouterr().err and "old" in page.read_text(encoding="utf-8")
    assert script.main(arguments) == 0 and script.main([*arguments, "--check"]) == 0
    filled = page.read_text(encoding="utf-8")
    assert filled.startswith("before\n") and filled.endswith("after\n") and "| llama | ✓ |" in filled
    page.write_text(filled.replace("| phi | ✗ |", "| phi | ✓ |"), encoding="utf-8")
    assert script.main([*arguments, "--check"]) == 1
    page.write_text("no markers", encoding="utf-8")
    with pytest.raises(ValueError, match="once each"):
        script.main(arguments)


def test_a_report_without_marks_changes_nothing(script: ModuleType, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text('<testsuites><testsuite><testcase classname="a" name="b"/></testsuite></testsuites>')
    assert script.main([str(report), "--page", str(tmp_path / "never-read.md")]) == 1


def test_a_word_on_no_axis_is_refused(tmp_path: Path) -> None:
    _, said = run(tmp_path, "import pytest\n@pytest.mark.supports(colour='red')\ndef test_it():\n    pass\n")
    assert "supports(colour=…) is none of" in said


def test_the_page_of_this_repository_has_its_markers(script: ModuleType) -> None:
    page = (ROOT / script.PAGE).read_text(encoding="utf-8")
    assert script.fill(page, "") != page and "✓" in page and script.FAILS not in page
