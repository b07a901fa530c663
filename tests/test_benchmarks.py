"""The speed benchmark on a tiny model: it times what it says, in turns, and its file can be read again."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import hippoformer
from hippoformer import HippoFormer
from tiny import awake

PATH = Path(__file__).resolve().parents[1] / "benchmarks" / "speed.py"
BUFFER, SEGMENT, WINDOW = 16, 6, 12


@pytest.fixture(scope="module")
def speed() -> ModuleType:
    specification = importlib.util.spec_from_file_location("speed", PATH)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def model() -> HippoFormer:
    return awake(buffer_size=BUFFER, segment_len=SEGMENT, window=WINDOW)


def ticking(speed: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the clock by one that counts what was run: every run logs its name and takes as long as it says."""
    log: list[str] = []
    clock = SimpleNamespace(perf_counter=lambda: float(sum(len(name) for name in log)))
    monkeypatch.setattr(speed, "time", clock)
    return log


def test_runs_take_turns_and_the_first_turn_is_not_counted(speed: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    log = ticking(speed, monkeypatch)
    seconds = speed.in_turns(3, on=lambda: log.append("on"), off=lambda: log.append("off"))
    assert log == ["off", "on", "on", "off", "off", "on", "on", "off"]
    assert seconds == {"on": [2.0] * 3, "off": [3.0] * 3}


def test_speed_is_by_the_median(speed: ModuleType) -> None:
    assert speed.speed(100, [1.0, 2.0, 50.0]) == 50.0


def test_scoring_compares_memory_with_the_bare_base(speed: ModuleType, model: HippoFormer) -> None:
    seen: list[tuple[bool, bool, list[int], int]] = []
    original = model.score

    def score(ids: torch.Tensor, past_key_values: Any) -> torch.Tensor:
        seen.append((model.episodes_on, past_key_values.written, list(past_key_values.lengths), ids.shape[1]))
        return original(ids, past_key_values=past_key_values)

    model.score = score  # type: ignore[method-assign]
    (result,) = speed.scoring(model, rows=2, tokens=18, repeats=2, seed=0)
    filled = speed.past_the_store(model)
    assert filled >= BUFFER + WINDOW and filled % SEGMENT == 0
    timed = [call for call in seen if call[2] != [0, 0]]
    assert sorted(timed) == [(False, False, [filled] * 2, 18)] * 3 + [(True, True, [filled] * 2, 18)] * 3
    assert result["tokens"] == 36
    assert result["ratio"] == pytest.approx(result["value"] / result["reference"])
    assert len(result["seconds"]["on"]) == len(result["seconds"]["off"]) == 2


def test_generation_starts_where_it_says(speed: ModuleType, model: HippoFormer) -> None:
    seen: list[tuple[bool, int, int]] = []
    original = model.generate

    def generate(prompt: torch.Tensor, past_key_values: Any, **options: Any) -> torch.Tensor:
        seen.append((model.episodes_on, past_key_values.lengths[0], prompt.shape[1]))
        return original(prompt, past_key_values=past_key_values, **options)

    model.generate = generate  # type: ignore[method-assign]
    results = speed.generate(model, near=5, far=50, tokens=4, repeats=1, seed=0)
    assert sorted(set(seen)) == [(False, 4, 5), (False, 49, 50), (True, 4, 5), (True, 49, 50)]
    near, far, flat_on, flat_off = results
    assert "token 5:" in near["measure"] and "token 50:" in far["measure"]
    assert flat_on["ratio"] == pytest.approx(far["value"] / near["value"])
    assert flat_off["ratio"] == pytest.approx(far["reference"] / near["reference"])


def test_writing_goes_through_the_memory_as_reading_does(speed: ModuleType, model: HippoFormer) -> None:
    """The pieces put together are what a stream does: positions in order, the window left alone, a full store."""
    config = model.config
    episodes = speed.Episodes.empty(3, config, model.dtype, model.device)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for number in range(9):
            episodes, took = speed.one_segment(model.hippocampus, episodes, number, generator)
            assert set(took) == {"encode", "write", "admit", "consolidate"}
    read = 9 * SEGMENT
    position = episodes.position
    for row in position:
        assert row[BUFFER:-1][:WINDOW].tolist() == list(range(read - WINDOW, read))
        assert row[BUFFER + WINDOW :].tolist() == [-1] * (SEGMENT + 1)
        stored = row[:BUFFER][row[:BUFFER] >= 0]
        assert stored.tolist() == sorted(stored.tolist()) and int(stored[-1]) < read - WINDOW
    assert int((position[:, :BUFFER] >= 0).sum(-1).min()) >= BUFFER - SEGMENT


def test_microseconds_are_per_token_of_all_rows(
    speed: ModuleType, model: HippoFormer, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = speed.one_segment

    def one_second_each(*arguments: Any) -> Any:
        episodes, took = original(*arguments)
        return episodes, dict.fromkeys(took, 1.0)

    monkeypatch.setattr(speed, "one_segment", one_second_each)
    (result,) = speed.write(model, rows=2, segments=4, seed=0)
    assert result["value"] == pytest.approx(4e6 / (2 * SEGMENT))
    assert list(result["pieces"].values()) == pytest.approx([1e6 / (2 * SEGMENT)] * 4)
    assert result["tokens"] == 4 * 2 * SEGMENT
    assert 0 < result["stored"] <= BUFFER


def test_state_is_measured_at_both_marks(speed: ModuleType, model: HippoFormer) -> None:
    state, resident = speed.memory(model, first=40, second=101, seed=0)
    cache = model.new_cache(1)
    model.score(torch.ones(1, 40, dtype=torch.int64), past_key_values=cache)
    assert state["reference"] == pytest.approx(cache.nbytes / 1e6)
    assert state["ratio"] == 1.0
    assert resident["value"] > 50  # a process with torch in it
    assert state["tokens"] == 101


def test_the_script_writes_table_and_file(
    speed: ModuleType,
    model: HippoFormer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(hippoformer, "load", lambda name, **options: (model, None))
    output = tmp_path / "new" / "speed.json"
    speed.main(["--parts", "scoring", "write", "--repeats", "1", "--score-tokens", "6", "--output", str(output)])
    content = json.loads(output.read_text(encoding="utf-8"))
    assert content["format"] == "hippoformer.speed/1"
    assert [result["part"] for result in content["results"]] == ["scoring", "write", "write"]
    assert content["settings"]["trained"] is True
    assert content["provenance"]["seed"] == 0
    shown = capsys.readouterr().out
    assert "streamed scoring" in shown and "of which consolidate" in shown and "generate" not in shown


def test_an_unknown_part_is_refused(speed: ModuleType) -> None:
    with pytest.raises(SystemExit):
        speed.parse(["--parts", "everything"])
    with pytest.raises(SystemExit):
        speed.parse(["--repeats", "0"])
