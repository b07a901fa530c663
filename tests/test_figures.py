"""Figures show the numbers of the files: changing one moves what is drawn, and without the file nothing is drawn."""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from typer.testing import CliRunner

from hippoformer.cli import app
from hippoformer.errors import ResultError
from hippoformer.figures import FIGURES, Result, draw, draw_all, read_results
from result_files import Content, results, write_results


def numbers(figure: Figure) -> list[float]:
    """Every number that the axes hold: of lines, bars, points, fillings, intervals and coloured cells."""
    found: list[Any] = []
    for axes in figure.axes:
        for line in axes.lines:
            found += [line.get_xdata(), line.get_ydata()]
        for patch in axes.patches:
            found.append(patch.get_path().transformed(patch.get_patch_transform()).vertices)
        for collection in axes.collections:
            found += [path.vertices for path in collection.get_paths()]
            found += [collection.get_offsets(), [] if collection.get_array() is None else collection.get_array()]
    return [float(value) for part in found for value in np.asarray(part, dtype=float).ravel()]


@cache
def numbers_unchanged(figure: str) -> list[float]:
    return numbers(draw(figure, results()))


def changed(name: str, change: Callable[[Content], None]) -> list[Result]:
    """All results, one of them with something changed."""
    made = results()
    change(next(result.content for result in made if result.name == name))
    return made


def put(*path: str | int) -> Callable[[float], Callable[[Content], None]]:
    """Sets the value at a path of keys."""

    def with_value(value: float) -> Callable[[Content], None]:
        def change(content: Any) -> None:
            for key in path[:-1]:
                content = content[key]
            content[path[-1]] = value

        return change

    return with_value


# Figure, file, where a number stands in it, a new value, and what must be drawn then.
ONE_OF_EACH: list[tuple[str, str, tuple[str | int, ...], float, float]] = [
    ("summary", "wiki", ("conditions", "memory", "against_off", "ratio", "estimate"), 0.4321, -56.79),
    ("summary", "wiki", ("conditions", "memory", "against_off", "ratio", "high"), 1.777, 77.7),
    ("summary", "recall", ("cells", 0, "nats"), 3.21, 3.21),
    ("summary", "speed", ("results", 0, "ratio"), 0.6543, 65.43),
    ("salience", "trace", ("tokens", "salience", -3), 0.8765, 0.8765),
    ("memory_dynamics", "dynamics", ("segments", 1, "utilisation"), 0.4567, 45.67),
    ("memory_dynamics", "dynamics", ("segments", 1, "mean_priority"), 4.321, 4.321),
    ("memory_dynamics", "dynamics", ("segments", 2, "mean_effective_priority"), 3.217, 3.217),
    ("memory_dynamics", "dynamics", ("segments", 3, "mean_age"), 7.65, 7.65),
    ("memory_dynamics", "dynamics", ("segments", 3, "reactivated"), 1234, 1234),
    ("memory_dynamics", "dynamics", ("segments", 2, "forgotten"), 777, 777),
    ("replay", "dynamics", ("retained", 4, "priority"), 4.567, 4.567),
    ("replay", "variants_tiny", ("variants", 2, "against", "ratio", "estimate"), 1.2345, 23.45),
    ("training", "training_log", ("history", 1, "perplexity"), 12.34, 12.34),
    ("training", "training_log", ("history", 3, "eval_perplexity"), 23.45, 23.45),
    ("training", "training_log", ("history", 1, "loss_credit"), 1.357, 1.357),
    ("training", "training_log", ("history", 0, "tagged_share"), 0.987, 0.987),
    ("training", "training_log", ("history", 0, "grad_norm"), 3.579, 3.579),
    ("perplexity_by_position", "long_range", ("by_position", 0, "perplexity", "off"), 33.3, 33.3),
    ("perplexity_by_position", "long_range", ("by_position", 1, "gain", "memory", "estimate"), 0.777, 0.777),
    ("perplexity_by_position", "long_range", ("by_distance", "2", 1, "gain", "memory", "high"), 0.888, 0.888),
    ("perplexity_over_bytes", "wiki", ("conditions", "memory", "token_perplexity", "estimate"), 123.4, 123.4),
    ("perplexity_over_bytes", "wiki", ("conditions", "memory", "state_nbytes"), 7.7e6, 7.7),
    ("perplexity_over_bytes", "bytes", ("contestants", 1, "bits_per_byte", "low"), 0.5432, 0.5432),
    ("perplexity_over_bytes", "bytes", ("contestants", 1, "state_nbytes"), 44.4e6, 44.4),
    ("recall", "recall", ("cells", 1, "right"), 0.4321, 43.21),
    ("recall", "recall", ("cells", 1, "nats_off"), 99.25, 99.25),
    ("recall", "recall", ("asked", 0, "position"), 4321, 4321),
    ("ablations", "variants_tiny", ("variants", 1, "against_base", "ratio", "estimate"), 0.7654, -23.46),
    ("ablations", "variants_tiny", ("variants", 1, "against", "ratio", "low"), 0.6789, -32.11),
    ("brain", "brain", ("measures", 0, "values", "untrained gate", "estimate"), 1.1234, 1.1234),
    ("brain", "brain", ("measures", 0, "values", "trained gate", "high"), 9.876, 9.876),
    ("brain", "brain", ("measures", 0, "target"), 3.333, 3.333),
    ("brain", "brain", ("measures", 0, "chance"), 0.777, 0.777),
]


@pytest.mark.parametrize(("figure", "file", "path", "value", "drawn"), ONE_OF_EACH)
def test_what_is_drawn_is_what_the_file_says(
    figure: str, file: str, path: tuple[str | int, ...], value: float, drawn: float
) -> None:
    def close(found: list[float]) -> bool:
        return any(math.isclose(number, drawn, rel_tol=1e-6) for number in found)

    assert not close(numbers_unchanged(figure))
    assert close(numbers(draw(figure, changed(file, put(*path)(value)))))


# ---------------------------------------------------------------- without data


def test_an_unknown_figure_and_an_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="no figure 'pie'; choose among summary, architecture"):
        draw("pie", results())
    with pytest.raises(ResultError, match="format gif: choose among png, pdf, svg"):
        draw_all(results(), tmp_path / "figures", ("svg", "gif"))
    assert not (tmp_path / "figures").exists()


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "cannot be read as JSON"),
        ("a.json", b"\xff\xfe", "cannot be read as JSON"),
        ("a.json", "[]", "holds no result file"),
        ("a.txt", "{}", "holds no result file"),
    ],
)
def test_a_folder_that_cannot_be_read(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ResultError, match=message):
        read_results(tmp_path)


def test_the_command(tmp_path: Path) -> None:
    folder, output = write_results(tmp_path / "results"), tmp_path / "figures"
    (folder / "brain.json").unlink()

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["figures", *arguments, "--output", str(output), "--format", "svg"])

    result = run(str(folder))
    assert result.exit_code == 0, result.output
    assert {path.stem for path in output.iterdir()} == set(FIGURES) - {"brain"}
    assert "brain not drawn: needs a report of `hippoformer eval brain --output`" in result.stdout
    result = run(str(folder), "--name", "brain")
    assert result.exit_code == 2 and result.stderr.startswith("Error: the figure brain cannot be drawn: it needs")
    result = run(str(tmp_path / "nowhere"))
    assert result.exit_code == 2 and "is not a folder" in result.stderr
