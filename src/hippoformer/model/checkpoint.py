"""Saving and loading a hippocampus: a small folder that names its base model.

    config.json                 every option
    hippocampus.safetensors     the hippocampus, and LoRA adapters where there are any
    base/                       the base model, only where its own weights were trained
    README.md                   the model card; one that is there already is left alone

Files are written beside their place and moved into it, so that a full disk or a kill leaves the previous ones whole.
"""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from hippoformer.errors import CheckpointError, ConfigurationError
from hippoformer.model.adapters import load_lora_state, lora_state
from hippoformer.model.base_models import load_base_model
from hippoformer.model.card import model_card
from hippoformer.model.configuration import HippoFormerConfig
from hippoformer.model.pinned_models import hub_failure

if TYPE_CHECKING:
    from hippoformer.model.modeling import HippoFormer

WEIGHTS = "hippocampus.safetensors"
CONFIG = "config.json"
BASE = "base"
CARD = "README.md"
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
# What the auto classes and pipelines of transformers add to any call, and has nothing to say here.
_HARMLESS = {"_from_auto", "_from_pipeline", "adapter_kwargs", "code_revision", "trust_remote_code"}


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


def save(model: "HippoFormer", folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """Writes the folder described above, without a card; weights first, so that a config never stands beside missing
    weights.

    Args:
        state: what to write instead of the model's own tensors, by their names in its state dict.
    """
    state = model.state_dict() if state is None else state
    base = {name.removeprefix("base."): tensor for name, tensor in state.items() if name.startswith("base.")}
    tensors = {name: tensor for name, tensor in state.items() if name.startswith("hippocampus.")}
    if model.config.use_lora:
        tensors |= {f"lora.{name}": tensor for name, tensor in lora_state(model.base, base).items()}
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    if not model.config.freeze_base and not model.config.use_lora:
        model.base.save_pretrained(folder / BASE, state_dict=base)
    model.config.save_pretrained(folder)


def write_card(model: "HippoFormer", folder: Path, name: str) -> None:
    """Writes the model card, unless there is one."""
    if not (folder / CARD).exists():
        model_card(model, name).save(folder / CARD)


def push(
    model: "HippoFormer",
    repository: str,
    *,
    token: bool | str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    **commit: Any,
) -> Any:
    """Uploads a model's files in one commit; a card that the repository has already is left alone.

    Args:
        commit: `commit_message`, `commit_description`, `create_pr`.

    Returns:
        What the hub says about the commit.
    """
    api = HfApi(token=token)
    repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repository, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save(model, folder)
        if not api.file_exists(repository, CARD, revision=revision):
            write_card(model, folder, repository)
        commit.setdefault("commit_message", "Upload HippoFormer")
        return api.upload_folder(repo_id=repository, folder_path=folder, revision=revision, **commit)


def load(
    cls: type["HippoFormer"], name_or_path: str | Path, base_model: PreTrainedModel | None, **options: Any
) -> "HippoFormer":
    """Builds the model of a saved folder or hub repository.

    Args:
        base_model: used instead of the base that the config names.
        options: of the config, to change (window, buffer_size, ...); a whole `config` instead of the saved one;
            `dtype` of the base; `device_map`, one device; `subfolder`, `revision`, `token`, `cache_dir`,
            `force_download`, `local_files_only` as in transformers.

    Raises:
        CheckpointError: not a HippoFormer checkpoint, or one whose weights are missing, damaged or of other shapes.
        ConfigurationError: an option that does not exist, or more than one device.
    """
    options = {name: value for name, value in options.items() if name not in _HARMLESS}
    hub = {name: options.pop(name) for name in _HUB_OPTIONS if name in options}
    dtype, older_name = options.pop("dtype", None), options.pop("torch_dtype", None)
    device = _one_device(options.pop("device_map", None))
    folder = _folder(name_or_path, options.pop("subfolder", None) or "", hub)
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder} is not a HippoFormer checkpoint: expected {CONFIG} and {WEIGHTS} in it")
    saved = options.pop("config", None) or folder
    if isinstance(saved, HippoFormerConfig):
        config, unknown = HippoFormerConfig.from_dict(saved.to_dict(), return_unused_kwargs=True, **options)
    else:
        config, unknown = HippoFormerConfig.from_pretrained(saved, return_unused_kwargs=True, **options)
    if unknown:
        raise ConfigurationError(
            f"from_pretrained does not take {', '.join(sorted(unknown))}: expected options of HippoFormerConfig; what "
            "concerns the base alone (quantisation, attention) goes into a base model given as base_model="
        )
    config.dtype = None  # is the base's, which need not be loaded in the same one again
    if base_model is None:
        own = folder / BASE
        base_model = load_base_model(str(own) if own.is_dir() else config.base_model_name, dtype=dtype or older_name)
    model = cls(config, base_model)
    restore(model, _weights(folder))
    return model if device is None else model.to(device)  # type: ignore[arg-type]


