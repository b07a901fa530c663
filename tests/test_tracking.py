"""What a run logs, and that every number reaches the trackers."""

from pathlib import Path
from typing import Any

import pytest

from hippoformer.train import main
from tiny_training import arguments, history

LOGGED = {"loss_total", "loss_lm", "loss_sparsity", "loss_credit", "salience_mean", "tagged_share", "buffer_use"}
LOGGED |= {"recall_use", "consolidation_r", "learning_rate", "grad_norm", "perplexity", "base_perplexity"}

# Trackers and what they bring are not ours to keep free of warnings.
pytestmark = pytest.mark.filterwarnings("ignore")


def test_tensorboard_has_every_number(folder: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(arguments(folder, "run", "--report_to", "tensorboard")) == 0
    entries, events = history(folder / "run"), EventAccumulator(str(folder / "run" / "hippoformer"))
    events.Reload()
    for name in LOGGED:
        logged = {entry["step"]: entry[name] for entry in entries if name in entry}
        written = {float(event.step): event.value for event in events.Scalars(name)}
        assert written == pytest.approx(logged, rel=1e-5, abs=1e-8) and logged
    options = next((folder / "run" / "hippoformer").rglob("hparams.yml")).read_text()
    assert "buffer_size: 16" in options and "max_steps: 8" in options
    for entry in entries:
        assert all(0 <= entry[name] <= 1 for name in ("salience_mean", "tagged_share", "buffer_use", "recall_use"))
    assert entries[-1]["buffer_use"] > 0.5 and entries[-1]["recall_use"] > 0


def test_a_log_of_two_steps_is_the_mean_of_their_tokens(folder: Path) -> None:
    """Perplexities over their tokens, losses over their pieces."""
    assert main(arguments(folder, "each", "--logging_steps", "1", "--max_steps", "2")) == 0
    assert main(arguments(folder, "both", "--max_steps", "2")) == 0
    (one, two), (both,) = history(folder / "each"), history(folder / "both")
    for name in ("loss_lm", "loss_total", "grad_norm"):
        assert both[name] == pytest.approx((one[name] + two[name]) / 2)
    shares = sorted((one["perplexity"], both["perplexity"], two["perplexity"]))
    assert shares[1] == both["perplexity"]


class Recorder:
    """Stands in for a tracker's library."""

    name, requires_logging_directory, main_process_only = "recorder", False, True

    def __init__(self) -> None:
        self.opened: dict[str, Any] = {}
        self.numbers: list[tuple[int, dict[str, float]]] = []

    def __call__(self, project: str, **options: Any) -> "Recorder":
        self.opened = {"project": project, **options}
        return self

    def start(self) -> None: ...

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.opened["config"] = values

    def log(self, values: dict[str, float], step: int, **_: Any) -> None:
        self.numbers.append((step, values))

    def finish(self) -> None:
        self.opened["finished"] = True


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_the_call_reaches_the_tracker(folder: Path, tracker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Project and run name as the original's flags give them; options as scalars; every logged step."""
    import accelerate.tracking
    from accelerate.utils import LoggerType

    if tracker not in LoggerType.list():
        pytest.skip(f"this accelerate does not know {tracker}")
    recorder = Recorder()
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, tracker, recorder)
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: [LoggerType(tracker)])
    named = ["--wandb_project", "memories", "--wandb_run_name", "night"]
    named += ["--no_wandb", "--report_to", tracker] if tracker == "trackio" else []
    assert main(arguments(folder, "run", *named)) == 0
    assert recorder.opened["project"] == "memories" and recorder.opened["name"] == "night"
    assert recorder.opened["config"]["importance_weight_range"] == "[2.0, 5.0]" and recorder.opened["finished"]
    assert [step for step, _ in recorder.numbers] == [2, 4, 6, 8]
    assert [{"step": float(step)} | numbers for step, numbers in recorder.numbers] == history(folder / "run")
