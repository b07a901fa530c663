"""What a user measures on his own text: perplexity and recall, as rows with intervals.

The research evaluations lie beside the package, in `evaluation/` of a checkout, and use the same rows.
"""

import dataclasses
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hippoformer.errors import InputError, MissingPackageError
from hippoformer.files import provenance

FORMAT = "hippoformer.rows/1"
RESAMPLES = 10_000
LEVEL = 0.95
_BATCH_NUMBERS = 10_000_000  # numbers that one batch of resamples holds: 80 MB


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

    def record(
        self, evaluation: str, model: Any, options: Any, documents: Sequence[Any] | None = None, command: str = ""
    ) -> dict[str, Any]:
        """The content of a result file: rows, details, and where they came from.

        Args:
            evaluation: its name. model: the HippoFormer that was measured. options: a dataclass.
            documents: the texts. command: as for `hippoformer.files.provenance`.
        """
        name = str(model.config.base_model_name)
        filled = [
            dataclasses.replace(row, evaluation=row.evaluation or evaluation, model=row.model or name)
            for row in self.rows
        ]
        return {
            "format": FORMAT,
            "rows": [dataclasses.asdict(row) for row in filled],
            "model": describe(model),
            "settings": json.loads(json.dumps(dataclasses.asdict(options), default=str)),
            "provenance": provenance(documents, command),
            "details": self.details,
        }


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table, intervals in brackets: conditions by metrics, or metrics by conditions where that has
    fewer columns.
    """
    several = len({row.model for row in rows}) > 1
    cells: dict[tuple[str, str], str] = {}
    for row in rows:
        interval = "" if row.low is None or row.high is None else f" [{_number(row.low)}, {_number(row.high)}]"
        condition = f"{row.model}, {row.condition}" if several else row.condition
        cells[condition, row.metric] = "-" if row.value is None else _number(row.value) + interval
    conditions, metrics = (list(dict.fromkeys(key[side] for key in cells)) for side in (0, 1))
    if len(metrics) > len(conditions):
        headings = ["metric", *conditions]
        lines = [[metric, *(cells.get((of, metric), "") for of in conditions)] for metric in metrics]
    else:
        headings = ["condition", *metrics]
        lines = [[of, *(cells.get((of, metric), "") for metric in metrics)] for of in conditions]
    return str(needed("tabulate").tabulate(lines, headings, tablefmt="github", disable_numparse=True))


def _number(value: float) -> str:
    return f"{value:,.0f}" if 1_000 <= abs(value) < 1e9 else f"{value:.4g}"


def bootstrap(
    statistic: Callable[..., Any], *samples: ArrayLike, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float | None, float | None]:
    """A statistic with its percentile bootstrap interval over documents (Efron 1979).

    Tokens of one document depend on each other, documents hardly do.

    Args:
        statistic: called with all samples and `axis`, over which it reduces.
        samples: one figure a document each, (D,); resampled together (paired). seed, resamples: of the bootstrap.

    Returns:
        (value, low, high); no ends for a single document, which cannot be resampled.

    Raises:
        InputError: no document, lengths that differ, or a figure that is not finite.
    """
    arrays = [np.asarray(sample, dtype=np.float64) for sample in samples]
    if not arrays[0].size or any(a.shape != arrays[0].shape or a.ndim != 1 or not np.isfinite(a).all() for a in arrays):
        raise InputError(
            f"samples of shapes {[a.shape for a in arrays]}; expected lists of one length, one finite number a document"
        )
    value, documents = float(statistic(*arrays, axis=-1)), len(arrays[0])
    if documents < 2:
        return value, None, None
    found = needed("scipy.stats").bootstrap(
        arrays,
        statistic,
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=resamples,
        confidence_level=LEVEL,
        batch=max(1, min(resamples, _BATCH_NUMBERS // documents)),
        rng=np.random.default_rng(seed),
    )
    return value, float(found.confidence_interval.low), float(found.confidence_interval.high)


def share(hits: Sequence[bool]) -> tuple[float, float, float]:
    """Percent of cases that hit, and the ends of the interval by Wilson's formula (Wilson 1927)."""
    interval = needed("scipy.stats").binomtest(sum(hits), len(hits)).proportion_ci(LEVEL, "wilson")
    return 100 * sum(hits) / len(hits), 100 * float(interval.low), 100 * float(interval.high)


def describe(model: Any) -> dict[str, Any]:
    """What a result file says of the model; what JSON has no word for (a dtype, infinity) goes by its name."""
    config = json.loads(json.dumps(model.config.to_dict(), default=str), parse_constant=str)
    return {"dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device), "config": config}


def needed(module: str) -> Any:
    """An optional package.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(f"this needs {module} ({error}): pip install 'hippoformer[evaluate]'") from error