def restore(model: "HippoFormer", tensors: dict[str, Tensor]) -> None:
    """Puts saved tensors into a model.

    Raises:
        CheckpointError: names or shapes that do not fit.
    """
    _restore_hippocampus(model, tensors)
    if model.config.use_lora:
        load_lora_state(model.base, {n.removeprefix("lora."): t for n, t in tensors.items() if n.startswith("lora.")})


def load_hippocampus(model: "HippoFormer", name_or_path: str | Path) -> None:
    """Gives a model the hippocampus of a saved folder or hub repository, and nothing else of it.

    Raises:
        CheckpointError: none there, a damaged one, or one of other shapes.
    """
    folder = _folder(name_or_path, "", {})
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder} holds no {WEIGHTS}: expected a saved HippoFormer")
    _restore_hippocampus(model, _weights(folder))


def _weights(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise CheckpointError(f"{folder / WEIGHTS} is damaged: {error}") from error


def _restore_hippocampus(model: "HippoFormer", tensors: dict[str, Tensor]) -> None:
    own = {n.removeprefix("hippocampus."): t for n, t in tensors.items() if n.startswith("hippocampus.")}
    # One that was saved before tokens were spelled goes on without.
    spelled = model.hippocampus.recall.ending_of_token
    own.setdefault("recall.ending_of_token", torch.zeros_like(spelled))
    own.pop("recall.log_contiguity", None)  # of checkpoints written before continuation was one pass
    try:
        model.hippocampus.load_state_dict(own)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint does not fit this base and config: {error}") from error


def _folder(name_or_path: str | Path, subfolder: str, hub: dict[str, Any]) -> Path:
    if Path(name_or_path).is_dir():
        return Path(name_or_path) / subfolder
    wanted = [str(Path(subfolder) / part) for part in (CONFIG, WEIGHTS, f"{BASE}/*")]
    try:
        validate_repo_id(str(name_or_path))  # what can only be a path is not sent to the hub
        if hub_failure(str(name_or_path), wanted[0], hub.get("revision")) is not None:
            hub = hub | {"local_files_only": True}
        return Path(snapshot_download(str(name_or_path), allow_patterns=wanted, **hub)) / subfolder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{name_or_path} is neither a folder nor a reachable hub repository: {error}") from error


def _one_device(device_map: Any) -> torch.device | None:
    """The device that a `device_map` of transformers names; "auto" is the accelerator, where there is one."""
    if isinstance(device_map, dict) and set(device_map) == {""}:
        device_map = device_map[""]
    if device_map is None or isinstance(device_map, torch.device):
        return device_map
    if device_map == "auto":
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError) as error:
        raise ConfigurationError(
            f"device_map={device_map!r} is not one device: a HippoFormer lives on one; give its name, or a base model "
            "that you spread yourself as base_model="
        ) from error
