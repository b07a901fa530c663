"""`hippoformer eval baselines` and `eval bytes`: others by the same protocol, and what bytes of state buy."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hippoformer.cli.app import eval_app
from hippoformer.cli.options import (
    DeviceOption,
    DocumentsOption,
    DtypeOption,
    ModelOption,
    MoreTexts,
    OutputOption,
    SeedOption,
    SplitOption,
    check_output,
    comma_separated,
    load,
    reading,
    show,
)
from hippoformer.cli.suite import (
    DataDirOption,
    DatasetOption,
    DatasetSplitOption,
    ResamplesOption,
    TextsOption,
    numbers,
    texts_of,
)
from hippoformer.data.documents import Document
from hippoformer.errors import ConfigurationError

WindowsOption = Annotated[str, typer.Option("--windows", help="Of the base alone, comma-separated tokens.")]
SelectionOption = Annotated[
    str, typer.Option("--kv", help="Selected keys, comma-separated: h2o:512, snapkv:512, random:512.")
]
CharactersOption = Annotated[int | None, typer.Option(help="Read the first so many characters of each document.")]


@eval_app.command("baselines")
def eval_baselines(
    model: ModelOption,
    text: TextsOption = None,
    more: MoreTexts = None,
    dataset: DatasetOption = None,
    dataset_split: DatasetSplitOption = "test",
    data_dir: DataDirOption = Path("data"),
    baseline: Annotated[
        list[str] | None,
        typer.Option("--baseline", help="Model or adapter: hub name, folder; its own tokenizer. Can be repeated."),
    ] = None,
    baseline_window: Annotated[int | None, typer.Option(help="Tokens a baseline reads at once.")] = None,
    windows: WindowsOption = "256,1024",
    kv: SelectionOption = "",
    limit_characters: CharactersOption = None,
    documents: DocumentsOption = None,
    split: SplitOption = "auto",
    output: OutputOption = None,
    resamples: ResamplesOption = 10_000,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Other models, adapters, windows and selected keys: bits per byte and word perplexity of the same texts."""
    check_output(output)
    texts = texts_of([*(text or []), *(more or [])], dataset, dataset_split, data_dir, split)[:documents]
    loaded, tokenizer = load(model, device, dtype, seed=seed)
    asked = {"windows": numbers(windows, "--windows"), "selections": selections(kv), "models": baseline or []}
    _compare(
        loaded, tokenizer, texts, asked | {"model_window": baseline_window}, limit_characters, seed, resamples, output
    )


@eval_app.command("bytes")
def eval_bytes(
    model: ModelOption,
    text: TextsOption = None,
    more: MoreTexts = None,
    dataset: DatasetOption = None,
    dataset_split: DatasetSplitOption = "test",
    data_dir: DataDirOption = Path("data"),
    windows: WindowsOption = "256,1024,2048",
    buffers: Annotated[str, typer.Option("--buffers", help="Of the memory, comma-separated episodes.")] = "0,1024,4096",
    kv: SelectionOption = "h2o:512,snapkv:512,random:512",
    limit_characters: CharactersOption = None,
    documents: DocumentsOption = None,
    split: SplitOption = "auto",
    output: OutputOption = None,
    resamples: ResamplesOption = 10_000,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Perplexity over bytes of state: windows, memories of several sizes, and selected keys."""
    check_output(output)
    texts = texts_of([*(text or []), *(more or [])], dataset, dataset_split, data_dir, split)[:documents]
    loaded, tokenizer = load(model, device, dtype, seed=seed)
    asked = {"windows": numbers(windows, "--windows"), "buffers": numbers(buffers, "--buffers")}
    _compare(
        loaded, tokenizer, texts, asked | {"selections": selections(kv)}, limit_characters, seed, resamples, output
    )


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
    model: Any,
    tokenizer: Any,
    texts: list[Document],
    asked: dict[str, Any],
    limit_characters: int | None,
    seed: int,
    resamples: int,
    output: Path | None,
) -> None:
    from hippoformer.evaluation.baselines import contestants
    from hippoformer.evaluation.comparison import compare
    from hippoformer.evaluation.scoring import describe

    everybody = contestants(model, tokenizer, **asked)
    with reading() as progress:
        report = compare(everybody, texts, describe(model), limit_characters, seed, resamples, progress)
    show(report, output)
