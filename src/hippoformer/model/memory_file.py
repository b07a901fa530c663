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
from hippoformer.hippocampus.unigram import of_vocabulary
from hippoformer.model.cache import HippoCache
from hippoformer.model.checkpoint import write_tensors
from hippoformer.model.pretrained import HippoFormerPreTrainedModel as Model
from hippoformer.model.weights import base_fingerprint
from hippoformer.model.window import window_fill
from hippoformer.ops import last_of

_FORMAT = "hippoformer-memory-1"
_COUNTERS = ("lengths", "columns", "frozen", "written")
_NOTE, _PASSAGES = "note.", "passages."  # before the names of the cache's notes, and of the passages' tensors
_ANCHORS = ("anchors.ids", "anchors.keys", "anchors.values")
# Anchors this far from where they were, in units of their own spread, have nothing in common with them any more.
_UNRELATED = 1.2
# Options that shape the stored tensors; a file and a model must agree on them.
_SHAPING = (
    *("window", "sink_tokens", "segment_len", "buffer_size", "recall_n_heads", "recall_head_dim", "recall_value_dim"),
    *("memory_layer", "hidden_size", "vocab_size", "num_hidden_layers"),
)


def fingerprint(model: Model) -> dict[str, str]:
    """Digests of what a memory's numbers depend on besides the shaping options: base with adapters, and hippocampus."""
    return {"base": base_fingerprint(model.base), "hippocampus": base_fingerprint(model.hippocampus)}


def _prints(model: Model, with_digests: bool = True) -> dict[str, str | None]:
    """Fingerprint of a model: the shaping options, and the digests as far as they can be computed."""
    shape = json.dumps({name: getattr(model.config, name) for name in _SHAPING}, sort_keys=True)
    prints: dict[str, str | None] = {"base": None, "hippocampus": None, "shape": shape}
    if with_digests:
        with _left_out("fingerprint"):
            prints |= fingerprint(model)
    return prints


@contextmanager
def _left_out(what: str) -> Iterator[None]:
    """Goes on without what cannot be computed, whatever the reason, and says so."""
    try:
        yield
    except Exception as error:
        warnings.warn(f"the memory's {what} cannot be computed ({error!r}): it goes without", stacklevel=6)


def save_memory(model: Model, cache: HippoCache, path: str | Path) -> None:
    """Writes the whole state of a cache of a model atomically.

    Raises:
        CheckpointError: the file could not be written; an earlier one at this place is unchanged.
    """
    tensors, change = cache.tensors(), cache.change_of_model()
    if cache.passages is not None:
        tensors |= {f"{_PASSAGES}{name}": tensor for name, tensor in cache.passages.tensors().items()}
    if change is not None:
        warnings.warn(f"{path} cannot say by which model it was written: {change}", stacklevel=4)
    else:
        with _left_out("drift anchors"):
            ids = model.hippocampus.drift_calibrator.anchor_ids
            tensors |= dict(zip(_ANCHORS, (ids, *model.anchors(ids)), strict=True))
    counters = {name: getattr(cache, name) for name in _COUNTERS}
    counters["stored_bound"] = cache.memory.stored_bound
    counters["digest"] = None if cache.digest is None else cache.digest.tolist()
    metadata = {"format": _FORMAT, "counters": json.dumps(counters)}
    metadata["fingerprint"] = json.dumps(_prints(model, with_digests=change is None))
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
    mine = _prints(model, with_digests=False)
    ours, other = json.loads(str(mine["shape"])), json.loads(theirs["shape"])
    differing = [n for n in ours if ours[n] != other.get(n) and n != "vocab_size"]
    if differing:
        found = ", ".join(f"{n}={other.get(n)} (model: {ours[n]})" for n in differing)
        raise MemoryFileError(f"{path} was written by a model of another shape: {found}; load that model")
    mine = _prints(model)
    cache: HippoCache = model.new_cache(len(counters["lengths"]))
    _fit_tensors(tensors, cache, str(path))
    _restore_passages(cache, tensors, str(path))
    known = None not in (*mine.values(), *theirs.values())
    if known and mine == theirs:
        cache.restore(tensors, counters["stored_bound"])
        cache.drift = {"keys": 0.0, "values": 0.0, "calibrated": False}
    else:
        tensors |= {name: tensors[name].to(tensor.dtype) for name, tensor in cache.tensors().items()}
        outside_window = {n: t for n, t in tensors.items() if not n.endswith((".keys", ".values"))}
        cache.restore(outside_window, counters["stored_bound"])
    for name in _COUNTERS:
        setattr(cache, name, counters[name])
    digest = counters.get("digest")
    cache.digest, cache.notes = None if digest is None else torch.tensor(digest, device=model.device), notes
    if not cache.drift:
        cache.drift = _translate(cache, tensors, model, str(path), known)
        fill = [window_fill(done, model.config) for done in cache.lengths]
        if max(fill):  # keys and values of the window by this model, from its tokens
            final, inner = model.window.read(cache, cache.tokens[:, : max(fill)].long(), [0] * len(fill), fill)
            cache.last_output = last_of(final, fill, cache.last_output)
            cache.memory.last_hidden = last_of(inner, fill, cache.memory.last_hidden)
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
        counts = [*counters["lengths"], counters["columns"], counters["stored_bound"]]
        complete = counters.keys() >= {*_COUNTERS} and prints.keys() >= {"base", "hippocampus", "shape"}
        if not complete or not counters["lengths"] or not all(isinstance(n, int) and n >= 0 for n in counts):
            raise ValueError("something is missing or below 0")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise MemoryFileError(f"the counters or the fingerprint of {path} are damaged: {error!r}") from error
    notes = {name.removeprefix(_NOTE): text for name, text in metadata.items() if name.startswith(_NOTE)}
    return tensors, counters, prints, notes


