"""DeepSpeed's ZeRO: gradients and the optimizer's state in pieces over the processes, as the user's own file says.

Of a DeepSpeed configuration the trainer fills in what its command line decides (gradient accumulation, clipping,
precision), and refuses what contradicts it. Weights stay whole and in float32, as with the other engines; what ZeRO
divides is read and written here weight by weight, so that a checkpoint has the same tensors as everybody's. DeepSpeed's
own checkpoints are pickles, which are neither written nor read.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from torch import Tensor, nn

from hippoformer.errors import ConfigurationError

_MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, for every number of a weight


def asked_for() -> bool:
    """Whether `accelerate launch` was told to use DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def plugin(gradient_accumulation_steps: int, mixed_precision: str | None) -> DeepSpeedPlugin:
    """The user's DeepSpeed configuration, with what the command line says.

    Raises:
        ConfigurationError: a configuration that contradicts it, or that this trainer cannot be run with.
    """
    try:
        made = DeepSpeedPlugin()
    except (ValueError, OSError) as error:
        raise ConfigurationError(f"accelerate refuses this DeepSpeed configuration: {error}") from error
    config = made.deepspeed_config
    if (stage := config["zero_optimization"].get("stage", 0)) not in (1, 2):
        instead = "configs/fsdp2.yaml shards the weights too" if stage == 3 else "configs/multi_gpu.yaml shards nothing"
        raise ConfigurationError(f"ZeRO stage {stage} does not work here: use 1 or 2, or another engine; {instead}")
    for name in ("optimizer", "scheduler"):
        if name in config:
            raise ConfigurationError(
                f"the DeepSpeed configuration has a section {name}: the trainer has its own AdamW with two learning "
                "rates and a linear schedule; remove the section"
            )
    _fill_in(config, "gradient_accumulation_steps", gradient_accumulation_steps, "--gradient_accumulation_steps")
    _fill_in(config, "zero_force_ds_cpu_optimizer", False, "the trainer, whose AdamW is torch's off the device too,")
    precision = mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    halves = [name for name in ("fp16", "bf16") if str(config.get(name, {}).get("enabled")).lower() == "true"]
    # Without safe modules gradients travel in float32, as they do between other engines' processes.
    autocast = {"enabled": precision == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": []}
    dtype = config.get("torch_autocast", autocast).get("dtype", "bfloat16")
    if halves or precision not in ("no", "bf16") or dtype != "bfloat16":
        raise ConfigurationError(
            f"{' and '.join(halves) or 'float16'} with DeepSpeed: weights stay in float32 here, and --mixed_precision "
            'bf16 computes in bfloat16; write "auto" or nothing in the sections fp16 and bf16'
        )
    config |= {"fp16": {"enabled": False}, "bf16": {"enabled": False}}
    config.setdefault("torch_autocast", autocast)
    return made


def complete(config: dict[str, Any], rows: int, processes: int, max_grad_norm: float) -> None:
    """Fills in what is known once there is a model.

    Args:
        rows: of this process.

    Raises:
        ConfigurationError: a configuration that contradicts it.
    """
    steps = config["gradient_accumulation_steps"]
    _fill_in(config, "gradient_clipping", max_grad_norm, "--set max_grad_norm")
    _fill_in(config, "train_micro_batch_size_per_gpu", rows, "--batch_size, divided over the processes,")
    _fill_in(config, "train_batch_size", rows * steps * processes, "--batch_size")


def _fill_in(config: dict[str, Any], name: str, value: float, option: str) -> None:
    if config.setdefault(name, "auto") not in ("auto", value):
        raise ConfigurationError(
            f'the DeepSpeed configuration has {name}={config[name]}, {option} says {value}: write "auto" there'
        )
    config[name] = value


def prepared(
    model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> "tuple[Any, ZeroOptimizer]":
    """Hands a model, the same in every process, and its AdamW to DeepSpeed.

    Raises:
        ConfigurationError: weights that train in half precision.
    """
    groups = [list(group["params"]) for group in optimizer.param_groups]
    if any(parameter.dtype != torch.float32 for group in groups for parameter in group):
        raise ConfigurationError(
            "ZeRO trains float32 copies of weights in half precision, which no checkpoint has: use --dtype float32, "
            "with --mixed_precision bf16"
        )
    # DeepSpeed sends every weight to the other processes, which it cannot do with one that has no dimension; it leaves
    # out those with this mark.
    scalars: list[Any] = [parameter for parameter in model.parameters() if parameter.dim() == 0]
    for scalar in scalars:
        scalar.ds_optim_param = True
    engine, divided = accelerator.prepare(model, optimizer)
    for scalar in scalars:
        del scalar.ds_optim_param
    return engine, ZeroOptimizer(divided.optimizer, groups)


class ZeroOptimizer(DeepSpeedOptimizerWrapper):
    """ZeRO's optimizer with the state of the AdamW that it divides: every process must ask for it, or give it, whole.

    Args:
        optimizer: of an engine. groups: the weights as AdamW had them.
    """

    def __init__(self, optimizer: Any, groups: Sequence[Sequence[nn.Parameter]]) -> None:
        super().__init__(optimizer)
        self.groups = groups
        self.parameters = [parameter for group in groups for parameter in group]

    @property
    def divided(self) -> torch.optim.Optimizer:
        """The AdamW of this process's pieces, one flat tensor a group."""
        inner: torch.optim.Optimizer = self.optimizer.optimizer
        return inner

    def state_dict(self) -> dict[str, Any]:
        """As AdamW without an engine has it."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state, safe_get_full_optimizer_state

        state: dict[int, dict[str, Tensor]] = {}
        for group, flat in zip(self.groups, self._flat(), strict=True):
            if not self.divided.state.get(flat):
                continue  # before the first step
            lazy_init_hp_params_optimizer_state(group, flat, self.divided.state)  # DeepSpeed does the first group only
            for parameter in group:
                moments = {name: safe_get_full_optimizer_state(parameter, name) for name in _MOMENTS}
                state[len(state)] = {"step": self.divided.state[flat]["step"].clone()} | moments
        return {"state": state, "param_groups": self.param_groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what any engine's `state_dict` gave."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state, safe_set_full_optimizer_state

        state: dict[int, dict[str, Tensor]] = state_dict["state"]
        if not state:
            return
        step = max(values["step"] for values in state.values())
        for group, flat in zip(self.groups, self._flat(), strict=True):
            self.divided.state[flat] = {"step": step.clone()} | {name: torch.zeros_like(flat) for name in _MOMENTS}
            lazy_init_hp_params_optimizer_state(group, flat, self.divided.state)
        for number, values in state.items():
            parameter = self.parameters[number]
            for name in _MOMENTS:
                safe_set_full_optimizer_state(parameter, values[name].to(parameter.device), name)

    def refresh(self) -> None:
        """Takes over weights that were changed from outside: ZeRO has a copy of each."""
        from deepspeed.utils import safe_set_full_fp32_param

        for parameter in self.parameters:
            safe_set_full_fp32_param(parameter, parameter.detach())

    def _flat(self) -> list[Tensor]:
        return [group["params"][0] for group in self.divided.param_groups]
