"""Training checkpoints: everything a run needs to continue as if it had never stopped, in safetensors and JSON.

    checkpoint-00000200/
        config.json, model.safetensors           a model anyone can load
        training.safetensors                     optimizer and measured credit
        process-00000-of-00001.safetensors       of each process: the state of its rows, its order, its random state
        training.json                            counters; written last, so a folder without it is not a checkpoint

A checkpoint is written under another name and renamed when it is complete: a kill or a full disk leaves the previous
one loadable. No pickle: nothing in a checkpoint can run code. What FSDP2 has in pieces is written whole, and rows are
rows, so a checkpoint of two processes also resumes on one.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from hippoformer.errors import CheckpointError
from hippoformer.model import checkpoint
from hippoformer.model.base_models import load_base_model
from hippoformer.model.modeling import HippoFormer
from hippoformer.training.processes import like, whole

KEPT = 2
ROWS = "rows."
_PREFIX = "checkpoint-"
_COUNTERS = "training.json"
_TENSORS = "training.safetensors"
_PROCESS = "process-{:05d}-of-{:05d}.safetensors"
_ORDER = "order"


@dataclass
class RunState:
    """What a checkpoint has besides the weights.

    Attributes:
        shared, counters: of the whole run: tensors, and JSON.
        own, order: of one process: tensors, those named `rows.*` with a row in front, and JSON.
    """

    shared: dict[str, Tensor]
    counters: dict[str, Any]
    own: dict[str, Tensor]
    order: dict[str, Any]


def complete(output: Path) -> list[Path]:
    """The complete checkpoints under `output`, oldest first."""
    return sorted(path for path in output.glob(f"{_PREFIX}*") if (path / _COUNTERS).is_file())


def locate(path: Path) -> Path:
    """The folder of a checkpoint: `path` itself, or the newest complete one in it.

    Raises:
        CheckpointError: there is none.
    """
    found = [path] if (path / _COUNTERS).is_file() else complete(path)
    if not found:
        raise CheckpointError(f"{path} holds no complete checkpoint: expected folders {_PREFIX}* with {_COUNTERS}")
    return found[-1]


def save(output: Path, step: int, model: HippoFormer, state: RunState, processes: PartialState) -> None:
    """Writes checkpoint `step` and removes all but the newest; every process must call it.

    Raises:
        CheckpointError: it could not be written; the previous ones are unchanged.
    """
    main, meet, count = processes.is_main_process, processes.wait_for_everyone, processes.num_processes
    final = output / f"{_PREFIX}{step:08d}"
    partial = output / f".{final.name}.partial"
    weights = whole_weights(model)
    try:
        if main:
            for left in output.glob(f".{_PREFIX}*.partial"):  # of a run that was killed
                shutil.rmtree(left)
            partial.mkdir(parents=True)
        meet()
        file = partial / _PROCESS.format(processes.process_index, count)
        checkpoint.write_tensors(file, state.own, {_ORDER: json.dumps(state.order)})
        if main:
            checkpoint.save(model, partial, weights)
            checkpoint.write_tensors(partial / _TENSORS, state.shared)
        meet()
        if main:
            (partial / _COUNTERS).write_text(json.dumps(state.counters | {"processes": count}), encoding="utf-8")
            if final.exists():
                shutil.rmtree(final)
            os.replace(partial, final)
            for old in complete(output)[:-KEPT]:
                shutil.rmtree(old)
        meet()
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"could not write {final}: {error}; the checkpoints before it are unchanged") from error


def restore_weights(model: HippoFormer, path: Path) -> None:
    """Puts a checkpoint's weights into the model, which no engine has sharded yet.

    Raises:
        CheckpointError: there is none, or it is damaged or of another model.
    """
    path = locate(path)
    checkpoint.restore(model, _load(checkpoint.weights_file(path))[0])
    if (base := path / checkpoint.BASE).is_dir():
        model.base.load_state_dict(load_base_model(str(base), dtype=model.dtype).state_dict())


def load(path: Path, index: int = 0, count: int = 1) -> RunState:
    """Reads what process `index` of `count` continues with; its rows also where others wrote the checkpoint.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = locate(path)
    counters = json.loads((path / _COUNTERS).read_text(encoding="utf-8"))
    written = counters["processes"]
    parts = [_load(path / _PROCESS.format(n, written)) for n in ([index] if written == count else range(written))]
    own, notes = parts[0]
    if written != count:
        rows = {name: torch.cat([part[name] for part, _ in parts]) for name in own if name.startswith(ROWS)}
        own = {name: tensor.chunk(count)[index] for name, tensor in rows.items()}
    return RunState(_load(path / _TENSORS)[0], counters, own, json.loads(notes[_ORDER]))


def whole_weights(model: HippoFormer) -> dict[str, Tensor] | None:
    """The model's tensors, put together where FSDP2 has them in pieces; None where they are whole.

    A frozen base is no part of a checkpoint, so it stays in its pieces.
    """
    state = model.state_dict()
    if not any(hasattr(tensor, "full_tensor") for tensor in state.values()):
        return None
    frozen = {f"base.{name}" for name, p in model.base.named_parameters() if not p.requires_grad}
    return {name: tensor if name in frozen else whole(tensor).cpu() for name, tensor in state.items()}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimizer whose per-parameter state is tensors (AdamW), flat and whole."""
    state = optimizer.state_dict()["state"]
    return {f"{n}.{name}": whole(value) for n, values in state.items() for name, value in values.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Puts back what `optimizer_tensors` gave, in pieces where the parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".")
        state.setdefault(int(number), {})[name] = like(value, parameters[int(number)])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _load(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file."""
    try:
        with safe_open(file, framework="pt") as opened:
            return load_file(file), opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the checkpoint file {file} is damaged: {error}") from error
