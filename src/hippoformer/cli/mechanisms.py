"""`hippoformer eval variants`, `ablations`, `salience`, `brain`, `dynamics`, `trace`: what the parts of a memory do."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hippoformer.cli.app import eval_app
from hippoformer.cli.options import (
    BatchOption,
    CacheOption,
    DocumentsOption,
    LimitOption,
    ModelOptions,
    OutputOption,
    PlantedOptions,
    ResamplesOption,
    SeedOption,
    SplitOption,
    TextOptions,
    with_groups,
)
from hippoformer.cli.terminal import reading, show
from hippoformer.errors import ConfigurationError, TextError

VariantOption = Annotated[
    list[str], typer.Option("--variant", help="NAME or NAME:option=value,…; repeat it, the first is compared to.")
]


@eval_app.command("variants")
@with_groups
def eval_variants(
    model: ModelOptions,
    variant: VariantOption,
    texts: TextOptions,
    cache_dir: CacheOption = Path("hidden_states"),
    limit_tokens: LimitOption = None,
    documents: DocumentsOption = None,
    batch_size: BatchOption = 4,
    output: OutputOption = None,
    resamples: ResamplesOption = 10_000,
    seed: SeedOption = 0,
) -> None:
    """Compare selection rules, buffers and replay settings of one hippocampus, the base's reading done once."""
    _compare(_named(variant), model, texts, cache_dir, limit_tokens, documents, batch_size, output, resamples, seed)


@eval_app.command("recall-variants")
@with_groups
def eval_recall_variants(
    model: ModelOptions,
    variant: VariantOption,
    texts: TextOptions,
    planted: PlantedOptions,
    trained: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FOLDER of another hippocampus that was trained on the same base; can be repeated."),
    ] = None,
    output: OutputOption = None,
    resamples: ResamplesOption = 10_000,
    seed: Annotated[int, typer.Option(help="Of the replay draws, of the facts, and of the bootstrap.")] = 0,
) -> None:
    """`eval recall` of one hippocampus under several options, or of several on one base, in one reading."""
    from hippoformer.evaluation.recall_variants import evaluate_recall_variants
    from hippoformer.model.loading import load_beside

    found, asked, variants, folders = texts.read(), planted.arguments(), _named(variant), _folders(trained or [])
    loaded, tokenizer = model.load(seed=seed)
    others = {name: load_beside(loaded, folder, seed=seed) for name, folder in folders.items()}
    with reading() as progress:
        report = evaluate_recall_variants(
            *(loaded, tokenizer, found, variants),
            **asked,
            seed=seed,
            resamples=resamples,
            progress=progress,
            trained=others,
        )
    show(report, output)


@eval_app.command("ablations")
@with_groups
def eval_ablations(
    model: ModelOptions,
    texts: TextOptions,
    cache_dir: CacheOption = Path("hidden_states"),
    limit_tokens: LimitOption = None,
    documents: DocumentsOption = None,
    batch_size: BatchOption = 4,
    output: OutputOption = None,
    resamples: ResamplesOption = 10_000,
    seed: SeedOption = 0,
) -> None:
    """What each mechanism is worth: `eval variants` over the usual set, nothing trained again."""
    _compare(None, model, texts, cache_dir, limit_tokens, documents, batch_size, output, resamples, seed)


def _named(variants: list[str]) -> dict[str, dict[str, Any]]:
    """NAME:option=value,… as name -> options."""
    from hippoformer.training.arguments import config_options

    named = [part.partition(":") for part in variants]
    return {name: config_options([pair for pair in options.split(",") if pair]) for name, _, options in named}


def _folders(trained: list[str]) -> dict[str, str]:
    """NAME=FOLDER as name -> folder.

    Raises:
        ConfigurationError: no folder, or one name twice.
    """
    named = [part.partition("=") for part in trained]
    if bad := [name for name, _, folder in named if not name or not folder]:
        raise ConfigurationError(f"--trained {bad[0]}: expected NAME=FOLDER")
    if len({name for name, _, _ in named}) < len(named):
        raise ConfigurationError("--trained names two hippocampi alike")
    return {name: folder for name, _, folder in named}


