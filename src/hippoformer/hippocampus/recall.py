"""Recall: what each token retrieves, by attention over the episodes, each query with its own weights.

Score of episode e for query q, per head h:

    scale_h cos(q, k_e) + rho_h log(effective priority_e x strength_e),        null_h(q) for recalling nothing

A softmax over all of them gives the recollection. Recall runs forward in time (temporal contiguity, Howard & Kahana
2002): what the token before recalled makes its successor in the text likelier now,

    a_t(e)  <-  a_t(e) (1 + kappa_h a_{t-1}(e - 1)),  normalised,

a second pass that needs no loop. A learned mixture over heads, its weights made from the query, gives one distribution.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from hippoformer.hippocampus.episodes import Episodes
from hippoformer.model.configuration import HippoFormerConfig

# Queries whose scores exist at once without gradients.
_QUERY_BLOCK = 16


@dataclass
class Recollection:
    """What N queries recalled.

    Attributes:
        weights: (R, N, E) attention on each episode, summed over the mixture of heads.
        nothing: (R, N) mass on the null slot; weights.sum(-1) + nothing == 1.
        content: (R, N, U) recalled value; None where there is no residual read-out to hear it.
        peak: (R, N) largest single weight.
    """

    weights: Tensor
    nothing: Tensor
    content: Tensor | None
    peak: Tensor

    def since(self, first: int) -> "Recollection":
        """That of the queries from `first` on."""
        content = None if self.content is None else self.content[:, first:]
        return Recollection(self.weights[:, first:], self.nothing[:, first:], content, self.peak[:, first:])


class Recall(nn.Module):
    """Encodes keys, values and queries, and retrieves. Parameters only; the episodes are handed in."""

    def __init__(self, hidden_size: int, config: HippoFormerConfig) -> None:
        super().__init__()
        heads = config.recall_n_heads
        self.with_content = config.residual_readout
        self.n_heads, self.head_dim, self.top_k = heads, config.recall_head_dim, config.recall_top_k
        self.query_proj = nn.Linear(hidden_size, config.key_dim, bias=False)
        self.key_proj = nn.Linear(hidden_size, config.key_dim, bias=False)
        self.value_proj = nn.Linear(hidden_size, config.recall_value_dim, bias=False)
        self.null_proj = nn.Linear(hidden_size, heads)
        self.head_mixture = nn.Linear(hidden_size, heads)
        # From a head that recalls the gist (what words this text uses) to one that recalls exact repetitions.
        self.log_scale = nn.Parameter(torch.linspace(1.0, 3.2, heads))
        self.priority_weight = nn.Parameter(torch.ones(heads))
        self.log_contiguity = nn.Parameter(torch.linspace(0.0, 3.0, heads))
        # Similar queries and keys from the start: an episode is found by the state that is like the one that made it.
        with torch.no_grad():
            self.query_proj.weight.copy_(self.key_proj.weight)
            nn.init.zeros_(self.null_proj.weight)
            nn.init.constant_(self.null_proj.bias, 8.0)
            nn.init.zeros_(self.head_mixture.weight)

    def encode_key(self, hidden: Tensor) -> Tensor:
        """(R, N, D) -> (R, N, K), unit length per head."""
        return self.unit_heads(self.key_proj(hidden))

    def encode_value(self, hidden: Tensor) -> Tensor:
        """(R, N, D) -> (R, N, U)."""
        return self.value_proj(hidden)

    def unit_heads(self, projected: Tensor) -> Tensor:
        """(..., K) -> (..., K), unit length per head; zero stays zero."""
        return normalize(projected.unflatten(-1, (self.n_heads, self.head_dim)), dim=-1).flatten(-2)

    def forward(
        self, hidden: Tensor, episodes: Episodes, mass: Tensor, visible: Tensor, n_shared: int = 0
    ) -> Recollection:
        """Retrieves for every query.

        Args:
            hidden: (R, N, D), queries; consecutive tokens, so that query i-1 is the step before query i.
            episodes: E slots.
            mass: (R, E) effective priority x strength.
            visible: (R, N, E) bool, episodes each query may recall.
            n_shared: so many slots in front are visible to all queries or to none, which saves looking at each.

        Returns:
            The recollection, in float32. The first query has no step before it and gets no contiguity bonus.
        """
        query = self.unit_heads(self.query_proj(hidden)) * self.log_scale.exp().repeat_interleave(self.head_dim)
        query = query.unflatten(-1, (self.n_heads, self.head_dim)).transpose(1, 2)  # (R, H, N, K/H)
        key = episodes.key.unflatten(-1, (self.n_heads, self.head_dim)).permute(0, 2, 3, 1)  # (R, H, K/H, E)
        bias = self.priority_weight[:, None, None] * mass.clamp_min(1e-6).log()[:, None, None, :]  # (R, H, 1, E)
        null = self.null_proj(hidden).transpose(1, 2)  # (R, H, N)
        mixture = torch.softmax(self.head_mixture(hidden), dim=-1).transpose(1, 2)  # (R, H, N)
        follows = (episodes.position[:, 1:] == episodes.position[:, :-1] + 1) & (
            episodes.position[:, :-1] >= 0
        )  # (R, E-1)
        if torch.is_grad_enabled() or 0 < self.top_k < key.shape[-1]:
            weights, nothing = self._attend(query.to(key.dtype), key, bias, null, mixture, follows, visible)
        else:
            bias[..., :n_shared].masked_fill_(~visible[:, None, :1, :n_shared], -torch.inf)
            weights, nothing = self._attend_in_blocks(
                query.to(key.dtype), key, bias, null, mixture, follows, ~visible[..., n_shared:]
            )
        content = None
        if self.with_content:
            content = (weights.to(episodes.value.dtype) @ episodes.value).float()
        return Recollection(weights, nothing, content, weights.amax(-1))

    def _attend(
        self, query: Tensor, key: Tensor, bias: Tensor, null: Tensor, mixture: Tensor, follows: Tensor, visible: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Weights (R, N, E) and null mass (R, N), with gradients."""
        score = ((query @ key).float() + bias).masked_fill(~visible.unsqueeze(1), -torch.inf)  # (R, H, N, E)
        if 0 < self.top_k < score.shape[-1]:
            lowest = score.topk(self.top_k, dim=-1).values[..., -1:]
            score = score.masked_fill(score < lowest, -torch.inf)
        first = torch.softmax(torch.cat((null.unsqueeze(-1), score), dim=-1), dim=-1)  # slot 0 is the null
        # Of query i-1, on the slot whose successor is weighed.
        led = torch.zeros_like(first)
        led[:, :, 1:, 2:] = first[:, :, :-1, 1:-1] * follows[:, None, None, :]
        second = first * (1.0 + self.log_contiguity.exp()[:, None, None] * led)
        second = second * (mixture / second.sum(-1)).unsqueeze(-1)
        total = second.sum(1)
        return total[..., 1:], total[..., 0]

    def _attend_in_blocks(
        self, query: Tensor, key: Tensor, bias: Tensor, null: Tensor, mixture: Tensor, follows: Tensor, hidden: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same numbers without gradients: a few queries at a time, so that all scores stay in the processor's
        cache. `hidden` (R, N, S) masks the last S slots; what no query sees before them has a bias of -inf.
        """
        n_rows, n_heads, n_queries, _ = query.shape
        n_slots = key.shape[-1]
        weights = torch.empty(n_rows, n_queries, n_slots, device=query.device)
        nothing = torch.empty(n_rows, n_queries, device=query.device)
        score = torch.empty(n_heads, min(n_queries, _QUERY_BLOCK), n_slots + 1, device=query.device)
        boost = self.log_contiguity.exp()[:, None, None] * follows.unsqueeze(1).unsqueeze(1)
        for row in range(n_rows):
            # (H, K/H, E), copied into that order where many queries share the copy.
            keys = key[row].contiguous() if n_queries > _QUERY_BLOCK else key[row]
            carried: Tensor | None = None
            for low in range(0, n_queries, _QUERY_BLOCK):
                block = slice(low, min(low + _QUERY_BLOCK, n_queries))
                if n_queries > _QUERY_BLOCK:
                    similar = query[row, :, block] @ keys  # (H, n, E)
                else:
                    similar = (keys.transpose(1, 2) @ query[row, :, block].transpose(1, 2)).transpose(1, 2)
                here = score[:, : block.stop - low]
                here[..., 0] = null[row, :, block]
                torch.add(similar, bias[row], out=here[..., 1:])
                here[..., 1 + n_slots - hidden.shape[-1] :].masked_fill_(hidden[row, block], -torch.inf)
                first = torch.softmax(here, dim=-1)  # (H, n, E + 1), slot 0 is the null
                led = first[..., 1:-1] * boost[row]  # (H, n, E - 1), of the query before, for the successors
                if first.shape[1] > 1:
                    first[:, 1:, 2:].addcmul_(first[:, 1:, 2:], led[:, :-1])
                if carried is not None:
                    first[:, :1, 2:].addcmul_(first[:, :1, 2:], carried)
                carried = led[:, -1:]
                share = mixture[row, :, block] / first.sum(-1)  # (H, n)
                total = first[0].mul_(share[0].unsqueeze(-1))
                for head in range(1, n_heads):
                    total.addcmul_(first[head], share[head].unsqueeze(-1))
                weights[row, block], nothing[row, block] = total[:, 1:], total[:, 0]
        return weights, nothing
