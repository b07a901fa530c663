"""Saving and loading a hippocampus: a small folder that names its base model.

    config.json                 every option
    model.safetensors           the hippocampus, and LoRA adapters where there are any
    generation_config.json      how `generate` chooses, unless told otherwise
    base/                       the base model, only where its own weights were trained
    README.md                   the model card; one that is there already is left alone

Weights under their former name, hippocampus.safetensors, load as well. Files are written beside their place and moved
into it, so that a full disk or a kill leaves the previous ones whole.
"""

import json
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_NAME

from hippoformer.configuration import HippoFormerConfig
from hippoformer.errors import CheckpointError, ConfigurationError
from hippoformer.model.base_models import PINNED_MODELS, hub_failure, is_repository, load_base_model
from hippoformer.model.pretrained import HippoFormerPreTrainedModel as Model
from hippoformer.model.weights import foreign_adapters, load_lora_state, lora_state

WEIGHTS, CONFIG, BASE, CARD = SAFE_WEIGHTS_NAME, CONFIG_NAME, "base", "README.md"
FORMER_WEIGHTS = "hippocampus.safetensors"
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
# What the auto classes and pipelines of transformers add to any call, and has nothing to say here.
_HARMLESS = {"_from_auto", "_from_pipeline", "adapter_kwargs", "code_revision", "trust_remote_code"}

_TEMPLATE = """---
{metadata}
---

# {title}

A hippocampus for {base}: a bounded episodic memory inside a language model, which reads text of any length in constant
space. Inside: {contents}.

| | |
| --- | --- |
{facts}

## How to load it

```python
import hippoformer
from hippoformer.text import encode

model, tokenizer = hippoformer.load("{name}")
cache = model.new_cache(batch_size=1)  # all that will be remembered
ids = encode(tokenizer, "Some long text.", bos=True)
print(tokenizer.decode(model.generate(ids, past_key_values=cache, max_new_tokens=20)[0]))
```

`AutoModelForCausalLM.from_pretrained("{name}")` works as well once `hippoformer` is imported. {where_the_base_is}
"""


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file atomically: the old one stays until the new one is whole; else CheckpointError."""
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


def save(model: Model, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """Writes the folder described above, without a card; weights first: a config never stands beside missing ones.

    `state` is written instead of the model's own tensors, by their names in its state dict.
    """
    model.take_vocabulary()
    if foreign := foreign_adapters(model.base):
        warnings.warn(
            f"the base's adapters {foreign} are not saved with the hippocampus: save them by peft, and give the base "
            "with them as base_model= when this model is loaded",
            stacklevel=3,
        )
    state = model.state_dict() if state is None else state
    base = {name.removeprefix("base."): tensor for name, tensor in state.items() if name.startswith("base.")}
    tensors = {name: tensor for name, tensor in state.items() if name.startswith("hippocampus.")}
    if model.config.lora is not None:
        tensors |= {f"lora.{name}": tensor for name, tensor in lora_state(model.base, base).items()}
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    (folder / FORMER_WEIGHTS).unlink(missing_ok=True)
    if not model.config.freeze_base and model.config.lora is None:
        model.base.save_pretrained(folder / BASE, state_dict=base)
    # Without the checks of its own save_pretrained: some bases come with settings that it refuses to write.
    model.generation_config.to_json_file(folder / GENERATION_CONFIG_NAME)
    model.config.save_pretrained(folder)


def push(
    model: Model,
    repository: str,
    *,
    token: bool | str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    **commit: Any,
) -> Any:
    """Uploads a model's files in one commit and returns what the hub says; a card that is there is left alone."""
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


