"""The whole evaluation under the original's command and options.

    python -m evaluation.comprehensive_eval --checkpoint DIR_OR_NAME --output results.json --device cpu --samples 20

`--samples` limits the documents of every part. The parts' files lie in a folder named after the output, so a run that
was interrupted goes on. Without `--text` the test set of WikiText-2 is read, from `--data-dir` or the hub.
"""

from pathlib import Path
from typing import Annotated

import typer

from hippoformer.cli.options import ModelOptions, TextOptions, check_output, comma_separated
from hippoformer.cli.suite import run_all
from hippoformer.errors import HippoFormerError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    checkpoint: Annotated[str, typer.Option(help="Saved HippoFormer folder, or base model: folder, hub name.")],
    output: Annotated[Path, typer.Option(help="JSON file for all results.")] = Path("results.json"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
    samples: Annotated[int | None, typer.Option(help="At most so many documents in each part; all.")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="Text file or folder; can be repeated.")] = None,
    datasets: Annotated[str, typer.Option(help="Comma-separated data sets, where no text is named.")] = "wikitext-2",
    data_dir: Annotated[Path, typer.Option(help="Where local copies of data sets lie.")] = Path("data"),
    max_seq_length: Annotated[int | None, typer.Option(help="Read the first so many tokens of each document.")] = None,
    batch_size: Annotated[int, typer.Option(help="Documents read side by side.")] = 4,
    parts: Annotated[str | None, typer.Option(help="Comma-separated; all of them.")] = None,
    seed: Annotated[int, typer.Option(help="Of every draw.")] = 0,
) -> None:
    """Perplexity, long range, salience, dynamics, ablations, brain-like behaviour, text quality and recall."""
    from dataclasses import replace

    from hippoformer.evaluation.parts import PARTS, SuiteSettings, smaller

    try:
        check_output(output)
        settings = SuiteSettings(limit_tokens=max_seq_length, batch_size=batch_size, seed=seed)
        if max_seq_length is not None:
            settings = replace(settings, part_tokens=min(max_seq_length, settings.part_tokens))
        if samples is not None:
            settings = smaller(settings, samples)
        texts = TextOptions(text=text, dataset=None if text else comma_separated(datasets), data_dir=data_dir).read()
        model, tokenizer = ModelOptions(checkpoint, device=_device(device)).load(seed=seed)
        folder = output.with_suffix("")
        chosen = list(PARTS) if parts is None else comma_separated(parts)
        run_all(model, tokenizer, texts, texts, settings, folder, chosen, folder / "hidden_states", summary=output)
    except HippoFormerError as error:
        typer.secho(f"Error: {' '.join(str(error).split())}", fg="red", bold=True, err=True)
        raise typer.Exit(2) from error


def _device(name: str) -> str | None:
    if name != "auto":
        return name
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if accelerator is None else accelerator.type


if __name__ == "__main__":
    app()
