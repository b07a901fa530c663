"""A HippoFormer among the models of transformers: auto classes, repositories, cards, uploads."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

import hippoformer
from hippoformer import HippoFormer, HippoFormerConfig
from hippoformer.errors import ConfigurationError
from hippoformer.model import base_models, checkpoint
from hippoformer.model.checkpoint import model_card
from tiny import awake, text, tiny_base
from tiny_texts import tiny_load, tiny_tokenizer

COMMIT = "a" * 40


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    """The tiny base as a folder with its tokenizer."""
    folder = tmp_path / "base-model"
    tiny_base().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def saved(tmp_path: Path, base_folder: Path) -> Path:
    """A saved HippoFormer that names the folder of its base."""
    folder = tmp_path / "a-memory"
    awake(base_model_name=str(base_folder)).save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- auto classes


@torch.no_grad()
def test_the_auto_classes_know_the_model(saved: Path) -> None:
    config = AutoConfig.from_pretrained(saved)
    assert type(config) is HippoFormerConfig and config.buffer_size == 16
    model, ids = AutoModelForCausalLM.from_pretrained(saved), text(rows=1, length=50)
    assert type(model) is HippoFormer
    assert torch.equal(model(ids).logits, awake()(ids).logits)


@torch.no_grad()
def test_options_go_through_the_auto_class(saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved, window=20, dtype=torch.bfloat16, device_map="cpu")
    assert (model.config.window, model.dtype, model.device.type) == (20, torch.bfloat16, "cpu")
    model.save_pretrained(saved)
    assert HippoFormer.from_pretrained(saved).dtype == torch.float32, "the type of the base was taken for an option"
    config = AutoConfig.from_pretrained(saved, buffer_size=5)
    assert AutoModelForCausalLM.from_pretrained(saved, config=config).new_cache(1).config.buffer_size == 5


def test_a_config_makes_a_fresh_model_on_its_base(base_folder: Path, saved: Path) -> None:
    fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(saved))
    assert type(fresh) is HippoFormer and fresh.memory == "untrained"
    own = tiny_base().state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in fresh.base.state_dict().items())


@pytest.mark.parametrize("load", [HippoFormer.from_pretrained, AutoModelForCausalLM.from_pretrained])
def test_options_that_do_not_exist_or_contradict_are_refused(load: Any, saved: Path) -> None:
    with pytest.raises(ConfigurationError, match="does not take windw"):
        load(saved, windw=20)
    with pytest.raises(ConfigurationError, match="window >= 1"):
        load(saved, window=0)
    with pytest.raises(ConfigurationError, match="not one device"):
        load(saved, device_map={"base": "cpu", "hippocampus": "cpu"})


def test_the_pipeline_of_transformers_generates() -> None:
    model, tokenizer = tiny_load()
    made = pipeline("text-generation", model=model, tokenizer=tokenizer)("abc de", max_new_tokens=5, do_sample=False)
    ids = tokenizer("abc de", return_tensors="pt").input_ids
    assert made[0]["generated_text"] == tokenizer.decode(model.generate(ids, max_new_tokens=5, do_sample=False)[0])


# ---------------------------------------------------------------- repositories


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache on disk; the hub itself is unreachable."""

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(base_models, "get_hf_file_metadata", fail)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def publish(hub: Path, folder: Path, name: str, revision: str = "main", commit: str = COMMIT) -> None:
    repository = hub / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / revision).write_text(commit)


@torch.no_grad()
def test_a_repository_fetches_the_base_it_names(tmp_path: Path, base_folder: Path, hub: Path) -> None:
    publish(hub, base_folder, "someone/base")
    awake(base_model_name="someone/base").save_pretrained(tmp_path / "memory")
    publish(hub, tmp_path / "memory", "someone/memory")
    shutil.rmtree(base_folder)
    ids = text(rows=1, length=50)
    expected = awake()(ids).logits
    assert torch.equal(HippoFormer.from_pretrained("someone/memory")(ids).logits, expected)
    model, tokenizer = hippoformer.load("someone/memory")
    assert torch.equal(model(ids).logits, expected) and tokenizer("ab")["input_ids"]
    assert AutoConfig.from_pretrained("someone/memory").base_model_name == "someone/base"
    assert torch.equal(AutoModelForCausalLM.from_pretrained("someone/memory")(ids).logits, expected)


@torch.no_grad()
def test_revisions_and_subfolders_of_a_repository(tmp_path: Path, base_folder: Path, hub: Path) -> None:
    options = {"base_model_name": str(base_folder)}
    awake(**options).save_pretrained(tmp_path / "one")
    awake(buffer_size=7, **options).save_pretrained(tmp_path / "two" / "inner")
    publish(hub, tmp_path / "one", "someone/memory")
    publish(hub, tmp_path / "two", "someone/memory", "v2", "b" * 40)
    assert HippoFormer.from_pretrained("someone/memory").config.buffer_size == 16
    again = HippoFormer.from_pretrained("someone/memory", revision="v2", subfolder="inner")
    assert again.config.buffer_size == 7
    assert HippoFormer.from_pretrained(tmp_path / "two", subfolder="inner").config.buffer_size == 7