def model_card(model: Model, name: str) -> ModelCard:
    """The card of a model that is about to be saved, which `name` (a hub repository, or a folder) will load.

    All of it is read off the model; the texts it was trained on, and the licence, are left for the author to add.
    """
    config = model.config
    own_base = not config.freeze_base and config.lora is None
    lora = ["LoRA adapters"] if config.lora is not None else []
    named, pinned = config.base_model_name, PINNED_MODELS.get(config.base_model_name)
    on_hub = not Path(named).expanduser().is_dir() and is_repository(named)
    repository = pinned.hub_repository if pinned else named if on_hub else None
    data = ModelCardData(
        base_model=repository,
        base_model_relation=None if repository is None else "finetune" if own_base else "adapter",
        library_name="hippoformer",
        pipeline_tag="text-generation",
        tags=["hippoformer", "memory", "long-context", *(["lora"] if lora else [])],
    )
    shown = named if repository is not None else Path(named).name
    added = [*model.hippocampus.parameters(), *(p for name, p in model.base.named_parameters() if "lora_" in name)]
    facts = {
        "base": f"`{shown}`, {'trained along' if own_base else 'frozen'}",
        "parameters besides the base's": f"{sum(parameter.numel() for parameter in added):,}",
        "memory": "trained" if model.hippocampus.fusion.is_trained else "untrained",
        "window, sinks, segment": f"{config.window}, {config.sink_tokens}, {config.segment_len} tokens",
        "episodes of a row": f"{config.buffer_size:,}, chosen by {config.selection}",
        "keys": f"{config.recall_n_heads} heads x {config.recall_head_dim}, of layer {config.memory_layer}",
    }
    contents = ["the hippocampus", *lora, "the base, whose weights were trained" if own_base else "not the base"]
    where = "The base is fetched from where its name says."
    if own_base:
        where = "The base comes along, in the folder `base`."
    elif repository is None:
        where = f"The base is a local folder, `{shown}`, that is on no hub: give it as `base_model=`."
    return ModelCard(
        _TEMPLATE.format(
            metadata=data.to_yaml(),
            title=name.rstrip("/").split("/")[-1],
            base=f"[{shown}](https://huggingface.co/{repository})" if repository else f"`{shown}`",
            contents=", ".join(contents),
            facts="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
            name=name,
            where_the_base_is=where,
        )
    )


def write_card(model: Model, folder: Path, name: str) -> None:
    """Writes the model card, unless there is one."""
    if not (folder / CARD).exists():
        model_card(model, name).save(folder / CARD)


def is_saved_model(folder: Path) -> bool:
    """Whether a folder holds a HippoFormer, by its config: other models, too, have a config.json and weights."""
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("model_type") == HippoFormerConfig.model_type


def weights_file(folder: Path) -> Path:
    """Where the weights of a saved model are; CheckpointError where there is no saved HippoFormer, or no weights."""
    found = [folder / name for name in (WEIGHTS, FORMER_WEIGHTS) if (folder / name).is_file()]
    if not found or not is_saved_model(folder):
        raise CheckpointError(
            f"{folder} is not a HippoFormer checkpoint: expected a {CONFIG} of model_type "
            f"{HippoFormerConfig.model_type} and {WEIGHTS} in it; hippoformer.load wraps other models"
        )
    return found[0]


