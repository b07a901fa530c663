"""Brain-like behaviour, each figure beside what it would be without the brain.

The original named four signs that its memory behaves like a hippocampus. Alone they prove little: surprise too falls on
content words, and any smoothing makes neighbours alike. So each stands beside its controls on the same text:

    selective tagging      content words tagged more often than function words    untrained gate, plain surprise
    temporal coherence     neighbours judged alike: (r + 1) / 2 of the lag-1       the gate unsmoothed, untrained, plain
                           autocorrelation of salience; 0.5 is none                surprise, salience shuffled
    retained priority      mean priority of what is stored at a text's end         random retention, untrained gate
    replay benefit         nats a token that replay saves                          untrained gate

Documents are the units: figures are means over documents, except for the shares of word classes, which are over tokens;
intervals come from resampling documents.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text

from hippoformer.data import Document
from hippoformer.errors import TextError
from hippoformer.evaluation.provenance import provenance
from hippoformer.evaluation.report import Report, with_range
from hippoformer.evaluation.scoring import describe, encode, hidden_states, reading
from hippoformer.evaluation.statistics import RESAMPLES, Interval, bootstrap_interval, mean_interval
from hippoformer.evaluation.variants import switched_replay
from hippoformer.evaluation.views import unsmoothed_gate, untrained_gate
from hippoformer.evaluation.word_classes import TaggerName, WordClass, tagger, token_classes
from hippoformer.text import start_tokens, token_spans
from hippoformer.training.credit import reconfigured
from hippoformer.training.hidden_states import HiddenStateCache
from hippoformer.training.readers import CachedReader

TRAINED, UNTRAINED, SURPRISE = "trained gate", "untrained gate", "surprise"
_RULES = (TRAINED, UNTRAINED, SURPRISE)
_CLASSES: tuple[WordClass, ...] = ("content", "function", "other")
_TAGGED = 0.5
_BINS = 20

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Measure:
    """One sign and its controls.

    Attributes:
        name, label, unit: for programs, for people, and what is counted.
        target: the original's figure, None where it gave none.
        chance: what a rule without any knowledge gives, None where there is no such figure.
        values: rule -> figure, the trained gate first; None where it is undefined (a share of nothing).
    """

    name: str
    label: str
    unit: str
    target: float | None
    chance: float | None
    values: dict[str, Interval | None]


@dataclass(frozen=True)
class BrainReport(Report):
    """Every sign with its controls; see the head of this module.

    Attributes:
        tagger: what told word classes. measures: the table.
        distribution: rule -> mean, std and tagged share of salience, and its histogram (edges, counts).
        word_classes: rule -> class -> tokens, tagged_share and mean salience.
    """

    FORMAT: ClassVar[str] = "hippoformer.brain/1"

    model: dict[str, Any]
    settings: dict[str, Any]
    tagger: str
    documents: list[str]
    tokens: int
    measures: tuple[Measure, ...]
    distribution: dict[str, dict[str, Any]]
    word_classes: dict[str, dict[str, dict[str, float]]]
    provenance: dict[str, Any]

    def __getitem__(self, name: str) -> Measure:
        """A measure by its name.

        Raises:
            KeyError: no such measure.
        """
        for measure in self.measures:
            if measure.name == name:
                return measure
        raise KeyError(name)

    def to_table(self) -> Table:
        """One line a sign."""
        caption = f"{len(self.documents)} documents, {self.tokens:,} tokens; words told apart by {self.tagger}"
        table = Table(title=Text(f"Brain-like behaviour of {self.model['base_model_name']}"), caption=Text(caption))
        table.add_column("sign")
        for heading in ("target", TRAINED, UNTRAINED, "other controls"):
            table.add_column(heading, justify="left" if heading == "other controls" else "right")
        for measure in self.measures:
            others = [f"{rule} {_shown(of)}" for rule, of in measure.values.items() if rule not in (TRAINED, UNTRAINED)]
            others += [] if measure.chance is None else [f"chance {measure.chance:g}"]
            cells = (
                f"{measure.label} ({measure.unit})",
                "-" if measure.target is None else f"{measure.target:g}",
                _shown(measure.values.get(TRAINED)),
                _shown(measure.values.get(UNTRAINED)),
                ", ".join(others),
            )
            table.add_row(*(Text(cell) for cell in cells))
        return table


@dataclass(frozen=True)
class _Read:
    """One document read in one way: salience (T,), nats a token, mean priority of what was stored at its end."""

    salience: Array
    nats: float
    priority: float


def evaluate_brain(
    model: Any,
    tokenizer: Any,
    documents: Sequence[Document],
    cache_dir: Path,
    limit_tokens: int | None = None,
    tagger_name: TaggerName = "auto",
    seed: int = 0,
    resamples: int = RESAMPLES,
    progress: Callable[[int, int], None] | None = None,
    command: str | None = None,
) -> BrainReport:
    """Measures the signs and their controls.

    Args:
        model, tokenizer: a HippoFormer whose base is frozen, and its fast tokenizer.
        documents: each read from an empty memory; those that leave nothing in the store are left out.
        cache_dir: where hidden states are kept. limit_tokens: read only the first so many tokens of each document.
        tagger_name: how words are told apart, see `word_classes.tagger`.
        seed: of the bootstrap, the untrained gate and the shuffling. resamples: of the bootstrap.
        progress: called with (documents read, documents in all). command: recorded in the report.

    Raises:
        TextError: no document is long enough for anything to leave its window.
    """
    tagger_used, tag = tagger(tagger_name)
    encoded = [encode(tokenizer, document, i, limit_tokens) for i, document in enumerate(documents)]
    # What never leaves the window is never stored.
    encoded = [d for d in encoded if d.tokens_read >= model.config.window + model.config.segment_len]
    if not encoded:
        raise TextError(
            f"no document has the {model.config.window + model.config.segment_len} tokens after which something is "
            "stored; name longer texts"
        )
    n_start, found = len(start_tokens(tokenizer)), []
    with reading(model):
        cache = hidden_states(model, encoded, cache_dir)
        ways = _ways(model, seed)
        for number, document in enumerate(encoded):
            reads = {name: _read(way, cache, number, options) for name, (way, options) in ways.items()}
            spans = token_spans(tokenizer, document.document.text)[1]
            offsets = [*([(0, 0)] * n_start), *spans][: document.tokens_read]
            labels = token_classes(document.document.text, offsets, tag)
            surprise = (1.0 - cache[number].log_prob.exp()).double().numpy()
            found.append((reads, surprise, np.array([label or "" for label in labels])))
            if progress is not None:
                progress(number + 1, len(encoded))
    # The first token of a document completes no transition and has no salience.
    salience = {rule: [(s if rule == SURPRISE else r[rule].salience)[1:] for r, s, _ in found] for rule in _RULES}
    labels_of = [labels[1:] for _, _, labels in found]
    reads_of = [reads for reads, _, _ in found]
    classes = {rule: _by_class(salience[rule], labels_of) for rule in _RULES}
    switched, _ = switched_replay(model.config)
    measures = (
        *_selective(classes, seed, resamples),
        *_coherent(salience, reads_of, seed, resamples),
        *_retained(reads_of, switched, seed, resamples),
        _replay(reads_of, switched, seed, resamples),
    )
    return BrainReport(
        model=describe(model),
        settings={"limit_tokens": limit_tokens, "seed": seed, "resamples": resamples},
        tagger=tagger_used,
        documents=[document.document.title for document in encoded],
        tokens=sum(len(s) for s in salience[TRAINED]),
        measures=measures,
        distribution={rule: _distribution(np.concatenate(of)) for rule, of in salience.items()},
        word_classes={rule: _summed(of) for rule, of in classes.items()},
        provenance=provenance(seed=seed, documents=list(documents), command=command),
    )


def _ways(model: Any, seed: int) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Name -> the model with some gate, and the options it reads under."""
    switched, options = switched_replay(model.config)
    untrained = untrained_gate(model, seed)  # its smoothing is the identity
    ways: dict[str, tuple[Any, dict[str, Any]]] = {"unsmoothed": (unsmoothed_gate(model), {})}
    for name, gated in ((TRAINED, model), (UNTRAINED, untrained)):
        ways[name] = (gated, {})
        ways[f"{name}, random retention"] = (gated, {"selection": "random"})
        ways[f"{name}, {switched}"] = (gated, options)
    return ways


