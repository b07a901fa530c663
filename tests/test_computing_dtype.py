"""The precision of a base model is measured, remembered for the machine, and left alone where it was asked for."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hippoformer.model import computing_dtype
from hippoformer.model.base_models import in_computing_dtype, load_base_model
from tiny import tiny_base


class Processor:
    """A fake timer: seconds of one product, by precision and by whether it has one row."""

    def __init__(self, reading: dict[str, float], generating: dict[str, float]) -> None:
        self.reading, self.generating, self.calls = reading, generating, 0

    def __call__(self, dtype: torch.dtype, rows: int, hidden: int, intermediate: int) -> float:
        self.calls += 1
        return (self.generating if rows == 1 else self.reading)[str(dtype).removeprefix("torch.")]


SLOW_BFLOAT16 = ({"float32": 1.0, "bfloat16": 4.4}, {"float32": 1.0, "bfloat16": 0.6})
FAST_BFLOAT16 = ({"float32": 1.0, "bfloat16": 0.2}, {"float32": 1.0, "bfloat16": 0.5})


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HIPPOFORMER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    return tmp_path / "home"


def timed(monkeypatch: pytest.MonkeyPatch, times: tuple[dict[str, float], dict[str, float]]) -> Processor:
    processor = Processor(*times)
    monkeypatch.setattr(computing_dtype, "seconds", processor)
    return processor


@pytest.mark.parametrize(("times", "expected"), [(SLOW_BFLOAT16, torch.float32), (FAST_BFLOAT16, torch.bfloat16)])
def test_the_faster_precision_is_taken_and_said_and_remembered(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], times: Any, expected: torch.dtype
) -> None:
    processor = timed(monkeypatch, times)
    before = tiny_base(dtype=torch.bfloat16).state_dict()
    model = in_computing_dtype(tiny_base(dtype=torch.bfloat16))
    assert model.dtype is expected
    assert all(torch.equal(tensor.bfloat16(), before[name]) for name, tensor in model.state_dict().items())
    (line,) = capsys.readouterr().err.splitlines()
    assert f"computing in {str(expected).removeprefix('torch.')}" in line and "times as fast" in line
    measured = processor.calls
    assert measured and in_computing_dtype(tiny_base(dtype=torch.bfloat16)).dtype is expected
    assert processor.calls == measured and not capsys.readouterr().err, "measured again"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "other units")
    in_computing_dtype(tiny_base(dtype=torch.bfloat16))
    assert processor.calls > measured, "another processor"
    assert len(json.loads((home / "precision.json").read_text())) == 2


@pytest.mark.parametrize("content", ["{", "[1]", '{"KEY": "fast"}', '{"KEY": NaN}', '{"KEY": -1.0}', "\udcff"])
def test_a_damaged_file_is_measured_again_and_mended(home: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    processor, model = timed(monkeypatch, SLOW_BFLOAT16), tiny_base(dtype=torch.bfloat16)
    key = computing_dtype._key(torch.bfloat16, model.config.hidden_size, model.config.intermediate_size)
    home.mkdir()
    file = home / "precision.json"
    file.write_bytes(content.replace("KEY", key).encode("utf-8", "surrogateescape"))
    assert in_computing_dtype(model).dtype is torch.float32
    assert processor.calls and json.loads(file.read_text())[key] > 1


def test_a_cache_folder_that_cannot_be_written_is_said_and_no_failure(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home.write_text("a file where the folder should be")
    timed(monkeypatch, SLOW_BFLOAT16)
    assert in_computing_dtype(tiny_base(dtype=torch.bfloat16)).dtype is torch.float32
    assert "not remembered" in capsys.readouterr().err


@pytest.mark.parametrize(("accelerator", "memory"), [(True, 1 << 30), (False, 4096)])
def test_accelerators_and_weights_that_fill_the_memory_leave_a_model_as_it_is(
    home: Path, monkeypatch: pytest.MonkeyPatch, accelerator: bool, memory: int
) -> None:
    processor = timed(monkeypatch, SLOW_BFLOAT16)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": memory // 4096, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert in_computing_dtype(tiny_base(dtype=torch.bfloat16)).dtype is torch.bfloat16
    assert not processor.calls


def test_a_precision_that_was_asked_for_is_not_measured(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    processor = timed(monkeypatch, SLOW_BFLOAT16)
    tiny_base(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert load_base_model(tmp_path / "base", dtype=dtype, progress=False).dtype is dtype
    assert in_computing_dtype(tiny_base(dtype=torch.float32)).dtype is torch.float32
    assert not processor.calls
    assert load_base_model(tmp_path / "base", progress=False).dtype is torch.float32 and processor.calls


def test_the_real_timer_times_products(home: Path) -> None:
    config: Any = SimpleNamespace(hidden_size=64, intermediate_size=128)
    assert computing_dtype.seconds(torch.float32, 128, 64, 128) > computing_dtype.seconds(torch.float32, 128, 8, 8)
    assert computing_dtype.faster_dtype(torch.bfloat16, config, progress=False) in (torch.bfloat16, torch.float32)
