"""`hippoformer import-original`: a checkpoint of the original research code becomes a HippoFormer folder."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from hippoformer.cli.app import app
from hippoformer.cli.options import SinkOption, WindowOption
from hippoformer.cli.terminal import console


@app.command("import-original")
def import_original(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="pytorch_model.pt or checkpoint.pt of the original.")],
    base_model: Annotated[str, typer.Option(help="The base it was trained with: folder, hub or short name.")],
    output: Annotated[Path, typer.Option(help="Folder for the HippoFormer.")],
    lora_alpha: Annotated[int, typer.Option(min=1, help="Scale of its LoRA, which the file does not tell.")] = 32,
    window: WindowOption = None,
    sink_tokens: SinkOption = None,
    seed: Annotated[int, typer.Option(help="Of the fresh hippocampus.")] = 0,
) -> None:
    """Import a checkpoint of the original research code, and tell what of it has no counterpart here, and why."""
    from hippoformer.model.base_models import load_base_model
    from hippoformer.model.original import import_original as convert
    from hippoformer.model.original import read_original, report_table

    original = read_original(file)
    given = {"lora_alpha": lora_alpha, "window": window, "sink_tokens": sink_tokens, "seed": seed}
    options = {name: value for name, value in given.items() if value is not None}
    model, rows = convert(original, load_base_model(base_model), base_model, **options)
    model.save_pretrained(output)
    terminal = console()
    terminal.print(report_table(rows))
    terminal.print(
        Text(f"Written to {output}. Its hippocampus is fresh: it is its base until it is trained."), soft_wrap=True
    )
