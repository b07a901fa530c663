"""HippoFormer: a causal language model with a hippocampus.

One path serves everything. A call is cut into steps, each at most to the end of every row's own segment; a step reads
the base through its window, lets the hippocampus encode and recall, and fuses. Padding is squeezed out first, so rows
of any padding advance by their own tokens. Prefill, chunks, single tokens, scoring and training on text are this one
stream.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from hippoformer.errors import ConfigurationError, InputError, NonFiniteError
from hippoformer.hippocampus.circuit import Hippocampus, MemoryState, StepOutput
from hippoformer.hippocampus.fusion import mix_target
from hippoformer.hippocampus.replay import ReplayReport
from hippoformer.model import checkpoint
from hippoformer.model.adapters import add_lora, check_foreign_adapters, foreign_adapters, merge_lora, unwrap
from hippoformer.model.base_models import load_base_model
from hippoformer.model.cache import HippoCache
from hippoformer.model.configuration import HippoFormerConfig
from hippoformer.model.inputs import Rows, check_token_ids, squeeze_padding
from hippoformer.model.outputs import HippoFormerOutput, Step
from hippoformer.model.statistics import memory_stats, salience_stats
from hippoformer.model.weights import vocabulary_size
from hippoformer.model.window import WindowedBase
from hippoformer.tensors.ragged import column_of, last_of, piece, place


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
            base_model = load_base_model(config.base_model_name)
        base_model = unwrap(base_model)
        text = base_model.config.get_text_config(decoder=True)
        check_foreign_adapters(base_model, config)
        config.base_adapters = foreign_adapters(base_model)
        window = WindowedBase(base_model, config)
        config.vocab_size, config.hidden_size = window.vocab_size, window.hidden_size
        config.num_hidden_layers = window.n_layers
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(text, name, None))
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
        self.generation_config = base_model.generation_config
        self._episodes_on = self._marginals_on = True
        self.eval()

    # ---------------------------------------------------------------- state

    def new_cache(self, batch_size: int = 1) -> HippoCache:
        """The state of `batch_size` rows that have read nothing."""
        if batch_size < 1:
            raise InputError(f"a cache needs at least one row, got batch_size={batch_size}")
        self.take_vocabulary()
        device, dtype = self.device, self.dtype
        memory = MemoryState.empty(batch_size, self.hippocampus.width, self.config, dtype, device)
        last_output = torch.zeros(batch_size, self.config.hidden_size, dtype=dtype, device=device)
        return HippoCache(self.window.new_cache(batch_size, device), memory, last_output, self)

    @contextmanager
    def memory_off(self) -> Iterator[None]:
        """Within it the model is exactly its base with the same window and sinks: nothing is recalled or stored."""
        before, self._marginals_on = self._marginals_on, False
        try:
            with self.episodes_off():
                yield
        finally:
            self._marginals_on = before

    @contextmanager
    def episodes_off(self) -> Iterator[None]:
        """Within it nothing is recalled or stored; marginals, where they are kept, go on moving the predictions."""
        before, self._episodes_on = self._episodes_on, False
        try:
            yield
        finally:
            self._episodes_on = before

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
        return cache.memory.marginals.are_kept and self._marginals_on

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

        def touch(module: nn.Module, args: Any, output: Any) -> Any:
            nonlocal source, prior_log_prob, found
            source = output[0] if isinstance(output, tuple) else output
            prior_log_prob = self._target_log_prob(norm(before), norm(source), ids, predicted)
            found, touched = self._recall(source, prior_log_prob, ids, new, cache)
            return (touched, *output[1:]) if isinstance(output, tuple) else touched

        (layer,) = self.config.memory_layers
        handle = self.window.layer(layer).register_forward_hook(touch)
        try:
            final = self.window.read(cache, ids, cache.lengths, new)
        finally:
            handle.remove()
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
        if not self._episodes_on:
            cache.memory = memory.without_vote(last_of(hidden, new, memory.last_hidden))
            return None, hidden
        found, cache.memory = self.hippocampus.step(memory, cache.lengths, hidden, ids, -log_prob, new)
        heard = (found.mixture, found.recollection.nothing, found.forecast, found.residual)
        if not all(torch.isfinite(part).all() for part in heard if part is not None):
            cache.memory = memory
            raise NonFiniteError("the hippocampus computed NaN or infinity: its weights are damaged, load them again")
        cache.written = True
        return found, hidden if found.residual is None else hidden + found.residual.to(hidden.dtype)

    def _advance(self, cache: HippoCache, new: list[int]) -> ReplayReport | None:
        """Counts the step's tokens, and lets rows that ended a segment sleep."""
        cache.lengths = [done + n for done, n in zip(cache.lengths, new, strict=True)]
        ended = _ended(cache, new)
        if not ended:
            return None
        if self._marginals_on and not cache.frozen:
            marginals = cache.memory.marginals.renewed(torch.tensor(ended, device=self.device), self.config)
            cache.memory = replace(cache.memory, marginals=marginals)
        if not cache.written:
            return None
        frozen = cache.frozen or not self._episodes_on
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
        cache.columns += rows.ids.shape[1]
        return log_probs[:, 1:]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: HippoCache | None = None,
        use_cache: bool | None = None,
        return_salience: bool = False,
        return_memory_stats: bool = False,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> HippoFormerOutput:
        """Reads `input_ids` after whatever the cache has read.

        Args:
            input_ids: (R, T).
            attention_mask: (R, T), or (R, what the cache has read + T); 0 marks padding, on either side.
            labels: (R, T), -100 where not counted; usually input_ids itself. Padding is never counted.
            past_key_values: state to continue, updated in place; None starts anew.
            use_cache: whether the output carries the state.
            return_salience, return_memory_stats: what else the output carries.
            logits_to_keep: only the last so many columns of logits; 0 for all.

        Raises:
            InputError: empty input, ids outside the vocabulary, a mask or labels of a wrong shape, a row that has read
                nothing but padding. NonFiniteError: NaN in what the base computes.
        """
        unknown = sorted(k for k, v in kwargs.items() if k not in _HARMLESS and v is not None and v is not False)
        if unknown:
            raise InputError(f"forward does not take {', '.join(unknown)}: it reads token ids, positions are its own")
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
        for step in self.stream(ids, lengths, cache):
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
        cache.columns += n_columns
        use_cache = use_cache if use_cache is not None else past_key_values is not None or not self.training
        denominator = kwargs.get("num_items_in_batch")
        denominator = max(counted, 1) if denominator is None else denominator
        real = torch.zeros_like(ids, dtype=torch.bool)
        place(real, torch.ones_like(real), [0] * len(lengths), lengths, order)
        return HippoFormerOutput(
            loss=None if following is None else nll / denominator,
            logits=logits if logits is not None else torch.zeros(ids.shape[0], keep, self.config.vocab_size),
            past_key_values=cache if use_cache else None,
            salience_scores=salience if return_salience else None,
            importance_weights=importance if return_salience else None,
            memory_stats=memory_stats(cache, replayed) if return_memory_stats else None,
            drift_stats=dict(cache.drift) if return_memory_stats else None,
            salience_stats=salience_stats(salience[real]) if return_memory_stats else None,
        )

    def _prepare(
        self, input_ids: Tensor, attention_mask: Tensor | None, cache: HippoCache | None
    ) -> tuple[Rows, HippoCache]:
        """The rows of a call without padding, and the state that they continue."""
        check_token_ids(input_ids)
        if cache is None:
            cache = self.new_cache(input_ids.shape[0])
        elif isinstance(cache, HippoCache):
            cache.follow_model()
        return squeeze_padding(input_ids, attention_mask, cache, self.config.vocab_size, self.device), cache

    # ---------------------------------------------------------------- generation

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """`generate` leaves the cache to `prepare_inputs_for_generation`."""
        return False

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, past_key_values: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Gives `generate` a HippoCache at its first step; all else is transformers' own."""
        if past_key_values is None and kwargs.get("use_cache", True):
            past_key_values = self.new_cache(input_ids.shape[0])
        return super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,  # type: ignore[arg-type]
            past_key_values=past_key_values,
            **kwargs,
        )

    # ---------------------------------------------------------------- drift

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
        cls, name_or_path: str | Path, base_model: PreTrainedModel | None = None, **options: Any
    ) -> "HippoFormer":
        """Loads what `save_pretrained` wrote, from a folder or a hub repository, and the base it names; see
        `checkpoint.load`.
        """
        return checkpoint.load(cls, name_or_path, base_model, **options)

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
_HARMLESS = {"position_ids", "return_dict", "num_items_in_batch", "cache_position", "token_type_ids", "tokenizer"}
