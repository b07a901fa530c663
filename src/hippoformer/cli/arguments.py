"""Arguments that several commands share, as dataclasses for `transformers.HfArgumentParser`.

    model_arguments, text_arguments, mine = parse("name", about, words, ModelArguments, TextArguments, MyArguments)

The parser takes `--buffer_size` and `--buffer-size` alike. An argument that is not given keeps the model's own value.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import HfArgumentParser

from hippoformer.data.documents import Split
from hippoformer.errors import ConfigurationError


def parse(command: str, about: str | None, words: Sequence[str], *groups: type, **positional: Any) -> tuple[Any, ...]:
    """Reads the words after a command; --help and a line that does not fit end the program as argparse does.

    Args:
        about: the first line of its help. groups: dataclasses.
        positional: arguments without dashes: name -> options of argparse's `add_argument`.

    Returns:
        An instance of each dataclass, then a namespace of the positional arguments where there are any.
    """
    parser = HfArgumentParser(groups, prog=f"hippoformer {command}", description=about)  # type: ignore[arg-type]
    for name, options in positional.items():
        parser.add_argument(name, **options)
    *found, rest = parser.parse_args_into_dataclasses(
        list(words), return_remaining_strings=True, look_for_args_file=False
    )
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return tuple(found)


@dataclass
class ModelArguments:
    """Which model, and which of its options to change."""

    model: str = field(metadata={"help": "saved HippoFormer, or base model: folder, hub name, short name"})
    window: int | None = field(default=None, metadata={"help": "tokens of the base model's own attention span"})
    sink_tokens: int | None = field(default=None, metadata={"help": "first tokens that always stay visible"})
    buffer_size: int | None = field(default=None, metadata={"help": "episodes kept beyond the window"})
    decay_rate: float | None = field(default=None, metadata={"help": "factor on an episode's priority per segment"})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, mps; default: cuda where it is"})
    dtype: Literal["float32", "bfloat16", "float16"] | None = field(default=None, metadata={"help": "of the base"})
    obey_control_tokens: bool = field(
        default=False, metadata={"help": "read control tokens written in a text as such, not as text"}
    )

    def load(self, **more: Any) -> tuple[Any, Any]:
        """(model, tokenizer), with `more` options; ConfigurationError for a device that this machine lacks."""
        import hippoformer

        given = {name: getattr(self, name) for name in ("window", "sink_tokens", "buffer_size", "decay_rate", "dtype")}
        options = {name: value for name, value in given.items() if value is not None} | more
        device = _device(self.device)
        model, tokenizer = hippoformer.load(self.model, **options)
        if self.obey_control_tokens:
            tokenizer.obey_control_tokens = True
        return (model if device is None else model.to(device)), tokenizer


@dataclass
class TextArguments:
    """Which documents: files, and data sets by name."""

    text: list[Path] = field(default_factory=list, metadata={"help": "text files or folders", "action": "extend"})
    dataset: list[str] = field(
        default_factory=list, metadata={"help": "names of data sets, such as wikitext-2", "action": "extend"}
    )
    dataset_split: str = field(default="test", metadata={"help": "which part of a data set"})
    data_dir: Path = field(default=Path("data"), metadata={"help": "folder of local copies of data sets"})
    split: Split = field(default="auto", metadata={"help": "where documents begin in a file"})

    def read(self) -> list[Any]:
        """The documents of the files, then those of the data sets; ConfigurationError where neither was named."""
        from hippoformer.data import read_documents
        from hippoformer.data.datasets import benchmark_documents

        if not self.text and not self.dataset:
            raise ConfigurationError("no text was named: give --text FILE_OR_FOLDER, or --dataset NAME")
        found = read_documents(self.text, split=self.split) if self.text else []
        for name in self.dataset:
            found += benchmark_documents(name, self.dataset_split, self.data_dir)
        return found


def check_output(path: Path | None, option: str = "--output") -> Path | None:
    """The path; ConfigurationError where it cannot be written: before hours of reading rather than after them."""
    if path is not None:
        folder = path.absolute().parent
        if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ConfigurationError(
                f"{option} {path} cannot be written; expected a file name in an existing folder that you may write to"
            )
    return path


def visible(text: str) -> str:
    """A text on one line, its line ends and tabs shown."""
    return text.replace("\n", "⏎").replace("\t", "⇥")


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
            f"--device {name} cannot be used here ({str(error).splitlines()[0]}); say --device cpu"
        ) from error
