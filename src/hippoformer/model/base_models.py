"""Find and load the language model that the hippocampus is attached to.

A base model is named by a local folder, by a hub repository (`google/gemma-2b`), or by a short name (`smollm2-135m`,
see `pinned_models.py`). transformers does the loading; this module adds what it leaves out: a quick answer when the hub
cannot be reached (what is in the hub's cache still loads), no random numbers in place of missing weights, and one kind
of error that says what to do.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hippoformer.errors import BaseModelNotFoundError, ConfigurationError
from hippoformer.model.computing_dtype import faster_dtype
from hippoformer.model.pinned_models import PINNED_MODELS, first_line, hub_failure, resolve_pinned


def resolve_base_model(name: str | os.PathLike[str]) -> str | Path:
    """What `from_pretrained` takes for `name`: a local folder, or the name of a hub repository.

    Args:
        name: a short name (`smollm2-135m`; fetched and unpacked on first use), a local folder, or a hub repository
            (not contacted here). A short name wins over a folder of that name; write `./smollm2-135m` for the folder.

    Raises:
        BaseModelNotFoundError: no such folder, or a short name whose file is neither cached nor reachable.
    """
    name = os.fspath(name)
    if name in PINNED_MODELS:
        return resolve_pinned(PINNED_MODELS[name])
    path = Path(name).expanduser()
    if (path / "config.json").is_file():
        return path
    if path.exists() or not is_repository(name):  # what can only be a path is not sent to the hub
        raise BaseModelNotFoundError(
            f"There is no config.json in a folder {path}. Expected a folder written by save_pretrained()."
        )
    return name


def is_repository(name: str) -> bool:
    """Whether a hub repository could have this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def load_base_model(
    name: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    attn_implementation: str | None = "sdpa",
) -> PreTrainedModel:
    """Loads a base model in eval mode; its `config.name_or_path` is `name`, as given.

    Args:
        name: see `resolve_base_model`.
        dtype: of the weights; by default the one they are stored in, or that of `in_computing_dtype`.
        revision: branch, tag or commit of a hub repository.
        attn_implementation: as transformers names them; None leaves the choice to the model.

    Raises:
        BaseModelNotFoundError: not found, not reachable, damaged, or without some of its weights; the cause is chained.
        ConfigurationError: a revision of something that is not a hub repository.
    """
    with _loading(name, revision) as arguments:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **arguments, dtype=dtype or "auto", attn_implementation=attn_implementation, output_loading_info=True
        )
        model, loading_info = loaded
        if missing := sorted(loading_info["missing_keys"]):
            # transformers has filled them with random numbers and would go on.
            raise ValueError(f"{len(missing)} of its weights are missing, {missing[0]} first")
    if dtype is None:
        model = in_computing_dtype(model)
    model.config.name_or_path = model.name_or_path = os.fspath(name)
    return model.eval()


def empty_base_model(name: str | os.PathLike[str], *, attn_implementation: str | None = "sdpa") -> PreTrainedModel:
    """The base model without weights, on the device of the surrounding `torch.device`, in eval mode.

    Raises:
        BaseModelNotFoundError: as for `load_base_model`.
    """
    with _loading(name, None) as arguments:
        config = AutoConfig.from_pretrained(**arguments)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
    model.config.name_or_path = model.name_or_path = os.fspath(name)
    return model.eval()


def in_computing_dtype(model: PreTrainedModel) -> PreTrainedModel:
    """The model in the precision that computes fastest on this machine, as measured by `faster_dtype`.

    Any accelerator, and weights that would fill half of the machine's memory, leave the model as it is.
    """
    if model.dtype not in (torch.bfloat16, torch.float16) or torch.accelerator.is_available():
        return model
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if model.num_parameters() * torch.float32.itemsize > memory / 2:
        return model
    dtype = faster_dtype(model.dtype, model.config.get_text_config(decoder=True))
    return model.float() if dtype is torch.float32 else model


def load_tokenizer(name: str | os.PathLike[str], *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a base model.

    Args:
        name, revision: as for `load_base_model`.

    Raises:
        BaseModelNotFoundError, ConfigurationError: as for `load_base_model`.
    """
    with _loading(name, revision) as arguments:
        tokenizer = AutoTokenizer.from_pretrained(**arguments)
        files, folder = tokenizer.vocab_files_names.values(), Path(arguments["pretrained_model_name_or_path"])
        if files and folder.is_dir() and not any((folder / file).is_file() for file in files):
            # Some releases of transformers make up a tokenizer of a few special tokens and go on.
            raise ValueError(f"none of {', '.join(files)} is there")
    tokenizer.name_or_path = os.fspath(name)
    return tokenizer


@contextmanager
def _loading(name: str | os.PathLike[str], revision: str | None) -> Iterator[dict[str, Any]]:
    """Yields the arguments of `from_pretrained`; turns every failure inside into a `BaseModelNotFoundError`."""
    source, unreachable = resolve_base_model(name), None
    if isinstance(source, str):
        unreachable = hub_failure(source, "config.json", revision)
        advice = f"Expected a hub repository or a local folder of a causal model, or one of {list(PINNED_MODELS)}."
        if unreachable is not None:
            advice += f" The hub cannot be reached ({first_line(unreachable)}): give a folder that holds the model."
    elif revision is not None:
        raise ConfigurationError(f"revision={revision!r} was given, but {os.fspath(name)} is not a hub repository.")
    elif os.fspath(name) in PINNED_MODELS:
        advice = f"Delete the folder {source}: it is made again."
    else:
        advice = "Expected a complete folder written by save_pretrained() of a causal language model."
    try:
        if unreachable is not None:  # a folder in the hub's cache: not every part of transformers stays offline
            source, revision = snapshot_download(str(source), revision=revision, local_files_only=True), None
        yield {"pretrained_model_name_or_path": source, "revision": revision or "main"}
    except Exception as error:
        raise BaseModelNotFoundError(
            f"The base model {os.fspath(name)!r} could not be loaded: {first_line(error)}. {advice}"
        ) from error
