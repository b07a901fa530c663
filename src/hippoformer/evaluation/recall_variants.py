"""Exact recall of one hippocampus under different options, or of several on one base: what parts are worth to facts.

What the base reads does not depend on the memory. It reads each stream once, with the memory off, and the episodes of
every variant are written beside it; every question is then put to a copy of the state with each of those memories in
turn. The answers are those of `evaluate_recall` under the same options.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from hippoformer.configuration import HippoFormerConfig
from hippoformer.data import Document
from hippoformer.errors import ConfigurationError
from hippoformer.evaluation.examination import Answer, Asked, ask, plan, unaided
from hippoformer.evaluation.needles import KINDS, Planted
from hippoformer.evaluation.provenance import provenance
from hippoformer.evaluation.recall import SPACING, cells
from hippoformer.evaluation.report import Report, shown
from hippoformer.evaluation.scoring import check_untouched, describe, reading
from hippoformer.evaluation.significance import TestResult, corrected, paired_test
from hippoformer.evaluation.statistics import RESAMPLES, Interval, mean_interval
from hippoformer.evaluation.variants import check_variants
from hippoformer.hippocampus.circuit import MemoryState
from hippoformer.model.modeling import HippoFormer
from hippoformer.training.credit import reconfigured


@dataclass(frozen=True)
class RecallOfVariant:
    """All questions under one variant.

    Attributes:
        name: of the variant. options: that differ from the model's; of one that was trained for itself, where it was.
        cells: as in `evaluation.recall`. asked: every question.
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
class _Contestant:
    """A variant: whose hippocampus it is, and the options that differ."""

    model: Any
    options: Mapping[str, Any]

    def empty(self, rows: int) -> MemoryState:
        """What it remembers of rows that have read nothing."""
        hippocampus = self.model.hippocampus
        with reconfigured(hippocampus, **self.options) as config:
            return MemoryState.empty(rows, hippocampus.width, config, self.model.dtype, self.model.device)

    def written(self, memory: MemoryState, reader: Any, piece: Tensor, step: Any, read: Sequence[int]) -> MemoryState:
        """The memory after a step of the base, in which every row has read equally many tokens."""
        new, done = list(step.new), [total - n for total, n in zip(read, step.new, strict=True)]
        tokens = piece[:, step.start[0] : step.start[0] + new[0]]
        heard, own = reader.config.memory_layers, self.model.config.memory_layers
        layers = dict(zip(heard, step.hidden.chunk(len(heard), dim=-1), strict=True))
        hidden = step.hidden if heard == own else torch.cat([layers[layer] for layer in own], dim=-1)
        with reconfigured(self.model.hippocampus, **self.options) as config:
            _, memory = self.model.hippocampus.step(memory, done, hidden, tokens, -step.prior_log_prob, new)
            if read[0] % config.segment_len == 0:
                memory, _ = self.model.hippocampus.end_segment(memory, list(read), list(range(len(new))))
        return memory

    def asked(
        self, cache: Any, memory: MemoryState, ready: list[tuple[int, Planted]], read: int, without: list[Answer]
    ) -> list[Asked]:
        """The questions that are due, put to the state as it would be with this memory."""
        with reconfigured(self.model.hippocampus, **self.options) as config:
            remembering = copy.copy(cache)
            remembering.model, remembering.config = self.model, config
            remembering.memory, remembering.written = memory, True
            return ask(self.model, remembering, ready, read, without)


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
    trained: Mapping[str, HippoFormer] | None = None,
) -> RecallVariantsReport:
    """Plants facts in long streams and asks each variant for them later.

    Args:
        model: a HippoFormer whose base never hears the memory. tokenizer: its tokenizer.
        variants: name -> options of the config that differ; the first is the reference.
        documents, distances, facts, kinds, haystacks, spacing, seed: as for `evaluate_recall`.
        seed, resamples: also of the bootstrap over questions.
        progress: called with (tokens read, tokens in all).
        command: recorded in the report.
        trained: name -> a model with a hippocampus of its own on `model.base` (`loading.load_beside`), which may read
            other layers and have other shapes; asked as it is, after `variants`.

    Raises:
        ConfigurationError: no variant, an option that cannot differ, a number out of range, a residual at an inner
            layer, two variants of one name, or a trained one with another base or window. TextError: no text.
    """
    trained = {} if trained is None else trained
    check_untouched(model.config)
    check_variants(variants, model.config)
    for name, other in trained.items():
        _check_trained(name, other, model, variants)
    contestants = {name: _Contestant(model, options) for name, options in variants.items()}
    contestants |= {name: _Contestant(other, {}) for name, other in trained.items()}
    examination = plan(tokenizer, documents, distances, facts, kinds, haystacks, spacing, seed)
    reader, rows = _reader([model, *trained.values()]), examination.rows
    cache = reader.new_cache(rows)
    asked: dict[str, list[Asked]] = {name: [] for name in contestants}
    with reading(model):
        memories = {name: contestant.empty(rows) for name, contestant in contestants.items()}
        for piece, read, ready in examination.pieces(model.device):
            with reader.episodes_off():
                for step in reader.stream(piece, [piece.shape[1]] * rows, cache):
                    for name, contestant in contestants.items():
                        memories[name] = contestant.written(memories[name], reader, piece, step, cache.lengths)
                memories = {name: replace(of, marginals=cache.memory.marginals) for name, of in memories.items()}
            without = unaided(reader, cache, ready) if ready else []
            for name, contestant in contestants.items() if ready else ():
                asked[name] += contestant.asked(cache, memories[name], ready, read, without)
            if progress is not None:
                progress(read * rows, examination.ids.numel())
    differing = dict(variants) | {name: {"trained": other.config.name_or_path} for name, other in trained.items()}
    return RecallVariantsReport(
        model=describe(model),
        settings=examination.settings | {"resamples": resamples},
        reference=next(iter(variants)),
        variants=_compared(differing, asked, distances, seed, resamples),
        provenance=provenance(seed=seed, documents=list(documents), command=command),
    )


def _check_trained(name: str, other: HippoFormer, model: Any, variants: Mapping[str, Any]) -> None:
    check_untouched(other.config)
    if other.base is not model.base:
        raise ConfigurationError(f"variant {name} has a base of its own: load it with load_beside(model, folder)")
    if name in variants:
        raise ConfigurationError(f"two variants are named {name}")
    shared = ("window", "sink_tokens", "segment_len", "marginal_weight", "marginal_prior")
    if unlike := [o for o in shared if getattr(other.config, o) != getattr(model.config, o)]:
        raise ConfigurationError(f"variant {name} has another {', '.join(unlike)}: one reading cannot serve both")


def _reader(models: Sequence[Any]) -> Any:
    """A model that hears all layers that these hear: the first of them, if that is enough."""
    first = models[0]
    layers = tuple(dict.fromkeys(layer for model in models for layer in model.config.memory_layers))
    if set(layers) <= set(first.config.memory_layers):
        return first
    as_it_is = {"use_lora": False, "freeze_base": False}  # adapters, where there are some, are in the base already
    options = first.config.to_dict() | as_it_is | {"memory_layer": list(layers), "residual_readout": False}
    return HippoFormer(HippoFormerConfig(**options), first.base)


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
