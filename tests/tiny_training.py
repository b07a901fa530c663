"""What a training test needs: token ids, a base model on disk with texts beside it, and arguments that fit it."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tiny_texts import LETTERS, byte_tokenizer


def texts(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 64, (n,), generator=generator) for n in lengths]


def small_base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=128, **sizes)).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_base().save_pretrained(tmp_path / "base")
    byte_tokenizer(pad_token=LETTERS[0]).save_pretrained(tmp_path / "base")
    (tmp_path / "text.txt").write_text("the memory keeps what the window loses. " * 25, encoding="utf-8")
    return tmp_path


def arguments(folder: Path, output: str, *more: str) -> list[str]:
    sizes = ["segment_len=6", "recall_n_heads=4", "recall_head_dim=8", "recall_value_dim=8", "salience_n_heads=2"]
    fixed = ["--base_model", str(folder / "base"), "--text", str(folder / "text.txt"), "--dtype", "float32"]
    fixed += ["--window", "12", "--buffer-size", "16", "--max-seq-length", "12", "--batch_size", "2"]
    fixed += ["--max_steps", "8", "--save_steps", "3", "--logging_steps", "2", "--output_dir", str(folder / output)]
    return [*fixed, *more, "--set", *sizes, "replay_batch=4", "anchor_len=4", "n_anchors=8"]
