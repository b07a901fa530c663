"""`hippoformer eval perplexity`: what a memory is worth on the user's own text.

`python -m evaluation` of a checkout adds intervals, tests, and the other evaluations.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hippoformer.cli.arguments import ModelArguments, TextArguments, check_output, parse
from hippoformer.evaluation import Options, figures, measure, table
from hippoformer.files import result_file, write_json


@dataclass
class OutputArguments:
    """Where the result goes."""

    output: Path | None = field(default=None, metadata={"help": "JSON file for the rows and their origin"})


def main(words: Sequence[str]) -> None:
    """Measures the perplexity of texts with and without memory."""
    what = {"choices": ["perplexity"], "help": "the only thing that is measured here; python -m evaluation has more"}
    groups = (ModelArguments, TextArguments, OutputArguments, Options)
    chosen, texts, result, options, _ = parse("eval", main.__doc__, words, *groups, what=what)
    check_output(result.output)
    documents = texts.read()
    model, tokenizer = chosen.load()
    scored = measure(model, tokenizer, documents, options)
    found = {name: figures(of) for name, of in scored.items()}
    for name, of in found.items():
        if name != "off" and "off" in found:
            of["against off, %"] = 100 * (of["perplexity"] / found["off"]["perplexity"] - 1)
    if result.output is not None:
        rows = [
            {"condition": name, "metric": metric, "value": value, "low": None, "high": None, "n": len(scored[name])}
            for name, of in found.items()
            for metric, value in of.items()
        ]
        write_json(result.output, result_file("perplexity", model, asdict(options), rows, documents))
    print(table(found))
