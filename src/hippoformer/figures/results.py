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
        name: file name without its suffix, with its folder where that lies below the one that was named, and with the
            part behind a slash where a file holds several.
        file: file name, with that folder.
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
    def title(self) -> str:
        """What a reader is shown: the name, or, where that only says which part of an evaluation this is, the text."""
        sources = (self.provenance.get("data") or {}).get("sources", ())
        if "/" in self.name and len(sources) == 1:
            return Path(sources[0]).name
        return self.name.replace("_", " ")

    @property
    def config(self) -> dict[str, Any] | None:
        """All options of the model that was measured, or None."""
        config: dict[str, Any] | None = (self.content.get("model") or {}).get("config")
        return config


def read_results(folder: Path) -> list[Result]:
    """All results of a folder and the folders in it, by name.

    Raises:
        ResultError: no such folder, no result in it, or a file that is not JSON.
    """
    if not folder.is_dir():
        raise ResultError(f"{folder} is not a folder; expected one with the JSON files that `hippoformer eval` writes.")
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*.json"))
    found = [result for path in paths for result in _results_of(folder, path)]
    # An evaluation's own file repeats those of its parts: the others come first.
    found.sort(key=lambda result: result.name != _stem(Path(result.file)))
    results = [r for i, r in enumerate(found) if not any(r.content == other.content for other in found[:i])]
    results.sort(key=lambda result: result.name)
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


def _stem(path: Path) -> str:
    return path.with_suffix("").as_posix()


def _results_of(folder: Path, path: Path) -> list[Result]:
    """What a file holds; nothing where it is of another kind. `path` is relative to the folder."""
    name, file = _stem(path), path.as_posix()
    try:
        content = json.loads((folder / path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ResultError(f"{folder / path} cannot be read as JSON ({error}); remove it, or make it again.") from error
    if not isinstance(content, dict):
        return []
    if isinstance(content.get("parts"), dict):
        whole = {name: value for name, value in content.items() if name != "parts"}
        parts = {part: of for part, of in content["parts"].items() if isinstance(of, dict) and "format" in of}
        return [
            Result(name, file, content["format"], whole),
            *(Result(f"{name}/{part}", file, of["format"], of) for part, of in parts.items()),
        ]
    if {"arguments", "history"} <= content.keys():
        return [Result(name, file, TRAINING, content)]
    return [Result(name, file, content["format"], content)] if "format" in content else []