def _compare(
    variants: Mapping[str, Mapping[str, Any]] | None,
    model: ModelOptions,
    texts: TextOptions,
    cache_dir: Path,
    limit_tokens: int | None,
    documents: int | None,
    batch_size: int,
    output: Path | None,
    resamples: int,
    seed: int,
) -> None:
    from hippoformer.evaluation.variants import ablations, evaluate_variants

    found = texts.read()[:documents]
    loaded, tokenizer = model.load(seed=seed)
    if variants is None:
        variants = ablations(loaded.config)
    report = evaluate_variants(
        loaded,
        tokenizer,
        found,
        variants,
        cache_dir,
        limit_tokens=limit_tokens,
        batch_size=batch_size,
        seed=seed,
        resamples=resamples,
        progress=lambda name: Console(stderr=True).print(f"reading as {name}"),
    )
    show(report, output)


@eval_app.command("salience")
@with_groups
def eval_salience(
    model: ModelOptions,
    texts: TextOptions,
    cache_dir: CacheOption = Path("hidden_states"),
    limit_tokens: LimitOption = None,
    documents: DocumentsOption = None,
    output: OutputOption = None,
    seed: Annotated[int, typer.Option(help="Of the replay draws, the bootstrap, and the untrained gate.")] = 0,
) -> None:
    """Compare the salience of each transition with the credit it earns, beside surprise and an untrained gate."""
    from hippoformer.evaluation.salience import evaluate_salience

    found = texts.read()[:documents]
    loaded, tokenizer = model.load(seed=seed)
    with reading() as progress:
        report = evaluate_salience(
            loaded, tokenizer, found, cache_dir, limit_tokens=limit_tokens, seed=seed, progress=progress
        )
    show(report, output)


@eval_app.command("brain")
@with_groups
def eval_brain(
    model: ModelOptions,
    texts: TextOptions,
    cache_dir: CacheOption = Path("hidden_states"),
    limit_tokens: LimitOption = None,
    documents: DocumentsOption = None,
    tagger: Annotated[str, typer.Option(help="auto, spacy, nltk, or word list.")] = "auto",
    output: OutputOption = None,
    resamples: ResamplesOption = 10_000,
    seed: SeedOption = 0,
) -> None:
    """Brain-like behaviour, each figure beside its controls."""
    from hippoformer.evaluation.brain import evaluate_brain

    found = texts.read()[:documents]
    loaded, tokenizer = model.load(seed=seed)
    with reading() as progress:
        report = evaluate_brain(
            loaded,
            tokenizer,
            found,
            cache_dir,
            limit_tokens,
            tagger,  # type: ignore[arg-type]  # an unknown one is an error that names the known ones
            seed,
            resamples,
            progress,
        )
    show(report, output)


@eval_app.command("dynamics")
@with_groups
def eval_dynamics(
    model: ModelOptions,
    texts: TextOptions,
    limit_tokens: LimitOption = 32_768,
    output: OutputOption = None,
    seed: SeedOption = 0,
) -> None:
    """Watch the memory over one stream, the longest text: how full, strong and old, and what replay does."""
    from hippoformer.evaluation.dynamics import evaluate_dynamics

    found = texts.read()
    loaded, tokenizer = model.load(seed=seed)
    with reading() as progress:
        report = evaluate_dynamics(loaded, tokenizer, found, limit_tokens, seed, progress)
    show(report, output)


@eval_app.command("trace")
@with_groups
def eval_trace(
    model: ModelOptions,
    text: Annotated[Path, typer.Option("--text", help="Text file.")],
    title: Annotated[str | None, typer.Option(help="Which document of the file; the first if not given.")] = None,
    limit_tokens: LimitOption = 3000,
    split: SplitOption = "auto",
    output: OutputOption = None,
) -> None:
    """Read one document and write down, token by token, what was salient, recalled, and what recall changed."""
    from hippoformer.data import read_documents
    from hippoformer.evaluation.trace import evaluate_trace

    documents = read_documents(text, split=split)
    chosen = [document for document in documents if title in (None, document.title)]
    if not chosen:
        titles = ", ".join(document.title for document in documents[:5])
        raise TextError(f"{text} has no document called {title!r}; its first ones are {titles}.")
    loaded, tokenizer = model.load()
    show(evaluate_trace(loaded, tokenizer, chosen[0], limit_tokens=limit_tokens), output)
