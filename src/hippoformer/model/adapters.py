"""LoRA on the base model, by peft, injected in place so that the base keeps its class."""

from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from hippoformer.errors import CheckpointError, ConfigurationError
from hippoformer.model.configuration import HippoFormerConfig

_ADAPTER = "hippoformer"


def add_lora(base: PreTrainedModel, config: HippoFormerConfig) -> None:
    """Adds zero-initialised adapters to the named linear layers (Hu et al. 2021, arXiv:2106.09685).

    Raises:
        ConfigurationError: a target name that no layer of the base has.
    """
    names = {name.split(".")[-1] for name, module in base.named_modules() if hasattr(module, "weight")}
    missing = sorted(set(config.lora_target_modules) - names)
    if missing:
        linear = sorted({n.split(".")[-1] for n, m in base.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"})
        raise ConfigurationError(
            f"lora_target_modules {missing} are not layers of {type(base).__name__}: choose from "
            f"{linear or sorted(names)}, or set use_lora=False"
        )
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.lora_target_modules),
    )
    inject_adapter_in_model(lora, base, adapter_name=_ADAPTER)
    for name, parameter in base.named_parameters():
        if f".{_ADAPTER}." in name:  # in half precision a step of a small learning rate would be lost
            parameter.data = parameter.data.float()
    if not config.freeze_base:
        base.requires_grad_(True)


def merge_lora(base: PreTrainedModel) -> None:
    """Adds what the adapters do to the weights that they stand beside, and takes the adapters away."""
    for name, layer in list(base.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge(safe_merge=True)
            parent, _, own_name = name.rpartition(".")
            setattr(base.get_submodule(parent), own_name, layer.get_base_layer())


def lora_state(base: PreTrainedModel, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The adapters' tensors by name, out of the base's own state dict or a given one."""
    return get_peft_model_state_dict(base, state_dict=state, adapter_name=_ADAPTER)


def load_lora_state(base: PreTrainedModel, state: dict[str, Tensor]) -> None:
    """Puts back what `lora_state` gave.

    Raises:
        CheckpointError: tensors that the base's adapters do not have.
    """
    result = set_peft_model_state_dict(base, state, adapter_name=_ADAPTER)
    if result is not None and result.unexpected_keys:
        raise CheckpointError(f"the checkpoint has adapters this base does not: {result.unexpected_keys[:3]}")
