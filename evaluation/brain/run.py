"""Four signs that the memory behaves like a hippocampus, each beside what it would be without a trained gate.

    selective tagging    content words are tagged (salience above 0.5) more often than function words
    temporal coherence   neighbours are judged alike: (r + 1) / 2 of the lag-1 autocorrelation of salience; 0.5 is none
    retained priority    mean priority of what is stored at the end of a text, also against random retention
    replay benefit       nats a token that replay saves

Controls are read on the same text: the gate before training, the surprise of the tokens, salience shuffled. The row
`original` holds the figures that the original research code published. Shares of word classes are over tokens, all
other figures are means over documents.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from evaluation.brain.words import CLASSES, CONTENT, FUNCTION, token_classes
from evaluation.common.results import Result, Row
from evaluation.common.statistics import bootstrap
from evaluation.salience.run import SURPRISE, TRAINED, UNTRAINED, Gated, Options, gate, read
from hippoformer.data.documents import Document
from hippoformer.errors import TextError
from hippoformer.evaluation import encode, reading
from hippoformer.text import start_tokens, token_spans
from hippoformer.training.credit import reconfigured

__all__ = ["Options", "run"]

RATIO, MEAN_RATIO = "tagged, content / function", "salience, content / function"
COHERENCE, UNSMOOTHED = "temporal coherence", "coherence before smoothing"
RETAINED, OVER_RANDOM, REPLAY = "retained priority", "priority over random", "replay benefit, nats/token"
_PUBLISHED = {RATIO: 2.11, COHERENCE: 0.58, UNSMOOTHED: 0.58, RETAINED: 4.9}
_CHANCE = {RATIO: 1.0, MEAN_RATIO: 1.0, COHERENCE: 0.5, UNSMOOTHED: 0.5, OVER_RANDOM: 0.0, REPLAY: 0.0}
_ROUNDS = 10  # of replay, where it is switched on


def run(model: Any, tokenizer: Any, documents: Sequence[Document], options: Options) -> Result:
    """The signs and their controls, and mean, spread and tagged share of salience.

    Raises:
        TextError: no document is long enough for anything to be stored.
    """
    least = model.config.window + model.config.segment_len
    encoded = [encode(tokenizer, d, limit_tokens=options.limit_tokens) for d in documents[: options.documents]]
    encoded = [document for document in encoded if len(document.input_ids) >= least]
    if not encoded:
        raise TextError(f"no document has the {least} tokens after which something is stored; name longer texts")
    replays = model.config.max_replay_rounds > 0
    switched = {"max_replay_rounds": 0 if replays else _ROUNDS}
    ways: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {(TRAINED, "unsmoothed"): ("unsmoothed", {})}
    for rule, kind in ((TRAINED, "own"), (UNTRAINED, "untrained")):
        ways |= {(rule, ""): (kind, {}), (rule, "random"): (kind, {"selection": "random"})}
        ways[rule, "switched"] = (kind, switched)
    reads: dict[tuple[str, str], list[Gated]] = {way: [] for way in ways}
    for document in encoded:
        for way, (kind, changed) in ways.items():
            with reading(model), gate(model, kind, options.seed), reconfigured(model.hippocampus, **changed):
                reads[way].append(read(model, document.input_ids))

    # The first token of a document completes no transition and has no salience.
    salience = {rule: [one.salience[1:] for one in reads[rule, ""]] for rule in (TRAINED, UNTRAINED)}
    salience[SURPRISE] = [one.surprise[1:] for one in reads[TRAINED, ""]]
    labels = []
    for document in encoded:
        text = document.document.text
        offsets = [*([(0, 0)] * len(start_tokens(tokenizer))), *token_spans(tokenizer, text)[1]]
        labels.append(np.array(token_classes(text, offsets[: len(document.input_ids)])[1:]))
    rows, classes = [], {}
    for rule, of in salience.items():
        joined = np.concatenate(of)
        found = {"salience, mean": joined.mean(), "salience, std": joined.std(), "tagged share": (joined > 0.5).mean()}
        rows += [Row(rule, metric, float(value), n=len(joined)) for metric, value in found.items()]
        # (D, 3): tokens of a class in each document, tagged ones, and their summed salience.
        counts = {
            name: np.array([(s[at].size, (s[at] > 0.5).sum(), s[at].sum()) for s, at in _of_class(of, labels, name)])
            for name in CLASSES
        }
        classes[rule] = {
            name: {"tokens": int(n), "tagged": int(tagged), "salience": float(total)}
            for name, (n, tagged, total) in ((name, part.sum(0)) for name, part in counts.items())
        }
        for column, metric in ((1, RATIO), (2, MEAN_RATIO)):
            parts = [counts[name][:, i] for name in (CONTENT, FUNCTION) for i in (column, 0)]
            rows.append(Row(rule, metric, *_defined(parts, options.seed), n=len(encoded)))

    draw = np.random.default_rng(options.seed)
    measured = {(rule, COHERENCE): list(map(coherence, of)) for rule, of in salience.items()}
    measured["shuffled", COHERENCE] = [coherence(draw.permutation(of)) for of in salience[TRAINED]]
    measured[TRAINED, UNSMOOTHED] = [coherence(one.salience[1:]) for one in reads[TRAINED, "unsmoothed"]]
    measured[UNTRAINED, UNSMOOTHED] = measured[UNTRAINED, COHERENCE]  # its smoothing is the identity
    for rule in (TRAINED, UNTRAINED):
        kept, random, other = (reads[rule, way] for way in ("", "random", "switched"))
        measured[rule, RETAINED] = [one.priority for one in kept]
        measured[rule, OVER_RANDOM] = [a.priority - b.priority for a, b in zip(kept, random, strict=True)]
        sign = 1.0 if replays else -1.0  # positive: better with replay
        measured[rule, REPLAY] = [sign * (b.nats - a.nats) for a, b in zip(kept, other, strict=True)]
    for (rule, metric), values in measured.items():
        if defined := [value for value in values if value is not None]:
            rows.append(Row(rule, metric, *bootstrap(np.mean, defined, seed=options.seed), n=len(defined)))
    rows += [Row("chance", metric, value) for metric, value in _CHANCE.items()]
    rows += [Row("original", metric, value) for metric, value in _PUBLISHED.items()]
    titles = [document.document.title for document in encoded]
    return Result(rows, {"documents": titles, "word_classes": classes})


def coherence(values: np.ndarray) -> float | None:
    """(r + 1) / 2 of the lag-1 autocorrelation of (T,) values; None for constant or too few values."""
    if len(values) < 3 or values[1:].std() == 0 or values[:-1].std() == 0:
        return None
    return float((np.corrcoef(values[:-1], values[1:])[0, 1] + 1.0) / 2.0)


def _of_class(values: Sequence[np.ndarray], labels: Sequence[np.ndarray], name: str) -> list[tuple[Any, Any]]:
    return [(of, label == name) for of, label in zip(values, labels, strict=True)]


def _ratio(*parts: Any, axis: int = -1) -> Any:
    with np.errstate(divide="ignore", invalid="ignore"):
        content, n_content, function, n_function = (part.sum(axis) for part in parts)
        return (content / n_content) / (function / n_function)


def _defined(parts: Sequence[np.ndarray], seed: int) -> tuple[float | None, float | None, float | None]:
    """The ratio with its interval; None where it is a share of nothing, no ends where that happens in a resample."""
    if not np.isfinite(_ratio(*parts)):
        return None, None, None
    value, low, high = bootstrap(_ratio, *parts, seed=seed)
    if low is None or high is None or not np.isfinite(low + high):
        return value, None, None
    return value, low, high
