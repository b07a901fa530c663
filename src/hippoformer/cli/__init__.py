"""The command line: `hippoformer eval …`, `train`, `demo`, `chat`, `ask`, `memory show`, `figures`, …

Each command is a thin layer over a function of the package, imported only when it runs, so that `--help` is quick. A
file a group of commands; importing it registers them.
"""

from hippoformer.cli import (
    ask,
    chat,
    memory,
    run,
)
from hippoformer.cli.app import app

__all__ = [
    "app",
    "ask",
    "chat",
    "main",
    "memory",
    "run",
]


def main() -> None:
    """Entry point of the `hippoformer` command."""
    app(prog_name="hippoformer")
