"""`hippoformer eval all`, and the parts of it that have no file of their own: one command each."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

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
    SplitOption,
    WindowOption,
    check_output,
    comma_separated,
    console,
    load,
    reading,
    show,
)
from hippoformer.data.documents import Document, Split
from hippoformer.errors import ConfigurationError

TextsOption = Annotated[list[Path] | None, typer.Option("--text", help="Text file or folder; can be repeated.")]
DatasetOption = Annotated[
    list[str] | None,
    typer.Option("--dataset", help="wikitext-2, pg19, …: from --data-dir or the hub; can be repeated."),
]
DataDirOption = Annotated[Path, typer.Option("--data-dir", help="Where local copies of data sets lie.")]
DatasetSplitOption = Annotated[str, typer.Option("--dataset-split", help="Which part of a data set.")]
ResamplesOption = Annotated[int, typer.Option(help="Of the bootstrap over documents.")]


@eval_app.command("all")
def eval_all(
    model: ModelOption,
    output_dir: Annotated[Path, typer.Option("--output-dir", help="Folder for the result files.")],
    text: TextsOption = None,
    more: MoreTexts = None,
    dataset: DatasetOption = None,
    dataset_split: DatasetSplitOption = "test",
    data_dir: DataDirOption = Path("data"),
    long_text: Annotated[
        list[Path] | None, typer.Option("--long-text", help="Texts for the stream and for recall; those of --text.")
    ] = None,
    parts: Annotated[str | None, typer.Option(help="Comma-separated; all of them.")] = None,
    conditions: Annotated[str, typer.Option(help="Of the perplexity, comma-separated.")] = "memory,off,window-only",
    limit_tokens: LimitOption = None,
    documents: DocumentsOption = None,
    split: SplitOption = "auto",
    part_documents: Annotated[int, typer.Option(help="Documents that salience, ablations and brain read.")] = 12,
    part_tokens: Annotated[int, typer.Option(help="Tokens of each of these.")] = 4_096,
    stream_tokens: Annotated[int, typer.Option(help="Tokens of the stream.")] = 32_768,
    prompts: Annotated[int, typer.Option(help="Texts that are continued.")] = 24,
    context_tokens: Annotated[int, typer.Option(help="Tokens read before a text is continued.")] = 1_536,
    new_tokens: Annotated[int, typer.Option(help="Tokens written.")] = 64,
    recall_distances: Annotated[str, typer.Option(help="Comma-separated: tokens before a fact is asked for.")] = (
        "1000,4000"
    ),
    batch_size: Annotated[int, typer.Option(help="Documents read side by side.")] = 4,
    cache_dir: CacheOption = Path("hidden_states"),
    speed: Annotated[float, typer.Option("--tokens-per-second", help="Reading speed, for the estimate.")] = 1_000.0,
    resamples: ResamplesOption = 10_000,
    window: WindowOption = None,
    buffer_size: BufferOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Everything: perplexity, long range, salience, dynamics, ablations, brain-like behaviour, text quality, recall."""
    from hippoformer.evaluation.suite import PARTS, SuiteSettings

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
    texts = texts_of([*(text or []), *(more or [])], dataset, dataset_split, data_dir, split)
    long_texts = texts if not long_text else texts_of(long_text, None, dataset_split, data_dir, split)
    loaded, tokenizer = load(model, device, dtype, window=window, buffer_size=buffer_size, seed=seed)
    run_all(
        loaded,
        tokenizer,
        texts,
        long_texts,
        settings,
        output_dir,
        list(PARTS) if parts is None else comma_separated(parts),
        cache_dir,
        speed,
    )


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
    from hippoformer.evaluation.suite import Suite, estimated_minutes, run_suite

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