def _read(model: Any, cache: HiddenStateCache, number: int, options: dict[str, Any]) -> _Read:
    with reconfigured(model.hippocampus, **options) as config:
        reader = CachedReader(model, cache, 1)
        salience, nll, tokens = [], 0.0, 0
        for piece in reader.through([number]):
            assert piece.found is not None
            salience.append(piece.found.salience[0].double().cpu())
            nll -= float(piece.target_log_prob.double().sum())
            tokens += int(piece.counted.sum())
        store = reader.memory.episodes.slots(0, config.buffer_size)
        priority = store.priority[store.valid]
    return _Read(torch.cat(salience).numpy(), nll / tokens, float(priority.mean()) if len(priority) else 0.0)


def _by_class(salience: Sequence[Array], labels: Sequence[NDArray[Any]]) -> dict[WordClass, Array]:
    """Class -> (D, 3): tokens, tagged ones, and summed salience of each document."""
    return {
        label: np.array(
            [
                (of[at].size, (of[at] > _TAGGED).sum(), of[at].sum())
                for of, at in ((s, n == label) for s, n in zip(salience, labels, strict=True))
            ],
            dtype=np.float64,
        )
        for label in _CLASSES
    }


def _summed(classes: dict[WordClass, Array]) -> dict[str, dict[str, float]]:
    shown: dict[str, dict[str, float]] = {}
    for label, of in classes.items():
        tokens, tagged, total = of.sum(0)
        shown[label] = {
            "tokens": int(tokens),
            "tagged_share": float(tagged / tokens) if tokens else 0.0,
            "mean": float(total / tokens) if tokens else 0.0,
        }
    return shown


