"""`hippoformer eval baselines`, `eval bytes`, `eval seeds`: a model among others."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hippoformer.cli.app import eval_app
from hippoformer.cli.options import (
    DocumentsOption,
    ModelOptions,
    OutputOption,
    ResamplesOption,
    SeedOption,
    TextOptions,
    comma_separated,
    numbers,
    with_groups,
)
from hippoformer.cli.terminal import reading, show
from hippoformer.errors import ConfigurationError

WindowsOption = Annotated[str, typer.Option("--windows", help="Of the base alone, comma-separated tokens.")]
SelectionOption = Annotated[
    str, typer.Option("--kv", help="Selected keys, comma-separated: h2o:512, snapkv:512, random:512.")
]
CharactersOption = Annotated[int | None, typer.Option(help="Read the first so many characters of each document.")]


@eval_app.command("baselines")
@with_groups
def eval_baselines(
    model: ModelOptions,
    texts: TextOptions,
    baseline: Annotated[
        list[str] | None,
        typer.Option("--baseline", help="Model or adapter: hub name, folder; its own tokenizer. Can be repeated."),
    ] = None,
    baseline_window: Annotated[int | None, typer.Option(help="Tokens a baseline reads at once.")] = None,
    windows: WindowsOption = "256,1024",
    kv: SelectionOption = "",
    limit_characters: CharactersOption = None,
    documents: DocumentsOption = None,
    output: OutputOption = None,
    resamples: ResamplesOption = 10_000,
    seed: SeedOption = 0,
) -> None:
    """Other models, adapters, windows and selected keys: bits per byte and word perplexity of the same texts."""
    asked = {
        "windows": numbers(windows, "--windows"),
        "selections": selections(kv),
        "models": baseline or [],
        "model_window": baseline_window,
    }
    _compare(asked, model, texts, limit_characters, documents, output, resamples, seed)


@eval_app.command("bytes")
@with_groups
def eval_bytes(
    model: ModelOptions,
    texts: TextOptions,
    windows: WindowsOption = "256,1024,2048",
    buffers: Annotated[str, typer.Option("--buffers", help="Of the memory, comma-separated episodes.")] = "0,1024,4096",
    kv: SelectionOption = "h2o:512,snapkv:512,random:512",
    limit_characters: CharactersOption = None,
    documents: DocumentsOption = None,
    output: OutputOption = None,
    resamples: ResamplesOption = 10_000,
    seed: SeedOption = 0,
) -> None:
    """Perplexity over bytes of state: windows, memories of several sizes, and selected keys."""
    asked = {
        "windows": numbers(windows, "--windows"),
        "buffers": numbers(buffers, "--buffers"),
        "selections": selections(kv),
    }
    _compare(asked, model, texts, limit_characters, documents, output, resamples, seed)


@eval_app.command("seeds")
def eval_seeds(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Result files, one a training seed.")],
    output: OutputOption = None,
) -> None:
    """Mean, deviation and interval of the headline figures over training seeds."""
    from hippoformer.evaluation.seeds import aggregate

    show(aggregate(files), output)


def selections(text: str) -> list[tuple[Any, int]]:
    """METHOD:BUDGET pairs between commas.

    Raises:
        ConfigurationError: anything else.
    """
    found = []
    for part in comma_separated(text):
        method, _, budget = part.partition(":")
        if not budget.isdigit():
            raise ConfigurationError(f"--kv {text}: expected METHOD:BUDGET like h2o:512")
        found.append((method, int(budget)))
    return found


def _compare(
    asked: dict[str, Any],
    model: ModelOptions,
    texts: TextOptions,
    limit_characters: int | None,
    documents: int | None,
    output: Path | None,
    resamples: int,
    seed: int,
) -> None:
    from hippoformer.evaluation.baselines import contestants
    from hippoformer.evaluation.comparison import compare
    from hippoformer.evaluation.scoring import describe

    found = texts.read()[:documents]
    loaded, tokenizer = model.load(seed=seed)
    everybody = contestants(loaded, tokenizer, **asked)
    # Hours of reading: what is finished is kept until the report is written.
    keep = None if output is None else output.with_name(f"{output.name}.finished.jsonl")
    with reading() as progress:
        report = compare(everybody, found, describe(loaded), limit_characters, seed, resamples, progress, keep=keep)
    show(report, output)
    if keep is not None:
        keep.unlink(missing_ok=True)
