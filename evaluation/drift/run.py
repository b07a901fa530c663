"""What drift costs a memory, and how much of the cost calibration recovers.

One model reads texts with planted facts and saves its memory; the same model with other weights (fine-tuned, or
quantised) loads the file, is asked for the facts, and predicts how the texts go on:

    own           the reader's own memory of the texts: no drift
    calibrated    the file, mapped by what its anchors say
    as written    the file, calibration off
    off           no memory

Drift costs (as written - own) nats; calibration recovers (as written - calibrated) of them. Streams are the units.
"""

import copy
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import hippoformer
from evaluation.common.results import Result, Row
from evaluation.common.statistics import bootstrap, perplexity, ratio
from evaluation.recall.needles import KINDS, haystack
from evaluation.recall.run import ask
from hippoformer.data.documents import Document
from hippoformer.errors import CheckpointError, ConfigurationError
from hippoformer.evaluation import reading
from hippoformer.model.base_models import load_base_model
from hippoformer.model.cache import HippoCache
from hippoformer.model.loading import saved_hippocampus
from hippoformer.model.modeling import HippoFormer

OWN, CALIBRATED, WRITTEN, OFF = CONDITIONS = ("own", "calibrated", "as written", "off")
_THRESHOLDS = {CALIBRATED: -1.0, WRITTEN: float("inf")}  # drift from which a loaded memory is mapped
_GROUP = 32  # weights that share a scale


@dataclass
class Options:
    """Who reads, and what the texts hold."""

    reader: str | None = field(
        default=None, metadata={"help": "saved HippoFormer, or another base, which gets the writer's hippocampus"}
    )
    quantise_bits: int | None = field(
        default=None, metadata={"help": "instead of --reader: the writer, its weights rounded to N bits"}
    )
    facts: int = field(default=6, metadata={"help": "facts of each kind in each stream"})
    spacing: int = field(default=200, metadata={"help": "tokens of text before the first fact and between two facts"})
    distance: int = field(default=4_000, metadata={"help": "tokens between the last fact and the questions"})
    continuation: int = field(default=1_024, metadata={"help": "tokens scored after the memory has changed hands"})
    streams: int | None = field(default=None, metadata={"help": "streams read side by side; default: one a document"})
    seed: int = field(default=0, metadata={"help": "of the facts and of the bootstrap over streams"})


