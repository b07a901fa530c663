"""The documentation tells the truth: what README.md and docs/*.md show is done, or at least could be started.

The rule for whoever writes a page:

    ```python   run, in order, in one namespace a page, in a temporary folder that holds the reader's things (below)
    ```bash     (sh, shell, console) parsed: every `hippoformer …`, `python -m hippoformer.…`, `make …` and
                `accelerate launch … -m hippoformer.…` line names commands, options and files that exist. The same
                holds for `hippoformer …` between single backticks in the text
    ```text …   anything else is left alone

A comment on the line before a block changes that:

    <!-- test: run -->          (bash) run it too, one plain command a line: no pipes, no `&&`, no redirection
    <!-- test: real -->         (both) run it in the tests marked `real` only, in its place among the others
    <!-- test: skip REASON -->  (python) do not run it: only its syntax and its imports from hippoformer are checked

and `<!-- test: before`, lines of Python, `-->` on lines of their own is Python that is run and not shown: to make what
a block takes for granted.

The reader's things: `my-model` (a base model), `runs/mine` (a trained HippoFormer around it), `smollm2-135m` (a tiny
stand-in), `book.memory.safetensors` (a memory of that), `my-texts`, `held-out` and `books` (folders of texts),
`my-book.txt`, `README.md`, and an empty folder `results`. The short name works in Python and in `hippoformer …`; other
programs run in a process of their own, where only the files are known.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pages import (
    PAGES,
    PYTHON,
    ROOT,
    SHELL,
    check_command,
    check_inline,
    inline_commands,
    make_readers_folder,
    read_page,
    run_page,
    simple_commands,
    standing_in,
)

# What the README's code prints is looked at in test_readme.py.
WITH_CODE = [page for page in PAGES[1:] if any(block.language in PYTHON | SHELL for block in read_page(page))]
WITH_REAL = [page for page in PAGES if any(block.mark == "real" for block in read_page(page))]
MARKS = r"|before|run|real|skip .{10,}"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    make_readers_folder(tmp_path)
    with standing_in(tmp_path):
        yield tmp_path


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", WITH_CODE, ids=named)
def test_what_a_page_shows_works(page: Path, folder: Path) -> None:
    run_page(page)


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("page", WITH_REAL, ids=list(map(named, WITH_REAL)))
def test_what_a_page_shows_works_with_the_real_model(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_readers_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    run_page(page, real=True)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_command_of_a_page_exists(page: Path, folder: Path) -> None:
    wrong = []
    commands = [(check_command, b.where, line) for b in read_page(page) if b.language in SHELL for line in b.commands]
    commands += [(check_inline, named(page), line) for line in inline_commands(page)]
    for check, where, line in commands:
        for argv in simple_commands(line):
            try:
                check(argv)
            except (Exception, SystemExit) as error:
                wrong.append(f"{where}: {line}\n    {type(error).__name__}: {error}")
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_mark_is_one_of_the_rule(page: Path) -> None:
    content = page.read_text(encoding="utf-8")
    blocks = read_page(page)
    assert [block.where for block in blocks if not re.fullmatch(MARKS, block.mark)] == []
    assert sum(bool(block.mark) for block in blocks) == len(re.findall(r"^ *<!-- test:", content, re.MULTILINE)), (
        "a mark over no block"
    )
    fenced = [block for block in blocks if block.mark != "before"]
    assert 2 * len(fenced) == len(re.findall(r"^ *```", content, re.MULTILINE)), "a fence that is not closed"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


# ---------------------------------------------------------------- the checks themselves


@pytest.mark.parametrize(
    "line",
    [
        "hippoformer train --text my-texts --max_stepz 3",
        "hippoformer eval perplexity --model runs/mine --text held-out --no-such-option",
        "hippoformer eval perplexity --text held-out",  # --model is needed
        "hippoformer sing",
        "python -m hippoformer.nothing --text a",
        "accelerate launch --num_processes 2 -m hippoformer.train --text my-texts --no_such_option",
        "python -m hippoformer.cli eval nothing",
        "make coffee",
        "python scripts/no_such_script.py",
    ],
)
def test_what_does_not_exist_is_noticed(line: str) -> None:
    with pytest.raises((Exception, SystemExit)):
        for argv in simple_commands(line):
            check_command(argv)


@pytest.mark.parametrize(
    "line",
    [
        "CUDA_VISIBLE_DEVICES=0 hippoformer train --text my-texts --set window=9 > log.txt",
        ".venv/bin/hippoformer demo my-book.txt && make unit PYTHON=python3.11",
        "accelerate launch --num_processes 2 -m hippoformer.train --text my-texts | tee log.txt",
        "pip install hippoformer  # from anywhere",
        "hippoformer eval bytes --model m --text my-texts --buffers '' --kv '' --dtype float32",
    ],
)
def test_what_exists_is_let_through(line: str) -> None:
    commands = simple_commands(line)
    assert commands
    for argv in commands:
        check_command(argv)


def test_commands_between_backticks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "`hippoformer eval\nrecall`, `hippoformer.load` and\n```bash\nhippoformer no\n```\n`hippoformer …`\n"
    )
    assert inline_commands(page) == ["hippoformer eval recall", "hippoformer …"]
    for good in ("hippoformer eval recall", "hippoformer …", "hippoformer memory show x --sort salience"):
        check_inline(good.split())
    for bad in ("hippoformer evil recall", "hippoformer eval recoil", "hippoformer memory show x --sorted salience"):
        with pytest.raises(AssertionError, match="no "):
            check_inline(bad.split())


PAGE = """
<!-- test: before
memory = []
-->

