"""Figures show the numbers of the files: changing one moves what is drawn, and without the file nothing is drawn."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree
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
from result_files import Content, contents, results, write_results

ROOT = Path(__file__).resolve().parents[1]


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


def words(figure: Figure) -> str:
    """Every text of the axes."""
    texts = [text for axes in figure.axes for text in axes.texts]
    labels = [label for axes in figure.axes for label in (*axes.get_yticklabels(), *axes.get_xticklabels())]
    titles = [axes.get_title("left") for axes in figure.axes]
    return "\n".join([*(text.get_text() for text in (*texts, *labels)), *titles])


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


@pytest.mark.parametrize("figure", FIGURES)
def test_the_same_files_give_the_same_figure(figure: str) -> None:
    one, other = (draw(figure, results()) for _ in range(2))
    assert np.array_equal(numbers(one), numbers(other), equal_nan=True) and words(one) == words(other)
    assert figure == "architecture" or figure in {row[0] for row in ONE_OF_EACH}


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [("window", 1234, "1,234 tokens"), ("buffer_size", 777, "777 episodes"), ("decay_rate", 0.321, "decay 0.321")],
)
def test_the_architecture_is_that_of_the_configuration(option: str, value: float, said: str) -> None:
    def change(made: list[Result]) -> list[Result]:
        for result in made:
            if result.config:
                result.config[option] = value
        return made

    assert said not in words(draw("architecture", results()))
    assert said in words(draw("architecture", change(results())))
    # One result with other options, though it be the newest, does not speak for the rest.
    made = [result for result in results() if result.config]
    assert len(made) > 2
    for result in made:
        result.content["model"] = {"config": dict(made[0].config or {})}
    change([max(made, key=lambda result: result.provenance.get("date", ""))])
    assert said not in words(draw("architecture", made))


def test_the_salience_figure_shows_the_words_of_the_text() -> None:
    figure = draw("salience", results())
    shown = [text.get_text() for text in figure.axes[0].texts]
    tokens = contents()["trace"]["tokens"]["text"]
    assert shown == [token.strip() for token in tokens[-len(shown) :]] and len(shown) > 100
    figure = draw("salience", changed("trace", put("tokens", "text", -2)("Ω")))  # type: ignore[arg-type]
    assert figure.axes[0].texts[-2].get_text() == "Ω"


def test_a_change_by_recall_is_underlined() -> None:
    def marks(change: float) -> list[Any]:
        def put_change(content: Content) -> None:
            content["tokens"]["log_p_off"] = list(content["tokens"]["log_p"])
            content["tokens"]["log_p"][-5] = content["tokens"]["log_p_off"][-5] + change

        (lines,) = [
            c for c in draw("salience", changed("trace", put_change)).axes[0].collections if c.get_label() == "recall"
        ]
        return [tuple(colour) for colour in lines.get_colors()]

    assert (len(marks(0.4)), len(marks(0.6)), len(marks(-0.6))) == (0, 1, 1)
    assert marks(0.6) != marks(-0.6)


def test_age_without_replay_is_counted_from_the_text() -> None:
    """Against a simulation: every episode enters the store when it leaves the window, and grows older ever since."""
    window, segment = 24, 16
    expected = []
    store: list[int] = []
    entered: set[int] = set()
    for end in range(segment, 97, segment):
        arrived = [p for p in range(1, end - window) if p not in entered]
        entered |= set(arrived)
        store = [age + 1 for age in store] + [1] * len(arrived)
        expected.append(float(np.mean(store)) if store else math.nan)

    def change(content: Content) -> None:
        content["segments"] = [content["segments"][1] | {"end": end} for end in range(segment, 97, segment)]

    made = [result for result in changed("dynamics", change) if result.name == "dynamics"]
    (line,) = [line for line in draw("memory_dynamics", made).axes[2].lines if "nothing" in str(line.get_label())]
    assert np.allclose(np.asarray(line.get_ydata(), dtype=float), expected, equal_nan=True)


def test_what_lies_beyond_the_window_is_marked() -> None:
    """The window of the long-range file is 24 tokens, and its third distance begins at 25."""
    distance = draw("perplexity_by_position", results()).axes[2]
    (span,) = [patch for patch in distance.patches if patch.get_alpha()]
    ends = span.get_path().transformed(span.get_patch_transform()).get_extents()
    assert (ends.x0, ends.x1) == (1.5, 2.5)
    near = draw("perplexity_by_position", changed("long_range", put("window")(30))).axes[2]
    assert not [patch for patch in near.patches if patch.get_alpha()]


# ---------------------------------------------------------------- without data


@pytest.mark.parametrize("figure", FIGURES)
def test_no_figure_is_drawn_without_its_result(figure: str, tmp_path: Path) -> None:
    needs = FIGURES[figure].needs
    for others in ([], [result for result in results() if not FIGURES[figure].usable(result)]):
        with pytest.raises(ResultError, match=re.escape(f"the figure {figure} cannot be drawn: it needs {needs}")):
            draw(figure, others)
        with pytest.raises(ResultError, match="cannot be drawn"):
            draw_all(others, tmp_path / "figures", ("svg",), [figure])
    assert not (tmp_path / "figures").exists()


def test_what_cannot_be_drawn_is_listed(tmp_path: Path) -> None:
    written, missing = draw_all([r for r in results() if r.name in ("brain", "speed")], tmp_path / "made", ("svg",))
    assert {path.stem for path in written} == {"brain", "architecture"}
    assert missing == {name: d.needs for name, d in FIGURES.items() if name not in ("brain", "architecture")}
    assert draw_all([], tmp_path / "none", ("svg",)) == ([], {name: d.needs for name, d in FIGURES.items()})


@pytest.mark.parametrize(
    ("figure", "file", "path", "empty"),
    [
        ("training", "training_log", "history", []),
        ("brain", "brain", "measures", []),
        ("recall", "recall", "cells", []),
        ("memory_dynamics", "dynamics", "segments", []),
        ("replay", "dynamics", "segments", []),
    ],
)
def test_an_empty_result_is_no_result(figure: str, file: str, path: str, empty: Any) -> None:
    made = [result for result in changed(file, put(path)(empty)) if result.name == file]
    with pytest.raises(ResultError, match="it needs"):
        draw(figure, made)


def test_an_unknown_figure_and_an_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="no figure 'pie'; choose among summary, architecture"):
        draw("pie", results())
    with pytest.raises(ResultError, match="format gif: choose among png, pdf, svg"):
        draw_all(results(), tmp_path / "figures", ("svg", "gif"))
    assert not (tmp_path / "figures").exists()


# ---------------------------------------------------------------- files


def test_files_are_what_their_names_say(tmp_path: Path) -> None:
    written, missing = draw_all(results(), tmp_path / "figures", names=["architecture", "brain"])
    assert not missing
    assert [p.name for p in written] == [f"{n}.{f}" for n in ("architecture", "brain") for f in ("png", "pdf", "svg")]
    for path in written:
        begin = path.read_bytes()[:8]
        if path.suffix == ".svg":
            assert ElementTree.parse(path).getroot().tag.endswith("svg")
        else:
            assert begin.startswith({".png": b"\x89PNG", ".pdf": b"%PDF"}[path.suffix])
    before = [path.read_bytes() for path in written]
    draw_all(results(), tmp_path / "figures", names=["architecture", "brain"])
    assert [path.read_bytes() for path in written] == before, "the same numbers gave another file"


def test_a_folder_is_read_once_over(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "results")
    (folder / "notes.json").write_text('{"a": 1}', encoding="utf-8")
    (folder / "list.json").write_text("[1]", encoding="utf-8")
    assert [r.name for r in read_results(folder)] == [r.name for r in results()]
    # The file of a whole evaluation repeats its parts, and brings those whose own files are not there.
    brain = contents()["brain"]
    parts = {"brain": brain, "other_brain": brain | {"measures": []}}
    whole = contents()["overall"] | {"parts": parts}
    (folder / "all").mkdir()
    (folder / "all" / "results.json").write_text(json.dumps(whole), encoding="utf-8")
    found = {result.name: result.file for result in read_results(folder)}
    assert "brain" in found and "all/results/brain" not in found
    assert found["all/results/other_brain"] == found["all/results"] == "all/results.json"


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


def test_the_page_explains_every_figure() -> None:
    page = (ROOT / "docs" / "figures.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE) == list(FIGURES)


def test_what_a_result_is_called(tmp_path: Path) -> None:
    """A part of an evaluation is called by the text it read, other files by their names."""
    own = contents()["wiki"]
    (tmp_path / "full").mkdir()
    for name, sources in (("full/perplexity", ["data/wiki.test.raw"]), ("full/two", ["a", "b"]), ("my_book", ["a"])):
        provenance = own["provenance"] | {"data": {"sources": sources}}
        content = own | {"provenance": provenance, "made up": name}
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    titles = {result.name: result.title for result in read_results(tmp_path)}
    assert titles == {"full/perplexity": "wiki.test.raw", "full/two": "full/two", "my_book": "my book"}


def test_one_way_with_more_and_more_bytes_is_one_line_with_one_name() -> None:
    from hippoformer.figures.perplexity import _family

    names = ("hippoformer", "hippoformer, buffer 64", "base, window 8", "base, window 16", "base, window 8 + 4 by h2o")
    contestants = [{"name": name} for name in names]
    families = [_family(contestant, contestants) for contestant in contestants]
    assert families == ["hippoformer"] * 2 + ["base, window …"] * 2 + ["base, window 8 + 4 by h2o"]
    more = [*contestants, {"name": "base, window 8 + 9 by h2o"}]
    assert _family(more[-1], more) == _family(more[-2], more) == "base, window … by h2o"
