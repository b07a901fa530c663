"""What a user measures on his own text: perplexity and recall, as rows with intervals.

    result = perplexity.run(model, tokenizer, read_documents(["book.txt"]), perplexity.Options())
    print(result.table())

The research evaluations lie beside the package, in the folder `evaluation` of a checkout, and use the same rows.
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
    """One figure. The metric's name says its unit.

    Attributes:
        evaluation, model: filled in by `Result.record` where they are empty.
        condition: the condition or variant that was measured. metric: what was measured.
        value: the figure; None where it is undefined. low, high: ends of its 95 % interval; None without one.
        n: documents, questions or other units behind it.
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
    """What an evaluation found.

    Attributes:
        rows: the figures. details: per document or per question, for figures and later analysis; plain JSON values.
    """

    rows: list[Row]
    details: dict[str, Any] = field(default_factory=dict)

    def table(self) -> str:
        """The rows as Markdown: a line per model and condition, a column per metric."""
        return table(self.rows)

    def record(
        self,
        evaluation: str,
        model: Any,
        options: Any,
        documents: Sequence[Any] | None = None,
        command: str | None = None,
    ) -> dict[str, Any]:
        """The content of a result file: rows, details, and where they came from.

        Args:
            evaluation: its name. model: the HippoFormer that was measured, or None. options: a dataclass.
            documents: the texts. command: as for `hippoformer.files.provenance`.
        """
        name = "" if model is None else str(model.config.base_model_name)
        rows = [
            dataclasses.replace(row, evaluation=row.evaluation or evaluation, model=row.model or name)
            for row in self.rows
        ]
        return {
            "format": FORMAT,
            "rows": [dataclasses.asdict(row) for row in rows],
            "model": None if model is None else describe(model),
            "settings": json.loads(json.dumps(dataclasses.asdict(options), default=str)),
            "provenance": provenance(documents, command),
            "details": self.details,
        }


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table: a line per model and condition, a column per metric, intervals in brackets."""
    tabulate = needed("tabulate")
    several = len({row.model for row in rows}) > 1
    metrics = list(dict.fromkeys(row.metric for row in rows))
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        cells.setdefault((row.model, row.condition) if several else (row.condition,), {})[row.metric] = _shown(row)
    lines = [[*key, *(of.get(metric, "") for metric in metrics)] for key, of in cells.items()]
    headings = [*(["model"] if several else []), "condition", *metrics]
    return str(tabulate.tabulate(lines, headings, tablefmt="github", disable_numparse=True))


def _shown(row: Row) -> str:
    if row.value is None:
        return "-"
    return _number(row.value) + ("" if row.low is None else f" [{_number(row.low)}, {_number(row.high or 0)}]")


def _number(value: float) -> str:
    return f"{value:,.0f}" if 1_000 <= abs(value) < 1e9 else f"{value:.4g}"


def bootstrap(
    statistic: Callable[..., Any], *samples: ArrayLike, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float | None, float | None]:
    """A statistic of whole documents with its percentile bootstrap interval (Efron 1979).

    Tokens of one document depend on each other, documents hardly do, so documents are resampled; several samples are
    resampled together (paired).

    Args:
        statistic: called with all samples and `axis`, over which it reduces.
        samples: one figure a document each, (D,). seed, resamples: of the bootstrap.

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
    interval = (
        needed("scipy.stats")
        .bootstrap(
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
        .confidence_interval
    )
    return value, float(interval.low), float(interval.high)


def describe(model: Any) -> dict[str, Any]:
    """What a result file says of the model: its options, dtype and device."""
    # A configuration may hold what JSON has no word for (a dtype, infinity): it is written by its name.
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
        raise MissingPackageError(
            f"evaluation needs {module} ({error}): pip install 'hippoformer[evaluate]'"
        ) from error
