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


@dataclass
class Recollection:
    """What N queries recalled.

    Attributes:
        weights: (R, N, E) attention on each episode, summed over the mixture of heads.
        nothing: (R, N) mass on the null slot; weights.sum(-1) + nothing == 1.
        content: (R, N, U) recalled value.
        peak: (R, N) largest single weight.
    """

    weights: Tensor
    nothing: Tensor
    content: Tensor
    peak: Tensor

    def since(self, first: int) -> "Recollection":
        """That of the queries from `first` on."""
        return Recollection(*(part[:, first:] for part in (self.weights, self.nothing, self.content, self.peak)))


class Recall(nn.Module):
    """Encodes keys, values and queries, and retrieves. Parameters only; the episodes are handed in."""

    def __init__(self, hidden_size: int, config: HippoFormerConfig) -> None:
        super().__init__()
        heads = config.recall_n_heads
        self.n_heads, self.head_dim, self.top_k = heads, config.recall_head_dim, config.recall_top_k
        self.decay_rate = config.decay_rate
        self.query_proj = nn.Linear(hidden_size, config.key_dim, bias=False)
        self.key_proj = nn.Linear(hidden_size, config.key_dim, bias=False)
        self.value_proj = nn.Linear(hidden_size, config.recall_value_dim, bias=False)
        self.null_proj = nn.Linear(hidden_size, heads)
        self.head_mixture = nn.Linear(hidden_size, heads)
        self.log_scale = nn.Parameter(torch.full((heads,), 2.5))
        self.priority_weight = nn.Parameter(torch.ones(heads))
        self.log_contiguity = nn.Parameter(torch.zeros(heads))
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

    def forward(self, hidden: Tensor, episodes: Episodes, visible: Tensor) -> Recollection:
        """Retrieves for every query.

        Args:
            hidden: (R, N, D), queries; consecutive tokens, so that query i-1 is the step before query i.
            episodes: E slots.
            visible: (R, N, E) bool, episodes each query may recall.

        Returns:
            The recollection, in float32. The first query has no step before it and gets no contiguity bonus.
        """
        query = self.unit_heads(self.query_proj(hidden)) * self.log_scale.exp().repeat_interleave(self.head_dim)
        query = query.unflatten(-1, (self.n_heads, self.head_dim)).transpose(1, 2)  # (R, H, N, K/H)
        key = episodes.key.unflatten(-1, (self.n_heads, self.head_dim)).transpose(1, 2)  # (R, H, E, K/H)
        mass = episodes.effective_priority(self.decay_rate) * episodes.strength
        bias = self.priority_weight[:, None, None] * mass.clamp_min(1e-6).log()[:, None, None, :]  # (R, H, 1, E)
        score = (query.to(key.dtype) @ key.transpose(-1, -2)).float() + bias  # (R, H, N, E)
        score = score.masked_fill(~visible.unsqueeze(1), -torch.inf)
        if 0 < self.top_k < score.shape[-1]:
            lowest = score.topk(self.top_k, dim=-1).values[..., -1:]
            score = score.masked_fill(score < lowest, -torch.inf)
        null = self.null_proj(hidden).transpose(1, 2)  # (R, H, N)

        weights = torch.softmax(torch.cat((score, null.unsqueeze(-1)), dim=-1), dim=-1)
        weights = self._favour_successors(weights, episodes)
        mixture = torch.softmax(self.head_mixture(hidden), dim=-1)  # (R, N, H)
        weights = torch.einsum("rhne,rnh->rne", weights, mixture)
        weights, nothing = weights[..., :-1], weights[..., -1]
        content = (weights.to(episodes.value.dtype) @ episodes.value).float()
        return Recollection(weights, nothing, content, weights.amax(-1))

    def _favour_successors(self, weights: Tensor, episodes: Episodes) -> Tensor:
        """The second pass: (R, H, N, E+1) -> same shape, normalised again."""
        position = episodes.position
        follows = (position[:, 1:] == position[:, :-1] + 1) & (position[:, :-1] >= 0)  # slot e+1 continues slot e
        before = weights[:, :, :-1, :-2] * follows[:, None, None, :]  # of query i-1, on slot e
        bonus = self.log_contiguity.exp()[:, None, None] * before
        later, first = weights[:, :, 1:], weights[:, :, :1]
        later = torch.cat((later[..., :1], later[..., 1:-1] * (1.0 + bonus), later[..., -1:]), dim=-1)
        later = later / later.sum(-1, keepdim=True)
        return torch.cat((first, later), dim=2)
