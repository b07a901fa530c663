"""The memory over one stream: how full, how strong and how old it is after each segment, and what replay did."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from evaluation.common.results import Result, Row
from hippoformer.data import Document
from hippoformer.errors import TextError
from hippoformer.evaluation import encode, reading
from hippoformer.model.outputs import memory_stats, salience_stats

_OF_MEMORY = ("utilisation", "mean_priority", "mean_effective_priority", "mean_age", "reactivated")
_OF_EPISODES = ("position", "token", "salience", "priority", "age")


@dataclass
class Options:
    """How much is read."""

    limit_tokens: int | None = field(default=None, metadata={"help": "read the first N tokens"})


def run(model: Any, tokenizer: Any, documents: Sequence[Document], options: Options) -> Result:
    """Reads the longest document and looks at the memory at every segment end.

    Returns:
        Rows of the last segment and of sums over all; details: every segment, and the episodes at the end.

    Raises:
        TextError: no document fills a segment.
    """
    segment_len = model.config.segment_len
    longest = max(documents, key=lambda document: len(document.text), default=Document("", "", "no text"))
    ids = encode(tokenizer, longest, limit_tokens=options.limit_tokens).input_ids
    if len(ids) < segment_len:
        raise TextError(f"the longest document has {len(ids)} tokens, a segment has {segment_len}: name a longer text")
    segments: list[dict[str, Any]] = []
    with reading(model):
        cache, before = model.new_cache(1), set[int]()
        for step in model.stream(ids.unsqueeze(0).to(model.device), [len(ids)], cache):
            if cache.lengths[0] % segment_len:
                continue
            stats = memory_stats(cache, 0 if step.found.replayed is None else int(step.found.replayed.sum()))
            n, first = step.new[0], int(step.start[0] == 0)  # nothing predicts a stream's first token
            salience = salience_stats(step.found.salience[0, :n].float())
            stored = {episode.position for episode in cache.episodes(0, stored_only=True)}
            segments.append(
                {"tokens": cache.lengths[0], "stored": stats["stored"][0], "written": len(stored - before)}
                | {name: stats[name] for name in _OF_MEMORY}
                | {"mean_salience": salience["mean"], "tagged_share": salience["tagged_share"]}
                | {"nats, memory": -float(step.target_log_prob[0, first:n].double().mean())}
                | {"nats, off": -float(step.base_log_prob[0, first:n].double().mean())}
            )
            before = stored
        retained = [
            {name: getattr(episode, name) for name in _OF_EPISODES} for episode in cache.episodes(0, stored_only=True)
        ]
    rows = [Row("memory", f"{name}, last segment", value, n=1) for name, value in segments[-1].items()]
    for name in ("written", "reactivated"):
        rows.append(Row("memory", f"{name}, in all", sum(segment[name] for segment in segments), n=len(segments)))
    return Result(rows, {"title": longest.title, "segments": segments, "retained": retained})
