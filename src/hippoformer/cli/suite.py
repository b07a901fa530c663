"""`hippoformer eval all`: every part of an evaluation, told beforehand how long it takes."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from hippoformer.cli.app import eval_app
from hippoformer.cli.options import (
    BatchOption,
    CacheOption,
    DocumentsOption,
    LimitOption,
    ModelOptions,
    ResamplesOption,
    SeedOption,
    TextOptions,
    comma_separated,
    numbers,
    with_groups,
)
from hippoformer.cli.terminal import console, reading
from hippoformer.data.documents import Document


@eval_app.command("all")
@with_groups
def eval_all(
    model: ModelOptions,
    output_dir: Annotated[Path, typer.Option("--output-dir", help="Folder for the result files.")],
    texts: TextOptions,
    long_text: Annotated[
        list[Path] | None, typer.Option("--long-text", help="Texts for the stream and for recall; those of --text.")
    ] = None,
    parts: Annotated[str | None, typer.Option(help="Comma-separated; all of them.")] = None,
    conditions: Annotated[str, typer.Option(help="Of the perplexity, comma-separated.")] = "memory,off,window-only",
    limit_tokens: LimitOption = None,
    documents: DocumentsOption = None,
    part_documents: Annotated[int, typer.Option(help="Documents that salience, ablations and brain read.")] = 12,
    part_tokens: Annotated[int, typer.Option(help="Tokens of each of these.")] = 4_096,
    stream_tokens: Annotated[int, typer.Option(help="Tokens of the stream.")] = 32_768,
    prompts: Annotated[int, typer.Option(help="Texts that are continued.")] = 24,
    context_tokens: Annotated[int, typer.Option(help="Tokens read before a text is continued.")] = 1_536,
    new_tokens: Annotated[int, typer.Option(help="Tokens written.")] = 64,
    recall_distances: Annotated[str, typer.Option(help="Comma-separated: tokens before a fact is asked for.")] = (
        "1000,4000"
    ),
    batch_size: BatchOption = 4,
    cache_dir: CacheOption = Path("hidden_states"),
    speed: Annotated[float, typer.Option("--tokens-per-second", help="Reading speed, for the estimate.")] = 1_000.0,
    resamples: ResamplesOption = 10_000,
    seed: SeedOption = 0,
) -> None:
    """Everything: perplexity, long range, salience, dynamics, ablations, brain-like behaviour, text quality, recall."""
    from hippoformer.data import read_documents
    from hippoformer.evaluation.parts import PARTS, SuiteSettings

    settings = SuiteSettings(
        documents=documents,
        limit_tokens=limit_tokens,
        conditions=tuple(comma_separated(conditions)),
        batch_size=batch_size,
        part_documents=part_documents,
        part_tokens=part_tokens,
        stream_tokens=stream_tokens,
        prompts=prompts,
        context_tokens=context_tokens,
        new_tokens=new_tokens,
        recall_distances=numbers(recall_distances, "--recall-distances"),
        seed=seed,
        resamples=resamples,
    )
    found = texts.read()
    long_texts = read_documents(long_text, split=texts.split) if long_text else found
    loaded, tokenizer = model.load(seed=seed)
    wanted = list(PARTS) if parts is None else comma_separated(parts)
    run_all(loaded, tokenizer, found, long_texts, settings, output_dir, wanted, cache_dir, speed)


def run_all(
    model: Any,
    tokenizer: Any,
    texts: list[Document],
    long_texts: list[Document],
    settings: Any,
    output_dir: Path,
    parts: list[str],
    cache_dir: Path,
    tokens_per_second: float = 1_000.0,
    summary: Path | None = None,
) -> None:
    """Tells how long it will take, runs the suite with progress bars, and shows the headline."""
    from hippoformer.evaluation.parts import Suite
    from hippoformer.evaluation.suite import estimated_minutes, run_suite

    terminal, errors = console(), Console(stderr=True)
    suite = Suite(model, tokenizer, tuple(texts), tuple(long_texts), cache_dir, settings, None)
    minutes = estimated_minutes(suite, parts, tokens_per_second)
    shown = ", ".join(f"{name} {of:.1f}" for name, of in minutes.items())
    total = f"About {sum(minutes.values()):.0f} minutes at {tokens_per_second:,.0f} tokens/s"
    errors.print(Text(f"{total}, less what is there: {shown}"))
    report = run_suite(
        suite, output_dir, parts, reading, lambda message: errors.print(Text(message), soft_wrap=True), summary
    )
    terminal.print(report.to_table())
    terminal.print(Text(f"Results in {output_dir}, all together in {summary or output_dir / 'results.json'}"))
