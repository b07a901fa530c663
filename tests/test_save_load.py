"""Invariant 8: saving and loading model, adapter and memory changes nothing, bit for bit; no pickle anywhere."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from transformers import AutoModelForCausalLM

from hippoformer import HippoCache, HippoFormer
from hippoformer.errors import CheckpointError, ConfigurationError, HippoFormerError, MemoryFileError
from hippoformer.model import checkpoint
from tiny import awake, same_state, state_of, text, tiny_base
from tiny_texts import text as words
from tiny_texts import tiny_load

LORA = {"lora": {"r": 4, "lora_alpha": 8}}


def with_adapters(seed: int = 3, size: float = 0.3, **options) -> HippoFormer:
    """Awake, with LoRA weights away from zero."""
    model = awake(**(LORA | options))
    return change_adapters(model, seed, size)


def change_adapters(model: HippoFormer, seed: int, size: float) -> HippoFormer:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.base.named_parameters():
            if "lora_B" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return model


def read_some(model: HippoFormer, rows: int = 2, length: int = 47) -> HippoCache:
    cache = model.new_cache(rows)
    with torch.no_grad():
        model(text(rows=rows, length=length), past_key_values=cache)
    return cache


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("lora", [False, True], ids=["frozen", "lora"])
@torch.no_grad()
def test_a_model_comes_back_bit_for_bit(lora: bool, tmp_path: Path) -> None:
    model, ids = with_adapters() if lora else awake(), text(rows=2, length=50)
    if lora:
        plain = awake()(ids).logits
        assert (model(ids).logits - plain).abs().max() > 0.1, "the adapters do nothing"
    model.save_pretrained(tmp_path)
    again = HippoFormer.from_pretrained(tmp_path, base_model=tiny_base())
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert again.config.to_dict() == model.config.to_dict()
    theirs = again.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())
    assert not again.training


@torch.no_grad()
def test_merged_adapters_are_the_bases_own(tmp_path: Path) -> None:
    model, ids = with_adapters(), text(rows=2, length=50)
    before = model(ids).logits
    base = model.merge_lora()
    torch.testing.assert_close(model(ids).logits, before, atol=1e-4, rtol=1e-4)
    assert not any("lora" in name for name in base.state_dict())
    base.save_pretrained(tmp_path / "base")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert type(exported) is type(base) and torch.equal(exported(ids).logits, base(ids).logits)
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(HippoFormer.from_pretrained(tmp_path / "whole")(ids).logits, model(ids).logits)
    with pytest.raises(ConfigurationError, match="no adapters"):
        model.merge_lora()


@torch.no_grad()
def test_a_trained_base_is_saved_too(tmp_path: Path) -> None:
    model, ids = awake(freeze_base=False), text(rows=1, length=30)
    model.base.get_input_embeddings().weight.mul_(1.1)
    model.save_pretrained(tmp_path)
    again = HippoFormer.from_pretrained(tmp_path)
    assert torch.equal(model(ids).logits, again(ids).logits)


@pytest.mark.parametrize("name", ["gemma2", "gpt2"])
@torch.no_grad()
def test_other_architectures_come_back(name: str, tmp_path: Path) -> None:
    model, ids = awake(name, memory_layer=1, residual_readout=False), text(rows=1, length=50)
    model.save_pretrained(tmp_path)
    assert torch.equal(HippoFormer.from_pretrained(tmp_path, base_model=tiny_base(name))(ids).logits, model(ids).logits)


@torch.no_grad()
def test_files_are_safetensors_json_and_a_card_alone(tmp_path: Path) -> None:
    model = with_adapters()
    model.save_pretrained(tmp_path)
    read_some(model).save(tmp_path / "memory.safetensors")
    names = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert names == ["README.md", "config.json", "generation_config.json", "memory.safetensors", "model.safetensors"]
    json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    for path in tmp_path.glob("*.safetensors"):
        header_size = int.from_bytes(path.read_bytes()[:8], "little")
        header = json.loads(path.read_bytes()[8 : 8 + header_size])
        assert all(isinstance(entry, dict) for entry in header.values())
    base_names = {f"base.{name}" for name, _ in tiny_base().named_parameters()}
    assert not base_names & load_file(tmp_path / "model.safetensors").keys(), "the base was saved along"


@pytest.mark.parametrize("damage", ["missing", "truncated", "garbage", "another shape", "no folder", "no config"])
def test_damaged_checkpoints_are_refused(damage: str, tmp_path: Path) -> None:
    awake().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    if damage in ("missing", "no config"):
        (weights if damage == "missing" else tmp_path / "config.json").unlink()
    elif damage in ("truncated", "garbage"):
        weights.write_bytes(weights.read_bytes()[:-100] if damage == "truncated" else b"\x80\x04 no tensor file")
    folder = tmp_path / "nowhere" / "at" / "all" if damage == "no folder" else tmp_path
    with pytest.raises(CheckpointError):
        HippoFormer.from_pretrained(
            folder, base_model=tiny_base(), **({"recall_head_dim": 16} if damage == "another shape" else {})
        )


# ---------------------------------------------------------------- memories


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
@torch.no_grad()
def test_a_memory_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = awake(name)
    cache = read_some(model)
    cache.freeze_memory()
    before, path = state_of(cache), tmp_path / "deep" / "memory.safetensors"
    cache.save(path)
    assert not same_state(before, state_of(cache)), "saving changed the cache"
    loaded = HippoCache.load(path, model)
    assert not same_state(before, state_of(loaded))
    for name in ("lengths", "columns", "frozen", "written"):
        assert getattr(loaded, name) == getattr(cache, name)
    assert loaded.memory.stored_bound == cache.memory.stored_bound
    assert loaded.drift == {"keys": 0.0, "values": 0.0, "calibrated": False}
    assert loaded.episodes(1) == cache.episodes(1)


def test_notes_travel_with_a_memory_and_belong_to_it_alone(tmp_path: Path) -> None:
    cache = read_some(awake())
    cache.notes["title"] = "Café\n"
    cache.copy().notes["title"] = "another"
    cache.select_rows(torch.tensor([1])).notes.clear()
    cache.save(tmp_path / "memory.safetensors")
    assert HippoCache.load(tmp_path / "memory.safetensors", awake()).notes == cache.notes == {"title": "Café\n"}
    cache.reset([0])
    assert cache.notes, "one row of two"
    cache.reset()
    assert cache.notes == {}


@torch.no_grad()
def test_a_memory_of_an_adapted_model_read_by_its_saved_self(tmp_path: Path) -> None:
    model, ahead = with_adapters(), text(rows=2, length=15, seed=9)
    cache = read_some(model)
    cache.save(tmp_path / "memory.safetensors")
    model.save_pretrained(tmp_path / "model")
    again = HippoFormer.from_pretrained(tmp_path / "model", base_model=tiny_base())
    loaded = HippoCache.load(tmp_path / "memory.safetensors", again)
    assert loaded.drift["keys"] == 0.0
    assert torch.equal(model(ahead, past_key_values=cache).logits, again(ahead, past_key_values=loaded).logits)


@pytest.mark.parametrize("moment", ["write", "replace"])
def test_an_interrupted_write_leaves_the_old_file(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full in the middle of a file, or a failure on the last step."""
    model = awake()
    path = tmp_path / "memory.safetensors"
    old = read_some(model)
    old.save(path)
    content = path.read_bytes()

    def full_disk(tensors, temporary, metadata=None) -> None:
        Path(temporary).write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    def no_rename(*_) -> None:
        raise OSError(errno.EIO, "Input/output error")

    if moment == "write":
        monkeypatch.setattr(checkpoint, "save_file", full_disk)
    else:
        monkeypatch.setattr(checkpoint.os, "replace", no_rename)
    with pytest.raises(CheckpointError, match="unchanged"):
        read_some(model, length=20).save(path)
    with pytest.raises(CheckpointError, match="unchanged"):
        model.save_pretrained(tmp_path / "model")
    monkeypatch.undo()
    assert path.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["memory.safetensors"], "debris was left"
    assert not same_state(state_of(old), state_of(HippoCache.load(path, model)))


