"""A base whose attention cannot be windowed is refused with a clear error; none is read wrongly without one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig

from hippoformer import HippoFormer
from hippoformer.errors import HippoFormerError, UnsupportedArchitectureError
from tiny import LAYERS, VOCAB, read_in_chunks, small_config, text

SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": LAYERS}
HEADS = SIZES | {"num_attention_heads": 4}
WIDE = HEADS | {"intermediate_size": 48}
GPT = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 128}
NEO = {"vocab_size": VOCAB, "hidden_size": 32, "num_layers": LAYERS, "num_heads": 4}
BART = {"encoder_layers": LAYERS, "decoder_layers": LAYERS, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
BART |= {"vocab_size": VOCAB, "d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4}

# Name -> model type and options of its config.
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba", SIZES | {"state_size": 4}),
    "rwkv": ("rwkv", SIZES | {"attention_hidden_size": 32}),
    "recurrent-gemma": ("recurrent_gemma", WIDE | {"num_hidden_layers": 3, "lru_width": 32}),
    "bloom": ("bloom", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": LAYERS, "n_head": 4}),
    "mpt": ("mpt", {"vocab_size": VOCAB, "d_model": 32, "n_layers": LAYERS, "n_heads": 4, "max_seq_len": 128}),
    "falcon-alibi": ("falcon", HEADS | {"alibi": True}),
    "bert": ("bert", WIDE | {"is_decoder": True}),
    "t5": ("t5", {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": LAYERS, "num_heads": 4}),
    "bart": ("bart", BART),
}
# Not on the list of what is supported, and not on that of what is not: read rightly, or refused.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("opt", HEADS | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "falcon": ("falcon", HEADS),
    "gpt-j": ("gptj", GPT | {"rotary_dim": 4}),
    "codegen": ("codegen", GPT | {"rotary_dim": 4}),
    "gpt-neo": ("gpt_neo", NEO | {"attention_types": [[["global", "local"], 1]], "window_size": 4}),
    "gpt-bigcode": ("gpt_bigcode", GPT),
    "stablelm": ("stablelm", WIDE | {"num_key_value_heads": 4}),
    "olmo": ("olmo", WIDE | {"pad_token_id": None, "eos_token_id": None}),
    "xglm": ("xglm", {"vocab_size": VOCAB, "d_model": 32, "ffn_dim": 48, "num_layers": LAYERS, "attention_heads": 4}),
}


def build(model_type: str, options: dict[str, Any], auto: type = AutoModelForCausalLM) -> torch.nn.Module:
    config: PreTrainedConfig = AutoConfig.for_model(model_type, **options)
    if auto is AutoModelForCausalLM:
        config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return auto.from_config(config).eval()


@pytest.mark.supports(refused="{name}")
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    decoder = name not in ("t5", "bart")
    base = build(*REFUSED[name], AutoModelForCausalLM if decoder else AutoModelForSeq2SeqLM)
    with pytest.raises(
        UnsupportedArchitectureError,
        match=f"{type(base).__name__}.*Supported are decoders" if decoder else "not a decoder",
    ) as e:
        HippoFormer(small_config(), base)
    assert type(base).__name__ in str(e.value)


@pytest.mark.supports
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # on import of GPTBigCode, in transformers 5.3
@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_read_rightly_or_refused(name: str, shows: Callable[..., None]) -> None:
    base = build(*OTHERS[name])
    ids = text(rows=2, length=30)
    whole = torch.log_softmax(base(ids).logits.float(), dim=-1)
    try:
        model = HippoFormer(small_config(window=30), base)
    except HippoFormerError as error:
        assert isinstance(error, UnsupportedArchitectureError)
        shows(refused=name)
        return
    shows(architecture=name, mode=("memory off: the base", "read in chunks", "batch with padding"))
    with model.memory_off():
        torch.testing.assert_close(model(ids).logits, whole, rtol=0.0, atol=1e-4)
    small = HippoFormer(small_config(), base)
    with small.memory_off():
        torch.testing.assert_close(read_in_chunks(small, ids, 1), small(ids).logits, rtol=0.0, atol=1e-4)
        mask, cache = torch.ones_like(ids), small.new_cache(2)
        mask[1, :7] = 0  # rows at different places of their windows
        small(ids[:, :9], attention_mask=mask[:, :9], past_key_values=cache)
        ragged = small(ids[:, 9:], past_key_values=cache).logits
        torch.testing.assert_close(ragged[1:], small(ids[1:, 7:]).logits[:, 2:], rtol=0.0, atol=1e-4)
