"""A base model's weights wherever they are: in memory, offloaded by accelerate, or packed by a quantisation."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn
from transformers import PreTrainedModel

from hippoformer.model.adapters import active_adapters, present_adapters

_SAMPLES = 1024


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
    if active != present_adapters(module):
        digest.update(f"active {active}".encode())
    return digest.hexdigest()


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of all that a state dict holds, by name, one after the other."""
    for name, value in sorted(module.state_dict().items()):
        if not (isinstance(value, Tensor) and value.is_meta):
            yield from ((name, tensor) for tensor in _unpacked(value))
            continue
        place = _offloaded_owner(module, name)
        if place is None:
            raise ValueError(f"{name} is on the meta device, and nothing says where its numbers are")
        owner, path = place
        with align_module_device(owner, torch.device("cpu")):
            found: Any = owner
            for part in path:
                found = getattr(found, part)
            yield from ((name, tensor) for tensor in _unpacked(found))


def is_offloaded(module: nn.Module, name: str) -> bool:
    """Whether accelerate fetches a weight when it is needed."""
    return _offloaded_owner(module, name) is not None


def _offloaded_owner(module: nn.Module, name: str) -> tuple[nn.Module, list[str]] | None:
    """The module whose hook fetches a weight, and the weight's path within it."""
    parts = name.split(".")
    for depth in reversed(range(len(parts))):
        owner = module.get_submodule(".".join(parts[:depth]))
        if has_offloaded_params(owner):
            return owner, parts[depth:]
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
