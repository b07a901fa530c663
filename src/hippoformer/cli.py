"""The command line: `hippoformer eval perplexity`, `eval recall`, `eval variants`, `train`, `demo`, `memory show`.

Each command is a thin layer over a function of the package, imported only when it runs, so that `--help` is quick.
An error that the package raises on purpose becomes one red line and exit code 2; `hippoformer --debug …` shows where
it came from.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from hippoformer.data.documents import Split
from hippoformer.errors import ConfigurationError, HippoFormerError


class _ErrorsInOneLine(TyperGroup):
    """The root command; the only place where errors of the package are turned into an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except HippoFormerError as error:
            if ctx.params.get("debug"):
                raise
            line = " ".join(str(error).split())
            Console(stderr=True).print(Text(f"Error: {line}", style="bold red"), soft_wrap=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=_ErrorsInOneLine,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A hippocampus for causal language models.",
)
eval_app = typer.Typer(no_args_is_help=True, help="Measure a model.")
memory_app = typer.Typer(no_args_is_help=True, help="Look into saved memories.")
app.add_typer(eval_app, name="eval")
app.add_typer(memory_app, name="memory")


Order = Literal["priority", "salience", "strength", "position"]

# `train` hands everything on, its own --help included.
_FORWARD = {"allow_extra_args": True, "ignore_unknown_options": True}
_CONTEXT_TOKENS = 12

ModelOption = Annotated[str, typer.Option("--model", help="Saved HippoFormer folder, or base model: folder, hub name.")]
WindowOption = Annotated[int | None, typer.Option(help="Tokens of the base model's own attention span.")]
SinkOption = Annotated[int | None, typer.Option("--sink-tokens", help="First tokens that always stay visible.")]
BufferOption = Annotated[int | None, typer.Option("--buffer-size", help="Episodes kept beyond the window.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, mps, …")]
CacheOption = Annotated[Path, typer.Option(help="Where the base's hidden states are kept.")]
DtypeOption = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")]


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
) -> None:
    """A hippocampus for causal language models."""
    # --debug is read by the group above, which also sees errors raised before any command runs.


@eval_app.command("perplexity")
def eval_perplexity(
    model: ModelOption,
    text: Annotated[list[Path], typer.Option("--text", help="Text file or folder; can be repeated.")],
    more: Annotated[list[Path] | None, typer.Argument(metavar="TEXT", help="Further files or folders.")] = None,
    window: WindowOption = None,
    sink_tokens: SinkOption = None,
    buffer_size: BufferOption = None,
    conditions: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: memory, off, window-only, other-document. All, if there are two documents."
        ),
    ] = None,
    limit_tokens: Annotated[int | None, typer.Option(help="Read the first so many tokens of each document.")] = None,
    skip_tokens: Annotated[int, typer.Option(help="Read but do not score the first so many tokens of each.")] = 0,
    documents: Annotated[int | None, typer.Option(help="Score the first so many documents.")] = None,
    split: Annotated[Split, typer.Option(help="Where documents begin.")] = "auto",
    batch_size: Annotated[int, typer.Option(help="Documents read side by side.")] = 4,
    output: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
    seed: Annotated[int, typer.Option(help="Of the replay draws and of the bootstrap.")] = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Stream texts with and without memory; report perplexity, bits per byte and bytes of state."""
    from hippoformer.data import read_documents
    from hippoformer.evaluation import CONDITIONS, evaluate_perplexity

    if output is not None:
        _check_output(output)
    texts = read_documents([*text, *(more or [])], split=split)
    if conditions is not None:
        chosen = [condition.strip() for condition in conditions.split(",") if condition.strip()]
    else:
        chosen = [condition for condition in CONDITIONS if condition != "other-document" or len(texts) > 1]
    loaded, tokenizer = _load(
        model, device, dtype, window=window, sink_tokens=sink_tokens, buffer_size=buffer_size, seed=seed
    )
    with _reading() as progress:
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
    _show(report, output)


@eval_app.command("recall")
def eval_recall(
    model: ModelOption,
    text: Annotated[list[Path], typer.Option("--text", help="Text file or folder to hide facts in; can be repeated.")],
    more: Annotated[list[Path] | None, typer.Argument(metavar="TEXT", help="Further files or folders.")] = None,
    distances: Annotated[str, typer.Option(help="Comma-separated: tokens read before a fact is asked for.")] = (
        "2000,8000,32000"
    ),
    facts: Annotated[int, typer.Option(help="Facts of each kind in each stream.")] = 9,
    kinds: Annotated[str | None, typer.Option(help="Comma-separated: pass key, home, one of three.")] = None,
    streams: Annotated[int | None, typer.Option(help="Streams read side by side; one a document.")] = None,
    window: WindowOption = None,
    sink_tokens: SinkOption = None,
    buffer_size: BufferOption = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
    seed: Annotated[int, typer.Option(help="Of the replay draws and of the facts.")] = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Hide facts in long texts, ask for them thousands of tokens later, and count exact answers."""
    from hippoformer.data import read_documents
    from hippoformer.evaluation.needles import KINDS
    from hippoformer.evaluation.recall import evaluate_recall

    if output is not None:
        _check_output(output)
    texts = read_documents([*text, *(more or [])])
    try:
        gaps = [int(part) for part in distances.split(",")]
    except ValueError as error:
        raise ConfigurationError(f"--distances {distances}: expected numbers like 2000,8000") from error
    loaded, tokenizer = _load(
        model, device, dtype, window=window, sink_tokens=sink_tokens, buffer_size=buffer_size, seed=seed
    )
    with _reading() as progress:
        report = evaluate_recall(
            loaded,
            tokenizer,
            texts,
            distances=gaps,
            facts=facts,
            kinds=KINDS if kinds is None else [kind.strip() for kind in kinds.split(",")],
            haystacks=streams,
            seed=seed,
            progress=progress,
        )
    _show(report, output)


