"""Every figure is drawn from result files as the evaluations write them, and says what it lacks."""

import json
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from evaluation.visualization import __main__ as visualization
from evaluation.visualization.figures import FIGURES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"


@pytest.fixture(scope="module")
def figures() -> dict[str, Figure]:
    results = visualization.read_results(RESULTS)
    return {name: draw(results) for name, (draw, _) in FIGURES.items()}


def texts(figure: Figure) -> str:
    found = [text.get_text() for axes in figure.axes for text in (axes.title, *axes.texts, axes.xaxis.label)]
    for axes in figure.axes:
        found += [label.get_text() for label in axes.get_yticklabels()] + [axes.get_title(loc="left")]
    return "\n".join(found)


def test_figures_hold_the_numbers_of_the_files(figures: dict[str, Figure]) -> None:
    rows = json.loads((RESULTS / "brain_articles.json").read_text(encoding="utf-8"))["rows"]
    (ratio,) = [r for r in rows if (r["condition"], r["metric"]) == ("trained gate", "tagged, content / function")]
    points = [line.get_xdata() for axes in figures["brain"].axes for line in axes.lines]
    assert any(list(point) == [ratio["value"]] for point in points)
    assert "untrained gate" in texts(figures["brain"]) and "home, 32,000 tokens ago" in texts(figures["summary"])
    assert "window 512 tokens + 4 sinks" in texts(figures["architecture"])
    assert "2,048 a row" in texts(figures["architecture"])
    assert len(figures["memory_dynamics"].axes) == len(figures["training"].axes) == 4


@pytest.mark.parametrize("name", FIGURES)
def test_no_panel_has_more_than_six_rows_and_no_labels_meet(name: str, figures: dict[str, Figure]) -> None:
    figure = figures[name]
    FigureCanvasAgg(figure).draw()
    for axes in figure.axes:
        boxes = [label.get_window_extent() for label in axes.get_yticklabels() if label.get_text()]
        if axes.yaxis_inverted() and axes.axison:
            assert len(boxes) <= 6
        assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    frames = [axes.get_tightbbox() for axes in figure.axes]
    assert all(box.x0 >= -1 and box.x1 <= figure.bbox.x1 + 1 for box in frames), "nothing is cut off"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "some").mkdir()
    for name in ("brain_articles", "training_log"):
        (tmp_path / "some" / f"{name}.json").write_bytes((RESULTS / f"{name}.json").read_bytes())
    words = [str(tmp_path / "some"), "--output", str(tmp_path / "figures"), "--formats", "png", "pdf", "svg"]
    assert visualization.main(words) == 0
    printed = capsys.readouterr().out
    assert "salience not drawn: needs trace" in printed and "consolidation not drawn: needs salience" in printed
    written = {file.name: file.read_bytes() for file in (tmp_path / "figures").iterdir()}
    names = ("architecture", "training", "brain")
    assert set(written) == {f"{name}.{form}" for name in names for form in ("png", "pdf", "svg")}
    assert visualization.main(words) == 0
    assert written == {file.name: file.read_bytes() for file in (tmp_path / "figures").iterdir()}, "the same bytes"
    for wrong in (["--names", "brian"], ["--formats", "gif"]):
        assert visualization.main([*words, *wrong]) == 2
