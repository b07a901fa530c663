"""The original's command: several evaluations of one model, one result file.

    python -m evaluation.comprehensive_eval --checkpoint DIR_OR_NAME --output results.json --device cpu --samples 20

`--samples` limits the documents of every evaluation. Each leaves a file in a folder named after the output; a file that
is there is not made again, so an interrupted run continues. Without `--text` the test set of WikiText-2 is read.
"""

import dataclasses
import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from evaluation.common.command import explained
from evaluation.common.results import Row, table
from evaluation.registry import EVALUATIONS
from hippoformer.cli.arguments import ModelArguments, TextArguments, check_output
from hippoformer.errors import ConfigurationError
from hippoformer.files import FORMAT, write_json

# What is run by default, and with which options: they suit two CPU cores and WikiText-2's test set.
DEFAULTS: dict[str, dict[str, Any]] = {
    "perplexity": {"conditions": ["memory", "off", "window-only"], "by_position": True},
    "salience": {"documents": 12, "limit_tokens": 4_096},
    "dynamics": {"limit_tokens": 32_768},
    "variants": {"documents": 12, "limit_tokens": 4_096},
    "brain": {"documents": 12, "limit_tokens": 4_096},
    "quality": {},
    "recall": {"distances": [1_000, 4_000], "facts": 4, "streams": 2},
}


@dataclass
class Arguments:
    """The original's options."""

    checkpoint: str = field(metadata={"help": "saved HippoFormer, or base model: folder, hub name, short name"})
    output: Path = field(default=Path("results.json"), metadata={"help": "JSON file for all rows"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, mps"})
    samples: int | None = field(default=None, metadata={"help": "at most N documents in each evaluation"})
    text: list[Path] = field(default_factory=list, metadata={"help": "text files or folders"})
    datasets: list[str] = field(default_factory=lambda: ["wikitext-2"], metadata={"help": "where no text is named"})
    data_dir: Path = field(default=Path("data"), metadata={"help": "folder of local copies of data sets"})
    max_seq_length: int | None = field(default=None, metadata={"help": "read the first N tokens of each document"})
    parts: list[str] = field(default_factory=list, metadata={"help": f"some of {', '.join(DEFAULTS)}; all of them"})


def options_of(name: str, module: Any, arguments: Arguments) -> Any:
    """The options of an evaluation, within the limits of the arguments."""
    known = {of.name for of in dataclasses.fields(module.Options)}
    options = {option: value for option, value in DEFAULTS.get(name, {}).items() if option in known}
    limits = {"documents": arguments.samples, "prompts": arguments.samples, "limit_tokens": arguments.max_seq_length}
    for option, limit in limits.items():
        if limit is not None and option in known:
            options[option] = min(limit, options.get(option) or limit)
    return module.Options(**options)


@explained
def main(words: Sequence[str] | None = None) -> int:
    """0 on success, 2 on an error that was explained."""
    parser = HfArgumentParser(Arguments, prog="python -m evaluation.comprehensive_eval", description=__doc__)  # type: ignore[arg-type]
    (arguments,) = parser.parse_args_into_dataclasses(None if words is None else list(words))
    check_output(arguments.output)
    names = arguments.parts or list(DEFAULTS)
    if unknown := [name for name in names if name not in EVALUATIONS]:
        raise ConfigurationError(f"parts {', '.join(unknown)}: choose among {', '.join(EVALUATIONS)}")
    datasets = [] if arguments.text else arguments.datasets
    documents = TextArguments(text=arguments.text, dataset=datasets, data_dir=arguments.data_dir).read()
    device = None if arguments.device == "auto" else arguments.device
    model, tokenizer = ModelArguments(model=arguments.checkpoint, device=device).load()
    folder = arguments.output.with_suffix("")
    folder.mkdir(exist_ok=True)
    found = {}
    for name in names:
        file, module = folder / f"{name}.json", importlib.import_module(EVALUATIONS[name])
        if not file.is_file():
            print(f"{name}: {file}", file=sys.stderr)
            options = options_of(name, module, arguments)
            result = module.run(model, tokenizer, documents, options)
            write_json(file, result.record(name, model, options, documents))
        found[name] = json.loads(file.read_text("utf-8"))
        print(f"\n## {name}\n\n{table([Row(**row) for row in found[name]['rows']])}")
    rows = [row for of in found.values() for row in of["rows"]]
    write_json(arguments.output, {"format": FORMAT, "rows": rows, "evaluations": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
