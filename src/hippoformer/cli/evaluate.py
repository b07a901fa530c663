"""`hippoformer eval perplexity`, `long-range`, `recall`, `quality`, `questions`: what a memory is worth."""

from pathlib import Path
from typing import Annotated

import typer

from hippoformer.cli.app import eval_app
from hippoformer.cli.options import (
    BatchOption,
    DataDirOption,
    DatasetSplitOption,
    DocumentsOption,
    LimitOption,
    ModelOptions,
    OutputOption,
    PlantedOptions,
    RereadOption,
    ResamplesOption,
    SeedOption,
    TextOptions,
    comma_separated,
    with_groups,
)
from hippoformer.cli.terminal import reading, show


@eval_app.command("perplexity")
@with_groups
def eval_perplexity(
    model: ModelOptions,
    texts: TextOptions,
    conditions: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: memory, off, window-only, other-document, marginals. "
            "The first four, if there are two documents."
        ),
    ] = None,
    limit_tokens: LimitOption = None,
    skip_tokens: Annotated[int, typer.Option(help="Read but do not score the first so many tokens of each.")] = 0,
    documents: Annotated[int | None, typer.Option(help="Score the first so many documents.")] = None,
    batch_size: BatchOption = 4,
    output: OutputOption = None,
    seed: SeedOption = 0,
) -> None:
    """Stream texts with and without memory; report perplexity, bits per byte and bytes of state."""
    from hippoformer.evaluation import CONDITIONS, evaluate_perplexity

    found = texts.read()
    if conditions is not None:
        chosen = comma_separated(conditions)
    else:
        chosen = [condition for condition in CONDITIONS if condition != "other-document" or len(found) > 1]
    loaded, tokenizer = model.load(seed=seed)
    with reading() as progress:
        report = evaluate_perplexity(
            loaded,
            tokenizer,
            found,
            conditions=chosen,
            batch_size=batch_size,
            limit_tokens=limit_tokens,
            skip_tokens=skip_tokens,
            max_documents=documents,
            seed=seed,
            progress=progress,
        )
    show(report, output)


@eval_app.command("long-range")
@with_groups
def eval_long_range(
    model: ModelOptions,
    texts: TextOptions,
    limit_tokens: LimitOption = None,
    documents: DocumentsOption = None,
    batch_size: BatchOption = 4,
    output: OutputOption = None,
    resamples: ResamplesOption = 10_000,
    seed: SeedOption = 0,
) -> None:
    """What memory gains by position, and by how long ago a token, or the words that end with it, last came."""
    from hippoformer.evaluation.long_range import evaluate_long_range

    found = texts.read()[:documents]
    loaded, tokenizer = model.load(seed=seed)
    with reading() as progress:
        report = evaluate_long_range(
            loaded,
            tokenizer,
            found,
            batch_size=batch_size,
            limit_tokens=limit_tokens,
            seed=seed,
            resamples=resamples,
            progress=progress,
        )
    show(report, output)


@eval_app.command("recall")
@with_groups
def eval_recall(
    model: ModelOptions,
    texts: TextOptions,
    planted: PlantedOptions,
    reread_tokens: RereadOption = 0,
    output: OutputOption = None,
    seed: Annotated[int, typer.Option(help="Of the replay draws and of the facts.")] = 0,
) -> None:
    """Hide facts in long texts, ask for them thousands of tokens later, and count exact answers."""
    from hippoformer.evaluation.recall import evaluate_recall

    found, asked = texts.read(), planted.arguments()
    loaded, tokenizer = model.load(seed=seed)
    with reading() as progress:
        report = evaluate_recall(
            loaded, tokenizer, found, **asked, reread_tokens=reread_tokens, seed=seed, progress=progress
        )
    show(report, output)


@eval_app.command("quality")
@with_groups
def eval_quality(
    model: ModelOptions,
    texts: TextOptions,
    prompts: Annotated[int, typer.Option(help="Texts that are continued.")] = 24,
    context_tokens: Annotated[int, typer.Option(help="Tokens read before.")] = 1_536,
    new_tokens: Annotated[int, typer.Option(help="Tokens written.")] = 64,
    output: OutputOption = None,
    resamples: ResamplesOption = 10_000,
    seed: SeedOption = 0,
) -> None:
    """Continue held-out texts with and without memory; BLEU, ROUGE, F1 against the truth, and speed."""
    from hippoformer.evaluation.quality import evaluate_quality

    found = texts.read()
    loaded, tokenizer = model.load(seed=seed)
    with reading() as progress:
        report = evaluate_quality(
            loaded,
            tokenizer,
            found,
            prompts,
            context_tokens,
            new_tokens,
            seed=seed,
            resamples=resamples,
            progress=progress,
        )
    show(report, output)


@eval_app.command("questions")
@with_groups
def eval_questions(
    model: ModelOptions,
    questions: Annotated[
        str, typer.Option(help="narrativeqa, scrolls-qasper, babilong-4k-qa1, babi-qa1 …, or a .jsonl file.")
    ],
    dataset_split: DatasetSplitOption = "validation",
    data_dir: DataDirOption = Path("data"),
    samples: Annotated[int | None, typer.Option(help="Ask the first so many questions.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Of an answer, at most.")] = 24,
    limit_tokens: LimitOption = None,
    batch_size: Annotated[int, typer.Option(help="Questions side by side.")] = 4,
    reread_tokens: RereadOption = 0,
    output: OutputOption = None,
    resamples: ResamplesOption = 10_000,
    seed: SeedOption = 0,
) -> None:
    """Ask questions about long texts with and without memory; exact match, F1, ROUGE."""
    from hippoformer.data.questions import read_questions
    from hippoformer.evaluation.questions import evaluate_questions

    asked = read_questions(questions, dataset_split, data_dir, samples)
    loaded, tokenizer = model.load(seed=seed)
    with reading() as progress:
        report = evaluate_questions(
            loaded,
            tokenizer,
            asked,
            f"{questions} ({dataset_split})",
            new_tokens,
            limit_tokens,
            batch_size,
            reread_tokens,
            seed,
            resamples,
            progress,
        )
    show(report, output)
