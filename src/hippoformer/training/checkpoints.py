"""Training checkpoints: everything a run needs to go on as if it had never stopped, in safetensors and JSON.

    checkpoint-00000200/
        config.json, model.safetensors           a model anyone can load
        training.safetensors                     optimizer, and what else the whole run shares
        process-00000-of-00001.safetensors       of each process: the state of its rows, its random state
        training.json                            counters; written last, so a folder without it is not a checkpoint

A checkpoint is written under another name and renamed when whole: a kill or a full disk leaves the previous one
loadable. No pickle: nothing in a checkpoint can run code. What the run shares is written whole by the main process,
whatever engine had it in pieces, and rows are rows: a checkpoint of two processes also resumes on one.
"""

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from hippoformer.errors import CheckpointError
from hippoformer.model import checkpoint
from hippoformer.model.modeling import HippoFormer
from hippoformer.training import processes
from hippoformer.training.zero import ZeroOptimizer

ROWS = "rows."
_PREFIX = "checkpoint-"
_COUNTERS = "training.json"
_TENSORS = "training.safetensors"
_PROCESS = "process-{:05d}-of-{:05d}.safetensors"
_NOTES = "notes"  # what a process writes in words, in the metadata of its file


@dataclass
class Own:
    """What one process adds to a checkpoint.

    Attributes:
        tensors: by name; those of `rows.` have a row in front. notes: anything JSON has words for.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


def save(
    output: Path,
    step: int,
    model: HippoFormer,
    tensors: dict[str, Tensor],
    counters: dict[str, Any],
    keep: int,
    own: Own | None = None,
    state: dict[str, Tensor] | None = None,
    together: PartialState | None = None,
) -> Path:
    """Writes checkpoint `step` under `output` and removes all but the `keep` newest; called by every process.

    Args:
        tensors, counters: of the whole run. own: of this process.
        state: the model's tensors by name, where its own are sharded.
        together: the processes that write it; None where there is one.

    Raises:
        CheckpointError: it could not be written; the previous ones are unchanged.
    """
    final = output / f"{_PREFIX}{step:08d}"
    partial = output / f".{final.name}.partial"
    own = own or Own()
    index, count = (together.process_index, together.num_processes) if together is not None else (0, 1)
    try:
        if index == 0:
            for left in output.glob(f".{_PREFIX}*.partial"):  # of a run that was killed
                shutil.rmtree(left)
            partial.mkdir(parents=True)
        _meet(together)
        checkpoint.write_tensors(partial / _PROCESS.format(index, count), own.tensors, {_NOTES: json.dumps(own.notes)})
        if index == 0:
            checkpoint.save(model, partial, state)
            checkpoint.write_tensors(partial / _TENSORS, tensors)
        _meet(together)
        if index == 0:
            (partial / _COUNTERS).write_text(json.dumps(counters | {"processes": count}), encoding="utf-8")
            if final.exists():
                shutil.rmtree(final)
            os.replace(partial, final)
            for old in whole(output)[:-keep]:
                shutil.rmtree(old)
        _meet(together)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"could not write {final}: {error}; the checkpoints before it are unchanged") from error
    return final


def _meet(together: PartialState | None) -> None:
    if together is not None:
        together.wait_for_everyone()


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
    """Reads what a checkpoint has of the whole run: the model's tensors, the run's tensors, the counters.

    Args:
        path: of a checkpoint, or of an output folder, whose newest checkpoint is taken.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = locate(path)
    try:
        model, run = load_file(checkpoint.weights_file(path)), load_file(path / _TENSORS)
        return model, run, json.loads((path / _COUNTERS).read_text(encoding="utf-8"))
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"the checkpoint {path} is damaged: {error}") from error


def load_own(path: Path, index: int, count: int) -> Own:
    """Reads what process `index` of `count` goes on with; its rows also where others wrote the checkpoint.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = locate(path)
    try:
        written: int = json.loads((path / _COUNTERS).read_text(encoding="utf-8"))["processes"]
        if written == count:
            return _read_own(path / _PROCESS.format(index, count))
        parts = [_read_own(path / _PROCESS.format(i, written)) for i in range(written)]
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"the checkpoint {path} is damaged: {error}") from error
    tensors, notes = {}, parts[0].notes
    for name in parts[0].tensors:
        if name.startswith(ROWS):
            rows = torch.cat([part.tensors[name] for part in parts])
            share = rows.shape[0] // count
            tensors[name] = rows[index * share : (index + 1) * share]
    return Own(tensors, notes | {"bound": max(part.notes.get("bound", 0) for part in parts)})


def _read_own(file: Path) -> Own:
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return Own(tensors, json.loads((opened.metadata() or {})[_NOTES]))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimizer whose per-parameter state is tensors (AdamW), flat; every process must ask."""
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{index}.{name}": processes.whole(value)
        for index, values in state.items()
        for name, value in values.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Puts back what `optimizer_tensors` gave, in pieces where the parameters are."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, field_name = name.split(".", 2)
            state.setdefault(int(index), {})[field_name] = value
    if not isinstance(optimizer, ZeroOptimizer):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state = {i: {n: processes.like(t, parameters[i]) for n, t in values.items()} for i, values in state.items()}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
