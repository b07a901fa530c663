"""Memories on disk: one safetensors file that carries everything a stream was, and the code it was written in.

Inside: all tensors of the cache; as metadata its counters, and a fingerprint of base, adapters, hippocampus and
config; and how the writing model encoded the drift anchors. A file read by the very same model comes back bit for
bit. Under a changed model of the same shape (LoRA steps, another quantisation) the anchors are encoded again: beyond
`drift_threshold` keys and values are mapped to the new code, and the window is read again, since its keys/values
belong to the old weights. A file of another kind of model is refused.

What took hours to read can always be written: a fingerprint or anchors that cannot be computed are left out with a
warning, and the file is then read by what is known.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hippoformer.errors import MemoryFileError
from hippoformer.hippocampus.drift import relative_drift
from hippoformer.hippocampus.marginals import of_vocabulary
from hippoformer.model.cache import HippoCache
from hippoformer.model.checkpoint import write_tensors
from hippoformer.model.interface import Model
from hippoformer.model.weights import base_fingerprint
from hippoformer.model.window import window_fill
from hippoformer.tensors.ragged import last_of

_FORMAT = "hippoformer-memory-1"
_COUNTERS = ("lengths", "columns", "frozen", "written", "stored_bound")
_NOTE = "note."  # before the name of each of the cache's notes
_PASSAGES = "passages."  # before the name of each of the passages' tensors
_PRINTS = ("base", "hippocampus", "shape")
_ANCHORS = ("anchors.ids", "anchors.keys", "anchors.values")
# Anchors this far from where they were, in units of their own spread, have nothing in common with them any more.
_UNRELATED = 1.2
# Options that shape the stored tensors; a file and a model must agree on them.
_SHAPING = (
    "window",
    "sink_tokens",
    "segment_len",
    "buffer_size",
    "recall_n_heads",
    "recall_head_dim",
    "recall_value_dim",
    "memory_layer",
    "hidden_size",
    "vocab_size",
    "num_hidden_layers",
)


def fingerprint(model: Model) -> dict[str, str]:
    """Digests of what a memory's numbers depend on: base with adapters, hippocampus, and the shaping options."""
    return {
        "base": base_fingerprint(model.base),
        "hippocampus": base_fingerprint(model.hippocampus),
        "shape": shape(model),
    }


def shape(model: Model) -> str:
    """The options that shape a memory's tensors, as JSON."""
    return json.dumps({name: getattr(model.config, name) for name in _SHAPING}, sort_keys=True)


@contextmanager
def _left_out(what: str) -> Iterator[None]:
    """Goes on without what cannot be computed, whatever the reason, and tells it."""
    try:
        yield
    except Exception as error:
        warnings.warn(f"the memory's {what} cannot be computed ({error!r}): it goes without", stacklevel=6)


def save_memory(model: Model, cache: HippoCache, path: str | Path) -> None:
    """Writes the whole state of a cache of a model atomically.

    Raises:
        CheckpointError: the file could not be written; an earlier one at this place is unchanged.
    """
    tensors = cache.tensors()
    change, prints = cache.change_of_model(), dict.fromkeys(_PRINTS, None) | {"shape": shape(model)}
    if cache.passages is not None:
        tensors |= {f"{_PASSAGES}{name}": tensor for name, tensor in cache.passages.tensors().items()}
    if change is not None:
        warnings.warn(f"{path} cannot say by which model it was written: {change}", stacklevel=4)
    else:
        with _left_out("fingerprint"):
            prints |= fingerprint(model)
        with _left_out("drift anchors"):
            ids = model.hippocampus.drift_calibrator.anchor_ids
            keys, values = model.anchors(ids)
            tensors |= {"anchors.ids": ids, "anchors.keys": keys, "anchors.values": values}
    counters = {
        "lengths": cache.lengths,
        "columns": cache.columns,
        "digest": None if cache.digest is None else cache.digest.tolist(),
        "frozen": cache.frozen,
        "written": cache.written,
        "stored_bound": cache.memory.stored_bound,
    }
    metadata = {"format": _FORMAT, "counters": json.dumps(counters), "fingerprint": json.dumps(prints)}
    metadata |= {f"{_NOTE}{name}": text for name, text in cache.notes.items()}
    write_tensors(Path(path), tensors, metadata)


