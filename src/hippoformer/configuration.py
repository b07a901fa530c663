"""Every setting of a HippoFormer, with the names of the original research code where it had one.

The defaults are those of the shipped hippocampus; the original's values stand in docs/training.md.
The `PreTrainedConfig` of transformers does the reading and writing of `config.json`. Options are grouped as in the
picture of the architecture; each says its unit and what it changes.
"""

import inspect
from importlib import import_module
from typing import Any

from transformers import PreTrainedConfig

from hippoformer.errors import ConfigurationError

# Tokens of the longest passage; a store of passages holds one at least.
LONGEST_PASSAGE = 64

_SAME_SETTING = {"recall_n_heads", "fusion_n_heads"}
# A store of 2,048 keeps 0.998 of a priority a segment: an episode fades as fast as new ones fill the store.
_FADING = 4.096
# The least that is kept where a store is so small that the rule would leave nothing.
_LEAST_DECAY = 0.5


def layers_of_depth(n_layers: int) -> list[int]:
    """The layers that are read where none are named: the first past half of the depth, and four fifths of it.

    Which are best was measured on one base of 30 layers, 16 and 24 (docs/lab-notebook.md); very shallow bases have one.
    """
    return sorted({n_layers // 2 + 1, round(0.8 * n_layers)})


class HippoFormerConfig(PreTrainedConfig):
    """Configuration of the hippocampus and of the window that the base model keeps.

    Base model:
        base_model_name: folder, hub repository, or short name (`smollm2-135m`).
        freeze_base: no gradient reaches the base's own weights (LoRA weights, where used, still train).
        use_lora, lora_r, lora_alpha, lora_dropout, lora_target_modules: low-rank adapters by peft.
    Window:
        window: tokens of the base's own attention span, the current one included.
        sink_tokens: first tokens of the row that stay visible for ever.
        segment_len: tokens of a row between two consolidations.
    Salience gate:
        salience_n_heads: heads of its global attention; at most `recall_n_heads`, whose keys it reads.
        salience_min_duration: tokens of its causal smoothing kernel.
        salience_threshold_init: initial threshold, in logits.
        salience_hidden_size: width of its local pathway.
        salience_surprise_weight: initial weight of plain surprise beside the two pathways, see `hippocampus.salience`.
        importance_weight_range: weight at salience 0.5+ and at salience 1.
        untagged_weight: weight at salience <= 0.5.
        capture_span: what leaves the window is judged by the passage it stands in, so many tokens on either side; 0 for
            each token by itself.
        selection: the rule by which episodes stay: "salience" (the gate) or one of the usual baselines, "surprise",
            "random" and "fifo"; it changes nothing else. `hippocampus.selection` has the rules, and refuses other
            names when a hippocampus is made.
    Episodic memory and replay:
        buffer_size: episodes kept per row, beyond the window.
        decay_rate: factor on the priority per segment since the last reactivation; None: 1 - 4.096 / buffer_size (see
            `decay`), since a larger buffer reaches further back only if it also forgets more slowly.
        max_replay_rounds: replay rounds at each segment end; 0 switches replay off.
        replay_batch: memories reactivated in a round.
        replay_span: memories on either side that a reactivation takes along, as far as they are of one story.
        replay_rate: share of the way to the highest importance that a reactivation raises the priority of a memory
            whose worth is proven. 0 leaves all judgement to the gate: new memories then need not beat a record.
        merge_threshold: cosine of two keys from which episodes with the same token are one memory.
        priority_threshold: effective priority below which a memory is forgotten at consolidation.
        soft_topk_temperature: softness, in units of log-priority, of the relaxed competition through which the loss
            reaches the gate in training; the forward pass itself is always the hard competition.
        seed: of the replay draws.
    Passages:
        passage_tokens: tokens of text that are kept per row, whole sentences, lines or turns, to be found by the words
            of a question (`HippoCache.retrieve`); 4 bytes each. 0 keeps none.
    Recall and fusion:
        memory_layer: what the hippocampus reads, and where the residual enters: -1 is the final hidden state, k >= 1
            the output of decoder layer k. Several layers are read side by side; they have no residual read-out. None:
            the model names two by its base's depth, see `layers_of_depth`.
        recall_n_heads, recall_head_dim: width of the episodic keys. The original's fusion_n_heads is the same setting.
        recall_value_dim: width of an episode's value for the residual read-out.
        recall_top_k: episodes a query may recall; 0 for all of them.
        following: whether a memory that predicted the token just read leads to the one after it; the `match_*` options
            say which one where there are several.
        match_power: of several stories that have foretold the last tokens, one counts by this power of how many they
            were.
        match_characters: where a story begins to match, so many characters that were the same right before it count
            as one token more, however they were cut into tokens; 0: only tokens count.
        match_recency: of stories that match equally long, m > 3 tokens, the k-th newest counts by 1 / k to the power of
            this times log(m / 3): what was told last is what is recalled. 0: all count the same.
        residual_readout, distribution_readout: the two ways recall changes a prediction.
        fusion_dropout: dropout on the residual read-out in training.
    Marginals:
        marginal_weight: how far the base's predictions follow how often each token came in the text so far, against
            how often the base expected it; 1 all the way, 0 switches it off. Without the residual read-out only. Three
            numbers of each row for every token of the vocabulary. See `hippocampus.marginals`.
        marginal_prior: tokens that are believed to have come as expected before the first is counted.
    Drift calibrator:
        n_anchors, anchor_len: number and tokens of the probe inputs.
        drift_threshold: drift, relative to the anchors' own spread, above which a loaded memory is mapped.
        drift_update_momentum: of the moving reference that training measures its own drift against.
    Losses:
        lm_loss_weight, salience_weighted_loss_weight, sparsity_loss_weight, memory_util_loss_weight,
        credit_loss_weight: weights of the terms.
        credit_only_gate: the gate learns from credit and sparsity alone; False lets the next-token loss reach it
            through the priorities as well. Training sets it where credit was measured.
        target_tagged_share: share of tokens that the gate is set to tag, and that the sparsity term lets it.
        consolidation_r_target: Pearson correlation of salience and retrieval quality to aim for.
    Training:
        learning_rate, weight_decay, warmup_steps, max_grad_norm: of AdamW; the base's LoRA trains at a tenth of the
            rate.

    Raises:
        ConfigurationError: a value outside its range, or two that contradict each other.
    """

    model_type = "hippoformer"

    def __init__(
        self,
        base_model_name: str = "smollm2-135m",
        freeze_base: bool = True,
        use_lora: bool = False,
        lora_r: int = 16,
        lora_alpha: int = 32,
        lora_dropout: float = 0.05,
        lora_target_modules: tuple[str, ...] | list[str] = ("q_proj", "v_proj"),
        window: int = 512,
        sink_tokens: int = 4,
        segment_len: int = 256,
        salience_n_heads: int = 4,
        salience_min_duration: int = 2,
        salience_threshold_init: float = 0.0,
        salience_hidden_size: int = 128,
        salience_surprise_weight: float = 1.0,
        importance_weight_range: tuple[float, float] | list[float] = (2.0, 5.0),
        untagged_weight: float = 1.0,
        capture_span: int = 4,
        selection: str = "salience",
        buffer_size: int = 2048,
        passage_tokens: int = 65_536,
        decay_rate: float | None = None,
        max_replay_rounds: int = 0,
        replay_batch: int = 16,
        replay_span: int = 4,
        replay_rate: float = 0.0,
        merge_threshold: float = 0.95,
        priority_threshold: float = 0.0,
        soft_topk_temperature: float = 1.0,
        seed: int = 0,
        memory_layer: int | list[int] | tuple[int, ...] | None = None,
        recall_n_heads: int | None = None,
        recall_head_dim: int = 64,
        recall_value_dim: int = 64,
        recall_top_k: int = 0,
        following: bool = True,
        match_power: float = 8.0,
        match_characters: float = 3.0,
        match_recency: float = 4.0,
        residual_readout: bool = False,
        distribution_readout: bool = True,
        fusion_n_heads: int | None = None,
        fusion_dropout: float = 0.1,
        marginal_weight: float = 0.75,
        marginal_prior: float = 2.0,
        n_anchors: int = 64,
        anchor_len: int = 16,
        drift_threshold: float = 0.3,
        drift_update_momentum: float = 0.99,
        lm_loss_weight: float = 1.0,
        salience_weighted_loss_weight: float = 0.5,
        sparsity_loss_weight: float = 0.1,
        memory_util_loss_weight: float = 0.01,
        credit_loss_weight: float = 1.0,
        credit_only_gate: bool = False,
        target_tagged_share: float = 0.3,
        consolidation_r_target: float = 0.86,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        warmup_steps: int = 100,
        max_grad_norm: float = 1.0,
        **kwargs: Any,
    ) -> None:
        self.base_model_name = base_model_name
        self.freeze_base = freeze_base
        self.use_lora = use_lora
        self.lora_r = lora_r
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.lora_target_modules = list(lora_target_modules)
        self.window = window
        self.sink_tokens = sink_tokens
        self.segment_len = segment_len
        self.salience_n_heads = salience_n_heads
        self.salience_min_duration = salience_min_duration
        self.salience_threshold_init = salience_threshold_init
        self.salience_hidden_size = salience_hidden_size
        self.salience_surprise_weight = salience_surprise_weight
        self.importance_weight_range = list(importance_weight_range)
        self.untagged_weight = untagged_weight
        self.capture_span = capture_span
        self.selection = selection
        self.buffer_size = buffer_size
        self.passage_tokens = passage_tokens
        self.decay_rate = decay_rate
        self.max_replay_rounds = max_replay_rounds
        self.replay_batch = replay_batch
        self.replay_span = replay_span
        self.replay_rate = replay_rate
        self.merge_threshold = merge_threshold
        self.priority_threshold = priority_threshold
        self.soft_topk_temperature = soft_topk_temperature
        self.seed = seed
        self.memory_layer = list(memory_layer) if isinstance(memory_layer, list | tuple) else memory_layer
        if None not in (recall_n_heads, fusion_n_heads) and recall_n_heads != fusion_n_heads:
            raise ConfigurationError(
                f"recall_n_heads={recall_n_heads} and fusion_n_heads={fusion_n_heads} name the same setting with two "
                "values: give one of them"
            )
        self.recall_n_heads = recall_n_heads or fusion_n_heads or 4
        self.fusion_n_heads = self.recall_n_heads
        self.recall_head_dim = recall_head_dim
        self.recall_value_dim = recall_value_dim
        self.recall_top_k = recall_top_k
        self.following = following
        self.match_power = match_power
        self.match_characters = match_characters
        self.match_recency = match_recency
        self.residual_readout = residual_readout
        self.distribution_readout = distribution_readout
        self.fusion_dropout = fusion_dropout
        self.marginal_weight = marginal_weight
        self.marginal_prior = marginal_prior
        self.n_anchors = n_anchors
        self.anchor_len = anchor_len
        self.drift_threshold = drift_threshold
        self.drift_update_momentum = drift_update_momentum
        self.lm_loss_weight = lm_loss_weight
        self.salience_weighted_loss_weight = salience_weighted_loss_weight
        self.sparsity_loss_weight = sparsity_loss_weight
        self.memory_util_loss_weight = memory_util_loss_weight
        self.credit_loss_weight = credit_loss_weight
        self.credit_only_gate = credit_only_gate
        self.target_tagged_share = target_tagged_share
        self.consolidation_r_target = consolidation_r_target
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.max_grad_norm = max_grad_norm
        self._check()
        super().__init__(**kwargs)
        import_module("hippoformer.model.modeling")  # AutoModelForCausalLM knows the model from here on

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, but options changed in `kwargs` are checked together with all others.

        Raises:
            ConfigurationError: as the constructor.
        """
        changed = {name: value for name, value in kwargs.items() if name in inspect.signature(cls).parameters}
        kept = {name: value for name, value in config_dict.items() if name not in changed}
        if changed.keys() & _SAME_SETTING:
            kept = {name: value for name, value in kept.items() if name not in _SAME_SETTING}
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

    def _check(self) -> None:
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
            "replay_batch >= 1": self.replay_batch >= 1,
            "replay_span >= 0": self.replay_span >= 0,
            "0 <= replay_rate <= 1": 0 <= self.replay_rate <= 1,
            "soft_topk_temperature > 0": self.soft_topk_temperature > 0,
            "0 < untagged_weight <= importance_weight_range[0] <= importance_weight_range[1]": 0
            < self.untagged_weight
            <= low
            <= high,
            "1 <= salience_n_heads <= recall_n_heads": 1 <= self.salience_n_heads <= self.recall_n_heads,
            "salience_min_duration >= 1": self.salience_min_duration >= 1,
            "memory_layer == -1 or memory_layer >= 1, none of them twice": len(layers) > 0
            and all(layer == -1 or layer >= 1 for layer in layers)
            and len(set(layers)) == len(layers),
            "residual_readout=False where memory_layer does not name exactly one": not self.residual_readout
            or (self.memory_layer is not None and len(layers) == 1),
            "recall_top_k >= 0": self.recall_top_k >= 0,
            "0 <= match_power <= 10": 0 <= self.match_power <= 10,
            "match_characters == 0 or >= 1": self.match_characters == 0 or self.match_characters >= 1,
            "match_recency >= 0": self.match_recency >= 0,
            "0 <= marginal_weight <= 1": 0 <= self.marginal_weight <= 1,
            "marginal_prior > 0": self.marginal_prior > 0,
            "residual_readout=False with a marginal_weight": not (self.marginal_weight and self.residual_readout),
            "n_anchors >= 1 and anchor_len >= 2": self.n_anchors >= 1 and self.anchor_len >= 2,
            "0 <= drift_update_momentum < 1": 0 <= self.drift_update_momentum < 1,
        }
        broken = [rule for rule, holds in rules.items() if not holds]
        if broken:
            raise ConfigurationError(f"HippoFormerConfig: expected {'; '.join(broken)}")
