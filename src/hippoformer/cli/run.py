"""`hippoformer train` and `hippoformer demo`."""

from pathlib import Path
from typing import Annotated

import typer

from hippoformer.cli.app import app

# `train` hands everything on, its own --help included.
_FORWARD = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command("train", context_settings=_FORWARD, add_help_option=False)
def train(context: typer.Context) -> None:
    """Train a hippocampus; all options are those of `python -m hippoformer.train`."""
    from hippoformer.train import main as train_main

    raise typer.Exit(train_main(list(context.args)))


@app.command("demo")
def demo(
    text: Annotated[list[Path] | None, typer.Option("--text", help="Text to read instead of the demo's own.")] = None,
    more: Annotated[list[Path] | None, typer.Argument(metavar="TEXT", help="Further texts.")] = None,
    fast: Annotated[bool, typer.Option("--fast", help="A shorter demo.")] = False,
) -> None:
    """Read long documents with and without memory, and show what was remembered and why."""
    from hippoformer.demo import main as demo_main

    demo_main(texts=[*(text or []), *(more or [])] or None, fast=fast)
