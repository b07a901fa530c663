"""Several processes, one run: under DDP or FSDP2 it computes what a single process would.

Each process reads its own rows. The inputs of the losses, a handful of numbers a token, are gathered, so every process
computes the loss of all rows, with gradients to its own. Summed over the processes these are the gradients of the
single run; the engines average, so the loss is multiplied by their number.

The engines hook into one module's `forward`: they gather its weights before and its gradients after. Everything that
touches weights therefore runs inside `Work`. FSDP2 shards the base; the hippocampus is small and full of scalars, which
cannot be sharded, so every process has all of it, and its gradients are averaged here.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.utils import GradientAccumulationPlugin, is_torch_version
from torch import Tensor, nn
from torch.nn.functional import pad

from hippoformer.errors import ConfigurationError
from hippoformer.model.modeling import HippoFormer
from hippoformer.training.arguments import TrainArguments

T = TypeVar("T")


class Work(nn.Module):
    """The module that an engine wraps; its `forward` runs any work on the model's weights."""

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
            # Which weights a loss reaches changes with the phase, and DDP cannot look for those it does not reach while
            # it postpones the exchange of gradients.
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=arguments.gradient_accumulation_steps, sync_each_batch=True
            ),
            mixed_precision=arguments.mixed_precision,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
    except (ValueError, ImportError) as error:
        raise ConfigurationError(f"accelerate refuses these settings: {error}") from error
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ConfigurationError("DeepSpeed and Megatron do not work here; configs/fsdp2.yaml shards a base over GPUs")
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
        raise ConfigurationError(f"fp16 needs float16 arithmetic, not {accelerator.device.type}: use bf16 or no")
    if missing := sorted(set(arguments.trackers) - {str(getattr(t, "value", t)) for t in accelerator.log_with}):
        raise ConfigurationError(
            f"--report_to {' '.join(missing)}: not installed; pip install {' '.join(missing)}, or leave it out"
        )
    if is_sharded(accelerator):
        plugin = accelerator.state.fsdp_plugin
        if not is_torch_version(">=", "2.7.0"):
            raise ConfigurationError("FSDP2 needs torch 2.7 or newer here, which can leave the hippocampus unsharded")
        if getattr(plugin, "fsdp_version", 1) != 2 or plugin.cpu_ram_efficient_loading:
            raise ConfigurationError(
                "FSDP works here with fsdp_version: 2 and fsdp_cpu_ram_efficient_loading: false (the hippocampus "
                "measures the base it is attached to, so every process loads it); configs/fsdp2.yaml has both"
            )
    return accelerator


def prepared(work: Work, optimizer: Any, accelerator: Accelerator) -> tuple[Any, Any]:
    """Hands the model and its optimizer to the engine.

    Raises:
        ConfigurationError: a base that cannot be sharded.
    """
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
    """The rows of this process.

    Raises:
        ConfigurationError: rows that cannot be divided evenly.
    """
    share, rest = divmod(rows, accelerator.num_processes)
    if rest or not share:
        raise ConfigurationError(
            f"--batch_size={rows} documents side by side cannot be divided over {accelerator.num_processes} processes: "
            "choose a multiple of their number"
        )
    return range(accelerator.process_index * share, (accelerator.process_index + 1) * share)


def of_all_rows(fields: dict[str, Tensor], accelerator: Accelerator, width: int) -> dict[str, Tensor]:
    """Numbers of each token, of the rows of all processes; only this process's own carry gradients.

    Args:
        fields: (R', N) each, R' rows of this process and at most `width` tokens.

    Returns:
        (R, width) each.
    """
    if accelerator.num_processes == 1:
        return fields
    own = torch.stack([pad(field.float(), (0, width - field.shape[1])) for field in fields.values()], dim=-1)
    everyone: Any = accelerator.gather(own.detach())
    first = accelerator.process_index * own.shape[0]
    parts = torch.cat((everyone[:first], own, everyone[first + own.shape[0] :])).unbind(-1)
    return {name: part.to(field.dtype) for (name, field), part in zip(fields.items(), parts, strict=True)}


def summed(numbers: list[float], accelerator: Accelerator) -> list[float]:
    """Sums over the processes, in float64."""
    if accelerator.num_processes == 1:
        return numbers
    parts = accelerator.gather(torch.tensor([numbers], dtype=torch.float64, device=accelerator.device))
    return [float(n) for n in parts.sum(0)]


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each process has only pieces of the base."""
    return accelerator.distributed_type == DistributedType.FSDP


def whole(tensor: Tensor) -> Tensor:
    """A tensor, put together where FSDP2 has sharded it; every process must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, sharded as a parameter of the same shape is."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(parameter.device), mesh, parameter.placements)  # type: ignore[attr-defined]
