"""What every command of this folder does with an error of the package: one line, and exit code 2."""

import functools
import sys
from collections.abc import Callable
from typing import Any

from hippoformer.errors import HippoFormerError


def explained(command: Callable[..., int | None]) -> Callable[..., int]:
    """A command that returns 0 on success, and 2 after an error that explains itself."""

    @functools.wraps(command)
    def run(*arguments: Any) -> int:
        try:
            return command(*arguments) or 0
        except HippoFormerError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return run
