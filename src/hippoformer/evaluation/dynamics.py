"""The life of a memory over one stream: how full, how strong, how old, and what each night's replay did.

One document is read from an empty memory; at every segment end, after consolidation, the store is looked at.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from rich.table import Table
from rich.text import Text

from hippoformer.data import Document
from hippoformer.errors import TextError
from hippoformer.evaluation.provenance import provenance
from hippoformer.evaluation.report import Report
from hippoformer.evaluation.scoring import describe, encode, reading
from hippoformer.model.cache import HippoCache
from hippoformer.model.outputs import Step
from hippoformer.model.statistics import memory_stats, salience_stats

_ROWS_SHOWN = 20


@dataclass(frozen=True)
class Segment:
    """One segment, and the store after the consolidation at its end.

    Attributes:
        end: tokens read. stored: episodes in the store. utilisation: share of the buffer. written: admitted just now.
        mean_salience, tagged_share: of the segment's transitions.
        mean_priority, mean_effective_priority, mean_age, mean_strength, mean_credit: of what is stored.
        reactivated, merged, forgotten: counts of this consolidation's replay.
        nats: -log p a token of the segment, with memory and (as the hippocampus saw it) off.
    """

    end: int
    stored: int
    utilisation: float
    written: int
    mean_salience: float
    tagged_share: float
    mean_priority: float
    mean_effective_priority: float
    mean_age: float
    mean_strength: float
    mean_credit: float
    reactivated: int
    merged: int
    forgotten: int
    nats: dict[str, float]


@dataclass(frozen=True)
class DynamicsReport(Report):
    """Every segment of the stream, and what is remembered at its end.

    Attributes:
        stream: title, source and tokens_read.
        retained: position, token, salience, priority, age, strength and credit of each stored episode at the end.
    """

    FORMAT: ClassVar[str] = "hippoformer.dynamics/1"

    model: dict[str, Any]
    settings: dict[str, Any]
    stream: dict[str, Any]
    segments: tuple[Segment, ...]
    retained: list[dict[str, float]]
    provenance: dict[str, Any]

    def to_table(self) -> Table:
        """At most twenty segments, evenly chosen, the last among them."""
        caption = f"{self.stream['title']}: {self.stream['tokens_read']:,} tokens, {len(self.segments)} segments"
        table = Table(title=Text(f"Memory of {self.model['base_model_name']} over a stream"), caption=Text(caption))
        for heading in ("tokens", "stored", "full", "written", "priority", "effective", "age", "tagged", "replayed"):
            table.add_column(heading, justify="right")
        table.add_column("merged", justify="right")
        table.add_column("forgotten", justify="right")
        step = max(1, -(-len(self.segments) // _ROWS_SHOWN))
        for segment in self.segments[::-1][::step][::-1]:
            table.add_row(
                f"{segment.end:,}",
                str(segment.stored),
                f"{segment.utilisation:.0%}",
                str(segment.written),
                f"{segment.mean_priority:.2f}",
                f"{segment.mean_effective_priority:.2f}",
                f"{segment.mean_age:.2f}",
                f"{segment.tagged_share:.0%}",
                str(segment.reactivated),
                str(segment.merged),
                str(segment.forgotten),
            )
        return table


def evaluate_dynamics(
    model: Any,
    tokenizer: Any,
    documents: Sequence[Document],
    limit_tokens: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    command: str | None = None,
) -> DynamicsReport:
    """Reads the longest document and looks at the memory at every segment end.

    Args:
        model, tokenizer: a HippoFormer and its tokenizer.
        documents: the one with most characters is read. limit_tokens: only its first so many tokens.
        seed: recorded; replay draws by the model's own. progress: called with (tokens read, tokens in all).
        command: recorded in the report.

    Raises:
        TextError: the document does not fill one segment.
    """
    segment_len = model.config.segment_len
    document = max(documents, key=lambda d: len(d.text), default=None)
    ids = None if document is None else encode(tokenizer, document, limit_tokens=limit_tokens).input_ids
    if document is None or ids is None or len(ids) < segment_len:
        raise TextError(
            f"the longest document has {0 if ids is None else len(ids)} tokens, and a segment has {segment_len}: "
            "name a longer text"
        )
    segments: list[Segment] = []
    with reading(model):
        cache: HippoCache = model.new_cache(1)
        before: set[int] = set()
        # The stream counts from the start of a call, so one call reads everything.
        for step in model.stream(ids.unsqueeze(0).to(model.device), [len(ids)], cache):
            if cache.lengths[0] % segment_len == 0:
                stored = _stored_positions(cache)
                segments.append(_segment(step, cache, len(stored - before)))
                before = stored
            if progress is not None:
                progress(cache.lengths[0], len(ids))
        retained = [
            {
                name: getattr(episode, name)
                for name in ("position", "token", "salience", "priority", "age", "strength", "credit")
            }
            for episode in cache.episodes(0, stored_only=True)
        ]
    return DynamicsReport(
        model=describe(model),
        settings={"limit_tokens": limit_tokens, "seed": seed},
        stream={"title": document.title, "source": document.source, "tokens_read": len(ids)},
        segments=tuple(segments),
        retained=retained,
        provenance=provenance(seed=seed, documents=[document], command=command),
    )


def _stored_positions(cache: HippoCache) -> set[int]:
    position = cache.memory.episodes.position[0, : cache.config.buffer_size]
    return set(position[position >= 0].tolist())


def _segment(step: Step, cache: HippoCache, written: int) -> Segment:
    stats = memory_stats(cache, [] if step.report is None else [step.report])
    assert step.found is not None  # the memory is on
    n = step.new[0]
    salience = salience_stats(step.found.salience[0, :n].float())
    first = 1 if step.start[0] == 0 else 0  # a stream's first token is predicted by nothing

    def nats(log_prob: torch.Tensor) -> float:
        return -float(log_prob[0, first:n].double().mean()) if n > first else 0.0

    return Segment(
        end=cache.lengths[0],
        stored=stats["stored"][0],
        utilisation=stats["utilisation"],
        written=written,
        mean_salience=salience["mean"],
        tagged_share=salience["tagged_share"],
        mean_priority=stats["mean_priority"],
        mean_effective_priority=stats["mean_effective_priority"],
        mean_age=stats["mean_age"],
        mean_strength=stats["mean_strength"],
        mean_credit=stats["mean_credit"],
        reactivated=stats["reactivated"],
        merged=stats["merged"],
        forgotten=stats["forgotten"],
        nats={"memory": nats(step.target_log_prob), "off": nats(step.base_log_prob)},
    )
