"""Training checkpoints: everything a run needs to go on as if it had never stopped, in safetensors and JSON.

    checkpoint-00000200/
        config.json, hippocampus.safetensors     a model anyone can load
        training.safetensors                     optimizer, stream state, random state
        training.json                            counters; written last, so a folder without it is not a checkpoint

A checkpoint is written under another name and renamed when whole: a kill or a full disk leaves the previous one
loadable. No pickle: nothing in a checkpoint can run code.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hippoformer.errors import CheckpointError
from hippoformer.model import checkpoint
from hippoformer.model.modeling import HippoFormer

_PREFIX = "checkpoint-"
_COUNTERS = "training.json"
_TENSORS = "training.safetensors"


def save(
    output: Path, step: int, model: HippoFormer, tensors: dict[str, Tensor], counters: dict[str, Any], keep: int
) -> Path:
    """Writes checkpoint `step` under `output` and removes all but the `keep` newest.

    Raises:
        CheckpointError: it could not be written; the previous ones are unchanged.
    """
    final = output / f"{_PREFIX}{step:08d}"
    partial = output / f".{final.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        checkpoint.save(model, partial)
        checkpoint.write_tensors(partial / _TENSORS, tensors)
        (partial / _COUNTERS).write_text(json.dumps(counters), encoding="utf-8")
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"could not write {final}: {error}; the checkpoints before it are unchanged") from error
    for old in whole(output)[:-keep]:
        shutil.rmtree(old)
    return final


def whole(output: Path) -> list[Path]:
    """The complete checkpoints under `output`, oldest first."""
    return sorted(path for path in output.glob(f"{_PREFIX}*") if (path / _COUNTERS).is_file())


def locate(path: Path) -> Path:
    """The folder of a checkpoint: `path` itself, or the newest whole one in it.

    Raises:
        CheckpointError: there is none.
    """
    if (path / _COUNTERS).is_file():
        return path
    found = whole(path)
    if not found:
        raise CheckpointError(f"{path} holds no complete checkpoint: expected folders {_PREFIX}* with {_COUNTERS}")
    return found[-1]


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Reads a checkpoint: the model's tensors, the run's tensors, the counters.

    Args:
        path: of a checkpoint, or of an output folder, whose newest checkpoint is taken.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = locate(path)
    try:
        model, run = load_file(path / checkpoint.WEIGHTS), load_file(path / _TENSORS)
        return model, run, json.loads((path / _COUNTERS).read_text(encoding="utf-8"))
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"the checkpoint {path} is damaged: {error}") from error


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimizer whose per-parameter state is tensors (AdamW), flat."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{index}.{name}": value for index, values in state.items() for name, value in values.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Puts back what `optimizer_tensors` gave."""
    whole_state = optimizer.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, field = name.split(".", 2)
            state.setdefault(int(index), {})[field] = value
    optimizer.load_state_dict({"state": state, "param_groups": whole_state["param_groups"]})
