"""The result files of a folder, as figures and the report read them.

Every file that `hippoformer eval …`, training and the benchmarks write is told by its `format`; a training log, which
has none, by its `history`. A file that holds several results in `parts` gives one result a part. Files of other kinds
are left alone.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hippoformer.errors import ResultError

TRAINING = "hippoformer.training/1"


@dataclass(frozen=True)
class Result:
    """One measured thing.

    Attributes:
        name: file name without its suffix, with the part behind a slash where a file holds several.
        file: file name.
        format: what its content is laid out as.
        content: the parsed JSON.
    """

    name: str
    file: str
    format: str
    content: dict[str, Any]

    @property
    def provenance(self) -> dict[str, Any]:
        """Command, commit, date and machine behind the numbers; empty where they were not recorded."""
        return self.content.get("provenance") or self.content.get("run") or {}

    @property
    def config(self) -> dict[str, Any] | None:
        """All options of the model that was measured, or None."""
        config: dict[str, Any] | None = (self.content.get("model") or {}).get("config")
        return config


def read_results(folder: Path) -> list[Result]:
    """All results of a folder, by name.

    Raises:
        ResultError: no such folder, no result in it, or a file that is not JSON.
    """
    if not folder.is_dir():
        raise ResultError(f"{folder} is not a folder; expected one with the JSON files that `hippoformer eval` writes.")
    found = [result for path in sorted(folder.glob("*.json")) for result in _results_of(path)]
    # An evaluation's own file repeats those of its parts.
    results = [r for i, r in enumerate(found) if not any(r.content == other.content for other in found[:i])]
    if not results:
        raise ResultError(
            f"{folder} holds no result file; expected JSON written by `hippoformer eval … --output` or by training."
        )
    return results


def of_format(results: Sequence[Result], *formats: str) -> list[Result]:
    """Those laid out in one of the formats, in their order."""
    return [result for result in results if result.format in formats]


def p_value(test: dict[str, Any] | None) -> float | None:
    """Of a comparison, corrected where several were made together; None where there was no test."""
    if test is None:
        return None
    p: float | None = test["p"] if test["p_corrected"] is None else test["p_corrected"]
    return p


def _results_of(path: Path) -> list[Result]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ResultError(f"{path} cannot be read as JSON ({error}); remove it, or make it again.") from error
    if not isinstance(content, dict):
        return []
    if isinstance(content.get("parts"), dict):
        whole = {name: value for name, value in content.items() if name != "parts"}
        parts = {name: part for name, part in content["parts"].items() if isinstance(part, dict) and "format" in part}
        return [
            Result(path.stem, path.name, content["format"], whole),
            *(Result(f"{path.stem}/{name}", path.name, part["format"], part) for name, part in parts.items()),
        ]
    if {"arguments", "history"} <= content.keys():
        return [Result(path.stem, path.name, TRAINING, content)]
    return [Result(path.stem, path.name, content["format"], content)] if "format" in content else []
