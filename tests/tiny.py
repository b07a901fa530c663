"""Tiny random models for the behaviour tests: one of every architecture, and a hippocampus that is wide awake.

`fresh` has a silent memory and is its base, so a test on one would pass with the memory broken. `awake` opens the
fusion, lets its gate read the query, lowers the null slot, spreads the salience and lets the residual in;
`test_awake.py` asserts that this is enough to change logits and to tag some tokens and not others, so that the other
tests mean something.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hippoformer.configuration import HippoFormerConfig
from hippoformer.hippocampus import replay
from hippoformer.model.cache import HippoCache
from hippoformer.model.modeling import HippoFormer

VOCAB = 97
LAYERS = 2

_TOKENS = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
_TOKENS |= {"initializer_range": 0.2}  # larger than a real model's, so that a tiny one has opinions
_NO_GROUPS = _TOKENS | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_SIZES = _NO_GROUPS | {"num_key_value_heads": 2}
_GEMMA = _SIZES | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 7}
_GPT2 = _TOKENS | {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 128}

# Name -> model type and options of its config.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _SIZES),
    "mistral-narrow": ("mistral", _SIZES | {"sliding_window": 7}),  # narrower than the window of 12
    "mistral-wide": ("mistral", _SIZES | {"sliding_window": 64}),  # wider than all slots
    "qwen2": ("qwen2", _SIZES),
    "qwen3": ("qwen3", _SIZES | {"head_dim": 8}),
    "gemma": ("gemma", _SIZES | {"head_dim": 8}),
    # Soft caps, and every second layer slides.
    "gemma2": ("gemma2", _GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    # Two rotary tables, one for each kind of layer.
    "gemma3": ("gemma3_text", _GEMMA | {"layer_types": ["sliding_attention", "full_attention"]}),
    "phi": ("phi", _NO_GROUPS),  # rotates half of a head
    "gpt-neox": ("gpt_neox", _NO_GROUPS),
    "cohere": ("cohere", _SIZES),  # interleaved pairs, scaled logits
    "smollm3": ("smollm3", _SIZES | {"no_rope_layers": [1, 0]}),  # the second layer knows no positions
    "gpt2": ("gpt2", _GPT2),
}
ARCHITECTURES = list(CONFIGS)
ROTARY = [name for name in ARCHITECTURES if name != "gpt2"]

SMALL: dict[str, Any] = {
    "base_model_name": "tiny",
    "window": 12,
    "sink_tokens": 2,
    "segment_len": 6,
    "buffer_size": 16,
    "recall_n_heads": 4,
    "recall_head_dim": 8,
    "recall_value_dim": 8,
    "replay_rate": 0.5,
    "max_replay_rounds": 2,
    "decay_rate": 0.9,
    "memory_layer": -1,
    "residual_readout": True,
    "unigram_weight": 0.0,  # a fresh HippoFormer is its base
}
replay.ROUND = 3  # with 16 cues a round all of a tiny store would be replayed at every segment end

VOTES = {"residual_readout": False}
# Settings that change what is computed; every invariant of reading holds for each.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "inner layer": VOTES | {"memory_layer": 1},
    "last layer": VOTES | {"memory_layer": LAYERS},
    "two layers": VOTES | {"memory_layer": [1, -1]},
    "no values": VOTES | {"recall_value_dim": 0},
    "unigram": VOTES | {"unigram_weight": 0.75},
    "no following": {"following": False},
    "by surprise": {"selection": "surprise"},
    "no store": {"buffer_size": 0},
    "no replay": {"max_replay_rounds": 0, "capture_span": 0},
}


def tiny_base(name: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random base model in eval mode, the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model_type, options = CONFIGS[name]
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options), dtype=dtype).eval()


def small_config(**options: Any) -> HippoFormerConfig:
    """Options that make a few dozen tokens pass through everything: window, store, replay."""
    return HippoFormerConfig(**(SMALL | options))


def untrained(name: str = "llama", model_seed: int = 0, **options: Any) -> HippoFormer:
    """A HippoFormer as it is made; `seed` is an option of the config, `model_seed` makes the weights."""
    base = tiny_base(name, model_seed)
    with torch.random.fork_rng():
        torch.manual_seed(model_seed + 1)
        return HippoFormer(small_config(**options), base)


def fresh(name: str = "llama", model_seed: int = 0, **options: Any) -> HippoFormer:
    """An untrained HippoFormer whose memory is silent, which must be its base."""
    model = untrained(name, model_seed, **options)
    model.hippocampus.fusion.strength.data.zero_()
    return model


def awake(name: str = "llama", model_seed: int = 0, **options: Any) -> HippoFormer:
    """A HippoFormer whose memory is heard in every logit."""
    model = fresh(name, model_seed, **options)
    hippocampus = model.hippocampus
    with torch.no_grad():
        hippocampus.fusion.strength.fill_(1.0)
        nn.init.kaiming_uniform_(
            hippocampus.fusion.gate_out.weight, generator=torch.Generator().manual_seed(model_seed)
        )
        hippocampus.fusion.gate_out.bias.fill_(1.0)
        hippocampus.fusion.residual_scale.fill_(0.5)
        hippocampus.recall.null_proj.bias.zero_()
        hippocampus.recall.log_scale.fill_(2.5)
        # Salience far on both sides of 0.5, so that no test hangs on the rounding of one that is near it.
        hippocampus.salience_gate.local_out.weight.mul_(20.0)
        hippocampus.salience_gate.surprise_weight.zero_()  # random models are always surprised: all would be tagged
        if hippocampus.salience_gate.has_global:
            speaking = hippocampus.salience_gate.global_out.weight  # silent in a fresh gate
            nn.init.kaiming_uniform_(speaking, generator=torch.Generator().manual_seed(model_seed))
        hippocampus.salience_gate.smoothing.add_(0.25)  # or what is carried over the edge of a step would not matter
    return model


def text(rows: int = 2, length: int = 60, seed: int = 0) -> Tensor:
    """(rows, length) random ids in which every second stretch of ten tokens comes again 30 tokens later: recall finds
    votes.

    Ids differ within 90 tokens otherwise. A text that opens with one token twice would have two equal hidden states,
    and which of two equal keys replay takes for the more similar one is a matter of rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = [
        torch.cat([torch.randperm(VOCAB - 3, generator=generator) + 3 for _ in range(length // 90 + 1)])
        for _ in range(rows)
    ]
    ids = torch.stack(shuffled)[:, :length].clone()
    for start in range(30, length, 20):
        stop = min(start + 10, length)
        ids[:, start:stop] = ids[:, start - 30 : stop - 30]
    return ids


@torch.no_grad()
def after(model: HippoFormer, ids: Tensor) -> HippoCache:
    """The state of rows that have read (R, T) tokens in one call."""
    cache = model.new_cache(len(ids))
    model(ids, past_key_values=cache)
    return cache


def read_in_chunks(model: HippoFormer, ids: Tensor, size: int) -> Tensor:
    """Logits of a text read `size` tokens at a time through one cache."""
    cache = model.new_cache(ids.shape[0])
    with torch.no_grad():
        return torch.cat([model(part, past_key_values=cache).logits for part in ids.split(size, dim=1)], dim=1)


def state_of(cache: Any) -> dict[str, Tensor]:
    """A copy of every tensor of a cache."""
    return {name: tensor.clone() for name, tensor in cache.tensors().items()}


def same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of the tensors in which two states differ; empty where they are equal bit for bit."""
    if one.keys() != other.keys():
        return sorted(one.keys() ^ other.keys())
    return [name for name in one if not torch.equal(one[name], other[name])]
