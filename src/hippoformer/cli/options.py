"""What commands are asked: options that several of them share, and groups of options with what they stand for.

    @eval_app.command("dynamics")
    @with_groups
    def eval_dynamics(model: ModelOptions, texts: TextOptions, limit_tokens: LimitOption = None) -> None: ...

The command line of this command has every field of both groups as an option of its own.
"""

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from hippoformer.data.documents import Document, Split
from hippoformer.errors import ConfigurationError


def check_output(path: Path | None) -> Path | None:
    """The path; fails before hours of reading rather than after them. Nothing to write is no failure.

    Raises:
        ConfigurationError: a folder, or a file that cannot be written.
    """
    if path is not None:
        folder = path.absolute().parent
        if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ConfigurationError(
                f"--output {path} cannot be written; expected a file name in an existing folder that you may write to."
            )
    return path


WindowOption = Annotated[int | None, typer.Option(help="Tokens of the base model's own attention span.")]
SinkOption = Annotated[int | None, typer.Option("--sink-tokens", help="First tokens that always stay visible.")]
BatchOption = Annotated[int, typer.Option("--batch-size", help="Documents read side by side.")]
CacheOption = Annotated[Path, typer.Option(help="Where the base's hidden states are kept.")]
DataDirOption = Annotated[Path, typer.Option("--data-dir", help="Where local copies of data sets lie.")]
DatasetSplitOption = Annotated[str, typer.Option("--dataset-split", help="Which part of a data set.")]
LimitOption = Annotated[int | None, typer.Option(help="Read the first so many tokens of each document.")]
DocumentsOption = Annotated[int | None, typer.Option(help="Read the first so many documents.")]
SplitOption = Annotated[Split, typer.Option(help="Where documents begin.")]
OutputOption = Annotated[Path | None, typer.Option(help="JSON file for the results.", callback=check_output)]
SeedOption = Annotated[int, typer.Option(help="Of the replay draws and of the bootstrap.")]
RereadOption = Annotated[
    int, typer.Option("--reread-tokens", help="Ask once more after reading so many remembered tokens again; 0: no.")
]
ResamplesOption = Annotated[int, typer.Option(help="Of the bootstrap over documents.")]


@dataclass(frozen=True)
class ModelOptions:
    """Which model; options that were not given keep the model's own values."""

    model: Annotated[str, typer.Option("--model", help="Saved HippoFormer folder, or base model: folder, hub name.")]
    window: WindowOption = None
    sink_tokens: SinkOption = None
    buffer_size: Annotated[int | None, typer.Option("--buffer-size", help="Episodes kept beyond the window.")] = None
    decay_rate: Annotated[
        float | None,
        typer.Option("--decay-rate", help="What is left of a priority after a segment; follows from the buffer."),
    ] = None
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps, …; default: cuda where it is.")] = None
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None
    obey_control_tokens: Annotated[
        bool, typer.Option("--obey-control-tokens", help="Control tokens written in a text are not taken for text.")
    ] = False

    def load(self, **more: Any) -> tuple[Any, Any]:
        """(model, tokenizer), with `more` options of the configuration.

        Raises:
            ConfigurationError: a device that this machine lacks, or an unknown dtype.
        """
        import hippoformer

        names = ("window", "sink_tokens", "buffer_size", "decay_rate")
        given = {name: getattr(self, name) for name in names}
        options: dict[str, Any] = {name: value for name, value in given.items() if value is not None} | more
        if self.dtype is not None:
            options["dtype"] = _dtype(self.dtype)
        target = _device(self.device)
        model, tokenizer = hippoformer.load(self.model, **options)
        if self.obey_control_tokens:
            tokenizer.obey_control_tokens = True
        return (model if target is None else model.to(target)), tokenizer


@dataclass(frozen=True)
class TextOptions:
    """Which documents: files, and data sets by their names."""

    text: Annotated[list[Path] | None, typer.Option("--text", help="Text file or folder; can be repeated.")] = None
    more: Annotated[list[Path] | None, typer.Argument(metavar="TEXT", help="Further files or folders.")] = None
    dataset: Annotated[
        list[str] | None,
        typer.Option("--dataset", help="wikitext-2, pg19, …: from --data-dir or the hub; can be repeated."),
    ] = None
    dataset_split: DatasetSplitOption = "test"
    data_dir: DataDirOption = Path("data")
    split: SplitOption = "auto"

    def read(self) -> list[Document]:
        """The documents of the files, then those of the data sets.

        Raises:
            ConfigurationError: neither was named. TextError: one of them is not there.
        """
        from hippoformer.data import read_documents
        from hippoformer.data.benchmarks import benchmark_documents

        paths = [*(self.text or []), *(self.more or [])]
        if not paths and not self.dataset:
            raise ConfigurationError("No text was named: give --text FILE_OR_FOLDER, or --dataset NAME.")
        found = read_documents(paths, split=self.split) if paths else []
        for name in self.dataset or []:
            found += benchmark_documents(name, self.dataset_split, self.data_dir)
        return found


@dataclass(frozen=True)
class PlantedOptions:
    """Facts hidden in text, and when they are asked for."""

    distances: Annotated[str, typer.Option(help="Comma-separated: tokens read before a fact is asked for.")] = (
        "2000,8000,32000"
    )
    facts: Annotated[int, typer.Option(help="Facts of each kind in each stream.")] = 9
    kinds: Annotated[
        str | None,
        typer.Option(help="Comma-separated: pass key, home, one of three (these by default), moved, reworded."),
    ] = None
    streams: Annotated[int | None, typer.Option(help="Streams read side by side; one a document.")] = None
    spacing: Annotated[int, typer.Option(help="Tokens of text before the first fact and between two facts.")] = 384

    def arguments(self) -> dict[str, Any]:
        """Of `evaluate_recall`.

        Raises:
            ConfigurationError: distances that are no numbers.
        """
        from hippoformer.evaluation.needles import KINDS

        return {
            "distances": numbers(self.distances, "--distances"),
            "facts": self.facts,
            "kinds": KINDS if self.kinds is None else comma_separated(self.kinds),
            "haystacks": self.streams,
            "spacing": self.spacing,
        }


def with_groups(function: Callable[..., None]) -> Callable[..., None]:
    """The command as typer should see it: for each parameter that is a group, the group's own fields."""
    shown: list[inspect.Parameter] = []
    groups: dict[str, type[Any]] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if isinstance(parameter.annotation, type) and is_dataclass(parameter.annotation):
            groups[name] = parameter.annotation
            shown += inspect.signature(parameter.annotation).parameters.values()
        else:
            shown.append(parameter)

    @wraps(function)
    def command(**options: Any) -> None:
        filled = {
            name: group(**{field.name: options.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        function(**options, **filled)

    keyword_only = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in shown]
    command.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
    return command


def comma_separated(text: str) -> list[str]:
    """The parts between commas that are not blank."""
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers between commas.

    Raises:
        ConfigurationError: anything else.
    """
    try:
        return tuple(int(part) for part in comma_separated(text))
    except ValueError as error:
        raise ConfigurationError(f"{option} {text}: expected numbers like 1000,4000") from error


def _device(name: str | None) -> Any:
    """Where a model goes; None: where it is."""
    import torch

    if name is None:
        return torch.device("cuda") if torch.cuda.is_available() else None
    try:
        # A tensor put there tells a device that this machine lacks from one that it has.
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigurationError(
            f"--device {name} cannot be used here ({str(error).splitlines()[0]}); say --device cpu."
        ) from error


def _dtype(name: str) -> Any:
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ConfigurationError(f"--dtype {name} is unknown; choose one of {', '.join(known)}.")
    return known[name]
