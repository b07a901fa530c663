"""Texts, a tokenizer with one token a byte, and a model that reads them: what stands in for `hippoformer.load`."""

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hippoformer import HippoFormer, HippoFormerConfig
from hippoformer.data import Document

WINDOW, SEGMENT = 48, 16
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_tokenizer(
    first: Sequence[str] = (),
    last: Sequence[str] = (),
    merges: Sequence[tuple[str, str]] = (),
    start: str | None = None,
    **special: str,
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer.

    Args:
        first, last: special tokens before and after the 256 bytes in the vocabulary.
        merges: pairs that become one token. start: put before every text. special: `bos_token` and others.
    """
    vocabulary = [*first, *LETTERS, *(a + b for a, b in merges), *last]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if start is not None:
        pair = (start, vocabulary.index(start))
        core.post_processor = processors.TemplateProcessing(single=f"{start} $A", special_tokens=[pair])
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role[0] }}: {{ message.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}a: {% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and an end, which also ends the turns of a chat."""
    tokenizer = byte_tokenizer(["<end>"], bos_token="<end>", eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_load(name: str = "smollm2-135m", **options: Any) -> tuple[HippoFormer, PreTrainedTokenizerFast]:
    """What stands in for `hippoformer.load`: a random Llama whose random hippocampus speaks."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=options.pop("vocab_size", len(LETTERS) + 1),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=1024,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    options.pop("dtype", None)
    sizes = {"window": WINDOW, "segment_len": SEGMENT, "buffer_size": 64} | options
    small = {"recall_n_heads": 2, "recall_head_dim": 8, "recall_value_dim": 8, "salience_n_heads": 2, "anchor_len": 4}
    small |= {"memory_layer": -1, "residual_readout": True, "marginal_weight": 0.0}
    small |= {"decay_rate": 0.9, "priority_threshold": 1.0, "max_replay_rounds": 10}
    config = HippoFormerConfig(base_model_name=name, **(small | sizes))
    model = HippoFormer(config, base.eval())
    model.hippocampus.fusion.open()
    return model, tiny_tokenizer()


def text(seed: int, characters: int) -> str:
    """Random letters, blanks and lines."""
    generator = torch.Generator().manual_seed(seed)
    return "".join("abcde fg\n"[i] for i in torch.randint(0, 9, (characters,), generator=generator))


def documents(*lengths: int) -> list[Document]:
    """A text of each length."""
    return [Document(f"text {i}", text(i, n), "made up") for i, n in enumerate(lengths)]