@torch.no_grad()
def test_damaged_and_foreign_memory_files_are_refused(tmp_path: Path) -> None:
    model, path = awake(), tmp_path / "memory.safetensors"
    read_some(model).save(path)
    content = path.read_bytes()
    for size in (0, 5, 8, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(MemoryFileError, match="truncated"):
            HippoCache.load(path, model)
    for garbage in (b"not a tensor file at all", b"\x80\x04\x95" + content[3:], content[:8] + b"x" + content[9:]):
        path.write_bytes(garbage)
        with pytest.raises(MemoryFileError):
            HippoCache.load(path, model)
    with pytest.raises(MemoryFileError, match="no memory file"):
        HippoCache.load(tmp_path / "missing.safetensors", model)
    with pytest.raises(MemoryFileError):
        HippoCache.load(tmp_path, model)  # a folder
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(MemoryFileError, match="not a memory"):
        HippoCache.load(path, model)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(MemoryFileError, match="not a memory"):
        HippoCache.load(tmp_path / "model" / "model.safetensors", model)


@pytest.mark.parametrize(
    "damage", ["tensor missing", "tensor of another shape", "no fingerprint", "counters of another shape"]
)
@torch.no_grad()
def test_a_memory_file_that_was_tampered_with_is_refused(damage: str, tmp_path: Path) -> None:
    """A whole safetensors file of the right kind whose inside does not fit: an error of ours, not a KeyError."""
    model, path = awake(), tmp_path / "memory.safetensors"
    read_some(model).save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    if damage == "tensor missing":
        del tensors["memory.priority"]
    elif damage == "tensor of another shape":
        tensors["memory.priority"] = tensors["memory.priority"][:, :-3].clone()
    elif damage == "no fingerprint":
        del metadata["fingerprint"]
    else:
        metadata["counters"] = json.dumps({"lengths": [3]})
    save_file(tensors, path, metadata)
    with pytest.raises(MemoryFileError):
        HippoCache.load(path, model)


@torch.no_grad()
def test_memories_of_older_formats_are_read(tmp_path: Path) -> None:
    """Episodes had a strength; passages were counted when they were retrieved, had a peak, and were not compared."""
    (model, tokenizer), path = tiny_load(), tmp_path / "memory.safetensors"
    cache = model.new_cache()
    model.score(tokenizer(words(0, 300), return_tensors="pt").input_ids, past_key_values=cache)
    cache.save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["memory.strength"] = torch.ones_like(tensors["memory.priority"])
    places, worth = tensors["passages.places"], tensors["passages.worth"]
    assert len(places) > 3
    tensors["passages.places"] = torch.cat((places[:, :4], places[:, :1]), dim=1)  # row, start, length, retrieved, at
    tensors["passages.worth"] = torch.stack((worth[:, 0], worth[:, 0], worth[:, -1]), dim=1)  # mean, peak, priority
    del tensors["passages.novelty"], tensors["passages.counts"]
    save_file(tensors, path, metadata)
    loaded = HippoCache.load(path, model)
    assert not same_state(state_of(cache), state_of(loaded)) and loaded.episodes() == cache.episodes()
    found, kept = loaded.passages.of_row(0), cache.passages.of_row(0)
    assert [(p.start, p.token_ids.tolist()) for p in found] == [(p.start, p.token_ids.tolist()) for p in kept]
    ahead = tokenizer(words(1, 60), return_tensors="pt").input_ids
    one, two = (model(ahead, past_key_values=state).logits for state in (loaded, cache))
    assert torch.equal(one, two)


@pytest.mark.parametrize(
    "options",
    [
        {"window": 10},
        {"buffer_size": 8},
        {"segment_len": 4},
        {"recall_head_dim": 4},
        {"memory_layer": 1, "residual_readout": False},
    ],
)
def test_a_memory_of_another_shape_is_refused(options: dict, tmp_path: Path) -> None:
    read_some(awake()).save(tmp_path / "memory.safetensors")
    name, *_ = options
    with pytest.raises(MemoryFileError, match=name):
        HippoCache.load(tmp_path / "memory.safetensors", awake(**options))


def test_a_memory_of_another_base_is_refused(tmp_path: Path) -> None:
    """The same shapes, but weights that have nothing in common: no map could carry it over."""
    model = awake()
    read_some(model).save(tmp_path / "memory.safetensors")
    stranger = awake(model_seed=11)
    with pytest.raises(MemoryFileError, match="unrelated"):
        HippoCache.load(tmp_path / "memory.safetensors", stranger)
    for name in ("gpt2", "qwen3"):
        with pytest.raises(HippoFormerError):
            HippoCache.load(tmp_path / "memory.safetensors", awake(name, model_seed=5))


# ---------------------------------------------------------------- drift

KEEP_ALL = {"buffer_size": 64, "max_replay_rounds": 0, "capture_span": 0}


def keys_by_position(cache: HippoCache) -> dict[int, torch.Tensor]:
    episodes = cache.memory.episodes
    store = range(cache.config.buffer_size)
    return {int(episodes.position[0, s]): episodes.key[0, s] for s in store if episodes.position[0, s] >= 0}


def error_to(truth: dict[int, torch.Tensor], keys: dict[int, torch.Tensor]) -> float:
    assert truth.keys() == keys.keys()
    return sum(float((truth[p] - keys[p]).square().sum()) for p in truth)


@pytest.mark.parametrize("moved", ["adapters", "key projection"])
@torch.no_grad()
def test_a_drifted_model_maps_the_memory_into_its_code(moved: str, tmp_path: Path) -> None:
    """Written by a model, read after its weights moved: nearer to what the new one would have written than before."""
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["down_proj", "o_proj"]}
    options = KEEP_ALL | {"lora": lora, "drift_threshold": 0.1}
    old = with_adapters(size=0.05, **options)
    cache = read_some(old, rows=1, length=60)
    path = tmp_path / "memory.safetensors"
    cache.save(path)
    new = with_adapters(size=0.05, **options)
    if moved == "adapters":
        change_adapters(new, seed=4, size=0.3)
    else:  # a turn of the key space itself
        turn = torch.linalg.matrix_exp(
            0.1 * (lambda a: a - a.T)(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
        )
        weight = new.hippocampus.recall.key_proj.weight
        weight.copy_(torch.block_diag(*[turn] * 4) @ weight)
    loaded = HippoCache.load(path, new)
    assert loaded.drift["keys"] > 0.1 and loaded.drift["calibrated"] is True
    assert loaded.drift["keys_calibrated"] < loaded.drift["keys"]
    truth = keys_by_position(read_some(new, rows=1, length=60))
    unmapped, mapped = error_to(truth, keys_by_position(cache)), error_to(truth, keys_by_position(loaded))
    assert mapped < (0.95 if moved == "adapters" else 0.05) * unmapped
    norms = loaded.memory.episodes.key[loaded.memory.episodes.valid].unflatten(-1, (4, 8)).norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms))
    assert not loaded.memory.episodes.key[~loaded.memory.episodes.valid].any(), "empty slots were mapped to something"

    # What is asked now finds what it should: recall over the mapped keys is nearer to the truth.
    def recalled(of: HippoCache) -> torch.Tensor:
        hidden = new.window.hidden_of(text(rows=1, length=60)[:, 10:30])
        store = of.memory.episodes.slots(0, new.config.buffer_size)
        visible = store.valid.unsqueeze(1).expand(-1, hidden.shape[1], -1)
        nothing_read = torch.zeros(1, hidden.shape[1], dtype=torch.int64)
        return new.hippocampus.recall(
            hidden,
            nothing_read,
            store,
            torch.ones_like(store.priority),
            visible,
            torch.tensor([0]),
        ).weights

    right = recalled(read_some(new, rows=1, length=60))
    assert (recalled(loaded) - right).abs().sum() < (recalled(cache) - right).abs().sum()


