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

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from transformers import PreTrainedModel

from hippoformer.data import Document
from hippoformer.errors import CheckpointError, ConfigurationError
from hippoformer.evaluation.examination import answers
from hippoformer.evaluation.needles import KINDS, Planted, haystack
from hippoformer.evaluation.provenance import provenance
from hippoformer.evaluation.report import Report, with_range
from hippoformer.evaluation.scoring import describe, reading
from hippoformer.evaluation.statistics import (
    LEVEL,
    RESAMPLES,
    Interval,
    bootstrap_interval,
    perplexity_interval,
    weighted_mean_interval,
)
from hippoformer.hippocampus.drift import relative_drift
from hippoformer.model.cache import HippoCache
from hippoformer.model.modeling import HippoFormer

_GROUP = 32  # weights that share a scale

CONDITIONS = ("re-encoded", "calibrated", "as written", "own", "off")
CEILING, CALIBRATED, WRITTEN, OWN, OFF = CONDITIONS


@dataclass(frozen=True)
class Read:
    """One stream under one condition.

    Attributes:
        questions, right: facts asked for, and answered with every token right.
        answer_nats: -log p of all answers together. tokens, nll: of the continuation.
    """

    condition: str
    stream: int
    questions: int
    right: int
    answer_nats: float
    tokens: int
    nll: float


@dataclass(frozen=True)
class DriftReport(Report):
    """Every stream under every condition, and how far the code had moved.

    Attributes:
        model: that wrote. drifted: that read; `from` says how it came about.
        drift: of the anchors' keys and values, by which a file is judged when it is loaded, and of the keys of the
            stored episodes (`episodes`), each also after calibration; for anchors on those held out of the fit.
        calibrates: the model's own threshold would have had the memory mapped.
        reads: all of them.
    """

    FORMAT: ClassVar[str] = "hippoformer.drift/1"

    model: dict[str, Any]
    drifted: dict[str, Any]
    settings: dict[str, Any]
    drift: dict[str, float]
    calibrates: bool
    reads: tuple[Read, ...]
    provenance: dict[str, Any]

    def _sums(self, name: str, condition: str) -> NDArray[Any]:
        return np.array([getattr(read, name) for read in self.reads if read.condition == condition], dtype=np.float64)

    def rows(self) -> list[dict[str, Any]]:
        """Per condition: share of answers right, nats an answer and perplexity of the continuation, with intervals."""
        seed, resamples = self.settings["seed"], self.settings["resamples"]
        rows = []
        for name in CONDITIONS:
            questions, right, nats, tokens, nll = (
                self._sums(field, name) for field in ("questions", "right", "answer_nats", "tokens", "nll")
            )
            rows.append(
                {
                    "condition": name,
                    "right": right.sum() / questions.sum(),
                    "answer_nats": vars(weighted_mean_interval(nats, questions, seed, resamples)),
                    "perplexity": vars(perplexity_interval(nll, tokens, seed, resamples)),
                }
            )
        return rows

    def regained(self) -> dict[str, dict[str, Any]]:
        """Of answers and of the continuation: what drift cost, in nats an answer or a token, and the share of it that
        calibration regained; None where drift cost nothing."""
        seed, resamples = self.settings["seed"], self.settings["resamples"]
        found = {}
        for name, field, unit in (("answers", "answer_nats", "questions"), ("continuation", "nll", "tokens")):
            ceiling, calibrated, written = (self._sums(field, c) for c in (CEILING, CALIBRATED, WRITTEN))
            cost = weighted_mean_interval(written - ceiling, self._sums(unit, WRITTEN), seed, resamples)
            share: Interval | None = None
            if cost.estimate > 0:
                share = bootstrap_interval((written - calibrated, written - ceiling), _ratio, seed, resamples)
            found[name] = {"cost": vars(cost), "share": None if share is None else vars(share)}
        return found

    def content(self) -> dict[str, Any]:
        """With what follows from the reads."""
        return super().content() | {"conditions": self.rows(), "regained": self.regained()}

    def to_table(self) -> Table:
        """One line a condition, for a terminal."""
        shares = []
        for name, of in self.regained().items():
            share = of["share"]
            shown = "" if share is None else _shown("{:.0%}", share)
            shares.append(f"{name}: drift costs {_shown('{:.4f}', of['cost'])} nats, regained {shown or '-'}")
        d = self.drift
        caption = (
            f"drift of keys {d['keys']:.3f} (anchors), {d['episodes']:.3f} (episodes); calibrated "
            f"{d['keys_calibrated']:.3f}, {d['episodes_calibrated']:.3f}; the threshold of "
            f"{self.settings['drift_threshold']} {'calibrates' if self.calibrates else 'leaves the memory as it is'}\n"
            f"{'; '.join(shares)} [{LEVEL:.0%} intervals over {self.settings['streams']} streams]"
        )
        title = f"Memory of {self.model['base_model_name']} read by {self.drifted['from']}"
        table = Table(title=Text(title), caption=Text(caption))
        table.add_column("memory")
        for heading in ("right", "nats an answer", "perplexity"):
            table.add_column(heading, justify="right")
        for row in self.rows():
            nats, perplexity = (Text(_shown("{:.2f}", row[name])) for name in ("answer_nats", "perplexity"))
            table.add_row(row["condition"], f"{row['right']:.0%}", nats, perplexity)
        return table


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


def _ratio(part: NDArray[Any], whole: NDArray[Any], axis: int = -1) -> NDArray[Any]:
    return np.asarray(part.sum(axis) / whole.sum(axis))


def _shown(form: str, interval: dict[str, Any]) -> str:
    return with_range(form, interval["estimate"], interval["low"], interval["high"])


def over_another_base(model: HippoFormer, base: PreTrainedModel) -> HippoFormer:
    """A model's hippocampus, and nothing else of it, over another base of the same shape.

    Raises:
        CheckpointError: a base of another shape.
    """
    config = copy.deepcopy(model.config)
    config.use_lora = False
    other = HippoFormer(config, base)
    try:
        other.hippocampus.load_state_dict(model.hippocampus.state_dict())
    except RuntimeError as error:
        raise CheckpointError(f"the hippocampus does not fit the other base: {error}") from error
    return other


def round_weights(base: PreTrainedModel, bits: int) -> None:
    """Other weights of the same model: every linear layer but the head rounded to `bits` bits, in place.

    Round to nearest between the smallest and the largest weight of each group of 32 in a row, as the simplest
    quantisations do.

    Raises:
        ConfigurationError: no such number of bits.
    """
    if not 1 <= bits <= 8:
        raise ConfigurationError(f"bits={bits}; expected a number from 1 to 8")
    head = base.get_output_embeddings()
    for layer in base.modules():
        if isinstance(layer, nn.Linear) and layer is not head:
            for group in layer.weight.data.split(_GROUP, dim=1):
                low, high = group.float().aminmax(dim=1, keepdim=True)
                step = ((high - low) / (2**bits - 1)).clamp_min(torch.finfo(torch.float32).tiny)
                group.copy_(((group.float() - low) / step).round() * step + low)
