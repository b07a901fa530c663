"""Where does memory help: late in a text, or where something comes again after a long time?

The original reported how much lower the perplexity of the last quarter of a text is than that of the first. That is
positive for every language model, with or without a memory, so it stands here beside the base's own, and what counts is
the gain: nats that a token costs with the memory off, minus what it costs with it. It is given

    by position    of the token in its document
    by distance    tokens since the same token, or the n-gram that ends with it, was last read; what last came beyond
                   the window only a memory can know, and "new" is what never came before

each with a bootstrap interval over documents. `perplexity` in the same cells is perplexity by position.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text

from hippoformer.data import Document
from hippoformer.errors import ConfigurationError, TextError
from hippoformer.evaluation.provenance import provenance
from hippoformer.evaluation.report import Report, with_range
from hippoformer.evaluation.scoring import describe
from hippoformer.evaluation.statistics import RESAMPLES, Interval, bootstrap_interval, weighted_mean_interval
from hippoformer.evaluation.token_scores import TokenScores, score_tokens

NGRAMS = (1, 2, 3)
_FIRST_POSITION = 128
_NEAR = (1, 16, 64, 256)
NEW = 0  # as a distance: never read before

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Cell:
    """Tokens of one span of positions or distances.

    Attributes:
        label: for people. low, high: low <= value < high; high None: no end; low None: never read before.
        tokens, documents: in the cell.
        nats, perplexity: of each condition. gain: nats a token that each condition saves against off.
    """

    label: str
    low: int | None
    high: int | None
    tokens: int
    documents: int
    nats: dict[str, float]
    perplexity: dict[str, float]
    gain: dict[str, Interval]


@dataclass(frozen=True)
class LongRangeReport(Report):
    """Everything by position and by distance; see the head of this module.

    Attributes:
        window: tokens the base itself sees. conditions, documents, tokens: what was scored.
        by_position: cells. by_distance: n -> cells.
        early_late: condition -> perplexity of the first and the last quarter of the documents, and their difference.
        early_late_gain: condition -> gain in either quarter, and the difference late minus early.
    """

    FORMAT: ClassVar[str] = "hippoformer.long_range/1"

    model: dict[str, Any]
    settings: dict[str, Any]
    window: int
    conditions: tuple[str, ...]
    documents: list[str]
    tokens: int
    by_position: list[Cell]
    by_distance: dict[str, list[Cell]]
    early_late: dict[str, dict[str, float]]
    early_late_gain: dict[str, dict[str, Interval]]
    provenance: dict[str, Any]

    def to_table(self) -> Table:
        """One line a cell: gain of the memory, and of every other condition."""
        early = self.early_late
        caption = (
            f"{len(self.documents)} documents, {self.tokens:,} tokens, window {self.window}; gain in nats a token "
            "against memory off; first minus last quarter, perplexity: "
            + ", ".join(f"{condition} {early[condition]['early_minus_late']:+.2f}" for condition in early)
        )
        table = Table(title=Text(f"Long-range benefit of {self.model['base_model_name']}"), caption=Text(caption))
        table.add_column("tokens")
        gains = [condition for condition in self.conditions if condition != "off"]
        for heading in ("number", "perplexity off", *(f"gain of {condition}" for condition in gains)):
            table.add_column(heading, justify="right")
        groups = {"at position": self.by_position}
        groups |= {f"last {n}-gram": cells for n, cells in self.by_distance.items()}
        for name, cells in groups.items():
            for cell in cells:
                shown = [with_range("{:+.4f}", g.estimate, g.low, g.high) for g in (cell.gain[c] for c in gains)]
                row = (f"{name} {cell.label}", f"{cell.tokens:,}", f"{cell.perplexity['off']:.2f}", *shown)
                table.add_row(*(Text(text) for text in row))
        return table


def evaluate_long_range(
    model: Any,
    tokenizer: Any,
    documents: Sequence[Document],
    conditions: Sequence[str] = ("memory", "off", "window-only"),
    batch_size: int = 4,
    limit_tokens: int | None = None,
    scores: TokenScores | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    progress: Callable[[int, int], None] | None = None,
    command: str | None = None,
) -> LongRangeReport:
    """Measures the gain of memory by position and by distance.

    Args:
        model, tokenizer: a HippoFormer and its tokenizer.
        documents: each read from an empty memory.
        conditions: memory, off, and where wanted window-only.
        batch_size, limit_tokens, progress: of the reading.
        scores: tokens scored before, of these documents; nothing is read then.
        seed, resamples: of the bootstrap over documents. command: recorded in the report.

    Raises:
        ConfigurationError: conditions without memory or off. TextError: no document of two tokens.
    """
    if scores is None:
        if not {"memory", "off"} <= set(conditions):
            raise ConfigurationError(f"conditions={list(conditions)}; a gain needs memory and off among them")
        scores = score_tokens(model, tokenizer, documents, conditions, batch_size, limit_tokens, progress)
    elif not {"memory", "off"} <= set(scores.conditions):
        raise ConfigurationError(f"scores of {list(scores.conditions)}; a gain needs memory and off among them")
    places = scores.places
    if not places:
        raise TextError("no document was scored under all conditions; a gain needs at least one")
    nats = {
        condition: [-scores.log_probs[condition][place].double().numpy() for place in places]
        for condition in scores.conditions
    }
    positions = [np.arange(1, len(scores.input_ids[place])) for place in places]
    window = model.config.window
    by_distance = {}
    for n in NGRAMS:
        distances = [last_distance(scores.input_ids[place].tolist(), n)[1:] for place in places]
        by_distance[str(n)] = _cells(nats, distances, _distance_edges(window, distances), seed, resamples)
    quarters = [np.minimum(3, 4 * (p - 1) // max(1, len(p))) for p in positions]
    early_late, early_late_gain = _early_late(nats, quarters, seed, resamples)
    return LongRangeReport(
        model=describe(model),
        settings={"limit_tokens": limit_tokens, "batch_size": batch_size, "seed": seed, "resamples": resamples},
        window=window,
        conditions=scores.conditions,
        documents=[scores.titles[place] for place in places],
        tokens=sum(len(p) for p in positions),
        by_position=_cells(nats, positions, _position_edges(positions), seed, resamples),
        by_distance=by_distance,
        early_late=early_late,
        early_late_gain=early_late_gain,
        provenance=provenance(seed=seed, documents=list(documents), command=command),
    )


def last_distance(ids: Sequence[int], n: int) -> NDArray[np.int64]:
    """Tokens since the n-gram that ends at each token last ended; `NEW` (0) where it never did.

    Args:
        ids: T tokens. n: length of the n-gram, the token itself its last.

    Returns:
        (T,); the first n - 1 tokens, which end no n-gram, count as new.
    """
    distances = np.zeros(len(ids), dtype=np.int64)
    last: dict[tuple[int, ...], int] = {}
    for t in range(n - 1, len(ids)):
        gram = tuple(ids[t - n + 1 : t + 1])
        distances[t] = t - last[gram] if gram in last else NEW
        last[gram] = t
    return distances


def _position_edges(positions: Sequence[NDArray[Any]]) -> list[tuple[int, int | None]]:
    farthest, edges = max((int(p[-1]) for p in positions if len(p)), default=0), [0, _FIRST_POSITION]
    while edges[-1] <= farthest:
        edges.append(2 * edges[-1])
    return list(itertools.pairwise(edges))


def _distance_edges(window: int, distances: Sequence[NDArray[Any]]) -> list[tuple[int, int | None]]:
    """Cells that meet where the window ends; the first, of what is new, is (0, 1)."""
    farthest = max((int(d.max()) for d in distances if len(d)), default=0)
    # A query at t sees tokens t - window + 1 … t and foretells t + 1, so what lies `window` back is the last it sees.
    edges, beyond = [edge for edge in _NEAR if edge <= window], window + 1
    while edges[-1] <= farthest:
        edges.append(beyond)
        beyond = 2 * (beyond - 1) + 1
    return [(NEW, 1), *itertools.pairwise(edges)]


def _cells(
    nats: dict[str, list[Array]],
    values: Sequence[NDArray[Any]],
    edges: Sequence[tuple[int, int | None]],
    seed: int,
    resamples: int,
) -> list[Cell]:
    """Cells that hold a token; a document counts in the cells it has tokens in."""
    cells = []
    for low, high in edges:
        chosen = [(v >= low) & ((v < high) if high is not None else True) for v in values]
        counts = np.array([mask.sum() for mask in chosen])
        there = counts > 0
        if not there.any():
            continue
        sums = {c: np.array([of[mask].sum() for of, mask in zip(n, chosen, strict=True)]) for c, n in nats.items()}
        tokens = int(counts.sum())
        mean = {condition: float(of.sum()) / tokens for condition, of in sums.items()}
        new = (low, high) == (NEW, 1)
        label = "new" if new else f"{low:,} to {high - 1:,}" if high is not None else f"{low:,} and more"
        cells.append(
            Cell(
                label=label,
                low=None if new else low,
                high=None if new else high,
                tokens=tokens,
                documents=int(there.sum()),
                nats=mean,
                perplexity={condition: float(np.exp(of)) for condition, of in mean.items()},
                gain={
                    condition: weighted_mean_interval((sums["off"] - of)[there], counts[there], seed, resamples)
                    for condition, of in sums.items()
                    if condition != "off"
                },
            )
        )
    return cells


def _early_late(
    nats: dict[str, list[Array]], quarters: Sequence[NDArray[Any]], seed: int, resamples: int
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, Interval]]]:
    """First and last quarter of the documents that have both."""
    kept = [i for i, q in enumerate(quarters) if (q == 0).any() and (q == 3).any()]
    if not kept:
        return {}, {}

    def sums(condition: str, quarter: int) -> Array:
        return np.array([nats[condition][i][quarters[i] == quarter].sum() for i in kept])

    tokens = [np.array([(quarters[i] == quarter).sum() for i in kept], dtype=np.float64) for quarter in (0, 3)]

    def difference(early: Array, late: Array, n_early: Array, n_late: Array, axis: int = -1) -> Array:
        return np.asarray(late.sum(axis) / n_late.sum(axis) - early.sum(axis) / n_early.sum(axis))

    perplexities, gains = {}, {}
    for condition in nats:
        early, late = (float(np.exp(sums(condition, q).sum() / n.sum())) for q, n in zip((0, 3), tokens, strict=True))
        perplexities[condition] = {"early": early, "late": late, "early_minus_late": early - late}
        if condition != "off":
            saved = [sums("off", quarter) - sums(condition, quarter) for quarter in (0, 3)]
            gains[condition] = {
                "early": weighted_mean_interval(saved[0], tokens[0], seed, resamples),
                "late": weighted_mean_interval(saved[1], tokens[1], seed, resamples),
                "late_minus_early": bootstrap_interval((*saved, *tokens), difference, seed, resamples),
            }
    return perplexities, gains
