"""`hippoformer eval drift`: a memory written by one model, read by another."""

from dataclasses import replace
from typing import Annotated

import typer

from hippoformer.cli.app import eval_app
from hippoformer.cli.options import ModelOptions, OutputOption, ResamplesOption, TextOptions, with_groups
from hippoformer.cli.terminal import reading, show
from hippoformer.errors import ConfigurationError


@eval_app.command("drift")
@with_groups
def eval_drift(
    model: ModelOptions,
    texts: TextOptions,
    drifted: Annotated[
        str | None,
        typer.Option(help="Who reads: a saved HippoFormer, or another base, which gets the writer's hippocampus."),
    ] = None,
    quantise_bits: Annotated[
        int | None,
        typer.Option("--quantise-bits", help="Instead of --drifted: the writer, weights rounded to so many."),
    ] = None,
    facts: Annotated[int, typer.Option(help="Facts of each kind in each stream.")] = 6,
    spacing: Annotated[int, typer.Option(help="Tokens of text before the first fact and between two facts.")] = 200,
    distance: Annotated[int, typer.Option(help="Tokens read between the last fact and the questions.")] = 4_000,
    continuation: Annotated[int, typer.Option(help="Tokens scored after the memory has changed hands.")] = 1_024,
    streams: Annotated[int | None, typer.Option(help="Streams read side by side; one a document.")] = None,
    output: OutputOption = None,
    resamples: ResamplesOption = 10_000,
    seed: Annotated[int, typer.Option(help="Of the replay draws, the facts and the bootstrap.")] = 0,
) -> None:
    """Read a memory with other weights than it was written with: what drift costs, what calibration regains."""
    from hippoformer.evaluation.drift import evaluate_drift
    from hippoformer.evaluation.other_weights import over_another_base, round_weights
    from hippoformer.model.base_models import load_base_model
    from hippoformer.model.loading import saved_hippocampus

    if (drifted is None) == (quantise_bits is None):
        raise ConfigurationError("say who reads the memory: either --drifted MODEL or --quantise-bits N")
    found = texts.read()
    loaded, tokenizer = model.load(seed=seed)
    if drifted is None:
        assert quantise_bits is not None
        reader, _ = model.load(seed=seed)
        round_weights(reader.base, quantise_bits)
    elif saved_hippocampus(drifted) is not None:
        reader, _ = replace(model, model=drifted).load(seed=seed)
    else:
        reader = over_another_base(loaded, load_base_model(drifted, dtype=loaded.dtype).to(loaded.device))
    with reading() as progress:
        report = evaluate_drift(
            loaded,
            reader,
            tokenizer,
            found,
            drifted or f"itself, weights rounded to {quantise_bits} bits",
            facts,
            spacing,
            distance,
            continuation,
            streams,
            seed,
            resamples,
            progress,
        )
    show(report, output)
