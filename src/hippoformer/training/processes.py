"""Several processes, one run: whether DDP or FSDP2 carries it, it computes what a single process would.

Rows are divided: each process reads its own share, with the state of those rows alone. What a loss looks at, a handful
of numbers a token, is gathered from all of them, so every process computes the loss of all rows, with gradients to its
own. Summed over the processes these are the gradients of the single run; the engines average, hence `scaled`.

The engines hook into one module's `forward`: they gather its weights before and its gradients after. Everything that
touches weights is therefore run inside `Work`. FSDP2 shards the base; the hippocampus is small and full of scalars,
which cannot be sharded, so every process has all of it, and its gradients are averaged here.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, gather_object, is_torch_version
from torch import Tensor, nn
from torch.nn.functional import pad

from hippoformer.errors import ConfigurationError
from hippoformer.model.modeling import HippoFormer
from hippoformer.training import zero
from hippoformer.training.readers import Reading

T = TypeVar("T")

# What a loss and the logs look at: (R, N) tensors of a Reading, and of the StepOutput in it.
_READ = ("target_log_prob", "base_log_prob", "counted")
_FOUND = ("prior_mixture", "prior_nothing", "hit", "forecast", "salience", "importance")


class Work(nn.Module):
    """The module that an engine wraps; its `forward` runs any work on the model's weights."""

    def __init__(self, model: HippoFormer) -> None:
        super().__init__()
        self.model = model
        self._no_split_modules = sorted(getattr(model.base, "_no_split_modules", None) or ())  # FSDP2 shards by these

    def forward(self, work: Callable[[], T]) -> T:
        """Runs `work`; the tensors that gradients are asked of must be in what it returns."""
        return work()


