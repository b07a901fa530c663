"""Texts, a tokenizer with one token a byte, and a model that reads them: what stands in for `hippoformer.load`."""

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizer, PreTrainedTokenizerFast

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


def metaspace_tokenizer(kind: str, scheme: str = "first", **more: Any) -> PreTrainedTokenizerFast:
    """As made of SentencePiece models: "▁" for a space and before a text, bytes for what has no piece."""
    merges = [("▁", "h"), ("▁h", "i"), ("e", "r"), ("▁", "<"), ("s", ">")]
    letters = sorted({*"▁hither<>|/sun", *(a + b for a, b in merges)})
    pieces = ["<unk>", "<s>", "</s>", "<|user|>", *(f"<0x{number:02X}>" for number in range(256)), *letters]
    model: Any
    if kind == "unigram":
        # In a model of SentencePiece the control tokens are pieces, and the likeliest of all.
        scores = [0.0] * 4 + [-20.0] * 256 + [-10.0 + len(piece) for piece in letters]
        model = models.Unigram(list(zip(pieces, scores, strict=True)), unk_id=0, byte_fallback=True)
    else:
        vocab = {piece: number for number, piece in enumerate(pieces)}
        model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    core = Tokenizer(model)
    if scheme == "prepended":  # as Llama 2 has it
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<|user|>"],
        **more,
    )


class SlowTokenizer(PreTrainedTokenizer):
    """One token a character."""

    def __init__(self, **options: Any) -> None:
        super().__init__(bos_token="<s>", eos_token="</s>", **options)

    vocab_size = 256

    def get_vocab(self) -> dict[str, int]:
        return {chr(number): number for number in range(256)} | self.added_tokens_encoder

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


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
    small = {"recall_n_heads": 2, "recall_head_dim": 8, "recall_value_dim": 8}
    small |= {"memory_layer": -1, "residual_readout": True, "unigram_weight": 0.0}
    small |= {"decay_rate": 0.9, "max_replay_rounds": 10}
    config = HippoFormerConfig(base_model_name=name, **(small | sizes))
    model = HippoFormer(config, base.eval())
    model.hippocampus.fusion.gate_out.bias.data.fill_(-1.0)
    tokenizer = tiny_tokenizer()
    model.set_tokenizer(tokenizer, words=False)
    return model, tokenizer


def text(seed: int, characters: int) -> str:
    """Random letters, blanks and lines."""
    generator = torch.Generator().manual_seed(seed)
    return "".join("abcde fg\n"[i] for i in torch.randint(0, 9, (characters,), generator=generator))


def documents(*lengths: int) -> list[Document]:
    """A text of each length."""
    return [Document(f"text {i}", text(i, n), "made up") for i, n in enumerate(lengths)]
