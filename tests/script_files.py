"""The files under scripts/ as modules."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load_script(name: str) -> ModuleType:
    """A fresh module of `scripts/NAME.py`, registered where its dataclasses look for their annotations."""
    specification = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[module.__name__] = module
    specification.loader.exec_module(module)
    return module


def script_at(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The same, working in another folder than this checkout."""
    module = load_script(name)
    monkeypatch.setattr(module, "ROOT", root)
    return module


def record_runs(monkeypatch: pytest.MonkeyPatch, failing: str, status: int) -> list[list[str]]:
    """The command lines that a script would have run; one that has the word `failing` ends with that status."""
    lines: list[list[str]] = []

    def run(line: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
        lines.append(line)
        return subprocess.CompletedProcess(line, status if failing in line else 0)

    monkeypatch.setattr(subprocess, "run", run)
    return lines