def new_accelerator(
    report_to: list[str], output_dir: str, gradient_accumulation_steps: int, mixed_precision: str | None
) -> Accelerator:
    """The run's accelerator; what `accelerate launch` was told comes first.

    Raises:
        ConfigurationError: a precision that the device does not have, an unknown tracker, or FSDP or DeepSpeed of a
            kind that cannot work here.
    """
    # Which weights a loss reaches changes with the phase; and DDP cannot look for those it does not reach while it puts
    # off the exchange of gradients.
    handlers: list[Any] = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    accumulation = GradientAccumulationPlugin(num_steps=gradient_accumulation_steps, sync_each_batch=True)
    deepspeed = zero.plugin(gradient_accumulation_steps, mixed_precision) if zero.asked_for() else None
    if deepspeed is not None and not torch.accelerator.is_available():
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    try:
        accelerator = Accelerator(
            log_with=report_to or None,
            project_dir=output_dir,
            gradient_accumulation_plugin=accumulation,
            mixed_precision=mixed_precision,
            kwargs_handlers=handlers,
            deepspeed_plugin=deepspeed,
        )
    except (ValueError, ImportError) as error:
        raise ConfigurationError(f"accelerate refuses these settings: {error}") from error
    if deepspeed is not None and accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise ConfigurationError(
            "ACCELERATE_USE_CPU turns DeepSpeed off: leave it out; where there is no GPU, DeepSpeed takes the CPU"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
        raise ConfigurationError(
            f"mixed precision fp16 needs a device with float16 arithmetic, not {accelerator.device.type}: "
            "use bf16 or no"
        )
    if missing := sorted(set(report_to) - {str(getattr(t, "value", t)) for t in accelerator.log_with}):
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


def prepared(
    work: Work, optimizer: torch.optim.Optimizer, accelerator: Accelerator, rows: int
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Hands the model and its optimizer to the engine.

    Args:
        rows: of this process.

    Raises:
        ConfigurationError: a base that cannot be sharded, a DeepSpeed configuration that contradicts the run's.
    """
    if is_sharded(accelerator):
        if work.model.window.rotations is None:
            raise ConfigurationError(
                f"{type(work.model.base).__name__} reads its window again at segment ends, which come at other times "
                "in other processes: train it data parallel (configs/multi_gpu.yaml), not with FSDP"
            )
        accelerator.state.fsdp_plugin.ignored_modules = [work.model.hippocampus]
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        zero.complete(config, rows, accelerator.num_processes, work.model.config.max_grad_norm)
        return zero.prepared(work, optimizer, accelerator)
    wrapped, optimizer = accelerator.prepare(work, optimizer)
    return wrapped, optimizer


def average_unsharded(model: HippoFormer, accelerator: Accelerator) -> None:
    """Averages the gradients that the engine leaves alone, where there are such; before they are clipped."""
    if not is_sharded(accelerator):
        return
    for parameter in model.hippocampus.parameters():
        # A weight that no process has used yet has no gradient anywhere: which are used depends on the phase alone.
        if parameter.grad is not None:
            parameter.grad = accelerator.reduce(parameter.grad, reduction="mean")


def clipped(work: nn.Module, accelerator: Accelerator, max_norm: float) -> float:
    """Clips the gradients; returns the norm they had. DeepSpeed has clipped them by its configuration already."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        norm = float(work.get_global_grad_norm())  # type: ignore[operator]
        return norm if norm >= 0 else math.nan  # -1 stands for numbers that are not finite
    return float(accelerator.clip_grad_norm_(work.parameters(), max_norm))


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


def of_all_rows(reading: Reading, accelerator: Accelerator, width: int) -> Reading:
    """A reading of this process's rows with those of the others around it; only its own carry gradients.

    Args:
        reading: of R' rows and up to `width` tokens.

    Returns:
        The fields that losses and logs look at as (R, width); the others are left as they are.
    """
    if accelerator.num_processes == 1:
        return reading
    names = _FOUND if reading.found is not None else ()
    fields = [getattr(reading, name) for name in _READ] + [getattr(reading.found, name) for name in names]
    own = torch.stack([pad(field.float(), (0, width - field.shape[1])) for field in fields], dim=-1)
    everyone = accelerator.gather(own.detach())
    assert isinstance(everyone, Tensor)
    first = accelerator.process_index * own.shape[0]
    parts = torch.cat((everyone[:first], own, everyone[first + own.shape[0] :])).unbind(-1)
    read = dict(zip(_READ, parts, strict=False))
    read["counted"] = read["counted"] > 0
    if reading.found is not None:
        found = dict(zip(names, parts[len(_READ) :], strict=True))
        reading = replace(reading, found=replace(reading.found, **found))  # type: ignore[arg-type]
    return replace(reading, **read)  # type: ignore[arg-type]


def scaled(loss: Tensor, accelerator: Accelerator) -> Tensor:
    """The loss of all rows such that the mean of the processes' gradients is their sum."""
    return loss * accelerator.num_processes if accelerator.num_processes > 1 else loss


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each process has only pieces of the base."""
    return accelerator.distributed_type == DistributedType.FSDP


def share_of(items: list[T], accelerator: Accelerator) -> list[T]:
    """What this process does of a list of independent jobs."""
    return items[accelerator.process_index :: accelerator.num_processes]


def collected(results: dict[int, Tensor], accelerator: Accelerator) -> dict[int, Tensor]:
    """Results by number, of all processes; tensors on the CPU."""
    parts = gather_object([results]) if accelerator.num_processes > 1 else [results]
    return {number: part[number] for part in parts for number in part}


def summed(numbers: list[float], accelerator: Accelerator) -> list[float]:
    """Sums over the processes, in float64."""
    if accelerator.num_processes == 1:
        return numbers
    parts = accelerator.gather(torch.tensor([numbers], dtype=torch.float64, device=accelerator.device))
    return [float(n) for n in parts.sum(0)]


def whole(tensor: Tensor) -> Tensor:
    """A tensor, put together where FSDP2 has sharded it; every process must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, sharded as a parameter of the same shape is."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(parameter.device), mesh, parameter.placements)  # type: ignore[attr-defined]
