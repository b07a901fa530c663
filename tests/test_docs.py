"""The documentation tells the truth: its Python runs, and the real parsers take its command lines.

The rule for whoever writes a page; a comment on the line before a block, `<!-- test: MARK -->`, changes it:

    ```python   run, in order, in one namespace a page, in a temporary folder with the reader's things (`pages.py`)
    ```bash     `hippoformer ...` and `... -m hippoformer.x ...` are parsed, and files of ours and targets of make exist
    run         (bash) its lines of `hippoformer` are run, too
    real        run with the real model only
    skip WHY    (python) not run, only compiled

`<!-- test: before`, lines of Python, `-->` on lines of their own is Python that is run and not shown.
"""

import importlib
import io
import os
import re
import shlex
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from transformers import HfArgumentParser

from hippoformer.cli import main
from pages import PAGES, ROOT, make_readers_folder, read_page, standing_in

NOTEBOOK = ROOT / "notebooks" / "hippoformer.ipynb"
WITH_CODE = [page for page in PAGES if any(b.language == "python" or b.mark == "run" for b in read_page(page))]
OURS = (
    "benchmarks/",
    "cloud/",
    "configs/",
    "docs/",
    "evaluation/",
    "notebooks/",
    "scripts/",
    "src/",
    "tests/",
)


def named(page: Path) -> str:
    return str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else page.name


def run_page(page: Path, real: bool = False) -> None:
    """Does what a page says, in the folder we are in; with the real model all of it."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in read_page(page):
        if block.language == "python":
            code = compile("\n" * block.line + block.code, str(page), "exec")
            if block.mark in ("", "before") or (real and block.mark == "real"):
                exec(code, names)
        elif block.mark == "run":
            for line in block.commands:
                program, *words = shlex.split(line)
                assert program == "hippoformer" and main(words) == 0, f"{named(page)}:{block.line}: {line}"


@pytest.mark.parametrize("page", WITH_CODE, ids=named)
def test_what_a_page_shows_works(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_readers_folder(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with standing_in(tmp_path):
        run_page(page)


@pytest.mark.slow
@pytest.mark.real
def test_the_readme_works_with_the_real_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    book = "Mrs Lane keeps the key of the boat house.\n\n" + (ROOT / "docs/how-it-works.md").read_text(encoding="utf-8")
    (tmp_path / "my-book.txt").write_text(book, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    run_page(ROOT / "README.md", real=True)
    assert "Mrs Lane" in capsys.readouterr().out


class Parsed(BaseException):
    """A command line was understood."""


def check_line(line: str) -> None:
    """Raises what a program itself would raise on a command or option that does not exist."""
    parse = HfArgumentParser.parse_args_into_dataclasses

    def parse_only(parser: HfArgumentParser, words: list[str], **_: Any) -> None:
        parse(parser, words, look_for_args_file=False)  # also fails on words that are left over
        raise Parsed

    for part in re.split(r"\||&&|;|>", line):
        words = [word for word in shlex.split(part, comments=True) if not re.match(r"[A-Z_]+=", word)]
        missing = [w for w in words if w.startswith(OURS) and not re.search(r"[*${<]", w) and not (ROOT / w).exists()]
        assert not missing, f"there is no {missing[0]}"
        if words[:1] == ["make"]:
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert all(re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE) for target in words[1:]), line
        start = words.index("-m") + 1 if "-m" in words else 0
        module, _, name = ".".join(words[start : start + 1]).partition(".")
        asked = [*([name.replace("_", "-")] if name else []), *words[start + 1 :]]
        run: Any = main
        if module == "evaluation":
            folder = (ROOT / "evaluation" / name).is_dir()
            where = ".".join(["evaluation", *([name] if name else []), *(["__main__"] if folder else [])])
            run, asked = importlib.import_module(where).main, words[start + 1 :]
        elif Path(module).name != "hippoformer" or asked in ([], ["--help"]) or asked[0] == "lm-eval":
            continue  # a program of others; lm-eval's options are the harness's
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed):
            patch.setattr(HfArgumentParser, "parse_args_into_dataclasses", parse_only)
            assert run(asked) == 0


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_command_of_a_page_exists(page: Path) -> None:
    blocks = [block for block in read_page(page) if block.language in ("bash", "sh", "shell", "console")]
    wrong = []
    for line in (line for block in blocks for line in block.commands):
        try:
            check_line(line)
        except (Exception, SystemExit, pytest.fail.Exception) as error:
            wrong.append(f"{line}\n    {type(error).__name__}: {error}")
    assert not wrong, f"\n{named(page)}:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    "line",
    [
        "hippoformer sing",
        "hippoformer demo --no-such-option 3",
        "CUDA_VISIBLE_DEVICES=0 hippoformer ask book.txt --model m",  # no question
        "accelerate launch --num_processes 2 -m hippoformer.train --text my-texts --no_such_option",
        "make coffee",
        "python scripts/no_such_script.py | tee log.txt",
    ],
)
def test_what_does_not_exist_is_noticed(line: str) -> None:
    with pytest.raises((Exception, SystemExit, pytest.fail.Exception)):
        check_line(line)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_mark_and_link_of_a_page_is_good(page: Path) -> None:
    content, blocks = page.read_text(encoding="utf-8"), read_page(page)
    assert [block.mark for block in blocks if not re.fullmatch(r"|before|run|real|skip .{10,}", block.mark)] == []
    assert sum(bool(block.mark) for block in blocks) == len(re.findall(r"^ *<!-- test:", content, re.MULTILINE))
    links = re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)[^)]*\)", content)
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_readers_folder(tmp_path)
    for name, value in {"MODEL": "runs/mine", "TEXT": "my-book.txt", "TOKENS": "600"}.items():
        monkeypatch.setenv(f"HIPPOFORMER_{name}", value)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": tmp_path}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    assert (tmp_path / "notebook.memory.safetensors").is_file()


def test_the_notebook_is_committed_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not [cell.id for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count") is not None]
