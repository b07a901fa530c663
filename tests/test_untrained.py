"""A memory that nobody trained helps at once, says what it is, and can be replaced or switched off by name."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hippoformer
from hippoformer.errors import CheckpointError, ConfigurationError
from hippoformer.hippocampus.recall import Recall, Recollection
from hippoformer.model.modeling import HippoFormer
from tiny import ARCHITECTURES, awake, small_config, text, tiny_base, untrained
from tiny_texts import tiny_tokenizer

OPTIONS = {"window": 12, "segment_len": 6, "buffer_size": 64}


@pytest.fixture
def base_folder(tmp_path: Path) -> str:
    """The tiny base as a folder with its tokenizer."""
    tiny_base().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_what_was_read_before_is_foretold_and_little_else_lost(name: str) -> None:
    model, ids = untrained(name, residual_readout=False, buffer_size=64), text(rows=2, length=90)
    model.centre_keys()
    told = model.score(ids)
    with model.memory_off():
        gain = told - model.score(ids)
    again, breaks = torch.zeros_like(gain, dtype=torch.bool), torch.zeros_like(gain, dtype=torch.bool)
    for start in range(30, 90, 20):  # where `text` repeats ten tokens; the first of them cannot be foretold
        again[:, start + 3 : start + 9] = True
        breaks[:, start + 9 : start + 10] = True
    assert gain[again].mean() > 0.5, "a stretch that was read before is not foretold"
    assert gain[~again & ~breaks].min() > -0.3, "other tokens pay for it"


@torch.no_grad()
def test_centred_keys_tell_states_apart() -> None:
    """States that share a large part have keys of cosine near 1; centred ones do not."""
    recall = Recall(64, 10, small_config(residual_readout=False))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(200, 64, generator=generator) + 5.0
    hidden[:, 7] *= 40.0

    def alike() -> float:
        key = recall.encode_key(hidden[None, :, :])[0].unflatten(-1, (recall.n_heads, -1)).transpose(0, 1)
        return float((key @ key.transpose(1, 2)).mean())

    before = alike()
    recall.centre(hidden)
    assert before > 0.6 and alike() < 0.2
    assert torch.equal(recall.query_proj.weight, recall.key_proj.weight)


@torch.no_grad()
def test_each_memory_by_its_name(base_folder: str, tmp_path: Path) -> None:
    ids = text(rows=1, length=60)
    plain, _ = hippoformer.load(base_folder, **OPTIONS)
    named, _ = hippoformer.load(base_folder, memory="untrained", **OPTIONS)
    off, _ = hippoformer.load(base_folder, memory="off", **OPTIONS)
    assert (plain.memory, named.memory, off.memory) == ("untrained", "untrained", "off")
    assert "memory='untrained'" in repr(plain)
    with plain.memory_off():
        assert torch.equal(off(ids).logits, plain(ids).logits)
    assert not torch.equal(off(ids).logits, plain(ids).logits)

    awake(base_model_name=base_folder).save_pretrained(tmp_path / "saved")
    trained, _ = hippoformer.load(base_folder, memory=tmp_path / "saved")
    assert trained.memory == "trained"
    own = load_file(tmp_path / "saved" / "model.safetensors")
    assert torch.equal(own["hippocampus.recall.key_proj.weight"], trained.hippocampus.recall.key_proj.weight)
    for model, what in ((plain, "untrained"), (trained, "trained")):
        model.save_pretrained(tmp_path / what)
        assert f"| memory | {what} |" in (tmp_path / what / "README.md").read_text(encoding="utf-8")
    again, _ = hippoformer.load(tmp_path / "untrained")
    assert again.memory == "untrained" and torch.equal(again(ids).logits, plain(ids).logits)


def test_a_memory_that_is_none_of_this_base_is_refused(base_folder: str, tmp_path: Path) -> None:
    awake(base_model_name="another").save_pretrained(tmp_path / "saved")
    with pytest.raises(CheckpointError, match="'untrained', 'off'"):
        hippoformer.load(base_folder, memory="none")
    with pytest.raises(ConfigurationError, match="trained on another"):
        hippoformer.load(base_folder, memory=tmp_path / "saved")
    with pytest.raises(ConfigurationError, match="of its own"):
        hippoformer.load(tmp_path / "saved", memory="off")


@torch.no_grad()
def test_recall_is_believed_less_while_the_window_holds_all() -> None:
    fusion = untrained().hippocampus.fusion
    part = torch.full((1, 3), 0.5)
    found = Recollection(part.unsqueeze(-1), part, None, part, part.unsqueeze(-1), 0 * part)
    hidden = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    none, some, all_of_it = fusion.mixture_weight(hidden, found, torch.tensor([[0.0, 0.1, 1.0]]))[0].tolist()
    assert none < 0.2 * all_of_it and none < some < all_of_it < 0.2


def test_an_older_checkpoint_goes_on_as_it_was(tmp_path: Path) -> None:
    """Its gate did not know what had left the window."""
    saved = awake()
    saved.hippocampus.fusion.beyond_weight.data.zero_()
    saved.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["hippocampus.fusion.beyond_weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again, ids = HippoFormer.from_pretrained(tmp_path, base_model=tiny_base()), text(rows=1, length=50)
    assert again.hippocampus.fusion.beyond_weight == 0 and torch.equal(again(ids).logits, saved(ids).logits)
