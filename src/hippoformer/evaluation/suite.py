"""The whole evaluation: parts that run one after the other, each leaving one JSON file, and a summary made from those.

A part's file carries the request it answers: model, text and settings, by their digests. A file that answers the
request at hand is taken as it is, so what was interrupted goes on, and changing one setting runs again what depends on
it and nothing else.
"""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from rich.table import Table

from hippoformer.errors import ConfigurationError, HippoFormerError
from hippoformer.evaluation.parts import PARTS, Part, Progress, Suite
from hippoformer.evaluation.provenance import provenance, write_json
from hippoformer.evaluation.report import Report
from hippoformer.evaluation.scoring import describe
from hippoformer.evaluation.summary import headline, summary_table
from hippoformer.evaluation.tables import render


@dataclass(frozen=True)
class SuiteReport(Report):
    """All parts together.

    Attributes:
        request: what was asked for. seconds: part -> wall time of making its file, also where it was made before.
        headline: see `hippoformer.evaluation.summary`. parts: name -> content of the part's file.
    """

    FORMAT: ClassVar[str] = "hippoformer.evaluation/1"

    model: dict[str, Any]
    request: dict[str, Any]
    seconds: dict[str, float]
    headline: list[dict[str, Any]]
    parts: dict[str, dict[str, Any]]
    provenance: dict[str, Any]

    def to_table(self) -> Table:
        """The headline figures."""
        return summary_table(self.headline, self.model)


def estimated_minutes(suite: Suite, parts: Sequence[str], tokens_per_second: float = 1_000.0) -> dict[str, float]:
    """Part -> minutes at a reading speed; the default is that of SmolLM2-135M on two CPU cores.

    Raises:
        ConfigurationError: an unknown part.
    """
    return {part.name: part.tokens(suite) / tokens_per_second / 60 for part in chosen(parts)}


def chosen(parts: Sequence[str]) -> list[Part]:
    """Parts by their names, in the suite's order.

    Raises:
        ConfigurationError: none, or an unknown one.
    """
    unknown = [name for name in parts if name not in PARTS]
    if unknown or not parts:
        raise ConfigurationError(f"parts {', '.join(unknown) or '(none)'}: choose among {', '.join(PARTS)}.")
    return [part for name, part in PARTS.items() if name in parts]


def run_suite(
    suite: Suite,
    output_dir: Path,
    parts: Sequence[str] = tuple(PARTS),
    progress: Callable[[str], AbstractContextManager[Progress]] | None = None,
    announce: Callable[[str], None] = lambda message: None,
    summary: Path | None = None,
) -> SuiteReport:
    """Runs the parts whose files do not answer the request yet, and writes the summary.

    Args:
        suite: model, texts and settings.
        output_dir: for the files; made where it is missing.
        parts: some of `PARTS`.
        progress: gives a progress bar for a part's name, as a context.
        announce: told what happens, a line a time.
        summary: the file of all parts; `output_dir / "results.json"` where None. Tables of the headline figures go
            beside it as Markdown and LaTeX.

    Raises:
        ConfigurationError: an unknown part. HippoFormerError: the folder cannot be written, or what a part raises;
            files of earlier parts stay, and are used by the next run.
    """
    wanted = chosen(parts)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HippoFormerError(f"{output_dir} cannot be made ({error}); choose another folder") from error
    contents: dict[str, dict[str, Any]] = {}
    for part in wanted:
        request, file = suite.request(part), output_dir / part.file
        content = _answer(file, request)
        if content is not None:
            announce(f"{part.name}: {file} is there already")
        else:
            announce(f"{part.name}: running")
            began = time.perf_counter()
            with nullcontext(lambda done, total: None) if progress is None else progress(part.name) as bar:
                report = part.run(suite, bar)
            seconds = time.perf_counter() - began
            content = report.to_dict() | {"request": request, "seconds": seconds}
            write_json(file, content)
            announce(f"{part.name}: {seconds:.0f} s, {file}")
        contents[part.name] = content
    whole = SuiteReport(
        model=describe(suite.model),
        request={"parts": [part.name for part in wanted], "settings": asdict(suite.settings)},
        seconds={name: content["seconds"] for name, content in contents.items()},
        headline=headline(contents),
        parts=contents,
        provenance=provenance(suite.settings.seed, suite.documents, suite.command),
    )
    summary = output_dir / "results.json" if summary is None else summary
    whole.save(summary)
    summary.with_suffix(".md").write_text(render(whole.to_table(), "markdown") + "\n", encoding="utf-8")
    summary.with_suffix(".tex").write_text(render(whole.to_table(), "latex") + "\n", encoding="utf-8")
    return whole


def _answer(file: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """The content of a part's file where it answers the request; None where it is missing, cut off, or another's."""
    if not file.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # what cannot be read is made again
        return None
    return content if isinstance(content, dict) and content.get("request") == request else None
