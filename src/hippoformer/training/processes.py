"""A run in several processes, any of which may be killed: it ends with the weights of one that nothing happened to.

Each process reads its own rows. The inputs of the losses, a handful of numbers a token, are gathered, so every process
computes the loss of all rows, with gradients to its own. Summed over the processes these are the gradients of the
single run; the engines average, so the loss is multiplied by their number. FSDP2 shards the base; the hippocampus is
small and full of scalars, which cannot be sharded, so every process has all of it, and its gradients are averaged here.

    checkpoint-00000200/
        config.json, model.safetensors           a model anyone can load
        training.safetensors                     optimizer and measured credit
        process-00000-of-00001.safetensors       of each process: the state of its rows
        training.json                            counters, order; written last: without it a folder is no checkpoint

A checkpoint is written under another name and renamed when it is complete: a kill or a full disk leaves the previous
one loadable. No pickle: nothing in a checkpoint can run code. What FSDP2 has in pieces is written whole, and rows are
rows, so a checkpoint of two processes also resumes on one.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType, PartialState
from accelerate.utils import gather_object, is_torch_version
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import pad

from hippoformer.errors import CheckpointError, ConfigurationError
from hippoformer.model import checkpoint
from hippoformer.model.base_models import load_base_model
from hippoformer.model.modeling import HippoFormer
from hippoformer.training.arguments import TrainArguments

T = TypeVar("T")
Tensors = dict[str, Tensor]

_PREFIX = "checkpoint-"
_COUNTERS, _TENSORS = "training.json", "training.safetensors"
_PROCESS = "process-{:05d}-of-{:05d}.safetensors"


class Work(nn.Module):
    """The module that an engine wraps; its `forward` runs any work on the model's weights.

    The engines hook into one module's `forward`: they gather its weights before and its gradients after.
    """

    def __init__(self, model: HippoFormer) -> None:
        super().__init__()
        self.model = model
        self._no_split_modules = sorted(getattr(model.base, "_no_split_modules", None) or ())  # FSDP2 shards by these

    def forward(self, work: Callable[[], T]) -> T:
        """Runs `work`; the tensors whose gradients are wanted must be in what it returns."""
        return work()


def new_accelerator(arguments: TrainArguments) -> Accelerator:
    """The run's accelerator; what `accelerate launch` says comes first.

    Raises:
        ConfigurationError: a precision that the device does not have, an unknown tracker, or FSDP of a kind that cannot
            work here.
    """
    try:
        accelerator = Accelerator(
            log_with=arguments.trackers or None,
            project_dir=arguments.output_dir,
            mixed_precision=arguments.mixed_precision,
            # Which weights a loss reaches changes with the phase.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
    except (ValueError, ImportError) as error:
        raise ConfigurationError(f"accelerate refuses these settings: {error}") from error
    engine, device = accelerator.distributed_type, accelerator.device.type
    missing = " ".join(sorted(set(arguments.trackers) - {str(getattr(t, "value", t)) for t in accelerator.log_with}))
    sharding = accelerator.state.fsdp_plugin if is_sharded(accelerator) else None
    refused = {
        "DeepSpeed and Megatron do not work here; configs/fsdp2.yaml shards a base over GPUs": engine
        in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM),
        f"fp16 needs float16 arithmetic, not {device}: use bf16 or no": accelerator.mixed_precision == "fp16"
        and accelerator.scaler is None,
        f"--report_to {missing}: not installed; pip install {missing}, or leave it out": missing,
        "FSDP2 needs torch 2.7 or newer here, which can leave the hippocampus unsharded": sharding
        and not is_torch_version(">=", "2.7.0"),
        "FSDP works here with fsdp_version: 2 and fsdp_cpu_ram_efficient_loading: false (the hippocampus measures the "
        "base it is attached to, so every process loads it); configs/fsdp2.yaml has both": sharding
        and (getattr(sharding, "fsdp_version", 1) != 2 or sharding.cpu_ram_efficient_loading),
    }
    if reasons := [reason for reason, holds in refused.items() if holds]:
        raise ConfigurationError("; ".join(reasons))
    return accelerator


def prepared(work: Work, optimizer: Any, accelerator: Accelerator) -> tuple[Any, Any]:
    """Hands the model and its optimizer to the engine; a `ConfigurationError` for a base that cannot be sharded."""
    if is_sharded(accelerator):
        if work.model.window.rotations is None:
            raise ConfigurationError(
                f"{type(work.model.base).__name__} reads its window again at segment ends, which come at other times "
                "in other processes: train it data parallel (configs/multi_gpu.yaml), not with FSDP"
            )
        accelerator.state.fsdp_plugin.ignored_modules = [work.model.hippocampus]
    return accelerator.prepare(work, optimizer)


def average_unsharded(model: HippoFormer, accelerator: Accelerator) -> None:
    """Averages the gradients that FSDP2 leaves alone, before they are clipped."""
    if is_sharded(accelerator):
        for parameter in model.hippocampus.parameters():
            # A weight that no process has used yet has no gradient anywhere: which are used depends on the phase alone.
            if parameter.grad is not None:
                parameter.grad = accelerator.reduce(parameter.grad, reduction="mean")


def own_rows(rows: int, accelerator: Accelerator) -> range:
    """The rows of this process; a `ConfigurationError` where they cannot be divided evenly."""
    share, rest = divmod(rows, accelerator.num_processes)
    if rest or not share:
        raise ConfigurationError(
            f"--batch_size={rows} documents side by side cannot be divided over {accelerator.num_processes} processes: "
            "choose a multiple of their number"
        )
    return range(accelerator.process_index * share, (accelerator.process_index + 1) * share)


def of_all_rows(fields: Tensors, accelerator: Accelerator, width: int) -> Tensors:
    """Numbers of each token, (R, width), of the rows of all processes; only this process's own carry gradients.

    Args:
        fields: (R', N) each, R' rows of this process and at most `width` tokens.
    """
    if accelerator.num_processes == 1:
        return fields
    own = torch.stack([pad(field.float(), (0, width - field.shape[1])) for field in fields.values()], dim=-1)
    everyone: Any = accelerator.gather(own.detach())
    first = accelerator.process_index * own.shape[0]
    parts = torch.cat((everyone[:first], own, everyone[first + own.shape[0] :])).unbind(-1)
    return {name: part.to(field.dtype) for (name, field), part in zip(fields.items(), parts, strict=True)}


def summed(numbers: list[float]) -> list[float]:
    """Sums over the processes."""
    return [sum(parts) for parts in zip(*gather_object([numbers]), strict=True)]


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each process has only pieces of the base."""
    return accelerator.distributed_type == DistributedType.FSDP


# ---------------------------------------------------------------- checkpoints


def complete(path: Path) -> list[Path]:
    """The complete checkpoints under a folder, oldest first; the folder itself where it is one."""
    if (path / _COUNTERS).is_file():
        return [path]
    return sorted(folder for folder in path.glob(f"{_PREFIX}*") if (folder / _COUNTERS).is_file())


def _newest(path: Path) -> Path:
    if not (found := complete(path)):
        raise CheckpointError(f"{path} holds no complete checkpoint: expected folders {_PREFIX}* with {_COUNTERS}")
    return found[-1]


def save(output: Path, model: HippoFormer, shared: Tensors, rows: Tensors, counters: dict[str, Any]) -> None:
    """Writes checkpoint `counters["step"]` and removes all but the newest two; every process must call it.

    Args:
        shared, counters: of the whole run: tensors, and JSON. rows: of this process, with a row in front.

    Raises:
        CheckpointError: it could not be written; the previous ones are unchanged.
    """
    processes = PartialState()
    main, meet, count = processes.is_main_process, processes.wait_for_everyone, processes.num_processes
    final = output / f"{_PREFIX}{counters['step']:08d}"
    partial = output / f".{final.name}.partial"
    weights = whole_weights(model)
    try:
        if main:
            for left in output.glob(f".{_PREFIX}*.partial"):  # of a run that was killed
                shutil.rmtree(left)
            partial.mkdir(parents=True)
        meet()
        checkpoint.write_tensors(partial / _PROCESS.format(processes.process_index, count), rows)
        if main:
            checkpoint.save(model, partial, weights)
            checkpoint.write_tensors(partial / _TENSORS, shared)
        meet()
        if main:
            (partial / _COUNTERS).write_text(json.dumps(counters), encoding="utf-8")
            if final.exists():
                shutil.rmtree(final)
            os.replace(partial, final)
            for old in complete(output)[:-2]:
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
    path = _newest(path)
    checkpoint.restore(model, _load(checkpoint.weights_file(path)))
    if (base := path / checkpoint.BASE).is_dir():
        model.base.load_state_dict(load_base_model(str(base), dtype=model.dtype).state_dict())


def load(path: Path, index: int = 0, count: int = 1) -> tuple[Tensors, Tensors, dict[str, Any]]:
    """What process `index` of `count` continues with, as `save` had it; its rows also where others wrote them.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = _newest(path)
    counters = json.loads((path / _COUNTERS).read_text(encoding="utf-8"))
    written = len(counters["orders"])
    if written == count:
        rows = _load(path / _PROCESS.format(index, count))
    else:
        parts = [_load(path / _PROCESS.format(n, written)) for n in range(written)]
        rows = {name: torch.cat([part[name] for part in parts]).chunk(count)[index] for name in parts[0]}
    return _load(path / _TENSORS), rows, counters


def _load(file: Path) -> Tensors:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the checkpoint file {file} is damaged: {error}") from error


def whole_weights(model: HippoFormer) -> Tensors | None:
    """The model's tensors, put together where FSDP2 has them in pieces; None where they are whole.

    A frozen base is no part of a checkpoint, so it stays in its pieces.
    """
    state = model.state_dict()
    if not any(hasattr(tensor, "full_tensor") for tensor in state.values()):
        return None
    frozen = {f"base.{name}" for name, p in model.base.named_parameters() if not p.requires_grad}
    return {name: tensor if name in frozen else _whole(tensor).cpu() for name, tensor in state.items()}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """The state of an optimizer whose per-parameter state is tensors (AdamW), flat and whole."""
    state = optimizer.state_dict()["state"]
    return {f"{n}.{name}": _whole(value) for n, values in state.items() for name, value in values.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Puts back what `optimizer_tensors` gave, in pieces where the parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, Tensors] = {}
    for key, tensor in tensors.items():
        number, name = key.split(".")
        parameter: Any = parameters[int(number)]
        if hasattr(parameter, "device_mesh") and tensor.shape == parameter.shape:
            from torch.distributed.tensor import distribute_tensor

            tensor = distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
