"""A base's weights wherever they are (in memory, offloaded by accelerate, packed by a quantisation), and adapters.

LoRA is peft's, injected in place so that the base keeps its class. peft is an optional package, imported where there
are adapters: a base cannot have any before somebody imported it.
"""

import hashlib
import sys
from collections.abc import Iterator
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn
from transformers import PreTrainedModel

from hippoformer.configuration import HippoFormerConfig
from hippoformer.errors import CheckpointError, ConfigurationError, UnsupportedArchitectureError

if TYPE_CHECKING:
    from peft import PeftModel

_SAMPLES = 1024
_ADAPTER = "hippoformer"


def vocabulary_size(base: PreTrainedModel) -> int:
    """Rows of the base's embedding: a quantised one may keep them in a weight of another shape."""
    embedding: Any = base.get_input_embeddings()
    return getattr(embedding, "num_embeddings", None) or embedding.weight.shape[0]


def computing_device(base: PreTrainedModel) -> torch.device:
    """Where a base reads its tokens, also one whose weights are elsewhere in between; `meta` for one without any."""
    embedding = base.get_input_embeddings()
    with align_module_device(embedding):
        return next(embedding.parameters()).device


def base_fingerprint(module: nn.Module) -> str:
    """Digest of a module's weights: of every tensor its name, shape and up to 1,024 evenly spaced elements.

    Weights that are offloaded are fetched module by module: the digest is that of the same weights in memory. Adapters
    that are switched off are part of it.

    Raises:
        ValueError: weights that are nowhere.
    """
    digest = hashlib.sha256()
    for name, tensor in _tensors(module):
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // _SAMPLES)].float().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    active = active_adapters(module)
    if active != active_adapters(module, switched_off=True):
        digest.update(f"active {active}".encode())
    return digest.hexdigest()


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of all that a state dict holds, by name, one after the other."""
    for name, value in sorted(module.state_dict().items()):
        if not (isinstance(value, Tensor) and value.is_meta):
            yield from ((name, tensor) for tensor in _unpacked(value))
            continue
        if (place := offloaded_owner(module, name)) is None:
            raise ValueError(f"{name} is on the meta device, and nothing says where its numbers are")
        owner, path = place
        with align_module_device(owner, torch.device("cpu")):
            yield from ((name, tensor) for tensor in _unpacked(attrgetter(path)(owner)))


def offloaded_owner(module: nn.Module, name: str) -> tuple[nn.Module, str] | None:
    """The module whose hook of accelerate fetches a weight when needed, and the weight's path within it; or None."""
    parts = name.split(".")
    for depth in reversed(range(len(parts))):
        owner = module.get_submodule(".".join(parts[:depth]))
        if has_offloaded_params(owner):
            return owner, ".".join(parts[depth:])
    return None


def _unpacked(value: Any) -> Iterator[Tensor]:
    """The ordinary tensors that a weight is made of; what else a state dict holds is no weight."""
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from _unpacked(part)
    elif hasattr(value, "__tensor_flatten__"):  # torch's protocol for tensors made of tensors, as torchao's are
        for name in value.__tensor_flatten__()[0]:
            yield from _unpacked(getattr(value, name))
    elif isinstance(value, Tensor):
        yield value.dequantize() if value.is_quantized else value


def unwrap(base: "PreTrainedModel | PeftModel") -> PreTrainedModel:
    """The model of transformers within a peft model, whose adapters stay where they are: in its layers.

    Raises:
        UnsupportedArchitectureError: an adapter outside of the layers (prompt and prefix tuning).
    """
    if "peft" not in sys.modules:
        return base  # type: ignore[return-value]
    from peft import PeftModel

    if not isinstance(base, PeftModel):
        return base
    config = base.active_peft_config
    if config.is_prompt_learning:
        raise UnsupportedArchitectureError(
            f"the adapter {base.active_adapter!r} ({getattr(config.peft_type, 'value', config.peft_type)}) puts a "
            "learned prompt in front of every text, which has no place in a window: use adapters in the layers, as "
            "LoRA's, or base_model=peft_model.get_base_model() without it"
        )
    return base.get_base_model()  # type: ignore[return-value]


