"""Rows: what every evaluation returns, prints as a table, and writes."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hippoformer import evaluation
from hippoformer.files import result_file


@dataclass(frozen=True)
class Row:
    """One figure: its name says the unit; low and high are the ends of its 95 % interval; n documents or questions.

    `Result.record` fills in an empty evaluation or model. A value is None where it is undefined.
    """

    evaluation: str = field(default="", kw_only=True)
    model: str = field(default="", kw_only=True)
    condition: str
    metric: str
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None


@dataclass
class Result:
    """The rows of an evaluation, and details per document or question as plain JSON values."""

    rows: list[Row]
    details: dict[str, Any] = field(default_factory=dict)

    def table(self) -> str:
        """See `table`."""
        return table(self.rows)

    def record(self, name: str, model: Any, options: Any, documents: Sequence[Any] | None = None) -> dict[str, Any]:
        """The content of a result file, see `hippoformer.files.result_file`; options: a dataclass."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        return result_file(name, model, dataclasses.asdict(options), rows, documents) | {"details": self.details}


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table, intervals in brackets: conditions by metrics, or metrics by conditions where that has
    fewer columns.
    """
    several = len({row.model for row in rows}) > 1
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        ends = "" if row.low is None or row.high is None else f" [{_shown(row.low)}, {_shown(row.high)}]"
        condition = f"{row.model}, {row.condition}" if several else row.condition
        cells.setdefault(condition, {})[row.metric] = _shown(row.value) + ends
    metrics = list(dict.fromkeys(metric for of in cells.values() for metric in of))
    if len(metrics) <= len(cells):
        return evaluation.table(cells)
    turned = {metric: {name: of[metric] for name, of in cells.items() if metric in of} for metric in metrics}
    return evaluation.table({metric: dict.fromkeys(cells, "") | of for metric, of in turned.items()}, "metric")


_shown = evaluation.number
