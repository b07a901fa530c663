"""`hippoformer train`, `hippoformer export-base` and `hippoformer demo`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from hippoformer.cli.app import app
from hippoformer.cli.terminal import console

# `train` hands everything on, its own --help included.
_FORWARD = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command("train", context_settings=_FORWARD, add_help_option=False)
def train(context: typer.Context) -> None:
    """Train a hippocampus; all options are those of `python -m hippoformer.train`."""
    from hippoformer.training.arguments import parse

    arguments = parse(list(context.args))  # before torch is imported: --help ends here
    from hippoformer.train import run

    run(arguments)


@app.command("export-base")
def export_base(
    model: Annotated[str, typer.Option("--model", help="Saved HippoFormer with adapters: folder, hub name.")],
    output: Annotated[Path, typer.Option(help="Folder for the base and its tokenizer.")],
) -> None:
    """Write the base of a HippoFormer, its adapters merged, as an ordinary model of transformers."""
    import hippoformer

    loaded, tokenizer = hippoformer.load(model)
    loaded.merge_lora().save_pretrained(output)
    tokenizer.save_pretrained(output)
    console().print(Text(f"Written to {output}. Train a hippocampus on it: --base_model {output}"), soft_wrap=True)


@app.command("demo")
def demo(
    text: Annotated[list[Path] | None, typer.Option("--text", help="Text to read instead of the demo's own.")] = None,
    more: Annotated[list[Path] | None, typer.Argument(metavar="TEXT", help="Further texts.")] = None,
    model: Annotated[str, typer.Option(help="Saved HippoFormer, or base model: folder, hub name.")] = "smollm2-135m",
    minutes: Annotated[float, typer.Option(min=0.1, help="To take; they decide how much is read.")] = 3.0,
) -> None:
    """Read a long text in constant memory, with and without the hippocampus, and find facts in it again."""
    from hippoformer.demo import main as demo_main

    demo_main([*(text or []), *(more or [])], model, minutes)
