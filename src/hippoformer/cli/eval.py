"""`hippoformer eval NAME`: what a memory is worth on the user's own text.

An evaluation is a module with a dataclass `Options` and a function `run(model, tokenizer, documents, options)` whose
result has `table()` and `record(...)`; its docstring is its help. `python -m evaluation` runs the research evaluations
of a checkout through `evaluate` as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType

from hippoformer.cli.arguments import ModelArguments, TextArguments, check_output, parse

EVALUATIONS = ("perplexity", "recall")


@dataclass
class OutputArguments:
    """Where the result goes."""

    output: Path | None = field(default=None, metadata={"help": "JSON file for the rows, the details and their origin"})


def main(words: Sequence[str]) -> None:
    """Measures a model on texts."""
    if words[:1] and words[0] in EVALUATIONS:
        evaluate(f"eval {words[0]}", words[0], import_module(f"hippoformer.evaluation.{words[0]}"), words[1:])
    else:
        options = {"choices": EVALUATIONS, "help": "what to measure; hippoformer eval NAME --help lists its options"}
        parse("eval", main.__doc__, words, name=options)


def evaluate(command: str, name: str, module: ModuleType, words: Sequence[str]) -> None:
    """Runs the evaluation of a module as a command line says; prints its table, and writes its record."""
    chosen, texts, result, options = parse(
        command, module.__doc__, words, ModelArguments, TextArguments, OutputArguments, module.Options
    )
    check_output(result.output)
    documents = texts.read() if texts.text or texts.dataset else []  # some evaluations bring texts of their own
    model, tokenizer = chosen.load()
    found = module.run(model, tokenizer, documents, options)
    if result.output is not None:
        from hippoformer.files import write_json

        write_json(result.output, found.record(name, model, options, documents))
    print(found.table())