```python
import pathlib
memory.append(pathlib.Path("my-book.txt").read_text())
```

<!-- test: skip it needs a cluster -->
```python
memory.append("not run")
```

<!-- test: real -->
```python
memory.append("real")
```

  1. An indented one:
     ```python
     pathlib.Path("out.txt").write_text(str(len(memory)))
     ```

<!-- test: run -->
```bash
hippoformer memory show book.memory.safetensors \\
    --model smollm2-135m
```

```bash
$ hippoformer eval perplexity --model runs/mine
hippoformer prints this
```
"""


def test_a_page_is_run_in_order(folder: Path) -> None:
    page = folder / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    assert [block.mark for block in read_page(page)] == ["before", "", "skip it needs a cluster", "real", "", "run", ""]
    assert read_page(page)[-1].commands == ["hippoformer eval perplexity --model runs/mine"]
    done = run_page(page)
    assert [str(place).rpartition(":")[2] for place in done[:-1]] == ["2", "6", "22"]
    assert done[-1] == "hippoformer memory show book.memory.safetensors      --model smollm2-135m"
    assert (folder / "out.txt").read_text() == "1"
    run_page(page, real=True)
    assert (folder / "out.txt").read_text() == "2"


@pytest.mark.parametrize(
    ("page", "complaint"),
    [
        ("<!-- test: run -->\n```bash\nhippoformer train --text nothing-here\n```\n", "ended with status 2"),
        ("<!-- test: run -->\n```bash\npython -c 'exit(3)'\n```\n", "ended with status 3"),
        ("<!-- test: run -->\n```bash\nhippoformer demo | less\n```\n", "one plain command"),
        ("```python\nassert 1 == 2, 'oh'\n```\n", "oh"),
        ("<!-- test: skip for a reason -->\n```python\nfrom hippoformer import Dream\n```\n", "import Dream"),
    ],
)
def test_a_page_that_is_wrong_fails(folder: Path, page: str, complaint: str) -> None:
    (folder / "page.md").write_text(page, encoding="utf-8")
    with pytest.raises(AssertionError, match=complaint):
        run_page(folder / "page.md")
