"""HippoFormer: a causal language model with a hippocampus.

One path serves everything. A call is cut into steps, each at most to the end of every row's own segment; a step reads
the base through its window, lets the hippocampus encode and recall, and fuses. Padding is squeezed out first, so rows
of any padding advance by their own tokens. Prefill, chunks, single tokens, scoring and training on text are this one
stream.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel

from hippoformer.configuration import HippoFormerConfig
from hippoformer.errors import CheckpointError, ConfigurationError, InputError, NonFiniteError
from hippoformer.hippocampus.fusion import mix_distribution, mix_target
from hippoformer.hippocampus.hippocampus import BaseReading
from hippoformer.hippocampus.passages import Passages
from hippoformer.model import checkpoint
from hippoformer.model.cache import HippoCache
from hippoformer.model.generation import GENERATION, Generation
from hippoformer.model.inputs import Rows, squeeze_padding
from hippoformer.model.memory_file import load_memory, save_memory
from hippoformer.model.outputs import CACHE, HippoFormerOutput, Step, memory_stats, salience_stats
from hippoformer.ops import column_of, last_of, piece, place, shifted

# Probes that keys are fitted to, and tokens at the beginning of each that are left out.
_PROBES, _FIRST_TOKENS = 16, 4
# Which parts of which model, by its id, are switched off in calls of the current thread.
_SWITCHED_OFF: ContextVar[frozenset[tuple[int, str]]] = ContextVar("switched_off", default=frozenset())
_PUSH_OPTIONS = {"commit_message", "commit_description", "private", "token", "revision", "create_pr"}
# Arguments that transformers hands to any model and that have nothing to say here.
_HARMLESS = {"position_ids", "num_items_in_batch", "cache_position", "token_type_ids", "tokenizer"}
# Why others cannot be served.
_NOT_TAKEN = {
    "inputs_embeds": "embeddings name no tokens, and the memory stores and recalls tokens: give input_ids",
    "output_attentions": "a token attends to slots of a window that moves with each segment, so there is no matrix of "
    "all tokens by all tokens: ask the base alone, model.base(input_ids, output_attentions=True)",
}


class HippoFormer(Generation, GenerationMixin):
    """Any causal language model of transformers with a bounded, learned, persistent memory.

    Args:
        config: every option; `base_model_name` is loaded unless `base_model` is given.
        base_model: a causal language model of transformers to wrap, or a peft model with adapters in its layers; with
            `lora` it gets adapters in place.

    Raises:
        UnsupportedArchitectureError, ConfigurationError, NonFiniteError, BaseModelNotFoundError.
    """

    # ---------------------------------------------------------------- state

    def new_cache(self, batch_size: int = 1) -> HippoCache:
        """The state of `batch_size` rows that have read nothing."""
        if batch_size < 1:
            raise InputError(f"a cache needs at least one row, got batch_size={batch_size}")
        self.take_vocabulary()
        memory = self.hippocampus.empty_state(batch_size, self.dtype, self.device)
        last_output = torch.zeros(batch_size, self.config.hidden_size, dtype=self.dtype, device=self.device)
        passages = None
        if self.spelling is not None and self.config.passage_tokens:
            passages = Passages(batch_size, self.spelling, self.config.passage_tokens)
        return HippoCache(self.window.new_cache(batch_size, self.device), memory, last_output, self, passages)

    @contextmanager
    def _without(self, *parts: str) -> Iterator[None]:
        token = _SWITCHED_OFF.set(_SWITCHED_OFF.get() | {(id(self), part) for part in parts})
        try:
            yield
        finally:
            _SWITCHED_OFF.reset(token)

    def memory_off(self) -> AbstractContextManager[None]:
        """Within it, in this thread, the model is exactly its base with the same window and sinks: nothing is recalled
        or stored.
        """
        return self._without("episodes", "unigram")

    def episodes_off(self) -> AbstractContextManager[None]:
        """Within it, in this thread, nothing is recalled or stored; unigram adaptation, where it is on, goes on."""
        return self._without("episodes")

    @property
    def episodes_on(self) -> bool:
        """False in this thread within `memory_off()` or `episodes_off()`."""
        return (id(self), "episodes") not in _SWITCHED_OFF.get()

    @property
    def unigram_on(self) -> bool:
        """False in this thread within `memory_off()`."""
        return (id(self), "unigram") not in _SWITCHED_OFF.get()

    @property
    def memory(self) -> str:
        """What memory this is: "shipped" with the package, "trained", "untrained", or "off" where nothing is heard."""
        fusion = self.hippocampus.fusion
        if fusion.is_trained:
            shipped = Path(__file__).parents[1] / "pretrained"
            return "shipped" if shipped in Path(self.name_or_path or "").parents else "trained"
        return "off" if fusion.strength == 0 and not self.config.unigram_weight else "untrained"

    def extra_repr(self) -> str:
        """The first line of `repr`."""
        return f"memory={self.memory!r}"

    def _moves(self, cache: HippoCache) -> bool:
        return cache.memory.unigram.are_kept and self.unigram_on

    # ---------------------------------------------------------------- reading

    def stream(self, ids: Tensor, lengths: list[int], cache: HippoCache) -> Iterator[Step]:
        """Reads text, a Step for each piece of a segment; the cache moves along, but for `cache.columns`, which counts
        what calls were given.

        Args:
            ids: (R, L) int64 without padding on the left.
            lengths: real tokens of each row, at most L.
        """
        start, segment_len = [0] * len(lengths), self.config.segment_len
        while any(s < n for s, n in zip(start, lengths, strict=True)):
            new = [
                min(n - s, segment_len - done % segment_len)
                for s, n, done in zip(start, lengths, cache.lengths, strict=True)
            ]
            yield self._step(piece(ids, start, new), start, new, cache)
            start = [s + n for s, n in zip(start, new, strict=True)]

    def _step(self, ids: Tensor, start: list[int], new: list[int], cache: HippoCache) -> Step:
        final, hidden = self.window.read(cache, ids, cache.lengths, new)
        before = cache.memory
        if not torch.isfinite(hidden).all():
            raise NonFiniteError("the base model computed NaN or infinity: check its weights and its precision")
        # A row's very first token is predicted by nothing.
        predicted = column_of(cache.lengths, ids.device) + torch.arange(ids.shape[1], device=ids.device) > 0
        base, prior = self._base_log_probs(final, ids, new, cache, predicted)
        reading, target, found = BaseReading(ids, hidden, prior, cache.lengths, new), prior, None
        ended = reading.ended(self.config.segment_len)
        if self.episodes_on:
            found, cache.memory = self.hippocampus.read(cache.memory, reading, cache.frozen)
            if not all(torch.isfinite(p).all() for p in (found.mixture, found.recollection.nothing, found.forecast)):
                cache.memory = before
                raise NonFiniteError("the hippocampus computed NaN or infinity: its weights are damaged, load others")
            if found.residual is not None:
                final = final + found.residual.to(final.dtype)
                target = self.window.log_prob_of(shifted(cache.last_output, final), ids)
            fused = mix_target(target, found.prior_mixture, found.prior_nothing, found.hit)
            target, cache.written = torch.where(predicted, fused, 0.0), True
            if cache.passages is not None and not cache.frozen:
                cache.passages.append(ids, new, found.salience, start=cache.lengths)
        else:
            cache.memory = self.hippocampus.skip(cache.memory, reading, cache.written)
        shift = cache.memory.unigram.shift
        if ended and self.unigram_on and not cache.frozen:
            unigram = cache.memory.unigram.renewed(torch.tensor(ended, device=self.device), self.config)
            cache.memory = replace(cache.memory, unigram=unigram)
        cache.last_output = last_of(final, new, cache.last_output)
        cache.lengths = reading.done
        self.window.end_segment(cache, cache.lengths, ended)
        shifts = (shift, cache.memory.unigram.shift) if self._moves(cache) else None
        return Step(start, new, base, prior, target, hidden, final, self.window, found, shifts)

    def _base_log_probs(
        self, final: Tensor, ids: Tensor, new: list[int], cache: HippoCache, predicted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(R, N) log p of a step's tokens under the base, and as the row's unigram counts move it; 0 where nothing
        predicts a token. The counts go on, unless the memory is frozen.
        """
        last = cache.memory.last_hidden if self.config.memory_layers == (-1,) else cache.last_output
        states = shifted(last, final)
        if not self._moves(cache):
            log_prob = torch.where(predicted, self.window.log_prob_of(states, ids), 0.0)
            return log_prob, log_prob
        real = torch.arange(ids.shape[1], device=ids.device) < column_of(new, ids.device)
        unigram, counted = cache.memory.unigram, predicted & real
        plain, moved, expected = self.window.moved_log_prob_of(states, ids, unigram.shift, counted)
        if not cache.frozen:
            cache.memory = replace(cache.memory, unigram=unigram.read(ids, counted, expected))
        return torch.where(predicted, plain, 0.0), torch.where(predicted, moved, 0.0)

    @torch.no_grad()
    def score(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, past_key_values: HippoCache | None = None
    ) -> Tensor:
        """Log-probability of every token given the tokens of its row before it.

        Streamed: never more than a segment of logits is held, whatever T.

        Args:
            input_ids: (R, T). attention_mask: (R, T), 1 for real tokens.
            past_key_values: state to continue; it is updated.

        Returns:
            (R, T - 1) float32, entry t - 1 for token t; 0 at padding and at each row's first token.
        """
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
        cache: HippoCache | None = None,
        **kwargs: Any,
    ) -> HippoFormerOutput | tuple[Any, ...]:
        """Reads `input_ids` after whatever the cache has read.

        Args:
            input_ids: (R, T).
            attention_mask: (R, T), or (R, what the cache has read + T); 0 marks padding, on either side.
            labels: (R, T), -100 where not counted; usually input_ids itself. Padding is never counted.
            past_key_values: state to continue, updated in place; None starts anew. cache: the same, in the words of
                transformers from 5.24 on.
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
        past_key_values = past_key_values if cache is None else cache
        kwargs["output_attentions"] = kwargs.get("output_attentions", self.config.output_attentions)
        unknown = sorted(k for k, v in kwargs.items() if k not in _HARMLESS and v is not None and v is not False)
        if unknown:
            reasons = [_NOT_TAKEN.get(name, "it reads token ids, positions are its own") for name in unknown]
            raise InputError(f"forward does not take {', '.join(unknown)}: {'; '.join(dict.fromkeys(reasons))}")
        if input_ids is None:
            raise InputError("forward was given no input_ids: expected token ids of shape (rows, tokens)")
        if past_key_values is not None and input_ids.shape[1:] == (0,) and GENERATION.get() is not None:
            log_probs = self.next_log_probs(past_key_values)  # the whole prompt has been read already
            state: dict[str, Any] = {CACHE: past_key_values}
            return HippoFormerOutput(logits=log_probs.unsqueeze(1), **state)
        rows, cache = self._prepare(input_ids, attention_mask, past_key_values)
        following = None if labels is None else rows.following(labels, self.config.vocab_size)
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        cache.wanted_states = output_hidden_states
        n_columns, order = rows.ids.shape[1], rows.order
        keep = n_columns if logits_to_keep == 0 or following is not None else min(logits_to_keep, n_columns)
        # Of each row, how many real tokens come before the kept columns.
        skipped = (rows.real & (order < n_columns - keep)).sum(1).tolist()
        salience, importance = (torch.zeros_like(rows.ids, dtype=torch.float) for _ in range(2))
        logits: Tensor | None = None
        hidden_states: tuple[Tensor | None, ...] | None = None
        nll, counted, replayed = salience.new_zeros(()), 0, 0
        for step in self.stream(rows.ids, rows.lengths, cache):
            if cache.hidden_states is not None:
                if hidden_states is None:
                    hidden_states = tuple(
                        None if part is None else part.new_zeros(*rows.ids.shape, part.shape[-1])
                        for part in cache.hidden_states
                    )
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
                        logits = log_probs.new_zeros(len(order), keep, log_probs.shape[-1])
                    place(logits, log_probs, start, new, order - (n_columns - keep))
            if step.found is not None and (return_salience or return_memory_stats):
                place(salience, step.found.salience.detach().float(), step.start, step.new, order)
                place(importance, step.found.importance.detach().float(), step.start, step.new, order)
                replayed += 0 if step.found.replayed is None else int(step.found.replayed.sum())
        cache.count(rows.ids, rows.lengths)
        cache.wanted_states, cache.hidden_states = False, None
        use_cache = use_cache if use_cache is not None else past_key_values is not None or not self.training
        denominator = kwargs.get("num_items_in_batch")
        state = {CACHE: cache if use_cache else None}
        output = HippoFormerOutput(
            loss=None if following is None else nll / (max(counted, 1) if denominator is None else denominator),
            logits=logits if logits is not None else salience.new_zeros(len(order), keep, self.config.vocab_size),
            **state,
            hidden_states=hidden_states,
            salience_scores=salience if return_salience else None,
            importance_weights=importance if return_salience else None,
            memory_stats=memory_stats(cache, replayed) if return_memory_stats else None,
            drift_stats=dict(cache.drift) if return_memory_stats else None,
            salience_stats=salience_stats(salience.gather(1, order)[rows.real]) if return_memory_stats else None,
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _prepare(self, input_ids: Tensor, mask: Tensor | None, cache: HippoCache | None) -> tuple[Rows, HippoCache]:
        """The rows of a call without padding, and the state that they continue."""
        if cache is None:
            cache = self.new_cache(*input_ids.shape[:1])
        elif isinstance(cache, HippoCache):
            cache.leave_inference_mode()
            cache.follow_model()
        return squeeze_padding(input_ids, mask, cache, self.config.vocab_size, self.device), cache

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
            logits = logits + cache.memory.unigram.shift.unsqueeze(1)
        log_probs = torch.log_softmax(logits, dim=-1)
        if not self.episodes_on:
            return log_probs.squeeze(1)
        vote = cache.memory.vote
        mixture, nothing = vote.mixture.unsqueeze(1), vote.nothing.unsqueeze(1)
        return mix_distribution(log_probs, mixture, nothing, vote.weights.unsqueeze(1), vote.token).squeeze(1)

    @torch.no_grad()
    def centre_keys(self) -> None:
        """Fits untrained keys to this base, by the states of its probes (`Recall.centre`).

        Once, before anything is read. The first states of a probe are left out: those of a text's first tokens are
        unlike all others.
        """
        ids = self.hippocampus.drift_calibrator.anchor_ids[:_PROBES]
        hidden = self.hippocampus.normed(self.window.hidden_of(ids.to(self.device).long()).float())
        self.hippocampus.recall.centre(hidden[:, min(_FIRST_TOKENS, ids.shape[1] - 1) :].flatten(0, 1))

    # ---------------------------------------------------------------- files

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
        if not is_main_process:
            return
        folder = Path(save_directory)
        checkpoint.save(self, folder, state_dict)
        checkpoint.write_card(self, folder, folder.name)
        if push_to_hub:
            asked = {name: value for name, value in options.items() if name in _PUSH_OPTIONS}
            self.push_to_hub(repo_id or folder.name, **asked)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:  # type: ignore[override]
        """Uploads what `save_pretrained` writes, with a model card where the repository has none.

        Args:
            options: `commit_message`, `commit_description`, `private`, `token`, `revision`, `create_pr`; no others.

        Returns:
            What the hub says about the commit.
        """
        if unknown := sorted(options.keys() - _PUSH_OPTIONS):
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


AutoModelForCausalLM.register(HippoFormerConfig, HippoFormer, exist_ok=True)
