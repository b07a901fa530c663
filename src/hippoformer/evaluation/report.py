"""What every evaluation hands back: numbers for a program, JSON for a file, a table for a reader.

A report is a frozen dataclass that derives from `Report` and names its format. What it holds becomes JSON field by
field; one that derives further figures from its fields overrides `content`.
"""

import dataclasses
import json
import os
from typing import Any, ClassVar

from rich.table import Table

from hippoformer.evaluation.provenance import write_json
from hippoformer.evaluation.statistics import Interval


@dataclasses.dataclass(frozen=True)
class Report:
    """Base of all reports.

    Attributes:
        FORMAT: name and version of the JSON layout, its first key.
    """

    FORMAT: ClassVar[str]

    def content(self) -> dict[str, Any]:
        """What goes into the file beside the name of the format."""
        return dataclasses.asdict(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers, as they go into the JSON file.

        Raises:
            ValueError: NaN or infinity among the numbers, which JSON cannot hold.
        """
        # Through JSON and back: tuples become lists, and what JSON cannot hold is found here.
        plain: dict[str, Any] = json.loads(json.dumps({"format": self.FORMAT} | self.content(), allow_nan=False))
        return plain

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the report as JSON, whole or not at all.

        Raises:
            HippoFormerError: the file cannot be written.
        """
        write_json(path, self.to_dict())

    def to_table(self) -> Table:
        """The figures for a terminal."""
        raise NotImplementedError(f"{type(self).__name__} has no table")


def changes(ratio: Interval) -> tuple[float, float | None, float | None]:
    """A ratio and the ends of its interval as changes: 0.9 is -0.1."""
    low, high = ratio.low, ratio.high
    return ratio.estimate - 1, None if low is None else low - 1, None if high is None else high - 1


def shown(form: str, interval: Interval) -> str:
    """An interval for a table."""
    return with_range(form, interval.estimate, interval.low, interval.high)


def with_range(form: str, estimate: float, low: float | None, high: float | None) -> str:
    """An estimate and, where there is one, its interval in brackets."""
    if low is None or high is None:
        return form.format(estimate)
    return f"{form.format(estimate)} [{form.format(low)}, {form.format(high)}]"
