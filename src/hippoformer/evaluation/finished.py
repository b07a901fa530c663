"""What a long comparison has found so far, kept in a file until its report is written: a run cut off goes on there.

Each finding is a line of JSON, written as soon as it is there and found again by a digest of everything that it depends
on. Nothing is ever taken over that another model, other options, another text or other code would have made.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hippoformer.errors import HippoFormerError


class Finished:
    """Findings by their digests.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found = _read(path)

    def get(self, key: str) -> dict[str, Any] | None:
        """What was added under a digest, now or before an interruption."""
        return self._found.get(key)

    def add(self, key: str, finding: Mapping[str, Any]) -> None:
        """Keeps a finding.

        Raises:
            HippoFormerError: the file cannot be written.
        """
        self._found[key] = dict(finding)
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                # The line end comes first: a line cut off by a kill spoils itself alone, not the next.
                file.write("\n" + json.dumps({"key": key, "finding": finding}, allow_nan=False))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise HippoFormerError(
                f"{self.path} could not be written ({error.strerror or error}); free some space or choose another "
                "output. What was finished before is kept there."
            ) from error


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Every whole line; one that was cut off is made again."""
    found = {}
    for line in path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            kept = json.loads(line)
            found[kept["key"]] = kept["finding"]
        except (ValueError, TypeError, KeyError):
            continue
    return found
