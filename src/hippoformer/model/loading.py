"""The short way to a model: a name, and the options to change."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from hippoformer.configuration import HippoFormerConfig
from hippoformer.errors import CheckpointError, ConfigurationError
from hippoformer.model import checkpoint
from hippoformer.model.base_models import PINNED_MODELS, hub_failure, is_repository, load_base_model, load_tokenizer
from hippoformer.model.modeling import HippoFormer

_MADE_ON_THE_SPOT = ("untrained", "off")


def shipped_hippocampus(name: str) -> Path | None:
    """The folder of the trained hippocampus that the package ships for a base model, or None."""
    folder = Path(str(files("hippoformer"))) / "pretrained" / name
    return folder if checkpoint.is_saved_model(folder) else None


def saved_hippocampus(name: str | Path) -> str | Path | None:
    """Where the trained hippocampus that a name stands for is: shipped, or a saved model; None for a bare base."""
    if (shipped := shipped_hippocampus(str(name))) is not None:
        return shipped
    return name if _is_saved_model(str(name)) else None


def load(
    name: str | Path, memory: str | Path | None = None, **options: Any
) -> tuple[HippoFormer, PreTrainedTokenizerBase]:
    """A model ready to read, and its tokenizer.

    Args:
        name: a saved HippoFormer (folder or hub repository), or a base model: a short name (`smollm2-135m`, with the
            hippocampus that the package ships), a folder, or a hub repository (with an untrained one). The tokenizer is
            the base's, or one saved beside the hippocampus.
        memory: of a base model: "untrained"; "off", which predicts as the base does with the same window; or a saved
            HippoFormer that was trained on this base. None takes the shipped one, or an untrained one where none is.
            `HippoFormer.memory` says which it is.
        options: of `HippoFormerConfig`, to change (window, buffer_size, ...); `dtype` of the base; `device`; of a saved
            HippoFormer also `revision`, `token` and the others of `from_pretrained`.

    Raises:
        BaseModelNotFoundError, CheckpointError, UnsupportedArchitectureError, ConfigurationError.
    """
    device = options.pop("device", None)
    saved = saved_hippocampus(name) if memory is None else _memory_of(name, memory)
    if saved is not None:
        model = HippoFormer.from_pretrained(saved, **options)
    else:
        if memory == "off":
            options["unigram_weight"] = 0.0
        base = load_base_model(str(name), dtype=options.pop("dtype", None))
        model = HippoFormer(HippoFormerConfig(base_model_name=str(name), **options), base)
        if memory == "off":
            torch.nn.init.zeros_(model.hippocampus.fusion.strength)
        else:
            model.centre_keys()
    if device is not None:
        model.to(torch.device(device))  # type: ignore[arg-type]
    own_tokenizer = saved is not None and _find(str(saved), "tokenizer_config.json") is not None
    tokenizer = load_tokenizer(str(saved) if own_tokenizer else model.config.base_model_name)
    model.set_tokenizer(tokenizer, words=saved is None)
    return model, tokenizer


def _memory_of(name: str | Path, memory: str | Path) -> str | Path | None:
    """Where the hippocampus `memory` of a base model is; None for "untrained" and "off"."""
    if _is_saved_model(str(name)):
        raise ConfigurationError(f"{name} is a saved HippoFormer with a memory of its own: name its base, or no memory")
    if memory in _MADE_ON_THE_SPOT:
        return None
    if not _is_saved_model(str(memory)):
        raise CheckpointError(
            f"expected a saved HippoFormer, or one of {_MADE_ON_THE_SPOT}, got memory={str(memory)!r}"
        )
    base = HippoFormerConfig.from_pretrained(memory).base_model_name
    if base != str(name):
        raise ConfigurationError(f"the memory {memory} was trained on {base}, not on {name}")
    return memory


def load_beside(model: HippoFormer, name: str | Path, **options: Any) -> HippoFormer:
    """Another trained hippocampus on the base of a model, which both share: no weight of it is loaded again.

    Args:
        name: as for `load`, of a HippoFormer that was trained on the same base, left as it was.
        options: of `HippoFormerConfig`, to change.

    Raises:
        CheckpointError: no trained hippocampus there. ConfigurationError: one on another base, or with adapters or base
            weights of its own.
    """
    saved = saved_hippocampus(name)
    if saved is None:
        raise CheckpointError(f"{name} is not a HippoFormer checkpoint: expected a saved HippoFormer")
    config, name_of_base = HippoFormerConfig.from_pretrained(saved), model.config.base_model_name
    if config.lora is not None or not config.freeze_base or config.base_model_name != name_of_base:
        raise ConfigurationError(
            f"{name} was trained on {config.base_model_name} not on {name_of_base}, or with weights of the base: it "
            "cannot share this one, load it alone"
        )
    found = HippoFormer.from_pretrained(saved, base_model=model.base, **options)
    found.config.name_or_path, found.spelling = str(name), model.spelling
    return found


def _is_saved_model(name: str) -> bool:
    config = _find(name, checkpoint.CONFIG)
    return config is not None and checkpoint.is_saved_model(config.parent)


def _find(name: str, file: str) -> Path | None:
    """A file of a folder or hub repository; None where there is none, also where the hub cannot be asked."""
    if Path(name).is_dir():
        return Path(name) / file if (Path(name) / file).is_file() else None
    if name in PINNED_MODELS or not is_repository(name):
        return None
    found = cached_file(
        name,
        file,
        local_files_only=hub_failure(name, checkpoint.CONFIG, None) is not None,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)
