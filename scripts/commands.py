"""What the scripts that make results share: commands of the package, run one after another, each for a file that it
leaves. What is there is not made again, and the first command that fails ends a script.
"""

import functools
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def flags(options: Mapping[str, Any]) -> list[str]:
    """Each option and its value as words of a command line, as `hippoformer train` takes them."""
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def python(root: Path, *words: Any) -> None:
    """Runs Python with these words, in a folder.

    Raises:
        CalledProcessError: it failed.
    """
    subprocess.run([sys.executable, *map(str, words)], cwd=root).check_returncode()


def hippoformer(root: Path, *words: Any) -> None:
    """Runs a command of the package, as `python` does."""
    python(root, "-m", "hippoformer.cli", *words)


def make(root: Path, commands: Mapping[Path, Sequence[Any]]) -> None:
    """Runs the package's command of each file that is missing, in order.

    Raises:
        CalledProcessError: one failed; those after it were not run.
    """
    for file, command in commands.items():
        if not (root / file).is_file():
            hippoformer(root, *command)


def write_tables(root: Path) -> None:
    """Writes the tables of the README, docs/all-results.md and the model card from the files under results/."""
    python(root, "scripts/readme_results.py")


def ends_with_failure(main: Callable[[list[str] | None], int]) -> Callable[[list[str] | None], int]:
    """A script that ends with the first command that fails: tells which, and returns its exit status."""

    @functools.wraps(main)
    def told(argv: list[str] | None = None) -> int:
        try:
            return main(argv)
        except subprocess.CalledProcessError as error:
            print(f"exit status {error.returncode}: {' '.join(error.cmd[1:])}", file=sys.stderr)
            return error.returncode

    return told
