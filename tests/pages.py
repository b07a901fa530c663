"""What the pages of the documentation say can be done, taken from them and done.

A page is read as a list of `Block`s, its fenced code; `run_page` does what they say, one after the other, in a folder
that holds what a reader has (`make_readers_folder`). `check_command` only asks whether a command line could be started:
whether the command, its options and the files of this repository that it names exist.
"""

import ast
import contextlib
import dataclasses
import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import hippoformer
from hippoformer.cli import app
from hippoformer.model.pinned_models import SMOLLM2_135M
from hippoformer.training import arguments as training_arguments
from tiny_texts import LETTERS, byte_tokenizer, text

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PYTHON, SHELL = {"python"}, {"bash", "sh", "shell", "console"}
# Commands that hand their options on, by `hippoformer NAME` or `python -m hippoformer.NAME`, and what reads them there.
# The options of lm-eval are read by the harness's own parser, in test_training_docs.py.
FORWARDED: dict[str, Callable[[list[str]], Any]] = {"train": training_arguments.parse, "lm-eval": list}
# Folders of this repository: a path into one of them has to lead to something.
OURS = ("benchmarks/", "cloud/", "docs/", "examples/", "notebooks/", "scripts/", "src/", "tests/")

_FENCE = re.compile(
    r"(?:^ *<!-- test: (?P<mark>[^\n]*?) *-->\n+)?"
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```$"
    r"|^<!-- test: before\n(?P<before>.*?)-->$",
    flags=re.DOTALL | re.MULTILINE,
)


@dataclasses.dataclass(frozen=True)
class Block:
    """One fenced block of a page.

    Attributes:
        page: its path. line: of the page, counted from 1. language: after the fence. code: without its indentation.
        mark: what the comment over it says, or nothing; `before` for what is in a comment itself.
    """

    page: Path
    line: int
    language: str
    mark: str
    code: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT) if self.page.is_relative_to(ROOT) else self.page}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """The command lines of a shell block; where some begin with `$ `, the others are what they print."""
        lines = [line.strip() for line in self.code.replace("\\\n", " ").splitlines()]
        if any(line.startswith("$ ") for line in lines):
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        return [line for line in lines if line and not line.startswith("#")]


def read_page(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    content, blocks = page.read_text(encoding="utf-8"), []
    for found in _FENCE.finditer(content):
        line = content.count("\n", 0, found.start()) + 1
        if found["before"] is not None:
            blocks.append(Block(page, line, "python", "before", found["before"]))
        else:
            code = re.sub(rf"^{found['indent']}", "", found["code"], flags=re.MULTILINE)
            blocks.append(Block(page, line, found["language"], found["mark"] or "", code))
    return blocks


def inline_commands(page: Path) -> list[str]:
    """What stands between backticks in the text and begins with `hippoformer `."""
    prose = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return [" ".join(span.split()) for span in re.findall(r"`((?:\S*/)?hippoformer\s[^`]+)`", prose)]


# ---------------------------------------------------------------- could it be started?


def simple_commands(line: str) -> list[list[str]]:
    """The commands of a shell line as argument lists: cut at pipes and lists, without redirections and variables."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    words = iter(lexer)
    for word in words:
        if word and set(word) <= set("|&;"):
            commands.append([])
        elif word and set(word) <= set("<>"):
            next(words, None)
        elif commands[-1] or not re.match(r"\w+=", word):
            commands[-1].append(word)
    return [command for command in commands if command]


def check_command(argv: list[str]) -> None:
    """Raises what the program itself would raise on a command or option that does not exist.

    Programs of others are not asked, but wherever one is told to run a module of this package (`accelerate launch
    -m hippoformer.train`), that module is.
    """
    for word in argv:
        path = word.split(":")[0]
        if path.startswith(OURS) and not any(sign in path for sign in "*${<"):
            assert (ROOT / path).exists(), f"there is no {path}"
    program = Path(argv[0]).name
    modules = [i + 1 for i, word in enumerate(argv[:-1]) if word == "-m" and argv[i + 1].split(".")[0] == "hippoformer"]
    if program == "hippoformer":
        _check_ours(argv[1:])
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for target in argv[1:]:
            assert "=" in target or re.search(rf"^{re.escape(target)}:", makefile, flags=re.MULTILINE), target
    elif modules:
        _, *names = argv[modules[0]].split(".")
        assert importlib.util.find_spec(argv[modules[0]]), f"there is no module {argv[modules[0]]}"
        rest = argv[modules[0] + 1 :]
        _check_ours(rest if names == ["cli"] else [*(name.replace("_", "-") for name in names), *rest])


def check_inline(argv: list[str]) -> None:
    """The same for a command named in the text, which may leave out what it needs: its names and options must exist."""
    command, known = typer.main.get_command(app), {"--help"}
    words = [word for word in argv[1:] if not word.startswith("-")]
    while commands := getattr(command, "commands", None):
        known |= {name for parameter in command.params for name in parameter.opts}
        if not words or words[0] in ("…", "..."):
            return
        assert words[0] in commands, f"no command {words[0]}"
        command = commands[words.pop(0)]
    known |= {name for parameter in command.params for name in parameter.opts}
    unknown = [word for word in argv if word.startswith("--") and word.split("=")[0] not in known]
    assert command.name in FORWARDED or not unknown, f"no option {unknown}"


def _check_ours(arguments: list[str]) -> None:
    command, context, name = typer.main.get_command(app), None, "hippoformer"
    while True:
        context = command.make_context(name, list(arguments), parent=context)
        arguments = [*context._protected_args, *context.args]
        if not hasattr(command, "resolve_command"):
            break
        name, command, arguments = command.resolve_command(context, arguments)
    if command.ignore_unknown_options or context.args:
        FORWARDED[name](arguments)


# ---------------------------------------------------------------- does it work?

TEXTS = {"my-texts": 3, "held-out": 2, "books": 2}


def make_readers_folder(folder: Path) -> None:
    """What a page may use without making it: every name here is part of the rule in docs/contributing.md.

    `my-model` is a base model of transformers, `runs/mine` and the short name smollm2-135m (as long as `standing_in`
    holds) are HippoFormers around models of this size, `book.memory.safetensors` is a memory of the latter.
    """
    tokenizer = byte_tokenizer(["<end>"], bos_token="<end>", eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    base = _tiny_base(len(LETTERS) + 1)
    for place in (folder / "my-model", _home(folder) / "base_models" / SMOLLM2_135M.folder):
        base.save_pretrained(place)
        tokenizer.save_pretrained(place)
    small = {"recall_n_heads": 2, "recall_head_dim": 8, "recall_value_dim": 8, "salience_n_heads": 2, "anchor_len": 4}
    sizes = {"window": 48, "segment_len": 32, "buffer_size": 64, "use_lora": False}
    for name, place in (("my-model", "runs/mine"), (SMOLLM2_135M.name, _SHIPPED)):
        config = hippoformer.HippoFormerConfig(base_model_name=name, **small, **sizes)
        model = hippoformer.HippoFormer(config, base)
        model.hippocampus.fusion.gate_out.bias.data.fill_(-1.0)
        model.save_pretrained(folder / place)
    model.set_tokenizer(tokenizer, words=False)
    cache = model.new_cache(1)
    model.score(tokenizer(text(0, 200), return_tensors="pt").input_ids, past_key_values=cache)
    cache.save(folder / "book.memory.safetensors")
    for name, number in TEXTS.items():
        (folder / name).mkdir()
        for i in range(number):
            (folder / name / f"{i}.txt").write_text(text(i, 500), encoding="utf-8")
    (folder / "my-book.txt").write_text(text(9, 700), encoding="utf-8")
    (folder / "results").mkdir()
    beginning = (ROOT / "README.md").read_text(encoding="utf-8")[:4000]  # of one token a byte
    (folder / "README.md").write_text(beginning, encoding="utf-8")


@contextlib.contextmanager
def standing_in(folder: Path) -> Iterator[None]:
    """Inside the block `smollm2-135m` is the tiny model of a reader's folder, which is also where we are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HIPPOFORMER_HOME", str(_home(folder)))
        found = {SMOLLM2_135M.name: folder / _SHIPPED}
        patch.setattr("hippoformer.model.loading.shipped_hippocampus", found.get)
        yield


def run_page(page: Path, real: bool = False) -> list[str]:
    """Does what a page says, in the folder we are in; says what was run. `real`: with the real models, all of it."""
    names: dict[str, Any] = {"__name__": "__main__"}
    done = []
    for block in read_page(page):
        if block.language in PYTHON:
            tree = ast.parse(block.code, block.where)
            if block.mark in ("", "before") or (real and block.mark == "real"):
                ast.increment_lineno(tree, block.line)
                exec(compile(tree, str(page), "exec"), names)
                done.append(block.where)
            else:
                _import_ours(tree)
        elif block.language in SHELL and (block.mark == "run" or (real and block.mark == "real")):
            for line in block.commands:
                _run_command(line, block.where)
                done.append(line)
    return done


def _import_ours(tree: ast.Module) -> None:
    """What is imported from this package by code that is not run has to be there all the same."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hippoformer":
            module = importlib.import_module(str(node.module))
            assert not [name.name for name in node.names if not hasattr(module, name.name)], ast.unparse(node)


def _run_command(line: str, where: str) -> None:
    argv = shlex.split(line, comments=True)
    assert simple_commands(line) == [argv], f"{where}: a block that is run holds one plain command a line, not {line}"
    if argv[0] == "hippoformer":
        result = CliRunner().invoke(app, argv[1:])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        status, output = result.exit_code, result.output
    else:
        argv = [sys.executable, *argv[1:]] if argv[0] == "python" else argv
        paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
        scripts = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = os.environ | {"PYTHONPATH": paths, "PATH": scripts, "OMP_NUM_THREADS": "1"}
        finished = subprocess.run(argv, capture_output=True, text=True, env=environment, check=False)
        status, output = finished.returncode, finished.stdout + finished.stderr
    assert status == 0, f"{where}: {line} ended with status {status}:\n{output[-3000:]}"


_SHIPPED = ".home/shipped"


def _home(folder: Path) -> Path:
    return folder / ".home"


def _tiny_base(vocabulary: int) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=1024, **sizes, **special))
