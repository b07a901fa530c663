"""Runs one evaluation: `python -m evaluation NAME --model MODEL --text FILE [--output FILE.json] [its options]`.

`python -m evaluation` lists the names, `python -m evaluation NAME --help` the options.
"""

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from evaluation.common.command import explained
from evaluation.registry import EVALUATIONS
from hippoformer.cli.arguments import ModelArguments, TextArguments, check_output
from hippoformer.files import write_json


@dataclass
class OutputArguments:
    """Where the result goes."""

    output: Path | None = field(default=None, metadata={"help": "JSON file for the rows, the details and their origin"})


@explained
def main(words: Sequence[str] | None = None) -> int:
    """Runs what the words of a command line ask for; 0 on success, 2 on an error that was explained."""
    words = sys.argv[1:] if words is None else list(words)
    if not words or words[0] not in EVALUATIONS:
        print(f"usage: python -m evaluation NAME ...\n{__doc__}\nNames: {', '.join(EVALUATIONS)}")
        return 0 if not words or words[0] in ("-h", "--help") else 2
    module = importlib.import_module(EVALUATIONS[words[0]])
    arguments = (ModelArguments, TextArguments, OutputArguments, module.Options)
    parser = HfArgumentParser(arguments, prog=f"python -m evaluation {words[0]}", description=module.__doc__)  # type: ignore[arg-type]
    model_arguments, texts, output, options = parser.parse_args_into_dataclasses(list(words[1:]))
    check_output(output.output)
    # Some evaluations bring texts of their own.
    documents = texts.read() if texts.text or texts.dataset else []
    model, tokenizer = model_arguments.load()
    result = module.run(model, tokenizer, documents, options)
    if output.output is not None:
        write_json(output.output, result.record(words[0], model, options, documents))
    print(result.table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
