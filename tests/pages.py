"""The pages of the documentation as blocks of code, and the folder that a reader of them has."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hippoformer
from hippoformer.model.base_models import SMOLLM2_135M
from tiny_texts import LETTERS, byte_tokenizer, text

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(
    r"(?:^ *<!-- test: (?P<mark>[^\n]*?) *-->\n+)?"
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```$"
    r"|^<!-- test: before\n(?P<before>.*?)-->$",
    flags=re.DOTALL | re.MULTILINE,
)
_TEXTS = {"my-texts": 3, "held-out": 2, "books": 2}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, or hidden Python (language `python`, mark `before`): its first line, and its mark."""

    line: int
    language: str
    mark: str
    code: str

    @property
    def commands(self) -> list[str]:
        """The command lines of a shell block; where some begin with `$ `, the others are what they print."""
        lines = [line.strip() for line in self.code.replace("\\\n", " ").splitlines()]
        typed = [line[2:] for line in lines if line.startswith("$ ")]
        return typed or [line for line in lines if line and not line.startswith("#")]


def read_page(page: Path) -> list[Block]:
    """All blocks of a page, in order."""
    content, blocks = page.read_text(encoding="utf-8"), []
    for found in _FENCE.finditer(content):
        line = content.count("\n", 0, found.start()) + 1
        if found["before"] is not None:
            blocks.append(Block(line, "python", "before", found["before"]))
        else:
            code = re.sub(rf"^{found['indent']}", "", found["code"], flags=re.MULTILINE)
            blocks.append(Block(line, found["language"], found["mark"] or "", code))
    return blocks


def make_readers_folder(folder: Path) -> None:
    """What a page may use without making it: every name here is part of the rule in docs/contributing.md.

    `my-model` is a base model of transformers, `runs/mine` and the short name smollm2-135m (as long as `standing_in`
    holds) are HippoFormers around models of this size, `book.memory.safetensors` is a memory of the latter.
    """
    tokenizer = byte_tokenizer(["<end>"], bos_token="<end>", eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        config = LlamaConfig(vocab_size=len(LETTERS) + 1, max_position_embeddings=1024, **sizes, **special)
        base = LlamaForCausalLM(config)
    for place in (folder / "my-model", folder / ".home" / "base_models" / SMOLLM2_135M.folder.name):
        base.save_pretrained(place)
        tokenizer.save_pretrained(place)
    small = {"recall_n_heads": 4, "recall_head_dim": 4, "recall_value_dim": 8}
    for name, place in (("my-model", "runs/mine"), (SMOLLM2_135M.name, ".home/shipped")):
        options = {"base_model_name": name, "window": 48, "segment_len": 32, "buffer_size": 64}
        model = hippoformer.HippoFormer(hippoformer.HippoFormerConfig(**small, **options), base)
        model.hippocampus.fusion.gate_out.bias.data.fill_(-1.0)
        model.save_pretrained(folder / place)
    model.set_tokenizer(tokenizer, words=False)
    cache = model.new_cache(1)
    model.score(tokenizer(text(0, 200), return_tensors="pt").input_ids, past_key_values=cache)
    cache.save(folder / "book.memory.safetensors")
    for name, number in _TEXTS.items():
        (folder / name).mkdir()
        for i in range(number):
            (folder / name / f"{i}.txt").write_text(text(i, 500), encoding="utf-8")
    (folder / "my-book.txt").write_text(text(9, 700), encoding="utf-8")
    (folder / "results").mkdir()
    beginning = (ROOT / "README.md").read_text(encoding="utf-8")[:4000]  # of one token a byte
    (folder / "README.md").write_text(beginning, encoding="utf-8")


@contextlib.contextmanager
def standing_in(folder: Path) -> Iterator[None]:
    """Inside the block `smollm2-135m` is the tiny model of a reader's folder, which is also where we are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HIPPOFORMER_HOME", str(folder / ".home"))
        found = {SMOLLM2_135M.name: folder / ".home" / "shipped"}
        patch.setattr("hippoformer.model.loading.shipped_hippocampus", found.get)
        yield