def run(model: Any, tokenizer: Any, documents: Sequence[Document], options: Options) -> Result:
    """Answers and perplexity of the continuation under each condition, the cost of drift and what is recovered.

    Raises:
        ConfigurationError: no reader or two, or a number out of range. CheckpointError: a base of another shape.
        TextError: no text. MemoryFileError: the reader cannot load the memory.
    """
    numbers = (options.facts, options.spacing, options.distance, options.continuation - 1, options.streams or 1)
    if (options.reader is None) == (options.quantise_bits is None) or min(numbers) < 1:
        raise ConfigurationError(f"{options}; expected either --reader or --quantise_bits, and positive numbers")
    reader = _reader(model, options)
    farthest = options.distance + options.continuation
    texts, needles = zip(
        *(
            haystack(tokenizer, documents, n, options.facts, KINDS[:3], options.spacing, farthest, options.seed)
            for n in range(options.streams or len(documents))
        ),
        strict=True,
    )
    segment = model.config.segment_len
    read = -(-(max(facts[-1].end for facts in needles) + options.distance) // segment) * segment
    ids = torch.tensor([text[: read + options.continuation] for text in texts], device=model.device)
    before, ahead = ids.split([read, options.continuation], dim=1)
    found: dict[
        str, np.ndarray
    ] = {}  # condition -> (3, R): right answers, nats of all answers, nats of the continuation
    with reading(model), reading(reader), tempfile.TemporaryDirectory() as folder:
        written, own = model.new_cache(len(ids)), reader.new_cache(len(ids))
        model.score(before, past_key_values=written)
        written.save(Path(folder) / "memory")
        reader.score(before, past_key_values=own)
        memories, calibrator = {OWN: own}, reader.hippocampus.drift_calibrator
        usual = calibrator.threshold
        for name, calibrator.threshold in _THRESHOLDS.items():
            memories[name] = HippoCache.load(Path(folder) / "memory", reader)
        calibrator.threshold = usual
        for name in CONDITIONS:
            state = own.copy()
            if name != OFF:  # also its own, so that none has the trace of what was recalled last
                state.adopt_memory(memories[name])
            with reader.memory_off() if name == OFF else nullcontext():
                found[name] = _asked(reader, state, needles, ahead)
    asked, tokens = np.array([len(of) for of in needles]), np.full(len(ids), options.continuation - 1)
    rows, n = [], len(ids)
    for name, (right, nats, nll) in found.items():
        rows += [
            Row(name, "right, %", *bootstrap(_percent, right, asked, seed=options.seed), n=n),
            Row(name, "nats/answer", *bootstrap(ratio, nats, asked, seed=options.seed), n=n),
            Row(name, "perplexity of the continuation", *bootstrap(perplexity, nll, tokens, seed=options.seed), n=n),
        ]
    for what, place, units in (("nats/answer", 1, asked), ("nats/token", 2, tokens)):
        own_nats, calibrated, as_written = (found[name][place] for name in (OWN, CALIBRATED, WRITTEN))
        cost = as_written - own_nats
        rows.append(Row("cost of drift", what, *bootstrap(ratio, cost, units, seed=options.seed), n=n))
        if cost.sum() > 0:
            recovered = bootstrap(_percent, as_written - calibrated, cost, seed=options.seed)
            rows.append(Row("recovered, %", what, *recovered, n=n))
    rows += [Row("drift of anchors", name, float(value)) for name, value in memories[CALIBRATED].drift.items()]
    return Result(rows, {"threshold": usual, "streams": {name: of.tolist() for name, of in found.items()}})


def _asked(reader: Any, state: HippoCache, needles: Sequence[Any], ahead: torch.Tensor) -> np.ndarray:
    """(3, R): questions are put to copies of each row, then all rows read on."""
    answers = []
    for row, of in enumerate(needles):
        right, nats = zip(*ask(reader, state.select_rows(torch.full((len(of),), row)), of), strict=True)
        answers.append((sum(right), sum(nats)))
    # The first token was predicted before the memories changed hands; `score` leaves it out.
    nll = -reader.score(ahead, past_key_values=state).double().sum(1)
    return np.array([*zip(*answers, strict=True), nll.tolist()])


def _reader(model: Any, options: Options) -> Any:
    if options.quantise_bits is not None:
        reader = copy.deepcopy(model)
        round_weights(reader.base, options.quantise_bits)
        return reader
    assert options.reader is not None
    if saved_hippocampus(options.reader) is not None:
        return hippoformer.load(options.reader, dtype=model.dtype)[0].to(model.device)
    config = copy.deepcopy(model.config)
    config.lora = None
    reader = HippoFormer(config, load_base_model(options.reader, dtype=model.dtype).to(model.device))
    try:
        reader.hippocampus.load_state_dict(model.hippocampus.state_dict())
    except RuntimeError as error:
        raise CheckpointError(f"the hippocampus does not fit {options.reader}: {error}") from error
    reader.spelling = model.spelling
    return reader


def round_weights(base: Any, bits: int) -> None:
    """Rounds every linear layer but the head to the nearest of 2^bits values, in place, as the simplest quantisations
    do: evenly between the smallest and the largest weight of each group of 32 in a row.

    Raises:
        ConfigurationError: a number of bits outside 1 to 8.
    """
    if not 1 <= bits <= 8:
        raise ConfigurationError(f"bits={bits}; expected a number from 1 to 8")
    for layer in base.modules():
        if isinstance(layer, nn.Linear) and layer is not base.get_output_embeddings():
            for group in layer.weight.data.split(_GROUP, dim=1):
                low, high = group.float().aminmax(dim=1, keepdim=True)
                step = ((high - low) / (2**bits - 1)).clamp_min(torch.finfo(torch.float32).tiny)
                group.copy_(((group.float() - low) / step).round() * step + low)


def _percent(part: Any, whole: Any, axis: int = -1) -> Any:
    return 100 * ratio(part, whole, axis)
