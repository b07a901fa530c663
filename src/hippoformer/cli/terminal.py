"""What commands say: progress on the error stream, tables on the other."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text


def console() -> Console:
    # In a pipe or a log there is no terminal to fit the tables into.
    return Console(width=None if sys.stdout.isatty() else 160)


@contextmanager
def reading(what: str = "reading") -> Iterator[Callable[[int, int], None]]:
    """A progress bar on the error stream; what it gives takes (done, total)."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, *times, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def show(report: Any, output: Path | None) -> None:
    """Prints a report's table, and writes its JSON where that was asked for."""
    terminal = console()
    terminal.print(report.to_table())
    if output is not None:
        report.save(output)
        terminal.print(Text(f"Results written to {output}"))


def visible(text: str) -> Text:
    """Text with its line ends shown, and no markup read into its brackets."""
    return Text(text.replace("\n", "⏎").replace("\t", "⇥"))
