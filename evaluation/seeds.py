"""Result files of several training seeds as one: `python -m evaluation.seeds FILE FILE ... [--output FILE]`.

A bootstrap over documents says how much the texts matter; only training again says how much the seed does. Every row
that all files have becomes its mean with a t interval; n is the number of seeds.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from evaluation.common.command import explained
from evaluation.common.results import Result, Row
from evaluation.common.statistics import over_seeds
from hippoformer.cli.arguments import check_output
from hippoformer.errors import InputError
from hippoformer.files import FORMAT, provenance, write_json


def aggregate(files: Sequence[Path]) -> Result:
    """The rows that all files have, each as mean and t interval; details: the value of each file.

    Raises:
        InputError: a file that holds no rows, or files without a row in common.
    """
    found = [_read(file) for file in files]
    common = [key for key in found[0] if all(of.get(key) is not None for of in found)] if found else []
    if not common:
        raise InputError(f"{len(files)} files have no figure in common; expected results of one evaluation")
    values = {key: [of[key] for of in found] for key in common}
    rows = [
        Row(condition, metric, *over_seeds(of), n=len(of), evaluation=evaluation, model=model)
        for (evaluation, model, condition, metric), of in values.items()
    ]
    return Result(rows, {"files": [str(file) for file in files], "values": list(values.values())})


def _read(file: Path) -> dict[tuple[str, str, str, str], float]:
    try:
        rows = json.loads(file.read_text("utf-8"))["rows"]
        return {tuple(row[key] for key in ("evaluation", "model", "condition", "metric")): row["value"] for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file} holds no rows ({error!r}); expected a file of `python -m evaluation --output`"
        ) from error


@dataclass
class Options:
    """What to put together."""

    files: list[Path] = field(metadata={"help": "result files of one evaluation, one a seed"})
    output: Path | None = field(default=None, metadata={"help": "JSON file"})


@explained
def main(words: Sequence[str]) -> int:
    """Puts together the files that the words of a command line name; 0 on success, 2 on an error that was explained."""
    given = words if words[:1] and words[0].startswith("-") else ["--files", *words]
    (arguments,) = HfArgumentParser((Options,), description=__doc__).parse_args_into_dataclasses(given)  # type: ignore[arg-type]
    check_output(arguments.output)
    result = aggregate(arguments.files)
    if arguments.output is not None:
        rows = [vars(row) for row in result.rows]
        content = {"format": FORMAT, "rows": rows, "provenance": provenance(), "details": result.details}
        write_json(arguments.output, content)
    print(result.table())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
