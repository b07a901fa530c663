"""What several commands share: types of options, loading a model, progress, tables."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from hippoformer.data.documents import Split
from hippoformer.errors import ConfigurationError

ModelOption = Annotated[str, typer.Option("--model", help="Saved HippoFormer folder, or base model: folder, hub name.")]
WindowOption = Annotated[int | None, typer.Option(help="Tokens of the base model's own attention span.")]
SinkOption = Annotated[int | None, typer.Option("--sink-tokens", help="First tokens that always stay visible.")]
BufferOption = Annotated[int | None, typer.Option("--buffer-size", help="Episodes kept beyond the window.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, mps, …")]
CacheOption = Annotated[Path, typer.Option(help="Where the base's hidden states are kept.")]
DtypeOption = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")]
TextOption = Annotated[list[Path], typer.Option("--text", help="Text file or folder; can be repeated.")]
MoreTexts = Annotated[list[Path] | None, typer.Argument(metavar="TEXT", help="Further files or folders.")]
LimitOption = Annotated[int | None, typer.Option(help="Read the first so many tokens of each document.")]
DocumentsOption = Annotated[int | None, typer.Option(help="Read the first so many documents.")]
SplitOption = Annotated[Split, typer.Option(help="Where documents begin.")]
OutputOption = Annotated[Path | None, typer.Option(help="JSON file for the results.")]
SeedOption = Annotated[int, typer.Option(help="Of the replay draws and of the bootstrap.")]


def load(name: str, device: str | None, dtype: str | None, **options: int | None) -> tuple[Any, Any]:
    """(model, tokenizer); options that were not given keep the model's own values."""
    import hippoformer

    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    if dtype is not None:
        given["dtype"] = _dtype(dtype)
    target = None if device is None else _device(device)
    model, tokenizer = hippoformer.load(name, **given)
    return (model if target is None else model.to(target)), tokenizer


def _device(name: str) -> Any:
    import torch

    try:
        # A tensor put there tells a device that this machine lacks from one that it has.
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigurationError(
            f"--device {name} cannot be used here ({str(error).splitlines()[0]}); leave it out for the CPU."
        ) from error


def _dtype(name: str) -> Any:
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ConfigurationError(f"--dtype {name} is unknown; choose one of {', '.join(known)}.")
    return known[name]


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


def comma_separated(text: str) -> list[str]:
    """The parts between commas that are not blank."""
    return [part.strip() for part in text.split(",") if part.strip()]


def check_output(path: Path | None) -> None:
    """Fails before hours of reading rather than after them; nothing to write is no failure."""
    if path is None:
        return
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigurationError(
            f"--output {path} cannot be written; expected a file name in an existing folder that you may write to."
        )


def console() -> Console:
    # In a pipe or a log there is no terminal to fit the tables into.
    return Console(width=None if sys.stdout.isatty() else 160)


def visible(text: str) -> Text:
    """Text with its line ends shown, and no markup read into its brackets."""
    return Text(text.replace("\n", "⏎").replace("\t", "⇥"))
