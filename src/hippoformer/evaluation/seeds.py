"""One evaluation over several training seeds: mean, standard deviation and interval of every headline figure.

A bootstrap over documents says how much the texts matter; only training again says how much the seed does.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rich.table import Table
from rich.text import Text

from hippoformer.errors import InputError
from hippoformer.evaluation.provenance import provenance
from hippoformer.evaluation.report import Report, with_range
from hippoformer.evaluation.significance import SeedSummary, over_seeds
from hippoformer.evaluation.summary import headline

_WHOLE = "hippoformer.evaluation/1"
# Name of a part by the format of its file.
_PARTS = {
    f"hippoformer.{name}/1": name for name in ("perplexity", "long_range", "salience", "brain", "quality", "recall")
}
_PARTS["hippoformer.variants/1"] = "ablations"


@dataclass(frozen=True)
class SeedRow:
    """A headline figure over all files. `values`: of each file, in order."""

    name: str
    unit: str
    values: list[float]
    summary: SeedSummary


@dataclass(frozen=True)
class SeedsReport(Report):
    """Every figure that all files have."""

    FORMAT: ClassVar[str] = "hippoformer.seeds/1"

    files: list[str]
    rows: tuple[SeedRow, ...]
    provenance: dict[str, Any]

    def to_table(self) -> Table:
        """One line a figure."""
        table = Table(title=Text(f"{len(self.files)} seeds"), caption=Text("mean, [95 % t interval], deviation"))
        table.add_column("figure")
        for heading in ("mean", "std", "lowest", "highest"):
            table.add_column(heading, justify="right")
        for row in self.rows:
            found = row.summary
            cells = (
                f"{row.name} ({row.unit})",
                with_range("{:.4g}", found.mean, found.low, found.high),
                "-" if found.std is None else f"{found.std:.2g}",
                f"{min(row.values):.4g}",
                f"{max(row.values):.4g}",
            )
            table.add_row(*(Text(cell) for cell in cells))
        return table


def aggregate(files: Sequence[Path], command: str | None = None) -> SeedsReport:
    """Puts together result files that differ by the seed of training.

    Args:
        files: of one part, or of the whole suite, one a seed; the same figures in each. command: recorded.

    Raises:
        InputError: no file, one that is no result file, or files without a figure in common.
    """
    found = [_figures(Path(file)) for file in files]
    common = [key for key in found[0] if all(key in of for of in found)] if found else []
    if not common:
        raise InputError(f"{len(files)} files have no headline figure in common; expected results of the same parts")
    rows = []
    for name, unit in common:
        values = [of[name, unit] for of in found]
        rows.append(SeedRow(name, unit, values, over_seeds(values)))
    return SeedsReport([str(file) for file in files], tuple(rows), provenance(command=command))


def _figures(file: Path) -> dict[tuple[str, str], float]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        form = content["format"]
        rows = content["headline"] if form == _WHOLE else headline({_PARTS[form]: content})
        return {(row["name"], row["unit"]): row["value"] for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file} is no result file with headline figures ({error!r}); expected one of eval all, "
            f"{', '.join(sorted(_PARTS.values()))}"
        ) from error
