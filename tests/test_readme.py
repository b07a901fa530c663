"""The README tells the truth: its Python prints what it promises."""

import re
from pathlib import Path

import pytest

import hippoformer
from pages import make_readers_folder, run_page, standing_in

ROOT = Path(__file__).resolve().parents[1]


FOUND = r"perplexity ([\d.]+); [\d,]+ bytes of state\n(?s:(.+))"
BOOK = "Mrs Lane keeps the key of the boat house.\n\n" + (ROOT / "docs/how-it-works.md").read_text(encoding="utf-8")


def test_the_python_says_what_it_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_readers_folder(tmp_path)
    (tmp_path / "my-book.txt").write_text(BOOK[:3000], encoding="utf-8")
    with standing_in(tmp_path):
        assert run_page(ROOT / "README.md") != []
        found = re.search(FOUND, capsys.readouterr().out)
        assert found and "Mrs Lane" in found[2]
        model, _ = hippoformer.load("smollm2-135m")
        cache = hippoformer.HippoCache.load(tmp_path / "my-book.memory.safetensors", model)
        assert cache.lengths[0] > 1000


@pytest.mark.slow
@pytest.mark.real
def test_the_python_runs_with_the_real_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my-book.txt").write_text(BOOK, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    run_page(ROOT / "README.md")
    found = re.search(FOUND, capsys.readouterr().out)
    assert found and 5 < float(found[1]) < 100 and "Mrs Lane" in found[2]
    assert (tmp_path / "my-book.memory.safetensors").stat().st_size > 1_000_000
