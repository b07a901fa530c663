"""Exact recall of one hippocampus under different options: what selection and replay are worth to facts.

What the base reads does not depend on the memory. It reads each stream once, with the memory off, and the episodes of
every variant are written beside it; every question is then put to a copy of the state with each of those memories in
turn. The answers are those of `evaluate_recall` under the same options.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from rich.table import Table
from rich.text import Text

from hippoformer.data import Document
from hippoformer.evaluation.examination import Asked, ask, plan, unaided
from hippoformer.evaluation.needles import KINDS
from hippoformer.evaluation.provenance import provenance
from hippoformer.evaluation.recall import SPACING, cells
from hippoformer.evaluation.report import Report, shown
from hippoformer.evaluation.scoring import check_untouched, describe, reading
from hippoformer.evaluation.significance import TestResult, corrected, paired_test
from hippoformer.evaluation.statistics import RESAMPLES, Interval, mean_interval
from hippoformer.evaluation.variants import check_variants
from hippoformer.hippocampus.circuit import MemoryState
from hippoformer.training.credit import reconfigured


@dataclass(frozen=True)
class RecallOfVariant:
    """All questions under one variant.

    Attributes:
        name, options: of the variant. cells: as in `evaluation.recall`. asked: every question.
        right: distance -> share of all facts right, memory on. against: distance -> right minus right of the reference
            variant, of the same questions; None for the reference itself. test: of all questions in pairs, p values
            corrected for the number of variants by Holm's method.
    """

    name: str
    options: dict[str, Any]
    cells: list[dict[str, Any]]
    asked: tuple[Asked, ...]
    right: dict[int, Interval]
    against: dict[int, Interval] | None
    test: TestResult | None


@dataclass(frozen=True)
class RecallVariantsReport(Report):
    """Every variant, and where the numbers came from."""

    FORMAT: ClassVar[str] = "hippoformer.recall_variants/1"

    model: dict[str, Any]
    settings: dict[str, Any]
    reference: str
    variants: tuple[RecallOfVariant, ...]
    provenance: dict[str, Any]

    def to_table(self) -> Table:
        """One line a variant, for a terminal."""
        caption = f"exact answers to all facts, and the difference to {self.reference} on the same questions"
        table = Table(title=Text(f"Recall of {self.model['base_model_name']}, variants"), caption=Text(caption))
        table.add_column("variant")
        for distance in self.settings["distances"]:
            table.add_column(f"{distance:,} tokens ago", justify="right")
            table.add_column("difference", justify="right")
        table.add_column("p", justify="right")
        for variant in self.variants:
            row = [variant.name]
            for distance in self.settings["distances"]:
                row.append(shown("{:.0%}", variant.right[distance]))
                row.append("-" if variant.against is None else shown("{:+.0%}", variant.against[distance]))
            p = None if variant.test is None else variant.test.p_corrected
            table.add_row(*(Text(cell) for cell in (*row, "-" if p is None else f"{p:.2g}")))
        return table


def evaluate_recall_variants(
    model: Any,
    tokenizer: Any,
    documents: Sequence[Document],
    variants: Mapping[str, Mapping[str, Any]],
    distances: Sequence[int] = (2_000, 8_000, 32_000),
    facts: int = 9,
    kinds: Sequence[str] = KINDS,
    haystacks: int | None = None,
    spacing: int = SPACING,
    seed: int = 0,
    resamples: int = RESAMPLES,
    progress: Callable[[int, int], None] | None = None,
    command: str | None = None,
) -> RecallVariantsReport:
    """Plants facts in long streams and asks each variant for them later.

    Args:
        model: a HippoFormer whose base never hears the memory. tokenizer: its tokenizer.
        variants: name -> options of the config that differ; the first is the reference.
        documents, distances, facts, kinds, haystacks, spacing, seed: as for `evaluate_recall`.
        seed, resamples: also of the bootstrap over questions.
        progress: called with (tokens read, tokens in all).
        command: recorded in the report.

    Raises:
        ConfigurationError: no variant, an option that cannot differ, a number out of range, or a residual at an inner
            layer. TextError: no text.
    """
    check_untouched(model.config)
    check_variants(variants, model.config)
    examination = plan(tokenizer, documents, distances, facts, kinds, haystacks, spacing, seed)
    cache, rows = model.new_cache(examination.rows), examination.rows
    asked: dict[str, list[Asked]] = {name: [] for name in variants}
    with reading(model):
        memories = {name: _empty(model, rows, options) for name, options in variants.items()}
        for piece, read, ready in examination.pieces(model.device):
            with model.memory_off():
                for step in model.stream(piece, [piece.shape[1]] * rows, cache):
                    for name, options in variants.items():
                        memories[name] = _written(model, memories[name], options, piece, step, cache.lengths)
            without = unaided(model, cache, ready) if ready else []
            for name, options in variants.items() if ready else ():
                with reconfigured(model.hippocampus, **options) as config:
                    remembering = copy.copy(cache)
                    remembering.config, remembering.memory, remembering.written = config, memories[name], True
                    asked[name] += ask(model, remembering, ready, read, without)
            if progress is not None:
                progress(read * rows, examination.ids.numel())
    return RecallVariantsReport(
        model=describe(model),
        settings=examination.settings | {"resamples": resamples},
        reference=next(iter(variants)),
        variants=_compared(variants, asked, distances, seed, resamples),
        provenance=provenance(seed=seed, documents=list(documents), command=command),
    )


def _empty(model: Any, rows: int, options: Mapping[str, Any]) -> MemoryState:
    with reconfigured(model.hippocampus, **options) as config:
        return MemoryState.empty(rows, model.hippocampus.width, config, model.dtype, model.device)


def _written(
    model: Any, memory: MemoryState, options: Mapping[str, Any], piece: Any, step: Any, read: Sequence[int]
) -> MemoryState:
    """The memory after a step of the base, in which every row has read equally many tokens."""
    new, done = list(step.new), [total - n for total, n in zip(read, step.new, strict=True)]
    tokens = piece[:, step.start[0] : step.start[0] + new[0]]
    with reconfigured(model.hippocampus, **options) as config:
        _, memory = model.hippocampus.step(memory, done, step.hidden, tokens, -step.base_log_prob, new)
        if read[0] % config.segment_len == 0:
            memory, _ = model.hippocampus.end_segment(memory, list(read), list(range(len(new))))
    return memory


def _compared(
    variants: Mapping[str, Mapping[str, Any]],
    asked: Mapping[str, list[Asked]],
    distances: Sequence[int],
    seed: int,
    resamples: int,
) -> tuple[RecallOfVariant, ...]:
    right = {name: np.array([float(question.right) for question in of]) for name, of in asked.items()}
    first, *others = variants
    at = np.array([question.asked_distance for question in asked[first]])
    tests = dict(zip(others, corrected([paired_test(right[name], right[first]) for name in others]), strict=True))

    def by_distance(values: np.ndarray) -> dict[int, Interval]:
        return {distance: mean_interval(values[at == distance], seed, resamples) for distance in distances}

    return tuple(
        RecallOfVariant(
            name=name,
            options=dict(options),
            cells=cells(asked[name]),
            asked=tuple(asked[name]),
            right=by_distance(right[name]),
            against=None if name == first else by_distance(right[name] - right[first]),
            test=tests.get(name),
        )
        for name, options in variants.items()
    )