@eval_app.command("long-range")
def eval_long_range(
    model: ModelOption,
    text: TextsOption = None,
    more: MoreTexts = None,
    dataset: DatasetOption = None,
    dataset_split: DatasetSplitOption = "test",
    data_dir: DataDirOption = Path("data"),
    limit_tokens: LimitOption = None,
    documents: DocumentsOption = None,
    split: SplitOption = "auto",
    batch_size: Annotated[int, typer.Option(help="Documents read side by side.")] = 4,
    window: WindowOption = None,
    buffer_size: BufferOption = None,
    output: OutputOption = None,
    resamples: ResamplesOption = 10_000,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """What memory gains by position, and by how long ago a token, or the words that end with it, last came."""
    from hippoformer.evaluation.long_range import evaluate_long_range

    check_output(output)
    texts = texts_of([*(text or []), *(more or [])], dataset, dataset_split, data_dir, split)[:documents]
    loaded, tokenizer = load(model, device, dtype, window=window, buffer_size=buffer_size, seed=seed)
    with reading() as progress:
        report = evaluate_long_range(
            loaded,
            tokenizer,
            texts,
            batch_size=batch_size,
            limit_tokens=limit_tokens,
            seed=seed,
            resamples=resamples,
            progress=progress,
        )
    show(report, output)


@eval_app.command("dynamics")
def eval_dynamics(
    model: ModelOption,
    text: TextsOption = None,
    more: MoreTexts = None,
    dataset: DatasetOption = None,
    dataset_split: DatasetSplitOption = "test",
    data_dir: DataDirOption = Path("data"),
    limit_tokens: LimitOption = 32_768,
    split: SplitOption = "auto",
    window: WindowOption = None,
    buffer_size: BufferOption = None,
    output: OutputOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Watch the memory over one stream, the longest text: how full, strong and old, and what replay does."""
    from hippoformer.evaluation.dynamics import evaluate_dynamics

    check_output(output)
    texts = texts_of([*(text or []), *(more or [])], dataset, dataset_split, data_dir, split)
    loaded, tokenizer = load(model, device, dtype, window=window, buffer_size=buffer_size, seed=seed)
    with reading() as progress:
        report = evaluate_dynamics(loaded, tokenizer, texts, limit_tokens, seed, progress)
    show(report, output)


@eval_app.command("ablations")
def eval_ablations(
    model: ModelOption,
    text: TextsOption = None,
    more: MoreTexts = None,
    dataset: DatasetOption = None,
    dataset_split: DatasetSplitOption = "test",
    data_dir: DataDirOption = Path("data"),
    cache_dir: CacheOption = Path("hidden_states"),
    limit_tokens: LimitOption = None,
    documents: DocumentsOption = None,
    split: SplitOption = "auto",
    output: OutputOption = None,
    resamples: ResamplesOption = 10_000,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """What each mechanism is worth: `eval variants` over the usual set, nothing trained again."""
    from hippoformer.evaluation.variants import ABLATIONS, evaluate_variants

    check_output(output)
    texts = texts_of([*(text or []), *(more or [])], dataset, dataset_split, data_dir, split)[:documents]
    loaded, tokenizer = load(model, device, dtype, seed=seed)
    report = evaluate_variants(
        loaded,
        tokenizer,
        texts,
        ABLATIONS,
        cache_dir,
        limit_tokens=limit_tokens,
        seed=seed,
        resamples=resamples,
        progress=lambda name: Console(stderr=True).print(f"reading as {name}"),
    )
    show(report, output)


@eval_app.command("brain")
def eval_brain(
    model: ModelOption,
    text: TextsOption = None,
    more: MoreTexts = None,
    dataset: DatasetOption = None,
    dataset_split: DatasetSplitOption = "test",
    data_dir: DataDirOption = Path("data"),
    cache_dir: CacheOption = Path("hidden_states"),
    limit_tokens: LimitOption = None,
    documents: DocumentsOption = None,
    split: SplitOption = "auto",
    tagger: Annotated[str, typer.Option(help="auto, spacy, nltk, or word list.")] = "auto",
    output: OutputOption = None,
    resamples: ResamplesOption = 10_000,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Brain-like behaviour, each figure beside its controls."""
    from hippoformer.evaluation.brain import evaluate_brain

    check_output(output)
    texts = texts_of([*(text or []), *(more or [])], dataset, dataset_split, data_dir, split)[:documents]
    loaded, tokenizer = load(model, device, dtype)
    with reading() as progress:
        report = evaluate_brain(
            loaded,
            tokenizer,
            texts,
            cache_dir,
            limit_tokens,
            tagger,  # type: ignore[arg-type]  # an unknown one is an error that names the known ones
            seed,
            resamples,
            progress,
        )
    show(report, output)


@eval_app.command("quality")
def eval_quality(
    model: ModelOption,
    text: TextsOption = None,
    more: MoreTexts = None,
    dataset: DatasetOption = None,
    dataset_split: DatasetSplitOption = "test",
    data_dir: DataDirOption = Path("data"),
    split: SplitOption = "auto",
    prompts: Annotated[int, typer.Option(help="Texts that are continued.")] = 24,
    context_tokens: Annotated[int, typer.Option(help="Tokens read before.")] = 1_536,
    new_tokens: Annotated[int, typer.Option(help="Tokens written.")] = 64,
    window: WindowOption = None,
    buffer_size: BufferOption = None,
    output: OutputOption = None,
    resamples: ResamplesOption = 10_000,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Continue held-out texts with and without memory; BLEU, ROUGE, F1 against the truth, and speed."""
    from hippoformer.evaluation.quality import evaluate_quality

    check_output(output)
    texts = texts_of([*(text or []), *(more or [])], dataset, dataset_split, data_dir, split)
    loaded, tokenizer = load(model, device, dtype, window=window, buffer_size=buffer_size, seed=seed)
    with reading() as progress:
        report = evaluate_quality(
            loaded,
            tokenizer,
            texts,
            prompts,
            context_tokens,
            new_tokens,
            seed=seed,
            resamples=resamples,
            progress=progress,
        )
    show(report, output)


@eval_app.command("questions")
def eval_questions(
    model: ModelOption,
    questions: Annotated[
        str, typer.Option(help="narrativeqa, scrolls-qasper, babilong-4k-qa1, babi-qa1 …, or a .jsonl file.")
    ],
    dataset_split: DatasetSplitOption = "validation",
    data_dir: DataDirOption = Path("data"),
    samples: Annotated[int | None, typer.Option(help="Ask the first so many questions.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Of an answer, at most.")] = 24,
    limit_tokens: LimitOption = None,
    batch_size: Annotated[int, typer.Option(help="Questions side by side.")] = 4,
    window: WindowOption = None,
    buffer_size: BufferOption = None,
    output: OutputOption = None,
    resamples: ResamplesOption = 10_000,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Ask questions about long texts with and without memory; exact match, F1, ROUGE."""
    from hippoformer.data.questions import read_questions
    from hippoformer.evaluation.questions import evaluate_questions

    check_output(output)
    asked = read_questions(questions, dataset_split, data_dir, samples)
    loaded, tokenizer = load(model, device, dtype, window=window, buffer_size=buffer_size, seed=seed)
    with reading() as progress:
        report = evaluate_questions(
            loaded,
            tokenizer,
            asked,
            f"{questions} ({dataset_split})",
            new_tokens,
            limit_tokens,
            batch_size,
            seed,
            resamples,
            progress,
        )
    show(report, output)


@eval_app.command("seeds")
def eval_seeds(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Result files, one a training seed.")],
    output: OutputOption = None,
) -> None:
    """Mean, deviation and interval of the headline figures over training seeds."""
    from hippoformer.evaluation.seeds import aggregate

    check_output(output)
    show(aggregate(files), output)


def texts_of(
    paths: list[Path], datasets: list[str] | None, dataset_split: str, data_dir: Path, split: Split
) -> list[Document]:
    """The documents of files and data sets, in that order.

    Raises:
        ConfigurationError: neither was named. TextError: one of them is not there.
    """
    from hippoformer.data import read_documents
    from hippoformer.data.benchmarks import benchmark_documents

    if not paths and not datasets:
        raise ConfigurationError("No text was named: give --text FILE_OR_FOLDER, or --dataset NAME.")
    found = read_documents(paths, split=split) if paths else []
    for name in datasets or []:
        found += benchmark_documents(name, dataset_split, data_dir)
    return found


def numbers(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers between commas.

    Raises:
        ConfigurationError: anything else.
    """
    try:
        return tuple(int(part) for part in comma_separated(text))
    except ValueError as error:
        raise ConfigurationError(f"{option} {text}: expected numbers like 1000,4000") from error
