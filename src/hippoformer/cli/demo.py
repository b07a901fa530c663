"""`hippoformer demo`: see `hippoformer.demo`, imported once the command line is understood."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hippoformer.cli.arguments import parse


@dataclass
class DemoArguments:
    """Which model, and for how long."""

    model: str = field(default="smollm2-135m", metadata={"help": "saved HippoFormer, or base: folder, hub name"})
    minutes: float = field(default=3.0, metadata={"help": "to take; they decide how much is read"})


def main(words: Sequence[str]) -> None:
    """Reads a long text in constant memory, with and without the hippocampus, and finds facts in it again."""
    texts = {"nargs": "*", "type": Path, "metavar": "TEXT", "help": "files to read instead of the demo's own text"}
    arguments, more = parse("demo", main.__doc__, words, DemoArguments, texts=texts)
    from hippoformer.demo import main as run

    run(more.texts, arguments.model, arguments.minutes)
