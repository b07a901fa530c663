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
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hippoformer.data.documents import Document
from hippoformer.errors import HippoFormerError

FORMAT = "hippoformer.rows/1"
PACKAGES = ("hippoformer", "torch", "transformers", "tokenizers", "peft", "safetensors", "datasets", "numpy", "scipy")


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any], indent: int | None = 2) -> None:
    """Writes JSON; after a crash or on a full disk the file is either the old one or the whole new one.

    Raises HippoFormerError for a file that cannot be written, ValueError for NaN or infinity, which JSON cannot hold.
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


def result_file(
    evaluation: str, model: Any, settings: Any, rows: Iterable[dict[str, Any]], documents: Sequence[Document] | None
) -> dict[str, Any]:
    """The content of a result file: rows with the names of evaluation and model, and where they came from."""
    names = {"evaluation": evaluation, "model": str(model.config.base_model_name)}
    config = json.loads(json.dumps(model.config.to_dict(), default=str), parse_constant=str)  # infinity by its name
    return {
        "format": FORMAT,
        "rows": [names | row | {name: row.get(name) or given for name, given in names.items()} for row in rows],
        "model": {"dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device), "config": config},
        "settings": json.loads(json.dumps(settings, default=str)),
        "provenance": provenance(documents),
    }


def provenance(documents: Iterable[Document] | None = None) -> dict[str, Any]:
    """Facts about this run, ready for JSON; `dirty`: src or evaluation have uncommitted changes."""
    commit, dirty = _commit(Path(__file__).resolve().parents[2])
    cpus = info.read_text("utf-8", errors="replace").splitlines() if (info := Path("/proc/cpuinfo")).is_file() else []
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": _command(),
        "commit": commit,
        "dirty": dirty,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": next((line.partition(": ")[2] for line in cpus if line.startswith("model name")), platform.machine()),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "data": None if documents is None else _describe_data(documents),
    }


def _describe_data(documents: Iterable[Document]) -> dict[str, Any]:
    digest, count, size, sources = hashlib.sha256(), 0, 0, dict[str, None]()
    for document in documents:
        data = document.text.encode("utf-8")
        digest.update(data)
        count, size = count + 1, size + len(data)
        # Records of one .jsonl file differ by their line number only; the file is named once.
        sources[re.sub(r":\d+$", "", document.source)] = None
    return {"sha256": digest.hexdigest(), "documents": count, "utf8_bytes": size, "sources": list(sources)}


def _command() -> str:
    """The command line as a user would type it, without where Python and the program lie."""
    program = Path(sys.argv[0]).name
    if module := getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", ""):
        program = f"python -m {module.removesuffix('.__main__')}"
    return f"{program} {shlex.join(sys.argv[1:])}".strip()


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
    except (OSError, subprocess.TimeoutExpired):
        return None  # no git on this machine: a result without a commit
    return done.stdout.strip() if done.returncode == 0 else None
