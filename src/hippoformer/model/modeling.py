"""HippoFormer: a causal language model with a hippocampus.

One path serves everything. A call is cut into steps, each at most to the end of every row's own segment; a step reads
the base through its window, lets the hippocampus encode and recall, and fuses. Padding is squeezed out first, so rows
of any padding advance by their own tokens. Prefill, chunks, single tokens, scoring and training on text are this one
stream.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel, StoppingCriteriaList

from hippoformer.configuration import HippoFormerConfig, layers_of_depth
from hippoformer.errors import CheckpointError, ConfigurationError, InputError, NonFiniteError
from hippoformer.hippocampus.circuit import Hippocampus, MemoryState, StepOutput
from hippoformer.hippocampus.fusion import mix_distribution, mix_target
from hippoformer.hippocampus.passages import Passages
from hippoformer.hippocampus.replay import ReplayReport
from hippoformer.hippocampus.spelling import Spelling
from hippoformer.hippocampus.words import words_of_tokens
from hippoformer.model import checkpoint
from hippoformer.model.adapters import add_lora, check_foreign_adapters, foreign_adapters, merge_lora, unwrap
from hippoformer.model.base_models import empty_base_model, load_base_model
from hippoformer.model.cache import HippoCache
from hippoformer.model.inputs import Rows, check_token_ids, squeeze_padding
from hippoformer.model.memory_file import load_memory, save_memory
from hippoformer.model.outputs import HippoFormerOutput, Step
from hippoformer.model.rereading import reread
from hippoformer.model.statistics import memory_stats, salience_stats
from hippoformer.model.taps import listening
from hippoformer.model.weights import vocabulary_size
from hippoformer.model.window import NO_CHECKPOINTING, WindowedBase
from hippoformer.tensors.ragged import column_of, last_of, piece, place


@dataclass
class _Generation:
    """What one call of `generate` notes.

    Attributes:
        ended: (R,) bool, rows that have come to their end and are padding from there on; None where no token ends one.
        beams: in beam search, the state of all beams when they had read their prompts; `n_beams` rows a prompt.
        n_columns: width of the prompts.
        ends: (K,) tokens that end a row.
    """

    ended: Tensor | None = None
    beams: HippoCache | None = None
    n_beams: int = 1
    n_columns: int = 0
    ends: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))


class _Noted(StoppingCriteriaList):
    """Stopping criteria that note which rows they have ended."""

    def __init__(self, criteria: StoppingCriteriaList, generation: _Generation) -> None:
        super().__init__(criteria)
        self.generation = generation
        for criterion in criteria:
            if hasattr(criterion, "eos_token_id"):
                generation.ends = criterion.eos_token_id

    def __call__(self, input_ids: Any, scores: Any, **options: Any) -> Any:
        stopped = super().__call__(input_ids, scores, **options)
        if self.generation.ends.numel():  # otherwise rows go on, and what follows is text
            ended = self.generation.ended
            self.generation.ended = stopped if ended is None else ended | stopped
        return stopped


# Probes that keys are fitted to, and tokens at the beginning of each that are left out.
_PROBES, _FIRST_TOKENS = 16, 4
# The call of `generate` that the current thread is in.
_GENERATION: ContextVar[_Generation | None] = ContextVar("generation", default=None)
# Which parts of which model, by its id, are switched off in calls of the current thread.
_SWITCHED_OFF: ContextVar[frozenset[tuple[int, str]]] = ContextVar("switched_off", default=frozenset())


class HippoFormer(PreTrainedModel, GenerationMixin):
    """Any causal language model of transformers with a bounded, learned, persistent memory.

    Args:
        config: every option; `base_model_name` is loaded unless `base_model` is given.
        base_model: a causal language model of transformers to wrap, or a peft model with adapters in its layers; with
            `use_lora` it gets adapters in place.

    Raises:
        UnsupportedArchitectureError, ConfigurationError, NonFiniteError, BaseModelNotFoundError.
    """

    config: HippoFormerConfig
    config_class = HippoFormerConfig
    base_model_prefix = "base"
    main_input_name = "input_ids"
    _is_stateful = True  # what was consolidated cannot be rolled back: `generate` refuses assistants
    _supports_sdpa = True

    def __init__(self, config: HippoFormerConfig, base_model: PreTrainedModel | None = None) -> None:
        if base_model is None:
            attention = config._attn_implementation or "sdpa"
            if torch.empty(0).device.type == "meta":
                base_model = empty_base_model(config.base_model_name, attn_implementation=attention)
            else:
                base_model = load_base_model(config.base_model_name, attn_implementation=attention)
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
        if config.use_lora:
            add_lora(base_model, config)
        elif config.freeze_base:
            base_model.requires_grad_(False)
        self.base = base_model
        self.hippocampus = Hippocampus(text.hidden_size, window.vocab_size, config).to(window.device)
        self.window = window
        self.spelling: Spelling | None = None
        self.generation_config = base_model.generation_config
        self._made_empty = base_model.device.type == "meta"
        self.post_init()
        self.eval()

    # ---------------------------------------------------------------- weights

    def init_weights(self) -> None:
        """Draws all weights of a model that was made on the meta device and moved off it by `to_empty`.

        Any other model has its weights, and keeps them.
        """
        if self._made_empty and self.device.type != "meta":
            self.base.init_weights()
            fresh = Hippocampus(self.config.hidden_size, self.config.vocab_size, self.config)
            self.hippocampus.load_state_dict(fresh.state_dict())

    def get_input_embeddings(self) -> nn.Module:
        """The base's."""
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Sets the base's."""
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The base's language-model head."""
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Sets the base's language-model head."""
        self.base.set_output_embeddings(new_embeddings)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Not as transformers does it.

        Raises:
            ConfigurationError: always, naming what to call.
        """
        raise ConfigurationError(NO_CHECKPOINTING)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Resizes the base's embeddings and head, as in transformers; the hippocampus and all caches follow."""
        embeddings = self.base.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.take_vocabulary()
        return embeddings

    @property
    def vocab_size(self) -> int:
        """Rows of the base's embeddings."""
        return self.config.vocab_size

    # ---------------------------------------------------------------- state

    def new_cache(self, batch_size: int = 1) -> HippoCache:
        """The state of `batch_size` rows that have read nothing."""
        if batch_size < 1:
            raise InputError(f"a cache needs at least one row, got batch_size={batch_size}")
        self.take_vocabulary()
        device, dtype = self.device, self.dtype
        memory = MemoryState.empty(batch_size, self.hippocampus.width, self.config, dtype, device)
        last_output = torch.zeros(batch_size, self.config.hidden_size, dtype=dtype, device=device)
        passages = None
        if self.spelling is not None and self.config.passage_tokens:
            passages = Passages(batch_size, self.spelling, self.config.passage_tokens)
        return HippoCache(self.window.new_cache(batch_size, device), memory, last_output, self, passages)

    def set_tokenizer(self, tokenizer: Any, words: bool = True) -> None:
        """Tells how the vocabulary is spelled, so that what is read can be kept as text (`HippoCache.passages`).

        Args:
            tokenizer: of the base. words: also tell recall which tokens are the same word (`Recall.set_words`), which
                a saved hippocampus knows already.
        """
        self.spelling = Spelling.of(tokenizer, self.config.vocab_size)
        if words:
            self.hippocampus.recall.set_words(*words_of_tokens(tokenizer, self.config.vocab_size))

    @contextmanager
    def memory_off(self) -> Iterator[None]:
        """Within it, in this thread, the model is exactly its base with the same window and sinks: nothing is recalled
        or stored.
        """
        with self._without("episodes", "marginals"):
            yield

    @contextmanager
    def episodes_off(self) -> Iterator[None]:
        """Within it, in this thread, nothing is recalled or stored; marginals, where they are kept, go on moving the
        predictions.
        """
        with self._without("episodes"):
            yield

    @contextmanager
    def _without(self, *parts: str) -> Iterator[None]:
        token = _SWITCHED_OFF.set(_SWITCHED_OFF.get() | {(id(self), part) for part in parts})
        try:
            yield
        finally:
            _SWITCHED_OFF.reset(token)

    @property
    def episodes_on(self) -> bool:
        """False in this thread within `memory_off()` or `episodes_off()`."""
        return (id(self), "episodes") not in _SWITCHED_OFF.get()

    @property
    def marginals_on(self) -> bool:
        """False in this thread within `memory_off()`."""
        return (id(self), "marginals") not in _SWITCHED_OFF.get()

    @property
    def memory(self) -> str:
        """What memory this is: "shipped" with the package, "trained", "untrained", or "off" where nothing is heard."""
        fusion = self.hippocampus.fusion
        if fusion.is_trained:
            shipped = Path(__file__).parents[1] / "pretrained"
            return "shipped" if shipped in Path(self.name_or_path or "").parents else "trained"
        return "off" if fusion.strength == 0 and not self.config.marginal_weight else "untrained"

    def extra_repr(self) -> str:
        """The first line of `repr`."""
        return f"memory={self.memory!r}"

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the base model, and so of its window and the episodes."""
        return self.base.dtype

    @property
    def device(self) -> torch.device:
        """Where the base model reads its tokens."""
        return self.window.device

    def take_vocabulary(self) -> None:
        """Follows a base whose embeddings were resized (`base.resize_token_embeddings`), or whose dtype was changed;
        called by every call.

        New tokens are words of their own, which nothing was read of; states follow when they are read into.
        """
        self.window.follow_dtype()
        size = vocabulary_size(self.base)
        if size != self.config.vocab_size:
            self.window.vocab_size = self.config.vocab_size = size
            self.hippocampus.resize_vocabulary(size)
            self.spelling = None if self.spelling is None else self.spelling.resized(size)

    # ---------------------------------------------------------------- reading

    def stream(
        self, ids: Tensor, lengths: list[int], cache: HippoCache, beside: Sequence[HippoCache] = ()
    ) -> Iterator[Step]:
        """Reads text step by step; the cache moves along, except for `cache.columns`, which counts what calls were
        given.

        Args:
            ids: (R, L) int64 without padding on the left.
            lengths: real tokens of each row, at most L.
            beside: states with other memories, whose rows have read as much: what they make of the same text, the base
                reading it once, is in `Step.beside`. Their own windows stay empty.

        Yields:
            One Step per piece of a segment.

        Raises:
            InputError: states that have read another number of tokens, or a base whose states recall changes.
        """
        if beside and (self.config.residual_readout or any(other.lengths != cache.lengths for other in beside)):
            raise InputError(
                "memories follow one reading only side by side from its beginning, and without the residual read-out: "
                "use new caches, and a model with residual_readout=False"
            )
        start = [0] * len(lengths)
        segment_len = self.config.segment_len
        while any(s < n for s, n in zip(start, lengths, strict=True)):
            new = [
                min(n - s, segment_len - done % segment_len)
                for s, n, done in zip(start, lengths, cache.lengths, strict=True)
            ]
            yield self._step(piece(ids, start, new), start, new, cache, beside)
            start = [s + n for s, n in zip(start, new, strict=True)]

    def _step(
        self, ids: Tensor, start: list[int], new: list[int], cache: HippoCache, beside: Sequence[HippoCache]
    ) -> Step:
        if self.config.memory_layers != (-1,) and self.config.residual_readout:
            step = self._step_within(ids, start, new, cache)
        else:
            with self.window.tapped() as states:
                final = self.window.read(cache, ids, cache.lengths, new)
            source = states(final)
            foretold = self._foretold(final, ids, new, [cache, *beside])
            parts = zip([cache, *beside], *foretold, strict=True)
            step, *others = [self._remembered(source, final, ids, start, new, *part) for part in parts]
            step.beside = tuple(others)
        self.window.end_segment(cache, cache.lengths, _ended(cache, new))
        return step

    def _foretold(
        self, final: Tensor, ids: Tensor, new: list[int], caches: Sequence[HippoCache]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """For each memory (R, N) log p of a step's tokens under the base, and as the memory's marginals move it.

        Marginals count the tokens, unless their memory is frozen.
        """
        cache = caches[0]
        predicted = _predicted(cache, ids)
        last = cache.memory.last_hidden if self.config.memory_layers == (-1,) else cache.last_output
        if not self._moves(cache):
            log_prob = self._target_log_prob(last, final, ids, predicted)
            return [log_prob] * len(caches), [log_prob] * len(caches)
        before = torch.cat((last.unsqueeze(1), final[:, :-1]), dim=1)
        real = torch.arange(ids.shape[1], device=ids.device) < torch.tensor(new, device=ids.device).unsqueeze(-1)
        counted = predicted & real
        shifts = torch.stack([one.memory.marginals.shift for one in caches], dim=-1)
        plain, moved, expected = self.window.moved_log_prob_of(before, ids, shifts, counted)
        for one in caches:
            if not one.frozen:
                one.memory = replace(one.memory, marginals=one.memory.marginals.read(ids, counted, expected))
        plain = torch.where(predicted, plain, 0.0)
        return [plain] * len(caches), [torch.where(predicted, part, 0.0) for part in moved.unbind(-1)]

    def _moves(self, cache: HippoCache) -> bool:
        return cache.memory.marginals.are_kept and self.marginals_on

    def _remembered(
        self,
        source: Tensor,
        final: Tensor,
        ids: Tensor,
        start: list[int],
        new: list[int],
        cache: HippoCache,
        base_log_prob: Tensor,
        prior_log_prob: Tensor,
    ) -> Step:
        """What one memory makes of a step, of the states it reads (R, N, n D), the final ones (R, N, D), and what was
        foretold of the tokens (R, N).
        """
        predicted, log_prob = _predicted(cache, ids), prior_log_prob
        found, touched = self._recall(source, log_prob, ids, new, cache)
        if touched is not source:
            final, log_prob = touched, self._target_log_prob(cache.last_output, touched, ids, predicted)
        foretold = (base_log_prob, prior_log_prob, _fused(log_prob, found, predicted))
        return self._taken(start, new, cache, foretold, source, final, found)

    def _taken(
        self,
        start: list[int],
        new: list[int],
        cache: HippoCache,
        foretold: tuple[Tensor, Tensor, Tensor],
        source: Tensor,
        final: Tensor,
        found: StepOutput | None,
    ) -> Step:
        """The step with all that came of it; the cache has read its tokens now."""
        cache.last_output = last_of(final, new, cache.last_output)
        shift, report = cache.memory.marginals.shift, self._advance(cache, new)
        return Step(
            start,
            new,
            *foretold,
            hidden=source,
            output=final,
            window=self.window,
            found=found,
            report=report,
            shifts=(shift, cache.memory.marginals.shift) if self._moves(cache) else None,
        )

    def _step_within(self, ids: Tensor, start: list[int], new: list[int], cache: HippoCache) -> Step:
        """The step of a residual that enters at an inner layer.

        The surprise of a token must not depend on recall, so it is read off that layer by the base's own final norm and
        head (the logit lens).
        """
        predicted, norm, before = _predicted(cache, ids), self.window.final_norm, cache.memory.last_hidden
        source = prior_log_prob = before
        found: StepOutput | None = None

        def touch(output: Any) -> Any:
            nonlocal source, prior_log_prob, found
            source = output[0] if isinstance(output, tuple) else output
            prior_log_prob = self._target_log_prob(norm(before), norm(source), ids, predicted)
            found, touched = self._recall(source, prior_log_prob, ids, new, cache)
            return (touched, *output[1:]) if isinstance(output, tuple) else touched

        (layer,) = self.config.memory_layers
        with listening({self.window.layer(layer): touch}):
            final = self.window.read(cache, ids, cache.lengths, new)
        log_prob = self._target_log_prob(cache.last_output, final, ids, predicted)
        foretold = (prior_log_prob, prior_log_prob, _fused(log_prob, found, predicted))
        return self._taken(start, new, cache, foretold, source, final, found)

    def _recall(
        self, hidden: Tensor, log_prob: Tensor, ids: Tensor, new: list[int], cache: HippoCache
    ) -> tuple[StepOutput | None, Tensor]:
        """Hands untouched hidden states to the hippocampus; what it found, and the states as recall leaves them."""
        memory = cache.memory
        if not torch.isfinite(hidden).all():
            raise NonFiniteError("the base model computed NaN or infinity: check its weights and its precision")
        if not self.episodes_on:
            cache.memory = memory.without_vote(last_of(hidden, new, memory.last_hidden))
            return None, hidden
        found, cache.memory = self.hippocampus.step(memory, cache.lengths, hidden, ids, -log_prob, new)
        heard = (found.mixture, found.recollection.nothing, found.forecast, found.residual)
        if not all(torch.isfinite(part).all() for part in heard if part is not None):
            cache.memory = memory
            raise NonFiniteError("the hippocampus computed NaN or infinity: its weights are damaged, load them again")
        cache.written = True
        if cache.passages is not None and not cache.frozen:
            cache.passages.append(ids, new, found.salience, start=cache.lengths)
        return found, hidden if found.residual is None else hidden + found.residual.to(hidden.dtype)

    def _advance(self, cache: HippoCache, new: list[int]) -> ReplayReport | None:
        """Counts the step's tokens, and lets rows that ended a segment sleep."""
        cache.lengths = [done + n for done, n in zip(cache.lengths, new, strict=True)]
        ended = _ended(cache, new)
        if not ended:
            return None
        if self.marginals_on and not cache.frozen:
            marginals = cache.memory.marginals.renewed(torch.tensor(ended, device=self.device), self.config)
            cache.memory = replace(cache.memory, marginals=marginals)
        if not cache.written:
            return None
        frozen = cache.frozen or not self.episodes_on
        cache.memory, report = self.hippocampus.end_segment(cache.memory, cache.lengths, ended, frozen)
        return report

    def _target_log_prob(self, last: Tensor, states: Tensor, ids: Tensor, predicted: Tensor) -> Tensor:
        """(R, N) log p of each token by the state (last (R, D), then states (R, N, D)) before it; 0 where not
        predicted.
        """
        before = torch.cat((last.unsqueeze(1), states[:, :-1]), dim=1)
        return torch.where(predicted, self.window.log_prob_of(before, ids), 0.0)

    def score(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: HippoCache | None = None,
    ) -> Tensor:
        """Log-probability of every token given the tokens of its row before it.

        Streamed: never more than a segment of logits is held, whatever T.

        Args:
            input_ids: (R, T). attention_mask: (R, T), 1 for real tokens.
            past_key_values: state to continue; it is updated.

        Returns:
            (R, T - 1) float32, entry t - 1 for token t; 0 at padding and at each row's first token.
        """
        with torch.no_grad():
            rows, cache = self._prepare(input_ids, attention_mask, past_key_values)
            log_probs = torch.zeros(rows.ids.shape, device=rows.ids.device)
            for step in self.stream(rows.ids, rows.lengths, cache):
                place(log_probs, step.target_log_prob, step.start, step.new, rows.order)
        cache.count(rows.ids, rows.lengths)
        return log_probs[:, 1:]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: HippoCache | None = None,
        use_cache: bool | None = None,
        return_salience: bool = False,
        return_memory_stats: bool = False,
        logits_to_keep: int = 0,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> HippoFormerOutput | tuple[Any, ...]:
        """Reads `input_ids` after whatever the cache has read.

        Args:
            input_ids: (R, T).
            attention_mask: (R, T), or (R, what the cache has read + T); 0 marks padding, on either side.
            labels: (R, T), -100 where not counted; usually input_ids itself. Padding is never counted.
            past_key_values: state to continue, updated in place; None starts anew.
            use_cache: whether the output carries the state.
            return_salience, return_memory_stats: what else the output carries.
            logits_to_keep: only the last so many columns of logits; 0 for all.
            output_hidden_states: whether, or of which layers, the output carries the base's hidden states.
            return_dict: False gives the output's fields as a tuple. None here and above: what the config says.

        Raises:
            InputError: an argument that cannot be served (`inputs_embeds`, `output_attentions`), empty input, ids
                outside the vocabulary, a mask or labels of a wrong shape, a row that has read nothing but padding.
            NonFiniteError: NaN in what the base computes.
        """
        kwargs["output_attentions"] = kwargs.get("output_attentions", self.config.output_attentions)
        unknown = sorted(k for k, v in kwargs.items() if k not in _HARMLESS and v is not None and v is not False)
        if unknown:
            reasons = [_NOT_TAKEN.get(name, "it reads token ids, positions are its own") for name in unknown]
            raise InputError(f"forward does not take {', '.join(unknown)}: {'; '.join(dict.fromkeys(reasons))}")
        if input_ids is None:
            raise InputError("forward was given no input_ids: expected token ids of shape (rows, tokens)")
        if past_key_values is not None and input_ids.shape[1:] == (0,) and _GENERATION.get() is not None:
            log_probs = self.next_log_probs(past_key_values)  # the whole prompt has been read already
            return HippoFormerOutput(logits=log_probs.unsqueeze(1), past_key_values=past_key_values)
        rows, cache = self._prepare(input_ids, attention_mask, past_key_values)
        ids, lengths, order = rows.ids, rows.lengths, rows.order
        n_columns = ids.shape[1]
        following = None if labels is None else rows.following(labels, self.config.vocab_size)
        keep = n_columns if logits_to_keep == 0 or following is not None else min(logits_to_keep, n_columns)
        # Of each row, how many real tokens come before the kept columns.
        skipped = [
            sum(1 for c in row[:n] if c < n_columns - keep) for row, n in zip(order.tolist(), lengths, strict=True)
        ]

        logits: Tensor | None = None
        nll, counted = torch.zeros((), device=ids.device), 0
        salience, importance = torch.zeros_like(ids, dtype=torch.float), torch.zeros_like(ids, dtype=torch.float)
        replayed: list[ReplayReport] = []
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        cache.wanted_states = output_hidden_states
        hidden_states: list[Tensor | None] | None = None
        for step in self.stream(ids, lengths, cache):
            if cache.hidden_states is not None:
                if hidden_states is None:
                    hidden_states = [
                        None if part is None else part.new_zeros(*ids.shape, part.shape[-1])
                        for part in cache.hidden_states
                    ]
                for whole, part in zip(hidden_states, cache.hidden_states, strict=True):
                    if whole is not None and part is not None:
                        place(whole, part, step.start, step.new, order)
            wanted = [max(0, k - s) for k, s, n in zip(skipped, step.start, step.new, strict=True) if s + n > k]
            if wanted:
                first = min(wanted)
                log_probs = step.log_probs(first)
                start, new = [s + first for s in step.start], [max(0, n - first) for n in step.new]
                if following is not None:
                    target = piece(following, start, new, fill=-100)
                    chosen = log_probs.gather(-1, target.clamp_min(0).unsqueeze(-1)).squeeze(-1)
                    nll = nll - torch.where(target != -100, chosen, 0.0).sum()
                    counted += int((target != -100).sum())
                if log_probs.shape[1] == keep == n_columns and min(new) == keep:
                    logits = log_probs  # one step, no padding: nothing to put together
                else:
                    if logits is None:
                        logits = log_probs.new_zeros(ids.shape[0], keep, log_probs.shape[-1])
                    place(logits, log_probs, start, new, order - (n_columns - keep))
            if step.found is not None:
                place(salience, step.found.salience.detach().float(), step.start, step.new, order)
                place(importance, step.found.importance.detach().float(), step.start, step.new, order)
            if step.report is not None:
                replayed.append(step.report)
        cache.count(ids, lengths)
        cache.wanted_states, cache.hidden_states = False, None
        use_cache = use_cache if use_cache is not None else past_key_values is not None or not self.training
        denominator = kwargs.get("num_items_in_batch")
        denominator = max(counted, 1) if denominator is None else denominator
        real = torch.zeros_like(ids, dtype=torch.bool)
        place(real, torch.ones_like(real), [0] * len(lengths), lengths, order)
        output = HippoFormerOutput(
            loss=None if following is None else nll / denominator,
            logits=logits if logits is not None else torch.zeros(ids.shape[0], keep, self.config.vocab_size),
            past_key_values=cache if use_cache else None,
            hidden_states=None if hidden_states is None else tuple(hidden_states),
            salience_scores=salience if return_salience else None,
            importance_weights=importance if return_salience else None,
            memory_stats=memory_stats(cache, replayed) if return_memory_stats else None,
            drift_stats=dict(cache.drift) if return_memory_stats else None,
            salience_stats=salience_stats(salience[real]) if return_memory_stats else None,
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _prepare(
        self, input_ids: Tensor, attention_mask: Tensor | None, cache: HippoCache | None
    ) -> tuple[Rows, HippoCache]:
        """The rows of a call without padding, and the state that they continue."""
        check_token_ids(input_ids)
        if cache is None:
            cache = self.new_cache(input_ids.shape[0])
        elif isinstance(cache, HippoCache):
            cache.leave_inference_mode()
            cache.follow_model()
        return squeeze_padding(input_ids, attention_mask, cache, self.config.vocab_size, self.device), cache

    # ---------------------------------------------------------------- generation

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *arguments: Any, **options: Any) -> Any:
        """`generate` of transformers, with these promises about a `HippoCache` given as `past_key_values`.

        Afterwards it has read the text returned, but for each row's last token: a row that ended before others is as it
        was then, and after beam search the rows are those of the sequences returned, in their order.

        Args:
            inputs: (R, T) prompt: all that the cache has read since its `new_turn`, and what is new, if anything.
            options: those of transformers; and `reread_tokens`, so many tokens of what fits the new part of the prompt
                are read again before it, in a copy of the cache, by the base alone (see `rereading`). The cache given
                reads the prompt and what was generated, as otherwise.

        Raises:
            InputError: a prompt that is shorter than what the cache has read, or begins with something else; rereading
                without a cache that keeps passages, or with several sequences for a prompt.
        """
        if n_tokens := options.pop("reread_tokens", 0):
            return self._generate_after_rereading(inputs, n_tokens, *arguments, **options)
        generation, cache = _Generation(), options.get("past_key_values")
        token = _GENERATION.set(generation)
        try:
            output = super().generate(inputs, *arguments, **options)  # type: ignore[misc]
        finally:
            _GENERATION.reset(token)
        sequences = output if isinstance(output, Tensor) else output.sequences
        if cache is None and not isinstance(output, Tensor):
            cache = output.past_key_values
        if generation.beams is not None and isinstance(cache, HippoCache):
            cache.become(self._reread(generation.beams, generation, sequences))
        return output

    def _generate_after_rereading(
        self, inputs: Tensor | None, n_tokens: int, *arguments: Any, past_key_values: Any = None, **options: Any
    ) -> Any:
        cache, mask = past_key_values, options.pop("attention_mask", None)
        prompt = inputs if inputs is not None else options.pop("input_ids", None)
        if not isinstance(cache, HippoCache) or prompt is None or prompt.shape[0] != cache.batch_size:
            raise InputError("rereading needs a prompt, and as past_key_values a HippoCache with a row for each prompt")
        mask = torch.ones_like(prompt) if mask is None else mask
        if mask.shape == prompt.shape:  # the whole text; otherwise only what is new
            cache.check_prompt(prompt, mask)
            new, real = prompt[:, cache.columns :], mask[:, cache.columns :]
        else:
            new, real = prompt, mask[:, -prompt.shape[1] :]
        if new.shape[1] == 0:
            raise InputError("nothing is new in this prompt, so nothing says what to read again: give a question")
        with self.memory_off():  # recall would go on in the words of the text that was just found
            copy = reread(cache, new, real, n_tokens)
            before = torch.tensor(copy.lengths)
            output = self.generate(new, *arguments, past_key_values=copy, attention_mask=real, **options)
        sequences = output if isinstance(output, Tensor) else output.sequences
        made = torch.tensor(copy.lengths) - before - real.cpu().sum(1)  # tokens that each row wrote and read
        columns = torch.arange(sequences.shape[1] - new.shape[1] - 1)
        written = (columns < made.unsqueeze(-1)).to(real)
        self.score(sequences[:, :-1], attention_mask=torch.cat((real, written), dim=1), past_key_values=cache)
        return output

    def _reread(self, beams: HippoCache, generation: "_Generation", sequences: Tensor) -> HippoCache:
        """The state of the sequences (S, L) that beam search returned, read behind their prompts up to the last token.

        Args:
            beams: state of all beams when they had read their prompts.
        """
        n_prompts = beams.batch_size // generation.n_beams
        index = torch.arange(n_prompts).repeat_interleave(sequences.shape[0] // n_prompts) * generation.n_beams
        state, new = beams.select_rows(index), sequences[:, generation.n_columns : -1]
        if new.shape[1]:
            ended = torch.isin(new, generation.ends.to(new.device)).cumsum(1) > 0
            self.score(new, attention_mask=(~ended).long(), past_key_values=state)
        return state

    def _prefill(  # type: ignore[override]
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], **options: Any
    ) -> Any:
        """That of transformers, if the prompt is one that the cache has read the beginning of."""
        cache, mask, generation = (
            model_kwargs.get("past_key_values"),
            model_kwargs.get("attention_mask"),
            _GENERATION.get(),
        )
        if generation is not None:
            generation.n_beams, generation.n_columns = generation_config.num_beams, input_ids.shape[1]
        given = getattr(generation_config, "_mask_length", input_ids.shape[1]) if mask is None else mask.shape[1]
        if isinstance(cache, HippoCache) and given == input_ids.shape[1]:  # otherwise only what is new is given
            cache.check_prompt(input_ids, mask)
        if isinstance(cache, HippoCache):
            generation_config.prefill_chunk_size = None  # a call holds no more than a segment anyway
        return super()._prefill(input_ids, generation_config, model_kwargs, **options)  # type: ignore[arg-type, misc]

    def _get_stopping_criteria(self, *arguments: Any, **options: Any) -> StoppingCriteriaList:
        """Those of transformers, which also note which rows have ended."""
        criteria = super()._get_stopping_criteria(*arguments, **options)  # type: ignore[misc]
        generation = _GENERATION.get()
        return criteria if generation is None else _Noted(criteria, generation)

    def _reorder_cache(self, cache: HippoCache, beam_idx: Tensor) -> HippoCache:
        """Called by beam search before each token it reads; first when the prompts alone have been read."""
        generation = _GENERATION.get()
        if generation is not None and generation.beams is None:
            generation.beams = cache.copy()
        cache.reorder_cache(beam_idx)
        return cache

    @torch.no_grad()
    def next_log_probs(self, cache: HippoCache) -> Tensor:
        """(R, V) float32 log-probabilities of each row's next token, after what it has read.

        Raises:
            InputError: a row that has read nothing.
        """
        if min(cache.lengths) == 0:
            raise InputError("a row of this cache has read nothing, so nothing predicts its first token")
        logits = self.window.head(cache.last_output.unsqueeze(1)).float()
        if self._moves(cache):
            logits = logits + cache.memory.marginals.shift.unsqueeze(1)
        log_probs = torch.log_softmax(logits, dim=-1)
        if not self.episodes_on:
            return log_probs.squeeze(1)
        vote = cache.memory.vote
        mixture, nothing = vote.mixture.unsqueeze(1), vote.nothing.unsqueeze(1)
        return mix_distribution(log_probs, mixture, nothing, vote.weights.unsqueeze(1), vote.token).squeeze(1)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """`generate` leaves the cache to `prepare_inputs_for_generation`."""
        return False

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Gives `generate` a HippoCache at its first step, and the cache no token behind the end of a row."""
        if past_key_values is None and kwargs.get("use_cache", True):
            past_key_values = self.new_cache(input_ids.shape[0])
        if next_sequence_length == 0:  # the cache has read the whole prompt
            input_ids, next_sequence_length = input_ids[:, :0], None
        found = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,  # type: ignore[arg-type]
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            **kwargs,
        )
        generation = _GENERATION.get()
        if generation is not None and past_key_values is not None:
            ended = generation.ended if generation.beams is None else None
            if ended is not None and found["input_ids"].shape[1] == 1:
                found["attention_mask"] = (~ended).long().unsqueeze(-1)
        return found

    # ---------------------------------------------------------------- probes

    @torch.no_grad()
    def centre_keys(self) -> None:
        """Fits untrained keys to this base, by the states of its probes (`Recall.centre`).

        Once, before anything is read. The first states of a probe are left out: those of a text's first tokens are
        unlike all others.
        """
        ids = self.hippocampus.drift_calibrator.anchor_ids[:_PROBES]
        hidden = self.hippocampus.normed(self.window.hidden_of(ids.to(self.device).long()).float())
        self.hippocampus.recall.centre(hidden[:, min(_FIRST_TOKENS, ids.shape[1] - 1) :].flatten(0, 1))

    @torch.no_grad()
    def anchors(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """How this model encodes probes (A, L): keys (A L, K) and values (A L, U), float32."""
        self.take_vocabulary()
        recall = self.hippocampus.recall
        hidden = self.hippocampus.normed(
            self.window.hidden_of(ids.to(self.device).long()).to(recall.key_proj.weight.dtype)
        )
        return recall.encode_key(hidden).flatten(0, 1).float(), recall.encode_value(hidden).flatten(0, 1).float()

    # ---------------------------------------------------------------- files and numbers

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **options: Any,
    ) -> None:
        """Writes hippocampus, adapters, config and card (not the base, unless its own weights were trained); see
        `checkpoint`.

        Args:
            is_main_process: False writes nothing, in the other processes of a distributed run.
            state_dict: instead of the model's own, which may be in shards.
            push_to_hub: also upload, to `repo_id` or a repository named like the folder, with the options of
                `push_to_hub`.
            options: others that transformers' models take (shard sizes, file formats) change nothing here.
        """
        folder = Path(save_directory)
        if is_main_process:
            checkpoint.save(self, folder, state_dict)
            checkpoint.write_card(self, folder, folder.name)
        if push_to_hub and is_main_process:
            asked = {name: value for name, value in options.items() if name in _PUSH_OPTIONS}
            self.push_to_hub(repo_id or folder.name, **asked)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:  # type: ignore[override]
        """Uploads what `save_pretrained` writes, with a model card where the repository has none.

        Args:
            options: `commit_message`, `commit_description`, `private`, `token`, `revision`, `create_pr`.

        Returns:
            What the hub says about the commit.

        Raises:
            ConfigurationError: an option that does not exist.
        """
        unknown = sorted(set(options) - _PUSH_OPTIONS)
        if unknown:
            raise ConfigurationError(
                f"push_to_hub does not take {', '.join(unknown)}: expected {sorted(_PUSH_OPTIONS)}"
            )
        return checkpoint.push(self, repo_id, **options)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path | None,
        base_model: PreTrainedModel | None = None,
        *,
        state_dict: dict[str, Tensor] | None = None,
        **options: Any,
    ) -> "HippoFormer":
        """Loads what `save_pretrained` wrote, from a folder or a hub repository, and the base it names; see
        `checkpoint.load`.

        Args:
            state_dict: all of a model's tensors, base included, for a `config` and no name, as in transformers.

        Returns:
            The model; with `output_loading_info` a pair, see `checkpoint.load`.
        """
        if pretrained_model_name_or_path is not None and state_dict is None:
            return checkpoint.load(cls, pretrained_model_name_or_path, base_model, **options)
        config = options.pop("config", None)
        if pretrained_model_name_or_path is not None or state_dict is None or config is None or options:
            raise ConfigurationError(
                "from_pretrained expected the name of a saved model, or None with config= and state_dict= and no other "
                "option than base_model="
            )
        model = cls(config, base_model)
        try:
            model.load_state_dict(state_dict)
        except RuntimeError as error:
            raise CheckpointError(f"the tensors do not fit this config and base: {error}") from error
        return model

    def save_memory(self, cache: HippoCache, path: str | Path) -> None:
        """What `HippoCache.save` does; see `memory_file`."""
        save_memory(self, cache, path)

    def load_memory(self, path: str | Path) -> HippoCache:
        """What `HippoCache.load` does; see `memory_file.load_memory`."""
        return load_memory(self, path)

    def merge_lora(self) -> PreTrainedModel:
        """Makes the adapters part of the base's weights; the model reads on as before, and is saved with its own base.

        Returns:
            The base, an ordinary model of transformers: save it, and train a hippocampus on it with its weights frozen.

        Raises:
            ConfigurationError: no adapters.
        """
        if not self.config.use_lora:
            raise ConfigurationError("this model has no adapters to merge: use_lora is False")
        merge_lora(self.base)
        self.config.use_lora = self.config.freeze_base = False
        return self.base

    def get_num_trainable_params(self) -> int:
        """Number of parameters that training changes."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def get_num_total_params(self) -> int:
        """Number of parameters, base included."""
        return sum(p.numel() for p in self.parameters())

    def reset_memory(self) -> None:
        """Kept from the original's interface: a model holds no memory here, the cache object does.

        Raises:
            InputError: always, naming what to call.
        """
        raise InputError("the memory is in the cache object: call cache.reset(), or start with model.new_cache()")


