"""The command line: `hippoformer demo`, `ask`, `chat`, `memory show`, `eval`, `train`, `lm-eval`.

A command is a function of its words, imported only when it runs, so that `hippoformer --help` is quick. Its options
are dataclasses, read by transformers' HfArgumentParser (`arguments.py`). An error that the package raises on purpose is
one line and exit code 2; `hippoformer --debug COMMAND ...` shows where it came from.
"""

import sys
from collections.abc import Sequence
from importlib import import_module

from hippoformer.errors import HippoFormerError

# Function below hippoformer, the extra whose packages it may need, and what it does.
COMMANDS = {
    "demo": ("cli.demo.main", "demo", "read a long text in constant memory, and find facts in it again"),
    "ask": ("cli.memory.ask", "", "answer questions about a text or a saved memory, with the passages behind each"),
    "chat": ("cli.chat.main", "chat", "talk with a model that remembers what has left its window"),
    "memory": ("cli.memory.show", "", "show what a saved memory holds: hippoformer memory show FILE"),
    "eval": (
        "cli.eval.main",
        "train",
        "perplexity of texts with and without memory: hippoformer eval perplexity",
    ),
    "train": ("train.main", "train", "train a hippocampus on texts"),
    "lm-eval": ("lm_eval.main", "harness", "run lm-evaluation-harness, which then knows --model hippoformer"),
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
    place, extra, _ = COMMANDS[name]
    module, _, function = place.rpartition(".")
    try:
        return getattr(import_module(f"hippoformer.{module}"), function)(rest) or 0
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
