"""Result files: written atomically, with the facts needed to make the numbers again."""

import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import uuid
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hippoformer.data.documents import Document
from hippoformer.errors import HippoFormerError

PACKAGES = ("hippoformer", "torch", "transformers", "tokenizers", "peft", "safetensors", "datasets", "numpy", "scipy")


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any], indent: int | None = 2) -> None:
    """Writes JSON; after a crash or on a full disk the file is either the old one or the whole new one.

    Args:
        path: of the file. content: what goes in. indent: spaces a level; None writes one line.

    Raises:
        HippoFormerError: the file cannot be written; an earlier file is unchanged.
        ValueError: NaN or infinity in the content, which JSON cannot hold.
    """
    path = Path(path)
    separators = (",", ":") if indent is None else None
    text = json.dumps(content, indent=indent, separators=separators, ensure_ascii=False, allow_nan=False) + "\n"
    # In the same folder, because os.replace is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise HippoFormerError(
            f"{path} could not be written ({error.strerror or error}); expected a writable folder with room for "
            f"{len(text)} characters. Choose another place or free some space; an earlier file there is unchanged."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def provenance(
    documents: Iterable[Document] | None = None, command: str = "", seed: int | None = None
) -> dict[str, Any]:
    """Facts about this run, ready for JSON.

    Args:
        documents: the data; their sha256, number, size and sources are recorded.
        command: the command that ran; the process's own command line where it is empty. seed: of the run.

    Returns:
        date (UTC), command, seed, commit (None outside a checkout), dirty (src or evaluation have uncommitted changes),
        python, packages (None: not installed), platform, cpu, cpus, torch_threads, gpu (None without one), data.
    """
    commit, dirty = _commit(Path(__file__).resolve().parents[2])
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command or _command(),
        "seed": seed,
        "commit": commit,
        "dirty": dirty,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "data": None if documents is None else _describe_data(list(documents)),
    }


def _describe_data(documents: list[Document]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.text.encode("utf-8"))
    return {
        "sha256": digest.hexdigest(),
        "documents": len(documents),
        "utf8_bytes": sum(len(document.text.encode("utf-8")) for document in documents),
        # Records of one .jsonl file differ by their line number only; the file is named once.
        "sources": list(dict.fromkeys(re.sub(r":\d+$", "", document.source) for document in documents)),
    }


def _command() -> str:
    """The process's command line as a user would type it, without where Python and the program lie."""
    program = sys.argv[0]
    if module := getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", ""):
        program = f"python -m {module.removesuffix('.__main__')}"
    return " ".join([program if module else Path(program).name, shlex.join(sys.argv[1:])]).strip()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")  # Linux
    lines = info.read_text("utf-8", errors="replace").splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit(root: Path) -> tuple[str | None, bool | None]:
    """(commit, uncommitted changes) of the checkout this package runs from; (None, None) for an installed copy."""
    # An installed copy may lie inside somebody else's repository, whose commit says nothing of this package.
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root:
        return None, None
    status = _git(root, "status", "--porcelain", "--", "src", "evaluation")
    return _git(root, "rev-parse", "--verify", "HEAD"), None if status is None else bool(status)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):  # no git on this machine: a result without a commit
        return None
    return done.stdout.strip() if done.returncode == 0 else None
