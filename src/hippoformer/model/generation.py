"""`generate` of transformers, with promises about the cache: it has read exactly the text returned."""

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, StoppingCriteriaList

from hippoformer.errors import InputError
from hippoformer.model.cache import HippoCache
from hippoformer.model.outputs import CACHE
from hippoformer.model.pretrained import HippoFormerPreTrainedModel
from hippoformer.model.rereading import reread


@dataclass
class GenerationNotes:
    """What one call of `generate` notes."""

    ended: Tensor | None = None  # (R,) bool, rows that are padding from here on; None where no token ends one
    beams: HippoCache | None = None  # in beam search, the state of all beams when they had read their prompts
    n_beams: int = 1  # rows of it a prompt
    n_columns: int = 0  # width of the prompts
    ends: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))  # (K,) tokens that end a row


class _Noted(StoppingCriteriaList):
    """Stopping criteria that note which rows they have ended."""

    def __init__(self, criteria: StoppingCriteriaList, generation: GenerationNotes) -> None:
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


# The call of `generate` that the current thread is in.
GENERATION: ContextVar[GenerationNotes | None] = ContextVar("generation", default=None)


class Generation(HippoFormerPreTrainedModel, GenerationMixin):
    """The part of a HippoFormer that generates. What a call notes lives in a context variable, not on the model."""

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *arguments: Any, **options: Any) -> Any:
        """`generate` of transformers. Afterwards a `HippoCache` given as `past_key_values` has read the text returned,
        but for each row's last token: a row that ended before others is as it was then, and after beam search the rows
        are those of the sequences returned, in their order.

        Args:
            inputs: (R, T) prompt: all that the cache has read since its `new_turn`, and what is new, if anything.
            options: those of transformers; and `reread_tokens`, so many tokens of what fits the new part of the prompt
                are read again before it, in a copy of the cache, by the base alone (see `rereading`). The cache given
                reads the prompt and what was generated, as otherwise.

        Raises:
            InputError: a prompt that is shorter than what the cache has read, or begins with something else; rereading
                without a cache that keeps passages, or with several sequences for a prompt.
        """
        if "past_key_values" in options:
            options[CACHE] = options.pop("past_key_values")
        if n_tokens := options.pop("reread_tokens", 0):
            return self._generate_after_rereading(inputs, n_tokens, *arguments, **options)
        generation, cache = GenerationNotes(), options.get(CACHE)
        token = GENERATION.set(generation)
        try:
            output = super().generate(inputs, *arguments, **options)  # type: ignore[misc]
        finally:
            GENERATION.reset(token)
        sequences = output if isinstance(output, Tensor) else output.sequences
        if cache is None and not isinstance(output, Tensor):
            cache = getattr(output, CACHE)
        if generation.beams is not None and isinstance(cache, HippoCache):
            cache.become(self._reread(generation.beams, generation, sequences))
        return output

    def _generate_after_rereading(self, inputs: Tensor | None, n_tokens: int, *arguments: Any, **options: Any) -> Any:
        cache, mask = options.pop(CACHE, None), options.pop("attention_mask", None)
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

    def _reread(self, beams: HippoCache, generation: GenerationNotes, sequences: Tensor) -> HippoCache:
        """The state of the sequences (S, L) that beam search returned, read from their prompts to the last token."""
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
        cache, mask, generation = model_kwargs.get(CACHE), model_kwargs.get("attention_mask"), GENERATION.get()
        if generation is not None:
            generation.n_beams, generation.n_columns = generation_config.num_beams, input_ids.shape[1]
        given = getattr(generation_config, "_mask_length", input_ids.shape[1]) if mask is None else mask.shape[1]
        if isinstance(cache, HippoCache):
            if given == input_ids.shape[1]:  # otherwise only what is new is given
                cache.check_prompt(input_ids, mask)
            generation_config.prefill_chunk_size = None  # a call holds no more than a segment anyway
        return super()._prefill(input_ids, generation_config, model_kwargs, **options)  # type: ignore[arg-type, misc]

    def _get_stopping_criteria(self, *arguments: Any, **options: Any) -> StoppingCriteriaList:
        """Those of transformers, which also note which rows have ended."""
        criteria = super()._get_stopping_criteria(*arguments, **options)  # type: ignore[misc]
        generation = GENERATION.get()
        return criteria if generation is None else _Noted(criteria, generation)

    def _reorder_cache(self, cache: HippoCache, beam_idx: Tensor) -> HippoCache:
        """Called by beam search before each token it reads; first when the prompts alone have been read."""
        generation = GENERATION.get()
        if generation is not None and generation.beams is None:
            generation.beams = cache.copy()
        cache.reorder_cache(beam_idx)
        return cache

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """`generate` leaves the cache to `prepare_inputs_for_generation`."""
        return False

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Gives `generate` a HippoCache at its first step, and the cache no token behind the end of a row."""
        cache = past_key_values if cache is None else cache
        if cache is None and kwargs.get("use_cache", True):
            cache = self.new_cache(input_ids.shape[0])
        if next_sequence_length == 0:  # the cache has read the whole prompt
            input_ids, next_sequence_length = input_ids[:, :0], None
        kwargs |= {"next_sequence_length": next_sequence_length, CACHE: cache}
        found = super().prepare_inputs_for_generation(input_ids, **kwargs)  # type: ignore[arg-type, misc]
        generation = GENERATION.get()
        if generation is not None and cache is not None:
            ended = generation.ended if generation.beams is None else None
            if ended is not None and found["input_ids"].shape[1] == 1:
                found["attention_mask"] = (~ended).long().unsqueeze(-1)
        return found
