"""What a comparison of memories in old and new code holds: figures, the share that calibration regains, and a table."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text

from hippoformer.evaluation.report import Report, with_range
from hippoformer.evaluation.statistics import (
    LEVEL,
    Interval,
    bootstrap_interval,
    perplexity_interval,
    weighted_mean_interval,
)

CONDITIONS = ("re-encoded", "calibrated", "as written", "own", "off")
CEILING, CALIBRATED, WRITTEN, OWN, OFF = CONDITIONS


@dataclass(frozen=True)
class Read:
    """One stream under one condition.

    Attributes:
        questions, right: facts asked for, and answered with every token right.
        answer_nats: -log p of all answers together. tokens, nll: of the continuation.
    """

    condition: str
    stream: int
    questions: int
    right: int
    answer_nats: float
    tokens: int
    nll: float


@dataclass(frozen=True)
class DriftReport(Report):
    """Every stream under every condition, and how far the code had moved.

    Attributes:
        model: that wrote. drifted: that read; `from` says how it came about.
        drift: of the anchors' keys and values, by which a file is judged when it is loaded, and of the keys of the
            stored episodes (`episodes`), each also after calibration; for anchors on those held out of the fit.
        calibrates: the model's own threshold would have had the memory mapped.
        reads: all of them.
    """

    FORMAT: ClassVar[str] = "hippoformer.drift/1"

    model: dict[str, Any]
    drifted: dict[str, Any]
    settings: dict[str, Any]
    drift: dict[str, float]
    calibrates: bool
    reads: tuple[Read, ...]
    provenance: dict[str, Any]

    def _sums(self, name: str, condition: str) -> NDArray[Any]:
        return np.array([getattr(read, name) for read in self.reads if read.condition == condition], dtype=np.float64)

    def rows(self) -> list[dict[str, Any]]:
        """Per condition: share of answers right, nats an answer and perplexity of the continuation, with intervals."""
        seed, resamples = self.settings["seed"], self.settings["resamples"]
        rows = []
        for name in CONDITIONS:
            questions, right, nats, tokens, nll = (
                self._sums(field, name) for field in ("questions", "right", "answer_nats", "tokens", "nll")
            )
            rows.append(
                {
                    "condition": name,
                    "right": right.sum() / questions.sum(),
                    "answer_nats": vars(weighted_mean_interval(nats, questions, seed, resamples)),
                    "perplexity": vars(perplexity_interval(nll, tokens, seed, resamples)),
                }
            )
        return rows

    def regained(self) -> dict[str, dict[str, Any]]:
        """Of answers and of the continuation: what drift cost, in nats an answer or a token, and the share of it that
        calibration regained; None where drift cost nothing."""
        seed, resamples = self.settings["seed"], self.settings["resamples"]
        found = {}
        for name, field, unit in (("answers", "answer_nats", "questions"), ("continuation", "nll", "tokens")):
            ceiling, calibrated, written = (self._sums(field, c) for c in (CEILING, CALIBRATED, WRITTEN))
            cost = weighted_mean_interval(written - ceiling, self._sums(unit, WRITTEN), seed, resamples)
            share: Interval | None = None
            if cost.estimate > 0:
                share = bootstrap_interval((written - calibrated, written - ceiling), _ratio, seed, resamples)
            found[name] = {"cost": vars(cost), "share": None if share is None else vars(share)}
        return found

    def content(self) -> dict[str, Any]:
        """With what follows from the reads."""
        return super().content() | {"conditions": self.rows(), "regained": self.regained()}

    def to_table(self) -> Table:
        """One line a condition, for a terminal."""
        shares = []
        for name, of in self.regained().items():
            share = of["share"]
            shown = "" if share is None else _shown("{:.0%}", share)
            shares.append(f"{name}: drift costs {_shown('{:.4f}', of['cost'])} nats, regained {shown or '-'}")
        d = self.drift
        caption = (
            f"drift of keys {d['keys']:.3f} (anchors), {d['episodes']:.3f} (episodes); calibrated "
            f"{d['keys_calibrated']:.3f}, {d['episodes_calibrated']:.3f}; the threshold of "
            f"{self.settings['drift_threshold']} {'calibrates' if self.calibrates else 'leaves the memory as it is'}\n"
            f"{'; '.join(shares)} [{LEVEL:.0%} intervals over {self.settings['streams']} streams]"
        )
        title = f"Memory of {self.model['base_model_name']} read by {self.drifted['from']}"
        table = Table(title=Text(title), caption=Text(caption))
        table.add_column("memory")
        for heading in ("right", "nats an answer", "perplexity"):
            table.add_column(heading, justify="right")
        for row in self.rows():
            nats, perplexity = (Text(_shown("{:.2f}", row[name])) for name in ("answer_nats", "perplexity"))
            table.add_row(row["condition"], f"{row['right']:.0%}", nats, perplexity)
        return table


def _ratio(part: NDArray[Any], whole: NDArray[Any], axis: int = -1) -> NDArray[Any]:
    return np.asarray(part.sum(axis) / whole.sum(axis))


def _shown(form: str, interval: dict[str, Any]) -> str:
    return with_range(form, interval["estimate"], interval["low"], interval["high"])
