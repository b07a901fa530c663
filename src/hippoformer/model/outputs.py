"""What reading gives: the output of a call, of one step of the stream, and numbers about both."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from hippoformer.hippocampus.fusion import mix_distribution
from hippoformer.hippocampus.hippocampus import StepOutput
from hippoformer.model.cache import HippoCache
from hippoformer.model.window import WindowedBase

# transformers renames the cache in 5.24, as an argument of its models and of `generate` and in what they return.
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


@dataclass
class HippoFormerOutput(CausalLMOutputWithPast):
    """What `HippoFormer.forward` returns.

    Attributes:
        loss: mean -log p of the labels, or None without labels.
        logits: (R, T, V) float32 normalised log-probabilities of the fused distribution; 0 at padding.
        past_key_values: the state, when `use_cache`; in transformers from 5.24 on also `cache`.
        hidden_states: the base's, with `output_hidden_states`: of the embeddings and of every layer (the last after the
            final norm, and before a residual that enters there), each (R, T, D); 0 at padding.
        salience_scores: (R, T) salience of the transition into each token, with `return_salience`.
        importance_weights: (R, T) priorities the transitions were stored with, with `return_salience`.
        memory_stats, drift_stats, salience_stats: dictionaries of numbers, with `return_memory_stats`.
    """

    hidden_states: tuple[Tensor | None, ...] | None = None  # type: ignore[assignment]
    salience_scores: Tensor | None = None
    importance_weights: Tensor | None = None
    memory_stats: dict[str, Any] | None = None
    drift_stats: dict[str, Any] | None = None
    salience_stats: dict[str, Any] | None = None


@dataclass
class Step:
    """One step of the stream, in the rows' own tokens.

    Attributes:
        start: tokens of this call each row had read before the step. new: tokens it reads in it.
        base_log_prob: (R, N) log-probability of the step's tokens under the base; 0 for a row's very first token.
        prior_log_prob: (R, N) the same as the row's unigram counts move it: what the hippocampus read.
        target_log_prob: (R, N) the same, fused with recall.
        hidden: (R, N, n D) what the hippocampus read: hidden states that no recollection has touched.
        output: (R, N, D) the final hidden states, which the residual has touched. window: whose head reads them.
        found: what the hippocampus found, or None with memory off.
        shifts: (R, V) what unigram adaptation adds to the logits after the step's tokens, and after the last token of
            a row that ended a segment with it; None where it is off.
    """

    start: list[int]
    new: list[int]
    base_log_prob: Tensor
    prior_log_prob: Tensor
    target_log_prob: Tensor
    hidden: Tensor
    output: Tensor
    window: WindowedBase
    found: StepOutput | None
    shifts: tuple[Tensor, Tensor] | None

    def log_probs(self, first: int) -> Tensor:
        """(R, N - first, V) fused distribution after each token of the step, from token `first` on."""
        logits = self.window.head(self.output[:, first:]).float()
        if self.shifts is not None:
            within, after = self.shifts
            last = torch.tensor(self.new, device=logits.device).unsqueeze(-1) - 1
            is_last = torch.arange(first, first + logits.shape[1], device=logits.device) == last
            logits = logits + torch.where(is_last.unsqueeze(-1), after.unsqueeze(1), within.unsqueeze(1))
        log_probs = torch.log_softmax(logits, dim=-1)
        if self.found is None:
            return log_probs
        nothing, weights = self.found.recollection.nothing[:, first:], self.found.recollection.weights[:, first:]
        return mix_distribution(log_probs, self.found.mixture[:, first:], nothing, weights, self.found.token)


def memory_stats(cache: HippoCache, reactivated: int) -> dict[str, Any]:
    """State of the store after a call, means over all rows, for `return_memory_stats` and for logs.

    Returns:
        utilisation (share of `buffer_size`), stored (episodes per row), mean priority, effective priority and age of
        stored episodes (0 for an empty store), `reactivated` by replay in this call, and bytes of state.
    """
    n_stored = cache.config.buffer_size
    store = cache.memory.episodes.slots(0, n_stored)
    n_valid = store.valid.sum().clamp_min(1)
    of_episodes = {
        "mean_priority": store.priority,
        "mean_effective_priority": store.effective_priority(cache.config.decay),
        "mean_age": store.age,
    }
    return {
        "stored": store.valid.sum(-1).tolist(),
        "utilisation": float(store.valid.float().mean()) if n_stored else 0.0,
        **{name: float(torch.where(store.valid, of, 0.0).sum() / n_valid) for name, of in of_episodes.items()},
        "reactivated": reactivated,
        "window_nbytes": cache.window_nbytes,
        "memory_nbytes": cache.memory_nbytes,
    }


def salience_stats(salience: Tensor) -> dict[str, float]:
    """Mean, standard deviation and tagged share (above 0.5) of the salience of real tokens, a flat tensor."""
    return {
        "mean": float(salience.mean()),
        "std": float(salience.std(unbiased=False)),
        "tagged_share": float((salience > 0.5).float().mean()),
    }