def active_adapters(module: nn.Module, switched_off: bool = False) -> tuple[str, ...]:
    """Names of the adapters of peft that take part in what a module computes, in order; or of all in its layers."""
    if "peft" not in sys.modules:
        return ()
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    found: set[str] = set()
    for layer in module.modules():
        if isinstance(layer, BaseTunerLayer):
            held = {name for kind in layer.adapter_layer_names for name in getattr(layer, kind, ())}
        elif isinstance(layer, ModulesToSaveWrapper):
            held = set(layer.modules_to_save)
        else:
            continue
        if switched_off or not layer.disable_adapters:
            found |= held if switched_off else held.intersection(layer.active_adapters)
    return tuple(sorted(found))


def foreign_adapters(base: nn.Module) -> list[str]:
    """Names of the active adapters that are not this package's own."""
    return [name for name in active_adapters(base) if name != _ADAPTER]


def check_foreign_adapters(base: nn.Module, config: HippoFormerConfig) -> None:
    """Adapters that a base came with stay as they are: they are neither trained nor saved here.

    Raises:
        ConfigurationError: they would have to be.
    """
    found = [name for name in active_adapters(base, switched_off=True) if name != _ADAPTER]
    if found and (config.lora is not None or not config.freeze_base):
        raise ConfigurationError(
            f"the base has adapters {found} of its own, which lora={config.lora}, "
            f"freeze_base={config.freeze_base} would change or lose: merge them first "
            "(peft_model.merge_and_unload()), or set lora=None and freeze_base=True"
        )


def add_lora(base: PreTrainedModel, config: HippoFormerConfig) -> None:
    """Adds zero-initialised adapters, by default to `q_proj` and `v_proj` (Hu et al. 2021, arXiv:2106.09685).

    Raises:
        ConfigurationError: a target name that no layer of the base has.
    """
    from peft import LoraConfig, inject_adapter_in_model

    lora = LoraConfig(**({"target_modules": ["q_proj", "v_proj"]} | (config.lora or {})))
    names = {name.split(".")[-1] for name, module in base.named_modules() if hasattr(module, "weight")}
    targets = {lora.target_modules} if isinstance(lora.target_modules, str) else set(lora.target_modules or ())
    missing = sorted(targets - names - {"all-linear"})
    if missing:
        linear = sorted({n.split(".")[-1] for n, m in base.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"})
        raise ConfigurationError(
            f"lora target_modules {missing} are not layers of {type(base).__name__}: choose from "
            f"{linear or sorted(names)}, or set lora=None"
        )
    inject_adapter_in_model(lora, base, adapter_name=_ADAPTER)
    for name, parameter in base.named_parameters():
        if f".{_ADAPTER}." in name:  # in half precision a step of a small learning rate would be lost
            parameter.data = parameter.data.float()
    if not config.freeze_base:
        base.requires_grad_(True)


def merge_lora(base: PreTrainedModel) -> None:
    """Adds what the adapters do to the weights that they stand beside, and takes the adapters away."""
    from peft.tuners.lora import LoraLayer

    for name, layer in list(base.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge(safe_merge=True)
            parent, _, own_name = name.rpartition(".")
            setattr(base.get_submodule(parent), own_name, layer.get_base_layer())


def lora_state(base: PreTrainedModel, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The adapters' tensors by name, out of the base's own state dict or a given one."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(base, state_dict=state, adapter_name=_ADAPTER)


def load_lora_state(base: PreTrainedModel, state: dict[str, Tensor]) -> None:
    """Puts back what `lora_state` gave.

    Raises:
        CheckpointError: tensors that the base's adapters do not have.
    """
    from peft import set_peft_model_state_dict

    result = set_peft_model_state_dict(base, state, adapter_name=_ADAPTER)
    if result is not None and result.unexpected_keys:
        raise CheckpointError(f"the checkpoint has adapters this base does not: {result.unexpected_keys[:3]}")
