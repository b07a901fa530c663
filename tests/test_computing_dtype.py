"""The precision of a base model is measured, remembered for the machine, and left alone where it was asked for."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from hippoformer.model import base_models
from hippoformer.model.base_models import in_computing_dtype, load_base_model
from tiny import tiny_base

# Seconds of one product with many rows and with one, in float32 and in bfloat16.
SLOW_BFLOAT16, FAST_BFLOAT16 = ((1.0, 4.4), (1.0, 0.6)), ((1.0, 0.2), (1.0, 0.5))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HIPPOFORMER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    return tmp_path / "home"


def timed(monkeypatch: pytest.MonkeyPatch, times: tuple[tuple[float, float], ...] = SLOW_BFLOAT16) -> list[int]:
    """Puts a made-up processor in place; the list grows with every product that it times."""
    calls: list[int] = []

    def seconds(dtype: torch.dtype, rows: int, hidden: int, intermediate: int) -> float:
        calls.append(rows)
        return times[rows == 1][dtype is torch.bfloat16]

    monkeypatch.setattr(base_models, "seconds", seconds)
    return calls


@pytest.mark.parametrize(("times", "expected"), [(SLOW_BFLOAT16, torch.float32), (FAST_BFLOAT16, torch.bfloat16)])
def test_the_faster_precision_is_taken_and_said_and_remembered(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, times: Any, expected: torch.dtype
) -> None:
    calls, base = timed(monkeypatch, times), tiny_base(dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = in_computing_dtype(base)
    assert model.dtype is expected
    assert all(torch.equal(tensor.bfloat16(), before[name]) for name, tensor in model.state_dict().items())
    (line,) = caplog.messages
    assert f"computing in {str(expected).removeprefix('torch.')}" in line and "times as fast" in line
    measured = len(calls)
    assert measured and in_computing_dtype(tiny_base(dtype=torch.bfloat16)).dtype is expected
    assert (len(calls), len(caplog.messages)) == (measured, 1), "measured again"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "other units")
    in_computing_dtype(tiny_base(dtype=torch.bfloat16))
    assert len(calls) > measured and len(json.loads((home / "precision.json").read_text())) == 2


@pytest.mark.parametrize("content", ["{", "[1]", '{"KEY": "fast"}', '{"KEY": NaN}', '{"KEY": -1.0}', "\udcff"])
def test_a_damaged_file_is_measured_again_and_mended(home: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    calls, file = timed(monkeypatch), home / "precision.json"
    in_computing_dtype(tiny_base(dtype=torch.bfloat16))
    ((key, ratio),) = json.loads(file.read_text()).items()
    file.write_bytes(content.replace("KEY", key).encode("utf-8", "surrogateescape"))
    calls.clear()
    assert in_computing_dtype(tiny_base(dtype=torch.bfloat16)).dtype is torch.float32
    assert calls and json.loads(file.read_text())[key] == ratio


def test_a_cache_folder_that_cannot_be_written_is_said_and_no_failure(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    home.write_text("a file where the folder should be")
    timed(monkeypatch)
    assert in_computing_dtype(tiny_base(dtype=torch.bfloat16)).dtype is torch.float32
    assert "not remembered" in caplog.text


@pytest.mark.parametrize(("accelerator", "memory"), [(True, 1 << 30), (False, 4096)])
def test_accelerators_full_memories_and_a_wish_leave_a_model_as_it_is(
    home: Path, monkeypatch: pytest.MonkeyPatch, accelerator: bool, memory: int, tmp_path: Path
) -> None:
    calls = timed(monkeypatch)
    tiny_base(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert load_base_model(tmp_path / "base", dtype=dtype).dtype is dtype
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": memory // 4096, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert in_computing_dtype(tiny_base(dtype=torch.bfloat16)).dtype is torch.bfloat16 and not calls


def test_the_real_timer_times_products(home: Path) -> None:
    assert base_models.seconds(torch.float32, 128, 64, 128) > base_models.seconds(torch.float32, 128, 8, 8)
    assert in_computing_dtype(tiny_base(dtype=torch.bfloat16)).dtype in (torch.bfloat16, torch.float32)
