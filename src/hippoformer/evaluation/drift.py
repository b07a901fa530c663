"""What drift costs a memory, and how much of it the calibrator regains.

A memory is written by a model, put into a file, and read by the same model with other weights: after LoRA steps, or
quantised. The text before has facts in it; then the reader is asked for them, and predicts how the text goes on. What
is compared differs in nothing but the code of the stored episodes: which ones were kept, the window, the questions and
the reader's weights are the same.

    re-encoded      each episode as the reader itself would have written it: no drift, the ceiling
    calibrated      mapped by what the anchors in the file say
    as written      calibration off
    own             the reader's own memory of the text, for which it also chose itself what to keep
    off             no memory

Drift costs (as written - re-encoded), in nats; the calibrator regains (as written - calibrated) of it.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hippoformer.data import Document
from hippoformer.errors import ConfigurationError
from hippoformer.evaluation.drift_report import CALIBRATED, CEILING, CONDITIONS, OFF, OWN, WRITTEN, DriftReport, Read
from hippoformer.evaluation.examination import answers
from hippoformer.evaluation.needles import KINDS, Planted, haystack
from hippoformer.evaluation.provenance import provenance
from hippoformer.evaluation.scoring import describe, reading
from hippoformer.evaluation.statistics import RESAMPLES
from hippoformer.hippocampus.drift import relative_drift
from hippoformer.model.cache import HippoCache


def evaluate_drift(
    model: Any,
    drifted: Any,
    tokenizer: Any,
    documents: Sequence[Document],
    drifted_from: str,
    facts: int = 6,
    spacing: int = 200,
    distance: int = 4_000,
    continuation: int = 1_024,
    streams: int | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    progress: Callable[[int, int], None] | None = None,
    command: str | None = None,
) -> DriftReport:
    """Lets one model write and another read.

    Args:
        model: a HippoFormer, which writes. drifted: one of the same shape, which reads. tokenizer: of both.
        documents: stream i begins with document i and goes on with those after it.
        drifted_from: how the reader came about, for the report.
        facts: of each kind in each stream. spacing: tokens before the first fact and between two facts.
        distance: tokens between the last fact and the questions.
        continuation: tokens of the text that are scored after the memory has changed hands.
        streams: as many as documents where it is None.
        seed: of facts and bootstrap. resamples: of the bootstrap.
        progress: called with (parts done, parts in all).
        command: recorded in the report.

    Raises:
        ConfigurationError: a number out of range. TextError: no text. MemoryFileError: the models are not of one shape,
            or unrelated.
    """
    if min(facts, spacing, distance, continuation - 1, 1 if streams is None else streams) < 1:
        raise ConfigurationError(
            f"facts={facts}, spacing={spacing}, distance={distance}, continuation={continuation}, streams={streams}; "
            "expected positive numbers, and at least two tokens to go on."
        )
    hidden_in = [
        haystack(tokenizer, documents, number, facts, KINDS, spacing, distance + continuation, seed)
        for number in range(streams or len(documents))
    ]
    segment = model.config.segment_len
    read = -(-(max(planted[-1].end for _, planted in hidden_in) + distance) // segment) * segment
    ids = torch.tensor([text[: read + continuation] for text, _ in hidden_in], device=model.device)
    before, ahead = ids.split([read, ids.shape[1] - read], dim=1)

    parts = iter(range(1, 3 + len(CONDITIONS)))

    def done() -> None:
        if progress is not None:
            progress(next(parts), 2 + len(CONDITIONS))

    reads: list[Read] = []
    with reading(model), reading(drifted), tempfile.TemporaryDirectory() as folder:
        written = model.new_cache(len(ids))
        model.score(before, past_key_values=written)
        written.save(Path(folder) / "written")
        done()
        keys, values, own = _own_code(drifted, before)
        done()
        memories = {OWN: own}
        for name, threshold in ((WRITTEN, torch.inf), (CALIBRATED, -1.0)):
            with _threshold(drifted, threshold):
                memories[name] = HippoCache.load(Path(folder) / "written", drifted)
        memories[CEILING] = _re_encoded(memories[WRITTEN], keys, values)
        for name in CONDITIONS:
            state = own.copy()
            if name != OFF:  # also the own one, so that all have lost the trace of what was recalled last
                state.adopt_memory(memories[name])
            with drifted.memory_off() if name == OFF else nullcontext():
                reads += _asked(drifted, state, [planted for _, planted in hidden_in], ahead, name)
            done()
    drift = _drift(memories)
    return DriftReport(
        model=describe(model),
        drifted=describe(drifted) | {"from": drifted_from},
        settings={
            "facts": facts,
            "spacing": spacing,
            "distance": distance,
            "tokens_read": read,
            "continuation": continuation,
            "streams": len(ids),
            "drift_threshold": drifted.config.drift_threshold,
            "seed": seed,
            "resamples": resamples,
        },
        drift=drift,
        calibrates=drift["keys"] > drifted.config.drift_threshold,
        reads=tuple(reads),
        provenance=provenance(seed=seed, documents=list(documents), command=command),
    )


def _own_code(model: Any, ids: Tensor) -> tuple[Tensor, Tensor, HippoCache]:
    """Reads (R, T); gives the key (R, T, K) and value (R, T, U) that the episode of each token has, and the state."""
    hippocampus, cache = model.hippocampus, model.new_cache(len(ids))
    states = [hippocampus.normed(step.hidden) for step in model.stream(ids, [ids.shape[1]] * len(ids), cache)]
    cache.columns += ids.shape[1]
    keys = torch.cat([hippocampus.recall.encode_key(part) for part in states], dim=1)
    values = torch.cat([hippocampus.recall.encode_value(part) for part in states], dim=1)
    # An episode leads from the state before its token to the one after it.
    return keys.roll(1, dims=1), values, cache


def _re_encoded(cache: HippoCache, keys: Tensor, values: Tensor) -> HippoCache:
    """The same episodes in another code, (R, T, ...) by the position of their token."""
    new = cache.copy()
    episodes = new.memory.episodes
    place = episodes.position.clamp_min(0).long()
    wide = episodes.valid.unsqueeze(-1)

    def moved(old: Tensor, code: Tensor) -> Tensor:
        found = code.gather(1, place.unsqueeze(-1).expand(-1, -1, code.shape[-1]))
        return torch.where(wide, found, 0.0).to(old.dtype)

    new.memory = replace(
        new.memory,
        episodes=replace(episodes, key=moved(episodes.key, keys), value=moved(episodes.value, values)),
    )
    return new


@contextmanager
def _threshold(model: Any, drift: float) -> Iterator[None]:
    """Memories loaded within are mapped from this drift on."""
    calibrator = model.hippocampus.drift_calibrator
    before, calibrator.threshold = calibrator.threshold, drift
    try:
        yield
    finally:
        calibrator.threshold = before


def _asked(
    model: Any, state: HippoCache, planted: Sequence[Sequence[Planted]], ahead: Tensor, condition: str
) -> list[Read]:
    """Questions are put to copies of each row, then all rows read on."""
    found = []
    for row, facts in enumerate(planted):
        copies = state.select_rows(torch.full((len(facts),), row))
        found.append(
            [
                (said == p.needle.answer, nats)
                for (said, nats), p in zip(answers(model, copies, [p.needle for p in facts]), facts, strict=True)
            ]
        )
    # Its first token was foretold before the memories changed hands; `score` leaves it out.
    nll = -model.score(ahead, past_key_values=state).double().sum(1)
    return [
        Read(
            condition,
            row,
            len(of),
            sum(right for right, _ in of),
            sum(nats for _, nats in of),
            ahead.shape[1] - 1,
            float(nll[row]),
        )
        for row, of in enumerate(found)
    ]


def _drift(memories: dict[str, HippoCache]) -> dict[str, float]:
    """How far anchors and stored keys had moved, and how far they still are after calibration."""
    loaded = memories[CALIBRATED]
    truth = _stored_keys(memories[CEILING])
    return {
        "keys": float(loaded.drift["keys"]),
        "values": float(loaded.drift["values"]),
        "keys_calibrated": float(loaded.drift.get("keys_calibrated", 0.0)),  # not there where no weight had changed
        "values_calibrated": float(loaded.drift.get("values_calibrated", 0.0)),
        "episodes": relative_drift(truth, _stored_keys(memories[WRITTEN])),
        "episodes_calibrated": relative_drift(truth, _stored_keys(loaded)),
    }


def _stored_keys(cache: HippoCache) -> Tensor:
    store = cache.memory.episodes.slots(0, cache.config.buffer_size)
    return store.key[store.valid].float()
