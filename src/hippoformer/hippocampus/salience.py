"""The salience gate: which transitions are worth keeping? (the sharp-wave ripple's tag)

Two pathways look at the transition s -> s+1 once s+1 has been read: a local MLP on both hidden states and on how
surprising the token was, and a global causal attention of s+1 over everything the row remembers at that moment. A
learned weight mixes them, a causal convolution smooths the result over time, a learned threshold centres it:

    forecast = smooth(w local + (1 - w) global) - threshold + v log((1 - p) / p)
    salience = sigmoid(forecast - tagging threshold)

The forecast is trained to be the log-odds of usefulness, the credit a memory later earns (see losses), not of easiness.
Few memories are ever asked for, so honest odds are low; the tagging threshold, set once by what the measured documents
were forecast, lets the target share of all transitions be tagged. Plain surprise,
with p the probability that the base gave the token, is a strong rule of its own: it enters as an expert whose log-odds
add to those of the pathways (a product of experts, Hinton 2002), with a learned weight v.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from hippoformer.configuration import HippoFormerConfig
from hippoformer.hippocampus.episodes import Episodes
from hippoformer.ops import project

_LEAST_SURPRISE, _MOST_SURPRISE = 1e-4, 30.0
# Width of the local pathway; tokens of the causal smoothing kernel.
_WIDTH, SMOOTHED = 128, 2


class SalienceGate(nn.Module):
    """Salience of each transition, in [0, 1]. Parameters only.

    Args:
        hidden_size: D of the base model.
        config: `recall_*` options: the global pathway reads the episodes' keys and values, and is not there without
            values.
    """

    def __init__(self, hidden_size: int, config: HippoFormerConfig) -> None:
        super().__init__()
        self.n_heads, self.head_dim = config.recall_n_heads, config.recall_head_dim
        self.has_global = config.recall_value_dim > 0
        self.local_norm = nn.LayerNorm(2 * hidden_size)
        self.local_in = nn.Linear(2 * hidden_size + 1, _WIDTH)
        self.local_out = nn.Linear(_WIDTH, 1)
        if self.has_global:
            self.global_query = nn.Linear(hidden_size, config.key_dim, bias=False)
            self.global_out = nn.Linear(self.n_heads * config.recall_value_dim, 1)
        self.pathway_weight = nn.Parameter(torch.zeros(()))
        self.smoothing = nn.Parameter(torch.zeros(SMOOTHED))
        self.threshold = nn.Parameter(torch.zeros(()))
        self.surprise_weight = nn.Parameter(torch.ones(()))
        self.tagging_threshold: Tensor
        self.register_buffer("tagging_threshold", torch.zeros(()))
        with torch.no_grad():
            self.smoothing[-1] = 1.0  # starts as the identity on the present token
            if self.has_global:  # starts silent: it is trained after the local one
                nn.init.zeros_(self.global_out.weight)
                nn.init.zeros_(self.global_out.bias)

    def forward(
        self,
        before: Tensor,
        after: Tensor,
        surprise: Tensor,
        episodes: Episodes,
        visible: Tensor,
        recent: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Forecasts for N transitions of each row: log-odds that each will be useful.

        Args:
            before, after: (R, N, D) hidden states at s and s+1.
            surprise: (R, N) -log p(x_{s+1}) of the base model, nats.
            episodes: what the row remembers.
            visible: (R, N, E) bool, episodes complete before s+1.
            recent: (R, SMOOTHED - 1) unsmoothed logits of the transitions before these.

        Returns:
            (R, N) forecasts, and (R, SMOOTHED - 1 + N) the unsmoothed ones with `recent` in front, for the state.
        """
        weight = torch.sigmoid(self.pathway_weight)
        raw = weight * self._local(before, after, surprise)
        if self.has_global:
            raw = raw + (1.0 - weight) * self._global(after, episodes, visible)
        return self._logit(raw, surprise, recent)

    def at_a_glance(self, before: Tensor, after: Tensor, surprise: Tensor) -> Tensor:
        """The forecasts (R, N) of `forward` as the local pathway alone would have them, at the beginning of a text."""
        raw = torch.sigmoid(self.pathway_weight) * self._local(before, after, surprise)
        return self._logit(raw, surprise, raw.new_zeros(raw.shape[0], SMOOTHED - 1))[0]

    def _logit(self, raw: Tensor, surprise: Tensor, recent: Tensor) -> tuple[Tensor, Tensor]:
        extended = torch.cat((recent, raw), dim=-1)
        smooth = extended.unfold(-1, SMOOTHED, 1) @ self.smoothing
        return smooth - self.threshold + self.surprise_weight * surprise_odds(surprise.float()), extended

    def _local(self, before: Tensor, after: Tensor, surprise: Tensor) -> Tensor:
        both = torch.cat((before, after), dim=-1)
        # A GPU normalises only in the dtype of the weights.
        both = self.local_norm(both.to(self.local_norm.weight.dtype)).to(both.dtype)
        both = torch.cat((both, (surprise.unsqueeze(-1) / 10.0).to(both.dtype)), dim=-1)
        local = project(self.local_in, both).to(self.local_out.weight.dtype)
        return self.local_out(torch.nn.functional.gelu(local)).squeeze(-1)

    def _global(self, after: Tensor, episodes: Episodes, visible: Tensor) -> Tensor:
        query = (
            project(self.global_query, after).unflatten(-1, (self.n_heads, self.head_dim)).transpose(1, 2)
        )  # (R, G, N, d)
        key = episodes.key.unflatten(-1, (self.n_heads, self.head_dim)).transpose(1, 2)  # (R, G, E, d)
        value = episodes.value.unsqueeze(1).expand(-1, self.n_heads, -1, -1)  # (R, G, E, U)
        # A softmax over nothing is NaN: such a query looks at any slot, and what it saw is dropped.
        sees = visible.any(-1, keepdim=True)  # (R, N, 1)
        mask = (visible | ~sees).unsqueeze(1)
        seen = scaled_dot_product_attention(query.to(key.dtype), key, value, attn_mask=mask, scale=1.0)
        seen = seen.transpose(1, 2).flatten(-2).to(self.global_out.weight.dtype)  # (R, N, G U)
        return self.global_out(torch.where(sees, seen, 0.0)).squeeze(-1)


def surprise_odds(surprise: Tensor) -> Tensor:
    """log((1 - p) / p) of surprises -log p (nats), within what float32 can tell from 0 and 1."""
    return torch.log(torch.expm1(surprise.clamp(_LEAST_SURPRISE, _MOST_SURPRISE)))


def last_of_each_row(sequence: Tensor, lengths: Tensor, count: int) -> Tensor:
    """The `count` entries that end at each row's length: (R, count + N), (R,) -> (R, count).

    Entry j of the sequence is `count` steps ahead of token j, so a row of length 0 keeps its old entries.
    """
    index = lengths.unsqueeze(-1) + torch.arange(count, device=lengths.device)
    return pad(sequence, (0, 1)).gather(-1, index)
