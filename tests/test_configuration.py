"""Options: what contradicts itself is refused, what is gone is refused with advice, and old files still load."""

import json
from pathlib import Path

import pytest

from hippoformer import HippoFormer, HippoFormerConfig
from hippoformer.configuration import _REMOVED, layers_of_depth
from hippoformer.errors import ConfigurationError
from hippoformer.model.loading import shipped_hippocampus
from tiny import LAYERS, VOTES, small_config, tiny_base


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"window": 0}, "window"),
        ({"sink_tokens": -1}, "sink_tokens"),
        ({"segment_len": 0}, "segment_len"),
        ({"buffer_size": -1}, "buffer_size"),
        ({"decay_rate": 0.0}, "decay_rate"),
        ({"decay_rate": 1.5}, "decay_rate"),
        ({"replay_rate": 1.5}, "replay_rate"),
        ({"importance_weight_range": (5.0, 2.0)}, "importance_weight_range"),
        ({"selection": "magic"}, r"selection in \(salience, surprise, random, fifo\)"),
        ({"recall_value_dim": 0}, "recall_value_dim"),
        ({"recall_n_heads": 0}, "recall_n_heads"),
        ({"unigram_weight": 0.5}, "residual_readout=False"),
        (VOTES | {"unigram_weight": 1.5}, "unigram_weight"),
        ({"memory_layer": 0}, "memory_layer"),
        ({"memory_layer": []}, "memory_layer"),
        (VOTES | {"memory_layer": [1, 1]}, "twice"),
        ({"memory_layer": [1, 2]}, "memory_layer=-1 with residual_readout"),
        (VOTES | {"memory_layer": LAYERS + 1}, f"memory_layer={LAYERS + 1}.*{LAYERS} layers"),
        ({"window": 121}, "window=121.*129 positions.*128"),  # + 2 sinks + 6 of a segment
        ({"passage_tokens": 63}, "passage_tokens"),
        ({"lora": {"target_modules": ["nowhere"]}}, r"nowhere.*q_proj"),
    ],
    ids=str,
)
def test_contradicting_options_are_refused(options: dict, word: str) -> None:
    with pytest.raises(ConfigurationError, match=word):
        HippoFormer(small_config(**options), tiny_base())


def test_positions_and_layers_of_the_base_decide() -> None:
    HippoFormer(small_config(window=120), tiny_base("gpt2"))
    with pytest.raises(ConfigurationError, match="q_proj"):
        HippoFormer(small_config(lora={"r": 2}), tiny_base("gpt2"))
    assert layers_of_depth(30) == [16, 24] and layers_of_depth(1) == [1]
    assert [layers_of_depth(n) for n in (2, 3, 4, 12, 24)] == [[2], [2], [3], [7, 10], [13, 19]]
    with pytest.raises(ConfigurationError, match="make a model of it first"):
        HippoFormerConfig().memory_layers  # noqa: B018


@pytest.mark.parametrize("name", _REMOVED)
def test_an_option_that_is_gone_is_refused_and_says_what_to_use_instead(name: str) -> None:
    with pytest.raises(
        ConfigurationError,
        match=rf"no more: {name}: .*(constant|train|lora=|recall_n_heads|unigram_weight|nothing reads)",
    ):
        HippoFormerConfig(**{name: 1})


def test_a_config_of_before_loads_without_them(tmp_path: Path) -> None:
    now = small_config(window=20).to_dict()
    before = now | dict.fromkeys(_REMOVED, 1) | {"use_lora": True, "lora_r": 3, "lora_alpha": 6, "lora_dropout": 0.1}
    before |= {"lora_target_modules": ["k_proj"]}
    del before["lora"]
    (tmp_path / "config.json").write_text(json.dumps(before), encoding="utf-8")
    config = HippoFormerConfig.from_pretrained(tmp_path)
    assert config.lora == {"r": 3, "lora_alpha": 6, "lora_dropout": 0.1, "target_modules": ["k_proj"]}
    assert config.window == 20 and not _REMOVED.keys() & config.to_dict().keys()
    (tmp_path / "config.json").write_text(json.dumps(before | {"use_lora": False}), encoding="utf-8")
    assert HippoFormerConfig.from_pretrained(tmp_path).to_dict() == now
    with pytest.raises(ConfigurationError, match="window >= 1"):
        HippoFormerConfig.from_pretrained(tmp_path, window=0)


@pytest.mark.parametrize(("size", "decay"), [(2048, 0.998), (16384, 0.99975), (1024, 0.996), (4, 0.5), (0, 0.5)])
def test_forgetting_follows_the_room_unless_it_is_given(size: int, decay: float) -> None:
    assert HippoFormerConfig(buffer_size=size).decay == pytest.approx(decay, abs=1e-12)
    assert HippoFormerConfig(buffer_size=size, decay_rate=0.9).decay == 0.9
    shipped = HippoFormerConfig.from_pretrained(shipped_hippocampus("smollm2-135m"), buffer_size=size)
    assert shipped.decay == pytest.approx(decay, abs=1e-12)


def test_the_defaults_are_what_is_shipped() -> None:
    folder = shipped_hippocampus("smollm2-135m")
    assert folder is not None
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8e6
    shipped, default = HippoFormerConfig.from_pretrained(folder).to_dict(), HippoFormerConfig().to_dict()
    default["memory_layer"] = layers_of_depth(shipped["num_hidden_layers"])
    of_the_base = {"vocab_size", "hidden_size", "num_hidden_layers", "bos_token_id", "eos_token_id", "pad_token_id"}
    differing = {name for name in shipped if shipped[name] != default.get(name)}
    assert differing <= of_the_base | {"seed", "transformers_version"}
    assert default.keys() <= shipped.keys()
    assert shipped_hippocampus("google/gemma-2b") is shipped_hippocampus("../pretrained/smollm2-135m/missing") is None
