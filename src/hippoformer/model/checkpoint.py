"""Saving and loading a hippocampus: a small folder that names its base model.

    config.json                 every option
    hippocampus.safetensors     the hippocampus, and LoRA adapters where there are any
    base/                       the base model, only where its own weights were trained

Files are written beside their place and moved into it, so that a full disk or a kill leaves the previous ones whole.
"""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from hippoformer.errors import CheckpointError
from hippoformer.model.adapters import load_lora_state, lora_state
from hippoformer.model.base_models import load_base_model
from hippoformer.model.configuration import HippoFormerConfig

if TYPE_CHECKING:
    from hippoformer.model.modeling import HippoFormer

WEIGHTS = "hippocampus.safetensors"
CONFIG = "config.json"
BASE = "base"


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file atomically: the old file stays until the new one is whole.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        try:
            save_file({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, temporary, metadata)
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"could not write {path}: {error}; what was there before is unchanged") from error


def save(model: "HippoFormer", folder: Path) -> None:
    """Writes the folder described above; weights first, so that a config never stands beside missing weights."""
    tensors = {f"hippocampus.{name}": tensor for name, tensor in model.hippocampus.state_dict().items()}
    if model.config.use_lora:
        tensors |= {f"lora.{name}": tensor for name, tensor in lora_state(model.base).items()}
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    if not model.config.freeze_base and not model.config.use_lora:
        model.base.save_pretrained(folder / BASE)
    model.config.save_pretrained(folder)


def load(
    cls: type["HippoFormer"], name_or_path: str | Path, base_model: PreTrainedModel | None, **overrides: Any
) -> "HippoFormer":
    """Builds the model of a saved folder or hub repository.

    Args:
        base_model: used instead of the base that the config names.
        overrides: options of the config to change (window, buffer_size, ...); `dtype` of the base.

    Raises:
        CheckpointError: not a HippoFormer checkpoint, or one whose weights are missing, damaged or of other shapes.
    """
    folder = _folder(name_or_path)
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder} is not a HippoFormer checkpoint: expected {CONFIG} and {WEIGHTS} in it")
    dtype = overrides.pop("dtype", None)
    config = HippoFormerConfig.from_pretrained(folder, **overrides)
    if base_model is None:
        own = folder / BASE
        base_model = load_base_model(str(own) if own.is_dir() else config.base_model_name, dtype=dtype)
    model = cls(config, base_model)
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise CheckpointError(f"{folder / WEIGHTS} is damaged: {error}") from error
    restore(model, tensors)
    return model


def restore(model: "HippoFormer", tensors: dict[str, Tensor]) -> None:
    """Puts saved tensors into a model.

    Raises:
        CheckpointError: names or shapes that do not fit.
    """
    own = {n.removeprefix("hippocampus."): t for n, t in tensors.items() if n.startswith("hippocampus.")}
    try:
        model.hippocampus.load_state_dict(own)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint does not fit this base and config: {error}") from error
    if model.config.use_lora:
        load_lora_state(model.base, {n.removeprefix("lora."): t for n, t in tensors.items() if n.startswith("lora.")})


def _folder(name_or_path: str | Path) -> Path:
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    try:
        return Path(snapshot_download(str(name_or_path), allow_patterns=[CONFIG, WEIGHTS, f"{BASE}/*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{name_or_path} is neither a folder nor a reachable hub repository: {error}") from error
