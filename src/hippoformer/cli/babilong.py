"""`hippoformer eval babilong` and `hippoformer hide-stories`: questions about stories hidden in books."""

import random
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from hippoformer.cli.app import app, eval_app
from hippoformer.cli.options import (
    DataDirOption,
    DatasetSplitOption,
    ModelOptions,
    OutputOption,
    TextOptions,
    check_output,
    comma_separated,
    numbers,
    with_groups,
)
from hippoformer.cli.terminal import console, reading, show


@eval_app.command("babilong")
@with_groups
def eval_babilong(
    model: ModelOptions,
    texts: TextOptions,
    tasks: Annotated[str, typer.Option(help="Comma-separated: qa1 to qa5 of bAbI.")] = "qa1,qa2,qa3",
    lengths: Annotated[str, typer.Option(help="Comma-separated: tokens of a text; 0: the story alone.")] = (
        "0,1000,4000,16000,64000"
    ),
    cases: Annotated[str, typer.Option(help="Questions of a task, at every length or comma-separated at each.")] = "25",
    windows: Annotated[str, typer.Option(help="Comma-separated: windows of the base alone, for comparison.")] = "",
    reply_tokens: Annotated[
        int, typer.Option("--reply-tokens", help="Tokens a reply may have, its last word the answer; 0: the answer.")
    ] = 0,
    reread_tokens: Annotated[
        int, typer.Option("--reread-tokens", help="Tokens read again before a question; 0 leaves this condition out.")
    ] = 256,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Texts read side by side.")] = 5,
    output: OutputOption = None,
    seed: Annotated[int, typer.Option(help="Of the replay draws, the stories and where they are hidden.")] = 0,
) -> None:
    """Hide bAbI's stories in books and ask about them: memory on, off, and longer windows; exact answers."""
    from hippoformer.evaluation.babilong import evaluate_babilong

    books, each = texts.read(), numbers(cases, "--cases")
    loaded, tokenizer = model.load(seed=seed)
    with reading() as progress:
        report = evaluate_babilong(
            loaded,
            tokenizer,
            books,
            tasks=comma_separated(tasks),
            lengths=numbers(lengths, "--lengths"),
            cases=each[0] if len(each) == 1 else each,
            windows=numbers(windows, "--windows"),
            reply_tokens=reply_tokens,
            reread_tokens=reread_tokens,
            split=texts.dataset_split,
            data_dir=texts.data_dir,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
        )
    show(report, output)


@app.command("hide-stories")
def hide_stories(
    text: Annotated[list[Path], typer.Option("--text", help="Book or folder of books; can be repeated.")],
    output: Annotated[Path, typer.Option(help="The .jsonl file to write.", callback=check_output)],
    task: Annotated[str, typer.Option(help="qa1 to qa5 of bAbI; 10k-qa1 and its like: the larger set.")] = "qa1",
    dataset_split: DatasetSplitOption = "train",
    data_dir: DataDirOption = Path("data"),
    lengths: Annotated[str, typer.Option(help="Comma-separated: tokens of a text; 0: the story alone.")] = "0,400,1000",
    samples: Annotated[int, typer.Option(help="Questions of each length.")] = 100,
    reasons: Annotated[bool, typer.Option(help="Begin each answer with the sentences it follows from.")] = False,
    model: Annotated[str, typer.Option(help="Base model whose tokens are counted: folder, hub or short name.")] = (
        "smollm2-135m"
    ),
    seed: Annotated[int, typer.Option(help="Of the stories, where they are hidden, and the order.")] = 0,
) -> None:
    """Write questions about bAbI's stories hidden in books, to train on or to ask with `eval questions`."""
    from hippoformer.data import read_documents
    from hippoformer.data.babilong import hidden_questions, reasoned, sentences, write_questions
    from hippoformer.model.base_models import load_tokenizer
    from hippoformer.text import token_ids

    books, tokenizer = [sentences(book.text) for book in read_documents(text)], load_tokenizer(model)

    def count(part: str) -> int:
        return len(token_ids(tokenizer, part))

    found = []
    for place, length in enumerate(numbers(lengths, "--lengths")):
        # Other stories at every length: there is more to learn from them.
        own_seed = random.Random(f"{seed}/{place}").randrange(2**32)
        found += hidden_questions(task, dataset_split, books, length, samples, count, own_seed, data_dir)
    found = [reasoned(question) for question in found] if reasons else found
    random.Random(seed).shuffle(found)
    write_questions(output, found)
    console().print(Text(f"{len(found)} questions of babi-{task} ({dataset_split}) written to {output}"))