def _selective(classes: dict[str, dict[WordClass, Array]], seed: int, resamples: int) -> tuple[Measure, Measure]:
    def ratio(content: Array, n_content: Array, function: Array, n_function: Array, axis: int = -1) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray((content.sum(axis) / n_content.sum(axis)) / (function.sum(axis) / n_function.sum(axis)))

    def values(column: int) -> dict[str, Interval | None]:
        found = {}
        for rule, of in classes.items():
            samples = [part for label in ("content", "function") for part in (of[label][:, column], of[label][:, 0])]
            found[rule] = _defined(samples, ratio, seed, resamples)
        return found

    return (
        Measure("content_function_ratio", "content to function words", "ratio of tagged shares", 2.11, 1.0, values(1)),
        Measure(
            "content_function_salience", "content to function words", "ratio of mean salience", None, 1.0, values(2)
        ),
    )


def _defined(samples: Sequence[Array], statistic: Any, seed: int, resamples: int) -> Interval | None:
    """The interval of a ratio; None where it is a share of nothing, without ends where some resamples are."""
    if not math.isfinite(float(statistic(*samples))):
        return None
    interval = bootstrap_interval(samples, statistic, seed, resamples)
    if interval.low is None or interval.high is None or math.isfinite(interval.low + interval.high):
        return interval
    return replace(interval, low=None, high=None)


def coherence(values: Array) -> float | None:
    """(r + 1) / 2 of the lag-1 autocorrelation of (T,) values: 0.5 is none; None for constant or too few values."""
    if len(values) < 3 or values[1:].std() == 0 or values[:-1].std() == 0:
        return None
    return float((np.corrcoef(values[:-1], values[1:])[0, 1] + 1.0) / 2.0)


def _coherent(
    salience: dict[str, list[Array]], reads: Sequence[dict[str, _Read]], seed: int, resamples: int
) -> tuple[Measure, Measure]:
    draw = np.random.default_rng(seed)

    def mean(documents: Sequence[Array]) -> Interval | None:
        found = [value for value in map(coherence, documents) if value is not None]
        return mean_interval(found, seed, resamples) if found else None

    after = {rule: mean(of) for rule, of in salience.items()} | {
        "shuffled": mean([draw.permutation(of) for of in salience[TRAINED]])
    }
    before = {TRAINED: mean([read["unsmoothed"].salience[1:] for read in reads]), UNTRAINED: after[UNTRAINED]}
    label, unit = "temporal coherence", "rescaled lag-1 autocorrelation"
    return (
        Measure("temporal_coherence", label, unit, 0.58, 0.5, after),
        Measure("temporal_coherence_unsmoothed", f"{label} before smoothing", unit, 0.58, 0.5, before),
    )


def _retained(reads: Sequence[dict[str, _Read]], switched: str, seed: int, resamples: int) -> tuple[Measure, Measure]:
    def priorities(way: str) -> Array:
        return np.array([read[way].priority for read in reads])

    ways = (TRAINED, UNTRAINED, f"{TRAINED}, random retention", f"{TRAINED}, {switched}")
    kept: dict[str, Interval | None] = {way: mean_interval(priorities(way), seed, resamples) for way in ways}
    over: dict[str, Interval | None] = {
        gate: mean_interval(priorities(gate) - priorities(f"{gate}, random retention"), seed, resamples)
        for gate in (TRAINED, UNTRAINED)
    }
    return (
        Measure("retained_priority", "priority of what is retained", "mean, of 5", 4.9, None, kept),
        Measure("retained_over_random", "the same over random retention", "difference", None, 0.0, over),
    )


def _replay(reads: Sequence[dict[str, _Read]], switched: str, seed: int, resamples: int) -> Measure:
    # Positive: better with replay, whichever of the two the model has.
    sign = 1.0 if switched == "no replay" else -1.0
    saved: dict[str, Interval | None] = {
        gate: mean_interval([sign * (r[f"{gate}, {switched}"].nats - r[gate].nats) for r in reads], seed, resamples)
        for gate in (TRAINED, UNTRAINED)
    }
    return Measure("replay_benefit", "what replay saves", "nats a token", None, 0.0, saved)


def _distribution(values: Array) -> dict[str, Any]:
    counts, edges = np.histogram(values, bins=_BINS, range=(0.0, 1.0))
    return {
        "mean": float(values.mean()),
        "std": float(values.std()),
        "tagged_share": float((values > _TAGGED).mean()),
        "edges": edges.tolist(),
        "counts": counts.tolist(),
    }


def _shown(interval: Interval | None) -> str:
    return "-" if interval is None else with_range("{:.4g}", interval.estimate, interval.low, interval.high)
