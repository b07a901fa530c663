"""The command line: `hippoformer demo`, `ask`, `chat`, `memory show`, `eval`, `train`, `lm-eval`.

A command is a module with `main(words)`, imported only when it runs, so that `hippoformer --help` is quick. Its options
are dataclasses, read by transformers' HfArgumentParser (`arguments.py`). An error that the package raises on purpose is
one line and exit code 2; `hippoformer --debug COMMAND ...` shows where it came from.
"""

import sys
from collections.abc import Sequence
from importlib import import_module

from hippoformer.errors import HippoFormerError

# Module below hippoformer, the extra whose packages it may need, and what it does.
COMMANDS = {
    "demo": ("cli.demo", "demo", "read a long text in constant memory, and find facts in it again"),
    "ask": ("cli.ask", "", "answer questions about a text or a saved memory, and show the passages behind each answer"),
    "chat": ("cli.chat", "chat", "talk with a model that remembers what has left its window"),
    "memory": ("cli.memory", "", "show what a saved memory holds: hippoformer memory show FILE"),
    "eval": ("cli.eval", "train", "measure perplexity of texts with and without memory: hippoformer eval perplexity"),
    "train": ("train", "train", "train a hippocampus on texts"),
    "lm-eval": ("lm_eval", "harness", "run lm-evaluation-harness, which then knows --model hippoformer"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = words[:1] == ["--debug"]
    name, *rest = words[debug:] or ["--help"]
    if name in ("-h", "--help"):
        print("usage: hippoformer [--debug] COMMAND ...\n\nA hippocampus for causal language models.\n")
        print("\n".join(f"  {command:8} {about}" for command, (_, _, about) in COMMANDS.items()))
        print("\nhippoformer COMMAND --help lists the options of a command; --debug shows the traceback of an error.")
        return 0
    if name not in COMMANDS:
        return _fail(f"there is no command {name}: choose one of {', '.join(COMMANDS)}")
    module, extra, _ = COMMANDS[name]
    try:
        return import_module(f"hippoformer.{module}").main(rest) or 0
    except HippoFormerError as error:
        if debug:
            raise
        return _fail(str(error))
    except ModuleNotFoundError as error:
        if debug or not extra or str(error.name).startswith("hippoformer"):
            raise
        return _fail(f"{name} needs the package {error.name}: pip install 'hippoformer[{extra}]'")


def _fail(message: str) -> int:
    print(f"Error: {' '.join(message.split())}", file=sys.stderr)
    return 2
