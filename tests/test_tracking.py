"""What a run tells trackers: every number, read back from what the tracker wrote."""

import contextlib
import json
import math
import sqlite3
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from hippoformer.errors import ConfigurationError
from hippoformer.train import main
from hippoformer.training.processes import new_accelerator
from hippoformer.training.tracking import means
from tiny_training import arguments

TOLD = {"loss_total", "loss_lm", "loss_salience_weighted", "loss_sparsity", "loss_memory_util", "loss_credit"}
TOLD |= {"salience_mean", "tagged_share", "buffer_use", "recall_use", "drift", "consolidation_r", "learning_rate"}

# Trackers and what they bring are not ours to keep free of warnings.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _own_accelerator() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def history(run: Path) -> list[dict[str, float]]:
    return json.loads((run / "training_log.json").read_text())["history"]


def test_tensorboard_has_every_number(folder: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(arguments(folder, "run", "--report_to", "tensorboard")) == 0
    events = EventAccumulator(str(folder / "run" / "hippoformer"))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= TOLD
    for name in TOLD:
        logged = {entry["step"]: entry[name] for entry in history(folder / "run") if name in entry}
        written = {float(event.step): event.value for event in events.Scalars(name)}
        assert written == pytest.approx(logged, rel=1e-5, abs=1e-8) and logged
    options = next((folder / "run" / "hippoformer").rglob("hparams.yml")).read_text()
    assert "buffer_size: 16" in options and "seed: 42" in options


def test_the_numbers_mean_what_they_say(folder: Path) -> None:
    assert main(arguments(folder, "run")) == 0
    entries = history(folder / "run")
    for entry in entries:
        assert all(0 <= entry[name] <= 1 for name in ("salience_mean", "tagged_share", "buffer_use", "recall_use"))
    assert entries[0]["drift"] == 0 < entries[-1]["drift"], "the code moves while the hippocampus learns"
    assert entries[-1]["buffer_use"] > 0.5 and entries[-1]["recall_use"] > 0


def test_numbers_of_several_steps_are_weighted_by_what_they_are_of() -> None:
    common = {"base_nll": 0.0, "salience": 0.0, "tagged": 0.0, "skipped": 0.0}
    one = {
        "tokens": 30.0,
        "learned": 15.0,
        "nll": 60.0,
        "mixture": 3.0,
        "pieces": 4.0,
        "loss_lm": 8.0,
        "grad_norm": 2.0,
    } | common
    other = {
        "tokens": 10.0,
        "learned": 5.0,
        "nll": 0.0,
        "mixture": 5.0,
        "pieces": 4.0,
        "loss_lm": 4.0,
        "grad_norm": 0.0,
    } | common
    got = means([one, other | {"skipped": 1.0}])
    assert got["perplexity"] == pytest.approx(math.exp(3.0)) and got["recall_use"] == pytest.approx(0.2)
    assert got["loss_lm"] == pytest.approx(1.5) and got["grad_norm"] == 2.0 and got["skipped_steps"] == 1.0


class Recorder:
    """Stands in for a tracker's library."""

    def __init__(self) -> None:
        self.opened: dict[str, Any] = {}
        self.numbers: list[tuple[int, dict[str, float]]] = []

    def __call__(self, project: str, **options: Any) -> "Recorder":
        self.opened = {"project": project, **options}
        return self

    name, requires_logging_directory, main_process_only = "recorder", False, True

    def start(self) -> None: ...

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.opened["config"] = values

    def log(self, values: dict[str, float], step: int, **_: Any) -> None:
        self.numbers.append((step, values))

    def finish(self) -> None:
        self.opened["finished"] = True


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_the_call_gets_through(folder: Path, tracker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Project and run name as the original's flags give them; options as scalars; every logged step."""
    import accelerate.tracking
    from accelerate.utils import LoggerType

    if tracker not in LoggerType.list():
        pytest.skip(f"this accelerate does not know {tracker}")
    recorder = Recorder()
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, tracker, recorder)
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: [LoggerType(tracker)])
    named = ["--wandb_project", "memories", "--wandb_run_name", "night"]
    named += ["--no_wandb"] if tracker == "trackio" else []
    assert main(arguments(folder, "run", "--report_to", tracker, *named)) == 0
    assert recorder.opened["project"] == "memories" and recorder.opened["name"] == "night"
    assert recorder.opened["config"]["lora_target_modules"] == '["q_proj", "v_proj"]' and recorder.opened["finished"]
    assert [step for step, _ in recorder.numbers] == [2, 4, 6, 8]
    assert [{"step": float(step)} | numbers for step, numbers in recorder.numbers] == history(folder / "run")


@pytest.mark.slow
def test_wandb_offline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(folder))
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert main(arguments(folder, "run", "--wandb_project", "memories", "--wandb_run_name", "night")) == 0
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    missing = {*TOLD, "memories", "night"}
    for _ in range(100):  # wandb writes in a process of its own, which may be behind
        missing -= {name for name in missing if name.encode() in file.read_bytes()}
        if not missing:
            break
        time.sleep(0.2)
    assert missing == set()


@pytest.mark.slow
def test_trackio_keeps_its_own_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("trackio") is None:
        pytest.skip("trackio is not installed")
    monkeypatch.setenv("TRACKIO_DIR", str(folder / "trackio"))  # read when trackio is imported
    assert main(arguments(folder, "run", "--report_to", "trackio")) == 0
    with contextlib.closing(sqlite3.connect(folder / "trackio" / "hippoformer.db")) as database:
        rows = database.execute("SELECT step, metrics FROM metrics ORDER BY step").fetchall()
    assert [{"step": float(step)} | json.loads(numbers) for step, numbers in rows] == history(folder / "run")


def test_a_tracker_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="nosuch"):
        new_accelerator(["nosuch"], str(tmp_path), 1, None)