@torch.no_grad()
def test_the_window_is_read_again_under_new_weights(tmp_path: Path) -> None:
    """Keys and values of the window belong to the old weights; the tokens are read anew, up to what lies before
    them.
    """
    old, ids = with_adapters(size=0.05, window=60), text(rows=2, length=40)
    cache = old.new_cache(2)
    old(ids, past_key_values=cache)
    cache.save(tmp_path / "memory.safetensors")
    new, ahead = with_adapters(size=0.3, window=60), text(rows=2, length=9, seed=2)
    loaded = HippoCache.load(tmp_path / "memory.safetensors", new)
    with new.memory_off():
        expected = new(torch.cat((ids, ahead), 1)).logits[:, 40:]
        torch.testing.assert_close(new(ahead, past_key_values=loaded).logits, expected, rtol=0.0, atol=1e-4)


def test_a_hippocampus_trained_with_contiguity_is_loaded(tmp_path: Path) -> None:
    """Earlier versions had a parameter for the weight of the query before, which is no longer used."""
    model = awake()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"hippocampus.recall.log_contiguity": torch.zeros(4)}, file)
    loaded = HippoFormer.from_pretrained(tmp_path, base_model=model.base).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
    save_file(tensors | {"hippocampus.recall.unheard_of": torch.zeros(4)}, file)
    with pytest.raises(CheckpointError, match="unheard_of"):
        HippoFormer.from_pretrained(tmp_path, base_model=model.base)
