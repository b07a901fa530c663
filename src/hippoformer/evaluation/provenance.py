"""Where a number came from, and how to write it down without ever leaving half a file.

Every result file carries the commit, the package versions, the machine, the sha256 of the data, the seed and the
command, so that a figure can be made again or told apart from one that looks like it.
"""

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

from hippoformer.data import Document
from hippoformer.errors import HippoFormerError

PACKAGES = ("hippoformer", "torch", "transformers", "tokenizers", "peft", "safetensors", "datasets", "numpy", "scipy")
_PACKAGE = Path(__file__).resolve().parents[1]


def provenance(
    seed: int | None = None, documents: Iterable[Document] | None = None, command: str | None = None
) -> dict[str, Any]:
    """Facts about this run, ready for JSON.

    Args:
        seed: of the run, where it has one.
        documents: the data; its sha256 and number of documents are recorded.
        command: what was run; the process's own command line where it is None.

    Returns:
        date (UTC), command, seed, commit (None outside a checkout), dirty (the package has uncommitted changes),
        python, packages (None: not installed), platform, cpu, cpus, torch_threads, gpu (None without one), data.
    """
    commit, dirty = _commit(_PACKAGE)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": _command() if command is None else command,
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
        "data": None if documents is None else _data(list(documents)),
    }


def documents_sha256(documents: Iterable[Document]) -> str:
    """sha256 of the UTF-8 bytes of the texts in order; for all documents of a file it is the file's own sha256."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.text.encode("utf-8"))
    return digest.hexdigest()


def digest(content: Any) -> str:
    """sha256 of anything that JSON can hold; what it has no word for goes by its name."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def code_sha256(package: Path = _PACKAGE) -> str:
    """sha256 of the package's own code, as it is and not as it was committed, and of the versions it runs with."""
    code = {file.relative_to(package).as_posix(): file.read_text("utf-8") for file in package.rglob("*.py")}
    return digest([code, {name: _version(name) for name in PACKAGES}])


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any], indent: int | None = 2) -> None:
    """Writes JSON so that the file is either the old one or the whole new one, also after a kill or a full disk.

    Args:
        path: of the file. content: what goes in.
        indent: blanks a level; None for one line without any, for long columns of numbers.

    Raises:
        HippoFormerError: the file cannot be written; whatever stood there before is untouched.
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


def _data(documents: list[Document]) -> dict[str, Any]:
    # Records of one .jsonl file differ by their line number only; the file is named once.
    sources = list(dict.fromkeys(re.sub(r":\d+$", "", document.source) for document in documents))
    return {
        "sha256": documents_sha256(documents),
        "documents": len(documents),
        "utf8_bytes": sum(len(document.text.encode("utf-8")) for document in documents),
        "sources": sources,
    }


def _command() -> str:
    """The command line, with the program as a user would call it instead of where it lies on this machine."""
    program, arguments = Path(sys.argv[0]), sys.argv[1:]
    if program.stem == _PACKAGE.name or program.resolve().parent == _PACKAGE / "cli":
        return shlex.join([_PACKAGE.name, *arguments])
    if program.is_absolute() and program.is_relative_to(Path.cwd()):
        program = program.relative_to(Path.cwd())
    return shlex.join([program.name if program.is_absolute() else str(program), *arguments])


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit(package: Path) -> tuple[str | None, bool | None]:
    """(commit, uncommitted changes) of the checkout this package runs from; (None, None) for an installed copy."""
    root = _git(package, "rev-parse", "--show-toplevel")
    # An installed copy may lie inside somebody else's repository (a .venv often does), whose commit says nothing of us.
    if root is None or Path(root).resolve() / "src" / package.name != package:
        return None, None
    status = _git(package, "status", "--porcelain", "--", ".")
    return _git(package, "rev-parse", "--verify", "HEAD"), None if status is None else bool(status)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):  # no git on this machine: a result without a commit
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()