@torch.no_grad()
def load_memory(model: Model, path: str | Path) -> HippoCache:
    """Reads a memory for a model.

    Returns:
        The cache. Its `drift` says what was measured: `keys` and `values` (0 for an unchanged model), `calibrated`;
        only the last where a file has no anchors.

    Raises:
        MemoryFileError: no such file, truncated, not a memory, made by a model of another shape, or by one whose code
            has nothing in common with this one's; without anchors, by another model.
    """
    tensors, counters, theirs, notes = _read(Path(path))
    cache: HippoCache = model.new_cache(len(counters["lengths"]))
    ours, other = json.loads(shape(model)), json.loads(theirs["shape"])
    differing = [n for n in ours if ours[n] != other.get(n) and n != "vocab_size"]
    if differing:
        found = ", ".join(f"{n}={other.get(n)} (model: {ours[n]})" for n in differing)
        raise MemoryFileError(f"{path} was written by a model of another shape: {found}; load that model")
    mine = dict.fromkeys(_PRINTS, None) | {"shape": shape(model)}
    with _left_out("fingerprint"):
        mine |= fingerprint(model)
    _take_vocabulary(tensors, cache, str(path))
    _take_surprise(tensors, cache, str(path))
    _check_tensors(tensors, cache, str(path))
    _restore_passages(cache, tensors, str(path))
    known = None not in (*mine.values(), *theirs.values())
    unchanged = known and mine == theirs
    if not unchanged:
        kinds = {name: tensor.dtype for name, tensor in cache.tensors().items()}
        tensors |= {name: tensors[name].to(kind) for name, kind in kinds.items()}
    kept = tensors if unchanged else {n: t for n, t in tensors.items() if not n.endswith((".keys", ".values"))}
    cache.restore(kept, counters["stored_bound"])
    cache.lengths, cache.columns = counters["lengths"], counters["columns"]
    digest = counters.get("digest")  # none in files written before prompts were checked against what was read
    cache.digest = None if digest is None else torch.tensor(digest, device=model.device)
    cache.frozen, cache.written, cache.notes = counters["frozen"], counters["written"], notes
    if unchanged:
        cache.drift = {"keys": 0.0, "values": 0.0, "calibrated": False}
    else:
        cache.drift = _translated(cache, tensors, model, str(path), known)
        _reread_window(cache, model)
    return cache


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str], dict[str, str]]:
    """Tensors, counters, fingerprint and notes of a file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copied: where a tensor lies in the file is not where torch would align it, and rounds otherwise.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise MemoryFileError(f"there is no memory file at {path}") from error
    except (SafetensorError, OSError) as error:
        raise MemoryFileError(f"{path} is truncated or not a memory file: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise MemoryFileError(f"{path} is a safetensors file, but not a memory of format {_FORMAT}")
    try:
        counters, prints = json.loads(metadata["counters"]), json.loads(metadata["fingerprint"])
        complete = all(name in counters for name in _COUNTERS) and all(name in prints for name in _PRINTS)
        counts = [*counters["lengths"], counters["columns"], counters["stored_bound"]] if complete else [-1]
        complete = bool(counters["lengths"]) and all(isinstance(n, int) and n >= 0 for n in counts)
    except (KeyError, TypeError, ValueError) as error:
        raise MemoryFileError(f"the counters or the fingerprint of {path} are damaged: {error!r}") from error
    if not complete:
        raise MemoryFileError(f"the counters or the fingerprint of {path} are incomplete; it was not written by `save`")
    notes = {name.removeprefix(_NOTE): text for name, text in metadata.items() if name.startswith(_NOTE)}
    return tensors, counters, prints, notes


def _take_vocabulary(tensors: dict[str, Tensor], cache: HippoCache, path: str) -> None:
    """Marginals as this model keeps them: of its vocabulary, which may have been resized since, or new, or none."""
    size = cache.vocab_size
    for name in ("window.tokens", "memory.token", "memory.vote_token", "anchors.ids"):
        if name in tensors and int(tensors[name].max()) >= size:
            raise MemoryFileError(
                f"{path} holds token {int(tensors[name].max())}, but the model's vocabulary has {size}"
            )
    for name, tensor in cache.memory.marginals.tensors().items():
        written = tensors.get(f"memory.marginal_{name}")
        if written is None or 0 in (written.numel(), tensor.numel()):  # one of both keeps none: they begin anew
            tensors[f"memory.marginal_{name}"] = tensor
        elif written.dim() == 2:
            tensors[f"memory.marginal_{name}"] = of_vocabulary(written, size)


def _take_surprise(tensors: dict[str, Tensor], cache: HippoCache, path: str) -> None:
    """Surprise as this model's selection rule needs it: none where the rule does not read it."""
    surprise = cache.memory.episodes.surprise
    if not surprise.numel():
        tensors["memory.surprise"] = surprise
    elif not tensors.get("memory.surprise", surprise[..., :0]).numel():
        raise MemoryFileError(
            f"{path} does not say how surprising each episode was, which selection={cache.config.selection!r} reads: "
            "load it with a model that selects by another rule"
        )


