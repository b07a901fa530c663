"""Perplexity under each condition, after a leak check; and where memory helps: by position and by distance.

The original reported how much lower the perplexity of the last quarter of a text is than that of the first. That is
positive for every language model, so it stands beside the base's own, and what counts is the gain, nats a token saved
against memory off: by position in the document, and by how many tokens ago the n-gram that ends with the token was last
read. What last came beyond the window only a memory can know; "new" never came before.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.common.causality import check_model
from evaluation.common.results import Result, Row
from evaluation.common.statistics import bootstrap, compare, ratio
from hippoformer import evaluation
from hippoformer.data import Document

_NGRAMS = (1, 2, 3)
_FIRST_POSITION = 128
_NEAR = (1, 16, 64, 256)

Array = NDArray[np.float64]
Edges = list[tuple[int, int]]


@dataclass
class Options(evaluation.Options):
    """How a perplexity is measured, and whether by position."""

    seed: int = field(default=0, metadata={"help": "of the bootstrap over documents"})
    by_position: bool = field(default=False, metadata={"help": "also the gain by position and by distance"})


def run(model: Any, tokenizer: Any, documents: Sequence[Document], options: Options) -> Result:
    """Perplexity, bits per byte and bytes of state under each condition; with `off`, the change against it, and with
    `by_position` where each gains.

    Raises:
        CausalityError: the model looks ahead. TextError: no token to score. Others as `hippoformer.evaluation.score`.
    """
    leak = check_model(model, evaluation.encode_all(tokenizer, documents, options.limit_tokens)[0].input_ids)
    scored = evaluation.measure(model, tokenizer, documents, options)
    nll = {name: [one.nll for one in of] for name, of in scored.items()}
    read = [one.document for one in next(iter(scored.values()))]
    rows = list(compare(nll, [document.tokens_scored for document in read], "off", options.seed))
    for name, of in scored.items():
        rows += [Row(name, metric, value, n=len(of)) for metric, value in list(evaluation.figures(of).items())[1:]]
    if options.by_position and "off" in options.conditions:
        nats = {name: [-one.log_probs.double().numpy() for one in of] for name, of in scored.items()}
        ids = [document.input_ids.tolist() for document in read]
        rows += by_position(nats, ids, model.config.window, options.seed)
    per_document = [
        {"title": d.document.title, "tokens": d.tokens_scored, "words": d.words, "bytes": d.utf8_bytes}
        | {"nll": {name: of[i] for name, of in nll.items()}}
        for i, d in enumerate(read)
    ]
    return Result(rows, {"documents": per_document, "leak check": leak})


def by_position(
    nats: Mapping[str, Sequence[Array]], ids: Sequence[Sequence[int]], window: int, seed: int = 0
) -> Iterator[Row]:
    """Perplexity and gain in each cell of positions, of distances, and in the first and the last quarter.

    Args:
        nats: condition, `off` among them → (T - 1,) -log p of each document's tokens but the first.
        ids: T token ids of each document. window: tokens the base sees. seed: of the bootstrap over documents.
    """
    positions = [np.arange(1, len(of)) for of in ids]
    edges = [0, _FIRST_POSITION]
    while edges[-1] <= max(int(of[-1]) for of in positions):
        edges.append(2 * edges[-1])
    yield from _cells("position", nats, positions, list(itertools.pairwise(edges)), seed)
    for n in _NGRAMS:
        distances = [last_distance(of, n)[1:] for of in ids]
        yield from _cells(f"last {n}-gram", nats, distances, _distance_edges(window, distances), seed)
    quarters = [np.minimum(3, 4 * (of - 1) // len(of)) for of in positions]
    both = [i for i, of in enumerate(quarters) if {0, 3} <= {*of.tolist()}]
    kept, of_each = [quarters[i] for i in both], {name: [of[i] for i in both] for name, of in nats.items()}
    if not both:
        return
    yield from _cells("quarter", of_each, kept, [(0, 1), (3, 4)], seed)
    counts = [np.array([(of == quarter).sum() for of in kept]) for quarter in (0, 3)]
    for name in nats:
        early, late = (_sums(of_each[name], kept, quarter, quarter + 1) for quarter in (0, 3))
        difference = np.exp(early.sum() / counts[0].sum()) - np.exp(late.sum() / counts[1].sum())
        yield Row(name, "perplexity, first minus last quarter", float(difference), n=len(both))
        if name != "off":
            saved = [_sums(of_each["off"], kept, q, q + 1) - of for q, of in ((0, early), (3, late))]
            gain = bootstrap(_later_gain, *saved, *counts, seed=seed)
            yield Row(name, "gain, last minus first quarter, nats/token", *gain, n=len(both))


def last_distance(ids: Sequence[int], n: int) -> NDArray[np.int64]:
    """(T,) tokens since the n-gram that ends at each token last ended; 0 where it never did."""
    distances = np.zeros(len(ids), dtype=np.int64)
    last: dict[tuple[int, ...], int] = {}
    for t in range(n - 1, len(ids)):
        gram = tuple(ids[t - n + 1 : t + 1])
        distances[t] = t - last.get(gram, t)
        last[gram] = t
    return distances


def _distance_edges(window: int, distances: Sequence[NDArray[Any]]) -> Edges:
    """Cells that meet where the window ends; the first, (0, 1), is of what is new."""
    # A query at t sees tokens t - window + 1 … t and predicts t + 1: what lies `window` back is the last it sees.
    edges, beyond = [edge for edge in _NEAR if edge <= window], window + 1
    while edges[-1] <= max(int(of.max()) for of in distances):
        edges.append(beyond)
        beyond = 2 * (beyond - 1) + 1
    return [(0, 1), *itertools.pairwise(edges)]


def _cells(
    name: str, nats: Mapping[str, Sequence[Array]], values: Sequence[NDArray[Any]], edges: Edges, seed: int
) -> Iterator[Row]:
    """Rows of the cells low <= value < high that hold a token; a document counts where it has tokens."""
    for low, high in edges:
        counts = np.array([((of >= low) & (of < high)).sum() for of in values])
        there = counts > 0
        if not there.any():
            continue
        label = f"{name} new" if name.startswith("last") and low == 0 else f"{name} {low:,} to {high - 1:,}"
        off = _sums(nats["off"], values, low, high)
        for condition, of in nats.items():
            own = _sums(of, values, low, high)
            yield Row(condition, f"{label}: perplexity", float(np.exp(own.sum() / counts.sum())), n=int(there.sum()))
            if condition != "off":
                gain = bootstrap(ratio, (off - own)[there], counts[there], seed=seed)
                yield Row(condition, f"{label}: gain, nats/token", *gain, n=int(there.sum()))


def _sums(nats: Sequence[Array], values: Sequence[NDArray[Any]], low: int, high: int) -> Array:
    """(D,) nats of each document's tokens in a cell."""
    return np.array([of[(value >= low) & (value < high)].sum() for of, value in zip(nats, values, strict=True)])


def _later_gain(early: Array, late: Array, n_early: Array, n_late: Array, axis: int = -1) -> Any:
    return ratio(late, n_late, axis) - ratio(early, n_early, axis)