@eval_app.command("variants")
def eval_variants(
    model: ModelOption,
    text: Annotated[list[Path], typer.Option("--text", help="Text file or folder; can be repeated.")],
    variant: Annotated[
        list[str],
        typer.Option("--variant", help="NAME or NAME:option=value,…; repeat it, the first is compared to."),
    ],
    more: Annotated[list[Path] | None, typer.Argument(metavar="TEXT", help="Further files or folders.")] = None,
    cache_dir: CacheOption = Path("hidden_states"),
    limit_tokens: Annotated[int | None, typer.Option(help="Read the first so many tokens of each document.")] = None,
    documents: Annotated[int | None, typer.Option(help="Read the first so many documents.")] = None,
    split: Annotated[Split, typer.Option(help="Where documents begin.")] = "auto",
    output: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
    seed: Annotated[int, typer.Option(help="Of the replay draws and of the bootstrap.")] = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Compare selection rules, buffers and replay settings of one hippocampus, the base's reading done once."""
    from hippoformer.data import read_documents
    from hippoformer.evaluation.variants import evaluate_variants
    from hippoformer.training.arguments import config_options

    if output is not None:
        _check_output(output)
    named = [part.partition(":") for part in variant]
    texts = read_documents([*text, *(more or [])], split=split)[:documents]
    loaded, tokenizer = _load(model, device, dtype, seed=seed)
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
    _show(report, output)


@eval_app.command("salience")
def eval_salience(
    model: ModelOption,
    text: Annotated[list[Path], typer.Option("--text", help="Text file or folder; can be repeated.")],
    more: Annotated[list[Path] | None, typer.Argument(metavar="TEXT", help="Further files or folders.")] = None,
    cache_dir: CacheOption = Path("hidden_states"),
    limit_tokens: Annotated[int | None, typer.Option(help="Read the first so many tokens of each document.")] = None,
    documents: Annotated[int | None, typer.Option(help="Read the first so many documents.")] = None,
    split: Annotated[Split, typer.Option(help="Where documents begin.")] = "auto",
    output: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap, and of the untrained gate.")] = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Compare the salience of each transition with the credit it earns, beside surprise and an untrained gate."""
    from hippoformer.data import read_documents
    from hippoformer.evaluation.salience import evaluate_salience

    if output is not None:
        _check_output(output)
    texts = read_documents([*text, *(more or [])], split=split)[:documents]
    loaded, tokenizer = _load(model, device, dtype)
    with _reading() as progress:
        report = evaluate_salience(
            loaded, tokenizer, texts, cache_dir, limit_tokens=limit_tokens, seed=seed, progress=progress
        )
    _show(report, output)


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


@memory_app.command("show")
def memory_show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Saved memory.")],
    model: ModelOption,
    row: Annotated[int, typer.Option(min=0, help="Which sequence of the memory.")] = 0,
    limit: Annotated[int, typer.Option(min=1, help="Episodes to show.")] = 20,
    sort: Annotated[Order, typer.Option(help="What comes first; priority is the effective one.")] = "priority",
    window: WindowOption = None,
    sink_tokens: SinkOption = None,
    buffer_size: BufferOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Show the episodes of a saved memory: what was kept, where it stood, and how strongly it is held."""
    from hippoformer.model.cache import HippoCache

    loaded, tokenizer = _load(model, device, dtype, window=window, sink_tokens=sink_tokens, buffer_size=buffer_size)
    cache = HippoCache.load(file, loaded)
    decay = loaded.config.decay_rate
    keys = {
        "priority": lambda episode: -episode.priority * decay**episode.age,
        "salience": lambda episode: -episode.salience,
        "strength": lambda episode: -episode.strength,
        "position": lambda episode: episode.position,
    }
    episodes = sorted(cache.episodes(row), key=keys[sort])
    table = Table(title=Text(f"{len(episodes)} episodes in {file}, row {row}"))
    table.add_column("token")
    table.add_column("context", overflow="fold")
    table.add_column("where")
    for heading in ("position", "salience", "priority", "age", "effective", "strength"):
        table.add_column(heading, justify="right")
    for episode in episodes[:limit]:
        table.add_row(
            _visible(tokenizer.decode([episode.token])),
            _visible(tokenizer.decode(list(episode.context[-_CONTEXT_TOKENS:]))),
            "window" if episode.in_window else "store",
            str(episode.position),
            f"{episode.salience:.3f}",
            f"{episode.priority:.2f}",
            f"{episode.age:g}",
            f"{episode.priority * decay**episode.age:.2f}",
            f"{episode.strength:g}",
        )
    _console().print(table)


def main() -> None:
    """Entry point of the `hippoformer` command."""
    app(prog_name="hippoformer")


def _load(name: str, device: str | None, dtype: str | None, **options: int | None) -> tuple[Any, Any]:
    """(model, tokenizer); options that were not given keep the model's own values."""
    import hippoformer

    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    if dtype is not None:
        given["dtype"] = _dtype(dtype)
    target = None if device is None else _device(device)
    model, tokenizer = hippoformer.load(name, **given)
    return (model if target is None else model.to(target)), tokenizer


def _device(name: str) -> Any:
    import torch

    try:
        # A tensor put there tells a device that this machine lacks from one that it has.
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigurationError(
            f"--device {name} cannot be used here ({str(error).splitlines()[0]}); leave it out for the CPU."
        ) from error


def _dtype(name: str) -> Any:
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ConfigurationError(f"--dtype {name} is unknown; choose one of {', '.join(known)}.")
    return known[name]


@contextmanager
def _reading() -> Iterator[Callable[[int, int], None]]:
    """A progress bar on the error stream; what it gives takes (done, total)."""
    columns = (TextColumn("reading"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _show(report: Any, output: Path | None) -> None:
    """Prints a report's table, and writes its JSON where that was asked for."""
    console = _console()
    console.print(report.to_table())
    if output is not None:
        report.save(output)
        console.print(Text(f"Results written to {output}"))


def _check_output(path: Path) -> None:
    """Fails before hours of reading rather than after them."""
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigurationError(
            f"--output {path} cannot be written; expected a file name in an existing folder that you may write to."
        )


def _console() -> Console:
    # In a pipe or a log there is no terminal to fit the tables into.
    return Console(width=None if sys.stdout.isatty() else 160)


def _visible(text: str) -> Text:
    """Text with its line ends shown, and no markup read into its brackets."""
    return Text(text.replace("\n", "⏎").replace("\t", "⇥"))


if __name__ == "__main__":
    main()