def _check_tensors(tensors: dict[str, Tensor], cache: HippoCache, path: str) -> None:
    """Every tensor of the state must be there, in the shape this model and the counters give it."""
    for name, expected in cache.tensors().items():
        if name not in tensors or tensors[name].shape != expected.shape:
            found = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise MemoryFileError(f"{path} is damaged: expected {name} of shape {tuple(expected.shape)}, found {found}")
    missing = [name for name in _ANCHORS if name not in tensors]
    if 0 < len(missing) < len(_ANCHORS):
        raise MemoryFileError(f"{path} is damaged: it lacks {', '.join(missing)}")


def _restore_passages(cache: HippoCache, tensors: dict[str, Tensor], path: str) -> None:
    """Puts the passages of a file into the cache, as far as both have any."""
    kept = {n.removeprefix(_PASSAGES): t for n, t in tensors.items() if n.startswith(_PASSAGES)}
    if cache.passages is None:
        if kept:
            warnings.warn(
                f"{path} holds passages, but this model keeps none: what was read is not found by its words. Call "
                "model.set_tokenizer(tokenizer) before loading, and leave passage_tokens above 0",
                stacklevel=6,
            )
        return
    if not kept:
        warnings.warn(
            f"{path} was written without passages: what was read before is recalled as before, but not found by its "
            "words; read the text again for that",
            stacklevel=6,
        )
        return
    rows = cache.batch_size
    try:
        cache.passages.restore(kept)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise MemoryFileError(f"the passages of {path} are damaged: {error!r}") from error
    if len(cache.passages.rows) != rows:
        raise MemoryFileError(f"{path} is damaged: passages of {len(cache.passages.rows)} rows for {rows} rows")


def _translated(
    cache: HippoCache, tensors: dict[str, Tensor], model: Model, path: str, known: bool
) -> dict[str, float | bool]:
    """Carries a memory written in another code into this model's, as far as the anchors tell how.

    Args:
        known: that it is another code, and not merely that nothing says whether it is.

    Returns:
        What was measured.
    """
    if "anchors.ids" not in tensors:
        if known:
            raise MemoryFileError(
                f"{path} was written by another model and has no anchors to carry it over: load the model that wrote it"
            )
        warnings.warn(f"nothing says whether {path} was written by this model: it is taken as it is", stacklevel=6)
        return {"calibrated": False}
    calibrator, memory = model.hippocampus.drift_calibrator, cache.memory
    new_keys, new_values = model.anchors(tensors["anchors.ids"])
    old_keys, old_values = tensors["anchors.keys"].to(model.device), tensors["anchors.values"].to(model.device)
    drift = {"keys": relative_drift(old_keys, new_keys), "values": relative_drift(old_values, new_values)}
    if drift["keys"] > _UNRELATED:
        raise MemoryFileError(
            f"{path} was written by an unrelated model: its anchors moved by {drift['keys']:.2f} times their own "
            "spread; load it with the model, or a fine-tuned version of the model, that wrote it"
        )
    key_map, value_map = calibrator.correction(old_keys, new_keys), calibrator.correction(old_values, new_values)
    filled = memory.episodes.valid.unsqueeze(-1)
    if key_map is not None:
        mapped = model.hippocampus.recall.unit_heads(key_map(memory.episodes.key))
        memory.episodes.key = torch.where(filled, mapped, 0.0).to(memory.episodes.key.dtype)
    if value_map is not None:
        memory.episodes.value = torch.where(filled, value_map(memory.episodes.value), 0.0).to(
            memory.episodes.value.dtype
        )
    for name, fitted in (("keys", key_map), ("values", value_map)):
        drift[f"{name}_calibrated"] = drift[name] if fitted is None else fitted.left
    return drift | {"calibrated": key_map is not None or value_map is not None}


def _reread_window(cache: HippoCache, model: Model) -> None:
    """Keys and values of the window by this model, from its tokens."""
    memory = cache.memory
    fill = [window_fill(done, model.config) for done in cache.lengths]
    if max(fill):
        final, inner = model.window.reread(cache, cache.tokens[:, : max(fill)].long(), fill)
        cache.last_output = last_of(final, fill, cache.last_output)
        memory.last_hidden = last_of(inner, fill, memory.last_hidden)