AutoModelForCausalLM.register(HippoFormerConfig, HippoFormer, exist_ok=True)


def _predicted(cache: HippoCache, ids: Tensor) -> Tensor:
    """(R, N) bool: a row's very first token is predicted by nothing."""
    return (column_of(cache.lengths, ids.device) > 0) | (torch.arange(ids.shape[1], device=ids.device) > 0)


def _fused(log_prob: Tensor, found: StepOutput | None, predicted: Tensor) -> Tensor:
    """(R, N) log p of each token, with what recall had said of it before."""
    if found is None:
        return log_prob
    fused = mix_target(log_prob, found.prior_mixture, found.prior_nothing, found.hit)
    return torch.where(predicted, fused, 0.0)


def _ended(cache: HippoCache, new: list[int]) -> list[int]:
    """The rows that have just come to the end of a segment."""
    return [r for r, n in enumerate(new) if n and cache.lengths[r] % cache.config.segment_len == 0]


_PUSH_OPTIONS = {"commit_message", "commit_description", "private", "token", "revision", "create_pr"}
# Arguments that transformers hands to any model and that have nothing to say here.
_HARMLESS = {"position_ids", "num_items_in_batch", "cache_position", "token_type_ids", "tokenizer"}
# Why others cannot be served.
_NOT_TAKEN = {
    "inputs_embeds": "embeddings name no tokens, and the memory stores and recalls tokens: give input_ids",
    "output_attentions": "a token attends to slots of a window that moves with each segment, so there is no matrix of "
    "all tokens by all tokens: ask the base alone, model.base(input_ids, output_attentions=True)",
}