def test_a_tokenizer_saved_beside_the_memory_is_taken(saved: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(saved.parent / "base-model")
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(saved)
    assert "<one more>" in hippoformer.load(saved)[1].get_vocab()


# ---------------------------------------------------------------- cards and uploads


class StandInApi:
    """In place of HfApi: remembers what would go up."""

    existing: tuple[str, ...] = ()
    calls: dict[str, Any]
    files: dict[str, bytes]

    def __init__(self, token: Any = None) -> None:
        type(self).calls = {"token": token}

    def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> Any:
        self.calls["repo"] = (repo_id, private, exist_ok)
        return SimpleNamespace(repo_id=f"someone/{repo_id.split('/')[-1]}")

    def create_branch(self, repo_id: str, branch: str, exist_ok: bool) -> None:
        self.calls["branch"] = branch

    def file_exists(self, repo_id: str, filename: str, revision: str | None) -> bool:
        return filename in self.existing

    def upload_folder(self, repo_id: str, folder_path: Path, **options: Any) -> str:
        self.calls["upload"] = {"repo_id": repo_id, **options}
        paths = [path for path in folder_path.rglob("*") if path.is_file()]
        type(self).files = {str(path.relative_to(folder_path)): path.read_bytes() for path in paths}
        return "commit"


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[StandInApi]:
    stand_in = type("Api", (StandInApi,), {})
    monkeypatch.setattr(checkpoint, "HfApi", stand_in)
    return stand_in


def test_a_push_uploads_the_memory_and_a_card(api: type[StandInApi], tmp_path: Path) -> None:
    model = awake(base_model_name="smollm2-135m")
    assert model.push_to_hub("memory", token="secret", private=True, commit_message="First") == "commit"
    assert sorted(api.files) == ["README.md", "config.json", "generation_config.json", "model.safetensors"]
    assert api.calls == {
        "token": "secret",
        "repo": ("memory", True, True),
        "upload": {"repo_id": "someone/memory", "revision": None, "commit_message": "First"},
    }
    for name, content in api.files.items():
        (tmp_path / name).write_bytes(content)
    again = HippoFormer.from_pretrained(tmp_path, base_model=tiny_base())
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert 'hippoformer.load("someone/memory")' in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_card_in_the_repository_or_folder_is_kept_and_a_branch_made(api: type[StandInApi], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    awake().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "mine"
    api.existing = ("README.md",)
    awake().push_to_hub("me/memory", revision="v2", create_pr=True)
    assert sorted(api.files) == ["config.json", "generation_config.json", "model.safetensors"]
    assert api.calls["branch"] == api.calls["upload"]["revision"] == "v2" and api.calls["upload"]["create_pr"] is True


def test_a_trained_base_goes_up_too(api: type[StandInApi]) -> None:
    awake(freeze_base=False).push_to_hub("memory")
    assert {"base/config.json", "base/model.safetensors"} <= set(api.files)
    with pytest.raises(ConfigurationError, match="does not take shards"):
        awake().push_to_hub("memory", shards=3)


@pytest.mark.parametrize(
    "options", [{}, {"lora": {"r": 4}}, {"freeze_base": False}], ids=["frozen", "lora", "trained base"]
)
@torch.no_grad()
def test_a_gathered_state_is_saved_in_place_of_the_shards(options: dict[str, Any], tmp_path: Path) -> None:
    """As accelerate does: the model's own parameters may be anything."""
    model, ids = awake(**options), text(rows=1, length=30)
    for parameter in model.parameters():
        parameter.add_(0.01)
    expected, state = model(ids).logits, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.zero_()
    model.save_pretrained(tmp_path, state_dict=state)
    if options.get("freeze_base", True):  # the base itself is never saved then
        base = tiny_base()
        for parameter in base.parameters():
            parameter.add_(0.01)
        assert torch.equal(HippoFormer.from_pretrained(tmp_path, base_model=base)(ids).logits, expected)
    else:
        assert torch.equal(HippoFormer.from_pretrained(tmp_path)(ids).logits, expected)


@pytest.mark.parametrize(
    ("options", "base", "relation"),
    [
        ({"base_model_name": "someone/base"}, "someone/base", "adapter"),
        ({"base_model_name": "smollm2-135m"}, base_models.SMOLLM2_135M.hub_repository, "adapter"),
        ({"base_model_name": "someone/base", "freeze_base": False}, "someone/base", "finetune"),
        ({"base_model_name": "/home/me/secret-base"}, None, None),
    ],
)
def test_the_card_names_the_base(options: dict[str, Any], base: str | None, relation: str | None) -> None:
    card = model_card(awake(**options), "someone/memory")
    again = ModelCard(str(card))  # its metadata can be read back
    assert again.data.base_model == base
    assert again.data.to_dict().get("base_model_relation") == relation
    assert again.data.library_name == "hippoformer" and "hippoformer" in again.data.tags
    assert "/home/me" not in str(card)


def test_the_card_tells_the_facts() -> None:
    options = {"lora": {"r": 4, "target_modules": ["v_proj"]}, "buffer_size": 1234}
    card, plain = (str(model_card(awake(**given), "someone/memory")) for given in (options, {}))
    for fact in (f"| {awake(**options).get_num_trainable_params():,} |", "| 12, 2, 6 tokens |", "1,234, chosen by"):
        assert fact in card
    assert "LoRA adapters" in card and "| memory | trained |" in card and "LoRA" not in plain
