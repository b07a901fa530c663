"""Draws the figures from the result files of a folder, and lists those whose results are missing.

python -m evaluation.visualization results --output results/figures --formats svg
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from transformers import HfArgumentParser

from evaluation.common.command import explained
from evaluation.visualization.figures import FIGURES, STYLE
from hippoformer.errors import ResultError
from hippoformer.files import FORMAT


@dataclass
class Options:
    """What to draw."""

    results: Path = field(metadata={"help": "folder of result files (JSON); subfolders are read too"})
    output: Path = field(default=Path("figures"), metadata={"help": "folder for the figures"})
    formats: list[str] = field(default_factory=lambda: ["png", "pdf"], metadata={"help": "some of png, pdf, svg"})
    names: list[str] = field(default_factory=lambda: list(FIGURES), metadata={"help": f"some of {', '.join(FIGURES)}"})


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Evaluation -> name of the file -> its content, for every result file of a folder, by name.

    Raises:
        ResultError: a file that is not JSON, or no result file.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ResultError(f"{path} cannot be read as JSON ({error}); remove it, or make it again") from error
        if isinstance(content, dict) and content.get("format") == FORMAT and content["rows"]:
            found.setdefault(content["rows"][0]["evaluation"], {})[path.stem] = content
            if any(row["metric"].startswith("position ") for row in content["rows"]):
                found.setdefault("position", {})[path.stem] = content
        elif isinstance(content, dict) and "history" in content:
            found.setdefault("training", {})[path.stem] = content
    if not found:
        raise ResultError(f"{folder} holds no result file; expected JSON of `python -m evaluation NAME --output`")
    return found


def draw(options: Options) -> list[str]:
    """Lines that name the files written, and the figures that lack results.

    Raises:
        ResultError: an unknown figure or format, or no results.
    """
    if not {*options.names} <= {*FIGURES} or not {*options.formats} <= {"png", "pdf", "svg"}:
        raise ResultError(f"{options}; expected names among {', '.join(FIGURES)}, formats among png, pdf, svg")
    results, lines = read_results(options.results), []
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.names:
        figure, needs = FIGURES[name]
        if needs and not any(evaluation in results for evaluation in needs):
            lines.append(f"{name} not drawn: needs {' or '.join(needs)}")
            continue
        with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
            drawn = figure(results)
            for form in options.formats:
                # Without a date, so that the same results give the same bytes.
                dated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
                drawn.savefig(options.output / f"{name}.{form}", metadata=dated.get(form))
                lines.append(str(options.output / f"{name}.{form}"))
    return lines


@explained
def main(words: list[str]) -> int:
    """Draws what the words of a command line say; 0 on success, 2 on an error that was explained."""
    if words and not words[0].startswith("-"):
        words = ["--results", *words]
    (options,) = HfArgumentParser((Options,), description=__doc__).parse_args_into_dataclasses(words)  # type: ignore[arg-type]
    print("\n".join(draw(options)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