def _fit_tensors(tensors: dict[str, Tensor], cache: HippoCache, path: str) -> None:
    """Makes a file's tensors those of this model's state: every one there, in the shape that model and counters give.

    The vocabulary may have been resized since; counts that only one of both keeps begin anew; surprise is dropped where
    the selection rule does not read it.
    """
    size = cache.vocab_size
    for name in ("window.tokens", "memory.token", "memory.vote_token", "anchors.ids"):
        if name in tensors and (largest := int(tensors[name].max())) >= size:
            raise MemoryFileError(f"{path} holds token {largest}, but the model's vocabulary has {size}")
    for name, tensor in cache.memory.unigram.tensors().items():
        written = tensors.get(f"memory.marginal_{name}")
        if written is None or 0 in (written.numel(), tensor.numel()):
            tensors[f"memory.marginal_{name}"] = tensor
        elif written.dim() == 2:
            tensors[f"memory.marginal_{name}"] = of_vocabulary(written, size)
    surprise = cache.memory.episodes.surprise
    if not surprise.numel():
        tensors["memory.surprise"] = surprise
    elif not tensors.get("memory.surprise", surprise[..., :0]).numel():
        raise MemoryFileError(
            f"{path} does not say how surprising each episode was, which selection={cache.config.selection!r} reads: "
            "load it with a model that selects by another rule"
        )
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
    if cache.passages is None or not kept:
        why = f"{path} was written without passages: read it again"
        if cache.passages is None:
            why = f"{path} holds passages, but this model keeps none: call model.set_tokenizer(tokenizer) before "
            why += "loading, and leave passage_tokens above 0"
        if kept or cache.passages is not None:
            warnings.warn(f"what was read is not found by its words; {why}", stacklevel=6)
        return
    try:
        cache.passages.restore(kept)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise MemoryFileError(f"the passages of {path} are damaged: {error!r}") from error
    if len(cache.passages.rows) != cache.batch_size:
        raise MemoryFileError(f"{path} is damaged: it has passages of {len(cache.passages.rows)} rows")


def _translate(
    cache: HippoCache, tensors: dict[str, Tensor], model: Model, path: str, known: bool
) -> dict[str, float | bool]:
    """Carries a memory written in another code into this model's, as far as the anchors tell how.

    `known`: that it is another code, and not merely that nothing says whether it is. Returns what was measured.
    """
    if "anchors.ids" not in tensors:
        if known:
            raise MemoryFileError(
                f"{path} was written by another model and has no anchors to carry it over: load the model that wrote it"
            )
        warnings.warn(f"nothing says whether {path} was written by this model: it is taken as it is", stacklevel=6)
        return {"calibrated": False}
    ids, *old = (tensors[name].to(model.device) for name in _ANCHORS)
    episodes, drift, maps = cache.memory.episodes, dict[str, float | bool](), {}
    for name, before, now in zip(("keys", "values"), old, model.anchors(ids), strict=True):
        drift[name] = relative_drift(before, now)
        maps[name] = model.hippocampus.drift_calibrator.correction(before, now)
    if drift["keys"] > _UNRELATED:
        raise MemoryFileError(
            f"{path} was written by an unrelated model: its anchors moved by {drift['keys']:.2f} times their own "
            "spread; load it with the model, or a fine-tuned version of the model, that wrote it"
        )
    filled = episodes.valid.unsqueeze(-1)
    if (to_new := maps["keys"]) is not None:
        key = model.hippocampus.recall.unit_heads(to_new(episodes.key))
        episodes.key = torch.where(filled, key, 0.0).to(episodes.key.dtype)
    if (to_new := maps["values"]) is not None:
        episodes.value = torch.where(filled, to_new(episodes.value), 0.0).to(episodes.value.dtype)
    for name, fitted in maps.items():
        drift[f"{name}_calibrated"] = drift[name] if fitted is None else fitted.left
    return drift | {"calibrated": any(fitted is not None for fitted in maps.values())}
