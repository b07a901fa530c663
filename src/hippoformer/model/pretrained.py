"""A base model with a hippocampus: its parts, their weights and their vocabulary. `modeling` reads with them."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hippoformer.configuration import HippoFormerConfig, layers_of_depth
from hippoformer.errors import ConfigurationError, InputError
from hippoformer.hippocampus.hippocampus import Hippocampus
from hippoformer.hippocampus.spelling import Spelling
from hippoformer.model.base_models import empty_base_model, load_base_model
from hippoformer.model.weights import (
    add_lora,
    check_foreign_adapters,
    foreign_adapters,
    merge_lora,
    unwrap,
    vocabulary_size,
)
from hippoformer.model.window import NO_CHECKPOINTING, WindowedBase


class HippoFormerPreTrainedModel(PreTrainedModel):
    """The parts of a `HippoFormer`, see there; the cache and the files know no more of it than this.

    Attributes:
        base, hippocampus: the two models. window: how the base is read. spelling: of the vocabulary, where it is known.
    """

    config: HippoFormerConfig
    config_class = HippoFormerConfig
    base_model_prefix = "base"
    main_input_name = "input_ids"
    _is_stateful = True  # what was consolidated cannot be rolled back: `generate` refuses assistants
    _supports_sdpa = True

    # What a HippoFormer does, of which the cache, generation and the files make use.
    new_cache: Callable[..., Any]
    score: Callable[..., Tensor]
    memory_off: Callable[[], AbstractContextManager[None]]
    save_memory: Callable[..., None]
    load_memory: Callable[..., Any]

    def __init__(self, config: HippoFormerConfig, base_model: PreTrainedModel | None = None) -> None:
        if base_model is None:
            make = empty_base_model if torch.empty(0).device.type == "meta" else load_base_model
            base_model = make(config.base_model_name, attn_implementation=config._attn_implementation or "sdpa")
        base_model = unwrap(base_model)
        text = base_model.config.get_text_config(decoder=True)
        check_foreign_adapters(base_model, config)
        config.base_adapters = foreign_adapters(base_model)
        window = WindowedBase(base_model, config)
        config.vocab_size, config.hidden_size = window.vocab_size, window.hidden_size
        config.num_hidden_layers = window.n_layers
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "_attn_implementation"):
            setattr(config, name, getattr(text, name, None))
        if config.memory_layer is None:
            config.memory_layer = layers_of_depth(window.n_layers)
        super().__init__(config)
        if max(config.memory_layers) > window.n_layers:
            raise ConfigurationError(f"memory_layer={config.memory_layer}, but the base has {window.n_layers} layers")
        if config.lora is not None:
            add_lora(base_model, config)
        elif config.freeze_base:
            base_model.requires_grad_(False)
        self.base = base_model
        self.hippocampus = Hippocampus(text.hidden_size, window.vocab_size, config).to(window.device)
        self.window = window
        self.spelling: Spelling | None = None
        self.generation_config: Any = base_model.generation_config
        self._made_empty = base_model.device.type == "meta"
        self.post_init()
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where the base model reads its tokens."""
        return self.window.device

    @property
    def vocab_size(self) -> int:
        """Rows of the base's embeddings."""
        return self.config.vocab_size

    def init_weights(self) -> None:
        """Draws all weights of a model that was made on the meta device and moved off it by `to_empty`; no others."""
        if self._made_empty and self.device.type != "meta":
            self.base.init_weights()
            fresh = Hippocampus(self.config.hidden_size, self.config.vocab_size, self.config)
            self.hippocampus.load_state_dict(fresh.state_dict())

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Raises ConfigurationError, naming what to call instead."""
        raise ConfigurationError(NO_CHECKPOINTING)

    # ---------------------------------------------------------------- vocabulary

    def get_output_embeddings(self) -> nn.Module:
        """The base's language-model head."""
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Sets the base's language-model head."""
        self.base.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Resizes the base's embeddings and head, as in transformers; the hippocampus and all caches follow."""
        embeddings = self.base.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.take_vocabulary()
        return embeddings

    def take_vocabulary(self) -> None:
        """Follows a base whose embeddings were resized or whose dtype was changed; called by every call. New tokens are
        words of their own; states follow when they are read into.
        """
        self.window.follow_dtype()
        size = vocabulary_size(self.base)
        if size != self.config.vocab_size:
            self.window.vocab_size = self.config.vocab_size = size
            self.hippocampus.resize_vocabulary(size)
            self.spelling = None if self.spelling is None else self.spelling.resized(size)

    def set_tokenizer(self, tokenizer: Any, words: bool = True) -> None:
        """Tells how the vocabulary is spelled, so that what is read can be kept as text (`HippoCache.passages`).

        Args:
            tokenizer: of the base. words: also tell recall which tokens are the same word (`Recall.set_words`), which
                a saved hippocampus knows already.
        """
        self.spelling = Spelling.of(tokenizer, self.config.vocab_size)
        if words:
            self.hippocampus.recall.set_words(self.spelling.words(), self.spelling.endings())

    @torch.no_grad()
    def anchors(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """How this model encodes the drift probes (A, L): keys (A L, K) and values (A L, U), float32."""
        self.take_vocabulary()
        recall = self.hippocampus.recall
        hidden = self.window.hidden_of(ids.to(self.device).long()).to(recall.key_proj.weight.dtype)
        hidden = self.hippocampus.normed(hidden)
        return recall.encode_key(hidden).flatten(0, 1).float(), recall.encode_value(hidden).flatten(0, 1).float()

    # ---------------------------------------------------------------- adapters, and the original's interface

    def merge_lora(self) -> PreTrainedModel:
        """Makes the adapters part of the base's weights; the model reads on as before, and is saved with its own base.

        Returns:
            The base, an ordinary model of transformers: save it, and train a hippocampus on it with its weights frozen.

        Raises:
            ConfigurationError: no adapters.
        """
        if self.config.lora is None:
            raise ConfigurationError("this model has no adapters to merge: lora is None")
        merge_lora(self.base)
        self.config.lora, self.config.freeze_base = None, False
        return self.base

    def get_num_trainable_params(self) -> int:
        """Number of parameters that training changes."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def get_num_total_params(self) -> int:
        """Number of parameters, base included."""
        return sum(p.numel() for p in self.parameters())

    def reset_memory(self) -> None:
        """Raises InputError: a model holds no memory, as the original's does; the cache object does."""
        raise InputError("the memory is in the cache object: call cache.reset(), or start with model.new_cache()")
