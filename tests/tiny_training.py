"""What a training test needs: token ids, a base model on disk with texts beside it, and arguments that fit it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import LlamaConfig, LlamaForCausalLM

from tiny_texts import LETTERS, byte_tokenizer

SEGMENT = 6  # of the small models


def texts(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 64, (n,), generator=generator) for n in lengths]


def small_base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=128, **sizes)).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A base and a text; accelerate keeps one precision a process, and each test has its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    small_base().save_pretrained(tmp_path / "base")
    byte_tokenizer(pad_token=LETTERS[0]).save_pretrained(tmp_path / "base")
    (tmp_path / "text.txt").write_text("the memory keeps what the window loses. " * 25, encoding="utf-8")
    yield tmp_path
    AcceleratorState._reset_state(reset_partial_state=True)


def arguments(folder: Path, output: str, *more: str) -> list[str]:
    fixed = ["--base_model", str(folder / "base"), "--text", str(folder / "text.txt"), "--dtype", "float32"]
    fixed += ["--window", "12", "--buffer-size", "16", "--max-seq-length", "12", "--batch_size", "2"]
    fixed += ["--max_steps", "8", "--save_steps", "3", "--logging_steps", "2", "--output_dir", str(folder / output)]
    return [*fixed, *more, "--set", "segment_len=6", "recall_n_heads=4", "recall_head_dim=8", "recall_value_dim=8"]


def history(run: Path) -> list[dict[str, float]]:
    return json.loads((run / "training_log.json").read_text())["history"]


def differing(one: Path, other: Path) -> list[str]:
    """Names of the weights in which two saved models differ in a bit."""
    from safetensors.torch import load_file

    names = []
    for file in ("model.safetensors", "base/model.safetensors"):
        if (one / file).exists() or (other / file).exists():
            a, b = load_file(one / file), load_file(other / file)
            names += [name for name in a.keys() | b.keys() if not torch.equal(a[name], b[name])]
    return names
