"""Does salience foresee what a memory will be worth?

Every document is read twice. Once as usual, for the salience of each transition at the moment it was written. Once with
room for everything and all memories equal, for the credit each turns out to earn: its share of the predictions made of
later tokens beyond the window. The two are compared token by token: Spearman's rank correlation with the credit,
Pearson's with it (the consolidation R-score of the original, retrieval quality being the credit), and how much of all
credit the transitions hold that a rule would keep if it could keep one in ten.

Each figure stands beside that of plain surprise, and of the same gate before training. And beside what nobody could do
better: credit depends on a future that chance has a part in. What every second segment owes to a transition is one
measure of its worth, what the segments between owe another; from how far they agree follows how reliable their sum is
(Spearman 1910, Brown 1910), and no forecast can correlate with a measure by more than the root of its reliability
(Spearman 1904). That is an upper bound: what both halves owe to the same turn of the story counts as foreseeable.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from rich.table import Table
from rich.text import Text
from scipy import stats
from torch import Tensor

from hippoformer.data import Document
from hippoformer.errors import TextError
from hippoformer.evaluation.provenance import provenance
from hippoformer.evaluation.report import Report, shown
from hippoformer.evaluation.scoring import describe, encode, hidden_states, reading
from hippoformer.evaluation.statistics import RESAMPLES, Interval, mean_interval
from hippoformer.evaluation.views import untrained_gate
from hippoformer.training.credit import measure_credit_by_halves
from hippoformer.training.hidden_states import HiddenStateCache
from hippoformer.training.readers import CachedReader

RULES = ("salience", "surprise", "untrained gate")
_KEPT = 0.1
_PROVING = 4


@dataclass(frozen=True)
class RuleResult:
    """One rule over all documents; means of the documents' figures, with bootstrap intervals over documents.

    Attributes:
        rule: one of `RULES`. spearman, pearson: correlation with credit.
        held: share of all credit held by the tenth of the transitions that the rule ranks highest; 0.1 is chance.
    """

    rule: str
    spearman: Interval
    pearson: Interval
    held: Interval


@dataclass(frozen=True)
class SalienceReport(Report):
    """Every rule, and where the numbers came from.

    Attributes:
        perfect: what `held` would be for a rule that knew the credit.
        ceiling: what `pearson` could be at most, of the transitions with at least four segments to prove themselves in;
            None if no document is long enough.
    """

    FORMAT: ClassVar[str] = "hippoformer.salience/1"

    model: dict[str, Any]
    documents: list[str]
    transitions: int
    perfect: Interval
    ceiling: Interval | None
    rules: tuple[RuleResult, ...]
    provenance: dict[str, Any]

    def to_table(self) -> Table:
        """One line a rule, for a terminal."""
        caption = (
            f"{len(self.documents)} documents, {self.transitions:,} transitions; credit held by the best tenth, had it "
            f"been known: {self.perfect.estimate:.2f}"
        )
        if self.ceiling is not None:
            caption += f"; no forecast could reach a Pearson above {self.ceiling.estimate:.2f}"
        table = Table(title=Text(f"Salience and credit of {self.model['base_model_name']}"), caption=Text(caption))
        table.add_column("rule")
        for heading in ("Spearman with credit", "Pearson with credit", "credit held by its best tenth"):
            table.add_column(heading, justify="right")
        for result in self.rules:
            cells = (shown("{:.3f}", of) for of in (result.spearman, result.pearson, result.held))
            table.add_row(*(Text(cell) for cell in (result.rule, *cells)))
        return table


def evaluate_salience(
    model: Any,
    tokenizer: Any,
    documents: Sequence[Document],
    cache_dir: Path,
    limit_tokens: int | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    progress: Callable[[int, int], None] | None = None,
    command: str | None = None,
) -> SalienceReport:
    """Measures salience, surprise and an untrained gate against the credit of held-out text.

    Args:
        model: a HippoFormer whose base is frozen. tokenizer: its tokenizer.
        documents: each read from an empty memory; those in which no transition earned credit are left out.
        cache_dir: where hidden states are kept.
        limit_tokens: read only the first so many tokens of each document.
        seed: of the bootstrap, and of the untrained gate. progress: called with (documents read, documents in all).
        command: recorded in the report.

    Raises:
        TextError: no transition of any document earned credit.
    """
    encoded = [encode(tokenizer, document, i, limit_tokens) for i, document in enumerate(documents)]
    encoded = [document for document in encoded if document.tokens_scored > 0]
    figures: dict[str, list[tuple[float, float, float]]] = {rule: [] for rule in RULES}
    perfect, ceilings, titles, transitions = [], [], [], 0
    with reading(model):
        cache = hidden_states(model, encoded, cache_dir)
        for number, document in enumerate(encoded):
            halves = measure_credit_by_halves(model.hippocampus, cache[number])
            credit = halves.sum(0)
            known = ~credit.isnan()
            if known.sum() > 1 and credit[known].max() > 0:
                measured = {
                    "salience": _salience(model, cache, number),
                    "surprise": 1.0 - cache[number].log_prob.exp(),
                    "untrained gate": _salience(untrained_gate(model, seed), cache, number),
                }
                worth = credit[known].double().numpy()
                for rule, values in measured.items():
                    figures[rule].append(_compared(values[known].double().numpy(), worth))
                perfect.append(_held(worth, worth))
                proven = known.clone()
                proven[-(model.config.window + _PROVING * model.config.segment_len) :] = False
                ceilings += _ceiling(halves[:, proven].double().numpy())
                titles.append(document.document.title)
                transitions += int(known.sum())
            if progress is not None:
                progress(number + 1, len(encoded))
    if not titles:
        raise TextError(
            f"no transition of {len(encoded)} documents earned credit: none outlived the window of "
            f"{model.config.window} tokens and was of use; name longer texts"
        )
    intervals = {
        rule: [mean_interval([f[i] for f in of], seed, resamples) for i in range(3)] for rule, of in figures.items()
    }
    return SalienceReport(
        model=describe(model),
        documents=titles,
        transitions=transitions,
        perfect=mean_interval(perfect, seed, resamples),
        ceiling=mean_interval(ceilings, seed, resamples) if ceilings else None,
        rules=tuple(RuleResult(rule, *of) for rule, of in intervals.items()),
        provenance=provenance(seed=seed, documents=list(documents), command=command),
    )


def _salience(model: Any, cache: HiddenStateCache, number: int) -> Tensor:
    """(T,) salience of each transition of a document when it was written."""
    readings = CachedReader(model, cache, 1).through([number])
    return torch.cat([piece.found.salience[0].float().cpu() for piece in readings if piece.found is not None])


def _compared(values: Any, credit: Any) -> tuple[float, float, float]:
    """Spearman, Pearson, and the share of credit held by the best tenth."""
    return (
        float(stats.spearmanr(values, credit).statistic),
        float(stats.pearsonr(values, credit).statistic),
        _held(values, credit),
    )


def _ceiling(halves: Any) -> list[float]:
    """The most that anything can correlate with the sum of two (T,) halves; nothing where one does not vary."""
    if halves.shape[1] < 2 or not halves.std(axis=1).all():
        return []
    agree = max(0.0, float(stats.pearsonr(*halves).statistic))
    return [float(np.sqrt(2 * agree / (1 + agree)))]


def _held(values: Any, credit: Any) -> float:
    best = np.argsort(-values, kind="stable")[: max(1, round(_KEPT * len(values)))]
    return float(credit[best].sum() / credit.sum())
