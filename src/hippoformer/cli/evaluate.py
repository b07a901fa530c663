"""`hippoformer eval …`: measure a model."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hippoformer.cli.app import eval_app
from hippoformer.cli.options import (
    BufferOption,
    CacheOption,
    DeviceOption,
    DocumentsOption,
    DtypeOption,
    LimitOption,
    ModelOption,
    MoreTexts,
    OutputOption,
    SeedOption,
    SinkOption,
    SplitOption,
    TextOption,
    WindowOption,
    check_output,
    comma_separated,
    load,
    reading,
    show,
)
from hippoformer.errors import ConfigurationError


@eval_app.command("perplexity")
def eval_perplexity(
    model: ModelOption,
    text: TextOption,
    more: MoreTexts = None,
    window: WindowOption = None,
    sink_tokens: SinkOption = None,
    buffer_size: BufferOption = None,
    conditions: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: memory, off, window-only, other-document. All, if there are two documents."
        ),
    ] = None,
    limit_tokens: LimitOption = None,
    skip_tokens: Annotated[int, typer.Option(help="Read but do not score the first so many tokens of each.")] = 0,
    documents: Annotated[int | None, typer.Option(help="Score the first so many documents.")] = None,
    split: SplitOption = "auto",
    batch_size: Annotated[int, typer.Option(help="Documents read side by side.")] = 4,
    output: OutputOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Stream texts with and without memory; report perplexity, bits per byte and bytes of state."""
    from hippoformer.data import read_documents
    from hippoformer.evaluation import CONDITIONS, evaluate_perplexity

    check_output(output)
    texts = read_documents([*text, *(more or [])], split=split)
    if conditions is not None:
        chosen = comma_separated(conditions)
    else:
        chosen = [condition for condition in CONDITIONS if condition != "other-document" or len(texts) > 1]
    loaded, tokenizer = load(
        model, device, dtype, window=window, sink_tokens=sink_tokens, buffer_size=buffer_size, seed=seed
    )
    with reading() as progress:
        report = evaluate_perplexity(
            loaded,
            tokenizer,
            texts,
            conditions=chosen,
            batch_size=batch_size,
            limit_tokens=limit_tokens,
            skip_tokens=skip_tokens,
            max_documents=documents,
            seed=seed,
            progress=progress,
        )
    show(report, output)


@eval_app.command("recall")
def eval_recall(
    model: ModelOption,
    text: Annotated[list[Path], typer.Option("--text", help="Text file or folder to hide facts in; can be repeated.")],
    more: MoreTexts = None,
    distances: Annotated[str, typer.Option(help="Comma-separated: tokens read before a fact is asked for.")] = (
        "2000,8000,32000"
    ),
    facts: Annotated[int, typer.Option(help="Facts of each kind in each stream.")] = 9,
    kinds: Annotated[str | None, typer.Option(help="Comma-separated: pass key, home, one of three.")] = None,
    streams: Annotated[int | None, typer.Option(help="Streams read side by side; one a document.")] = None,
    spacing: Annotated[int, typer.Option(help="Tokens of text before the first fact and between two facts.")] = 384,
    window: WindowOption = None,
    sink_tokens: SinkOption = None,
    buffer_size: BufferOption = None,
    output: OutputOption = None,
    seed: Annotated[int, typer.Option(help="Of the replay draws and of the facts.")] = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Hide facts in long texts, ask for them thousands of tokens later, and count exact answers."""
    from hippoformer.data import read_documents
    from hippoformer.evaluation.needles import KINDS
    from hippoformer.evaluation.recall import evaluate_recall

    check_output(output)
    texts = read_documents([*text, *(more or [])])
    try:
        gaps = [int(part) for part in distances.split(",")]
    except ValueError as error:
        raise ConfigurationError(f"--distances {distances}: expected numbers like 2000,8000") from error
    loaded, tokenizer = load(
        model, device, dtype, window=window, sink_tokens=sink_tokens, buffer_size=buffer_size, seed=seed
    )
    with reading() as progress:
        report = evaluate_recall(
            loaded,
            tokenizer,
            texts,
            distances=gaps,
            facts=facts,
            kinds=KINDS if kinds is None else [kind.strip() for kind in kinds.split(",")],
            haystacks=streams,
            spacing=spacing,
            seed=seed,
            progress=progress,
        )
    show(report, output)


@eval_app.command("variants")
def eval_variants(
    model: ModelOption,
    text: TextOption,
    variant: Annotated[
        list[str],
        typer.Option("--variant", help="NAME or NAME:option=value,…; repeat it, the first is compared to."),
    ],
    more: MoreTexts = None,
    cache_dir: CacheOption = Path("hidden_states"),
    limit_tokens: LimitOption = None,
    documents: DocumentsOption = None,
    split: SplitOption = "auto",
    output: OutputOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Compare selection rules, buffers and replay settings of one hippocampus, the base's reading done once."""
    from hippoformer.data import read_documents
    from hippoformer.evaluation.variants import evaluate_variants
    from hippoformer.training.arguments import config_options

    check_output(output)
    named = [part.partition(":") for part in variant]
    texts = read_documents([*text, *(more or [])], split=split)[:documents]
    loaded, tokenizer = load(model, device, dtype, seed=seed)
    report = evaluate_variants(
        loaded,
        tokenizer,
        texts,
        {name: config_options([pair for pair in options.split(",") if pair]) for name, _, options in named},
        cache_dir,
        limit_tokens=limit_tokens,
        seed=seed,
        progress=lambda name: Console(stderr=True).print(f"reading as {name}"),
    )
    show(report, output)


@eval_app.command("salience")
def eval_salience(
    model: ModelOption,
    text: TextOption,
    more: MoreTexts = None,
    cache_dir: CacheOption = Path("hidden_states"),
    limit_tokens: LimitOption = None,
    documents: DocumentsOption = None,
    split: SplitOption = "auto",
    output: OutputOption = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap, and of the untrained gate.")] = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Compare the salience of each transition with the credit it earns, beside surprise and an untrained gate."""
    from hippoformer.data import read_documents
    from hippoformer.evaluation.salience import evaluate_salience

    check_output(output)
    texts = read_documents([*text, *(more or [])], split=split)[:documents]
    loaded, tokenizer = load(model, device, dtype)
    with reading() as progress:
        report = evaluate_salience(
            loaded, tokenizer, texts, cache_dir, limit_tokens=limit_tokens, seed=seed, progress=progress
        )
    show(report, output)