def load(
    cls: Callable[[HippoFormerConfig, PreTrainedModel], Any],
    name_or_path: str | Path,
    base_model: PreTrainedModel | None,
    **options: Any,
) -> Any:
    """Builds the model of a saved folder or hub repository.

    Args:
        cls: the model's class. base_model: used instead of the base that the config names.
        options: of the config, to change (window, buffer_size, ...); a whole `config` instead of the saved one;
            `dtype` and `attn_implementation` of the base; `device_map`, one device; `subfolder`, `revision`, `token`,
            `cache_dir`, `force_download`, `local_files_only`, `output_loading_info` as in transformers.

    Returns:
        The model; with `output_loading_info` also the names of tensors that the file has and the model does not
        (`unexpected_keys`). Nothing else can be in it: missing weights and other shapes are errors.

    Raises:
        CheckpointError: not a HippoFormer checkpoint, or one whose weights are missing, damaged or of other shapes.
        ConfigurationError: an option that does not exist, more than one device, the meta device, or a base without the
            adapters of its own that it had.
    """
    if torch.empty(0).device.type == "meta":
        raise ConfigurationError(
            "from_pretrained reads weights, and the meta device holds none: leave torch.device('meta'), or make an "
            "empty model by HippoFormer(config)"
        )
    options = {name: value for name, value in options.items() if name not in _HARMLESS}
    hub = {name: options.pop(name) for name in _HUB_OPTIONS if name in options}
    dtype, older_name = options.pop("dtype", None), options.pop("torch_dtype", None)
    attention, with_info = options.pop("attn_implementation", None), options.pop("output_loading_info", False)
    device = _one_device(options.pop("device_map", None))
    folder = _folder(name_or_path, options.pop("subfolder", None) or "", hub)
    weights = weights_file(folder)
    saved = options.pop("config", None) or folder
    if isinstance(saved, HippoFormerConfig):
        attention = attention or saved._attn_implementation  # where the auto classes put it
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
        own = str(folder / BASE) if (folder / BASE).is_dir() else config.base_model_name
        base_model = load_base_model(own, dtype=dtype or older_name, attn_implementation=attention or "sdpa")
    elif attention is not None:
        base_model.set_attn_implementation(attention)
    foreign = getattr(config, "base_adapters", None)
    if foreign and not foreign_adapters(base_model):
        raise ConfigurationError(
            f"{folder} was saved over a base with adapters {foreign}, and this base has none: load them by peft "
            "(PeftModel.from_pretrained) and give the peft model as base_model="
        )
    model, tensors = cls(config, base_model), _tensors(weights)
    restore(model, tensors)
    if (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    if device is not None:
        model.to(device)
    known = ("hippocampus.", "lora.") if config.lora is not None else ("hippocampus.",)
    info: dict[str, Any] = {name: set() for name in ("missing_keys", "mismatched_keys", "error_msgs")}
    info["unexpected_keys"] = {name for name in tensors if not name.startswith(known)}
    return (model, info) if with_info else model


def restore(model: Model, tensors: dict[str, Tensor]) -> None:
    """Puts saved tensors into a model; CheckpointError for names or shapes that do not fit."""
    _restore_hippocampus(model, tensors)
    if model.config.lora is not None:
        load_lora_state(model.base, {n.removeprefix("lora."): t for n, t in tensors.items() if n.startswith("lora.")})


def load_hippocampus(model: Model, name_or_path: str | Path) -> None:
    """Gives a model the hippocampus of a saved folder or hub repository, and nothing else. Errors as `load`."""
    _restore_hippocampus(model, _tensors(weights_file(_folder(name_or_path, "", {}))))


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error


def _restore_hippocampus(model: Model, tensors: dict[str, Tensor]) -> None:
    own = {n.removeprefix("hippocampus."): t for n, t in tensors.items() if n.startswith("hippocampus.")}
    mine = model.config.vocab_size
    theirs = own["recall.word_of_token"].shape[0] if "recall.word_of_token" in own else mine
    if theirs != mine:
        warnings.warn(
            f"the hippocampus was saved for a vocabulary of {theirs} tokens, the base has {mine}: nothing is known of "
            "how the others are spelled, until recall.set_words",
            stacklevel=2,
        )
        model.hippocampus.resize_vocabulary(theirs)
    own.pop("recall.log_contiguity", None)  # in the shipped weights, of before continuation was one pass
    for name in ("recall.ending_of_token", "fusion.beyond_weight"):  # of checkpoints written before there was one
        own.setdefault(name, torch.zeros_like(model.hippocampus.state_dict()[name]))
    try:
        model.hippocampus.load_state_dict(own)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint does not fit this base and config: {error}") from error
    model.hippocampus.resize_vocabulary(mine)


def _folder(name_or_path: str | Path, subfolder: str, hub: dict[str, Any]) -> Path:
    if Path(name_or_path).is_dir():
        return Path(name_or_path) / subfolder
    parts = (CONFIG, WEIGHTS, FORMER_WEIGHTS, GENERATION_CONFIG_NAME, f"{BASE}/*")
    wanted = [str(Path(subfolder) / part) for part in parts]
    try:
        if hub_failure(str(name_or_path), wanted[0], hub.get("revision")) is not None:
            hub = hub | {"local_files_only": True}
        return Path(snapshot_download(str(name_or_path), allow_patterns=wanted, **hub)) / subfolder
    except (OSError, ValueError) as error:  # ValueError: what can only be a path is not sent to the hub
        raise CheckpointError(f"{name_or_path} is neither a folder nor a reachable hub repository: {error}") from error


def _one_device(device_map: Any) -> torch.device | None:
    """The device that a `device_map` of transformers names; "auto" is the accelerator, where there is one."""
    if isinstance(device_map, dict) and set(device_map) == {""}:
        device_map = device_map[""]
    if device_map == "auto":
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        return None if device_map is None else torch.device(device_map)
    except (RuntimeError, TypeError) as error:
        raise ConfigurationError(
            f"device_map={device_map!r} is not one device: a HippoFormer lives on one; give its name, or a base model "
            "that you spread yourself as base_model="
        ) from error
