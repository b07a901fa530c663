"""The options of a HippoFormer. The defaults are those of the shipped hippocampus.

What was never varied is a constant beside the code that reads it; what belongs to a training run is an argument of
`hippoformer train`. The `PreTrainedConfig` of transformers reads and writes `config.json`.
"""

import inspect
from importlib import import_module
from typing import Any

from transformers import PreTrainedConfig

from hippoformer.errors import ConfigurationError

# Tokens of the longest passage; a store of passages holds one at least.
LONGEST_PASSAGE = 64

# A store of 2,048 keeps 0.998 of a priority a segment: an episode fades as fast as new ones fill the store.
_FADING = 4.096
# The least that is kept where a store is so small that the rule would leave nothing.
_LEAST_DECAY = 0.5
# Options of earlier versions, and what to use instead.
_CONSTANTS = "it is a constant now, with the value of the shipped hippocampus"
_GONE = "nothing reads it any more"
_TRAINING = "it is an argument of hippoformer train (hippoformer.training.arguments)"
_LORA = "give the fields of a peft LoraConfig as lora={'r': 16, 'lora_alpha': 32, ...}"
_REMOVED = (
    dict.fromkeys(("use_lora", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"), _LORA)
    | dict.fromkeys(("salience_n_heads", "salience_min_duration", "salience_threshold_init"), _CONSTANTS)
    | dict.fromkeys(("salience_hidden_size", "salience_surprise_weight", "untagged_weight"), _CONSTANTS)
    | dict.fromkeys(("replay_batch", "replay_span", "merge_threshold", "priority_threshold"), _CONSTANTS)
    | dict.fromkeys(("match_power", "match_characters", "match_recency", "marginal_prior"), _CONSTANTS)
    | dict.fromkeys(("n_anchors", "anchor_len", "recall_top_k", "distribution_readout"), _CONSTANTS)
    | dict.fromkeys(("fusion_dropout", "soft_topk_temperature", "credit_only_gate"), _CONSTANTS)
    | {"fusion_n_heads": "use recall_n_heads", "marginal_weight": "use unigram_weight"}
    | dict.fromkeys(("drift_update_momentum", "consolidation_r_target"), _GONE)
    | dict.fromkeys(("salience_weighted_loss_weight", "memory_util_loss_weight"), _GONE)
    | dict.fromkeys(("lm_loss_weight", "sparsity_loss_weight", "credit_loss_weight", "learning_rate"), _TRAINING)
    | dict.fromkeys(("weight_decay", "warmup_steps", "max_grad_norm", "target_tagged_share"), _TRAINING)
)


def layers_of_depth(n_layers: int) -> list[int]:
    """The layers that are read where none are named: the first past half of the depth, and four fifths of it.

    Which are best was measured on one base of 30 layers, 16 and 24; very shallow bases have one.
    """
    return sorted({n_layers // 2 + 1, round(0.8 * n_layers)})


class HippoFormerConfig(PreTrainedConfig):
    """Configuration of the hippocampus and of the window that the base model keeps.

    Base model:
        base_model_name: folder, hub repository, or short name (`smollm2-135m`).
        freeze_base: no gradient reaches the base's own weights (LoRA weights, where used, still train).
        lora: fields of a peft `LoraConfig` for adapters in the base's layers; None for no adapters.
    Window:
        window: tokens of the base's own attention span, the current one included.
        sink_tokens: first tokens of the row that stay visible for ever.
        segment_len: tokens of a row between two consolidations.
    Episodes:
        buffer_size: episodes kept per row, beyond the window.
        selection: the rule by which episodes stay: "salience" (the gate) or a baseline, "surprise", "random" or
            "fifo"; it changes nothing else. See `hippocampus.selection`.
        capture_span: half-width, in tokens, of the passage over which salience is averaged before eviction; 0 disables
            it.
        importance_weight_range: priority of an episode at salience just above 0.5 and at salience 1; it is 1 below.
        decay_rate: factor on the priority per segment since the last reactivation; None: 1 - 4.096 / buffer_size (see
            `decay`), since a larger buffer reaches further back only if it also forgets more slowly.
        max_replay_rounds: replay rounds at each segment end; 0 switches replay off. See `hippocampus.replay`.
        replay_rate: share of the way to the highest importance that a reactivation raises the priority of an episode
            of proven use.
        seed: of random selection, the replay draws and the drift probes.
    Passages:
        passage_tokens: tokens of text kept per row, in whole sentences, lines or turns, 4 bytes each, to be found by
            the words of a question (`HippoCache.retrieve`). 0 keeps none.
    Recall and fusion:
        memory_layer: layers that the hippocampus reads, side by side: -1 is the final hidden state, k >= 1 the output
            of decoder layer k. None: two by the base's depth, see `layers_of_depth`.
        recall_n_heads, recall_head_dim: width of the episodic keys.
        recall_value_dim: width of an episode's value, which the gate's global pathway and the residual read-out read;
            0 for neither.
        following: whether an episode that predicted the token just read boosts the one after it. See
            `hippocampus.continuation`.
        residual_readout: add recalled content to the final hidden state, which memory_layer=-1 then reads. See
            `hippocampus.fusion`.
        unigram_weight: how far the base's predictions follow the frequency of each token in the text so far; 0
            switches it off. Not together with the residual read-out. See `hippocampus.unigram`.
    Drift:
        drift_threshold: drift, relative to the probes' own spread, above which a loaded memory is mapped to the new
            code. See `hippocampus.drift`.

    Raises:
        ConfigurationError: a value outside its range, two that contradict each other, or an option that is gone.
    """

    model_type = "hippoformer"

    def __init__(
        self,
        base_model_name: str = "smollm2-135m",
        freeze_base: bool = True,
        lora: dict[str, Any] | None = None,
        window: int = 512,
        sink_tokens: int = 4,
        segment_len: int = 256,
        buffer_size: int = 2048,
        selection: str = "salience",
        capture_span: int = 4,
        importance_weight_range: tuple[float, float] | list[float] = (2.0, 5.0),
        decay_rate: float | None = None,
        max_replay_rounds: int = 0,
        replay_rate: float = 0.0,
        seed: int = 0,
        passage_tokens: int = 65_536,
        memory_layer: int | list[int] | tuple[int, ...] | None = None,
        recall_n_heads: int = 4,
        recall_head_dim: int = 64,
        recall_value_dim: int = 64,
        following: bool = True,
        residual_readout: bool = False,
        unigram_weight: float = 0.75,
        drift_threshold: float = 0.3,
        **kwargs: Any,
    ) -> None:
        self.base_model_name = base_model_name
        self.freeze_base = freeze_base
        self.lora = lora
        self.window = window
        self.sink_tokens = sink_tokens
        self.segment_len = segment_len
        self.buffer_size = buffer_size
        self.selection = selection
        self.capture_span = capture_span
        self.importance_weight_range = list(importance_weight_range)
        self.decay_rate = decay_rate
        self.max_replay_rounds = max_replay_rounds
        self.replay_rate = replay_rate
        self.seed = seed
        self.passage_tokens = passage_tokens
        self.memory_layer = list(memory_layer) if isinstance(memory_layer, list | tuple) else memory_layer
        self.recall_n_heads = recall_n_heads
        self.recall_head_dim = recall_head_dim
        self.recall_value_dim = recall_value_dim
        self.following = following
        self.residual_readout = residual_readout
        self.unigram_weight = unigram_weight
        self.drift_threshold = drift_threshold
        self._check(kwargs)
        super().__init__(**kwargs)
        import_module("hippoformer.model.modeling")  # AutoModelForCausalLM knows the model from here on

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, but options changed in `kwargs` are checked together with all others.

        Options of earlier versions that are gone are left out; adapters become `lora`.

        Raises:
            ConfigurationError: as the constructor.
        """
        changed = {name: value for name, value in kwargs.items() if name in inspect.signature(cls).parameters}
        kept = {n: v for n, v in config_dict.items() if n not in changed and n not in _REMOVED}
        if config_dict.get("use_lora"):
            names = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
            names["lora_target_modules"] = "target_modules"
            kept["lora"] = {new: config_dict[old] for old, new in names.items() if old in config_dict}
        if "marginal_weight" in config_dict:
            kept.setdefault("unigram_weight", config_dict["marginal_weight"])
        others = {name: value for name, value in kwargs.items() if name not in changed}
        return super().from_dict(kept | changed, **others)

    @property
    def key_dim(self) -> int:
        """Width K of an episode's key, all heads together."""
        return self.recall_n_heads * self.recall_head_dim

    @property
    def memory_layers(self) -> tuple[int, ...]:
        """`memory_layer`, always as a tuple.

        Raises:
            ConfigurationError: it is None, and no model has named the layers yet.
        """
        if self.memory_layer is None:
            raise ConfigurationError("memory_layer=None follows from the depth of a base: make a model of it first")
        return (self.memory_layer,) if isinstance(self.memory_layer, int) else tuple(self.memory_layer)

    @property
    def decay(self) -> float:
        """`decay_rate`, or what follows from `buffer_size` where it is None."""
        if self.decay_rate is not None:
            return self.decay_rate
        return max(1.0 - _FADING / max(self.buffer_size, 1), _LEAST_DECAY)

    @property
    def window_slots(self) -> int:
        """Key/value slots C of a row: sinks, window, and the segment being read."""
        return self.sink_tokens + self.window + self.segment_len

    @property
    def working_slots(self) -> int:
        """Episodes of a row that have not yet left the window: they compete at the next segment end at the earliest."""
        return self.window + self.segment_len

    def _check(self, others: dict[str, Any]) -> None:
        gone = {name: _REMOVED[name] for name in others if name in _REMOVED}
        if gone:
            said = "; ".join(f"{name}: {instead}" for name, instead in gone.items())
            raise ConfigurationError(f"HippoFormerConfig has these options no more: {said}")
        low, high = self.importance_weight_range
        layers = (-1,) if self.memory_layer is None else self.memory_layers
        rules = {
            "window >= 1": self.window >= 1,
            "sink_tokens >= 0": self.sink_tokens >= 0,
            "segment_len >= 1": self.segment_len >= 1,
            "buffer_size >= 0": self.buffer_size >= 0,
            f"passage_tokens == 0 or >= {LONGEST_PASSAGE}": not 0 < self.passage_tokens < LONGEST_PASSAGE,
            "capture_span >= 0": self.capture_span >= 0,
            "decay_rate=None or 0 < decay_rate <= 1": self.decay_rate is None or 0 < self.decay_rate <= 1,
            "max_replay_rounds >= 0": self.max_replay_rounds >= 0,
            "0 <= replay_rate <= 1": 0 <= self.replay_rate <= 1,
            "1 <= importance_weight_range[0] <= importance_weight_range[1]": 1 <= low <= high,
            "recall_n_heads >= 1 and recall_head_dim >= 1": self.recall_n_heads >= 1 and self.recall_head_dim >= 1,
            "recall_value_dim >= 0, and > 0 with residual_readout": self.recall_value_dim >= int(self.residual_readout),
            "memory_layer == -1 or memory_layer >= 1, none of them twice": len(layers) > 0
            and all(layer == -1 or layer >= 1 for layer in layers)
            and len(set(layers)) == len(layers),
            "0 <= unigram_weight <= 1": 0 <= self.unigram_weight <= 1,
            "memory_layer=-1 with residual_readout": not self.residual_readout or self.memory_layer in (-1, [-1]),
            "residual_readout=False with a unigram_weight": not (self.unigram_weight and self.residual_readout),
        }
        broken = [rule for rule, holds in rules.items() if not holds]
        if broken:
            raise ConfigurationError(f"HippoFormerConfig: expected {'; '.join(broken)}")
