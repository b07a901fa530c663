"""Recall: what each token retrieves, by attention over the episodes, each query with its own weights.

Score of episode e for query q, per head h:

    scale_h cos(q, k_e) + rho_h log(effective priority_e),        null_h(q) for recalling nothing

A softmax over all of them gives the attention a_h; a learned mixture over heads, its weights m_h made from the query,
gives one distribution r' = sum_h m_h a_h. `continuation` then moves a part of it to what continues a verbatim match.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from hippoformer.configuration import HippoFormerConfig
from hippoformer.errors import InputError
from hippoformer.hippocampus.continuation import (
    follow,
    longest_matches,
    match_lengths,
    predicted_words,
    text_before,
)
from hippoformer.hippocampus.episodes import Episodes
from hippoformer.ops import project

# Queries whose scores exist at once without gradients: few, so that they stay near a processor.
_QUERY_BLOCK = 64
# At the start of training a match goes on after 1, 4, 12 common tokens with probability 0.02, 0.5, 0.97.
_FIRST_MATCH, _MATCH_WEIGHT = -4.0, 3.0
# Scale of the untrained heads, and score of their null, that of a cosine of 0.75 (docs/notebook/bases.md).
_SCALE, _NULL = 20.0, 15.0
# Part of the mean deviation that is added to each component's before dividing by its root.
_LEAST_DEVIATION = 0.1


@dataclass
class Recollection:
    """What N queries recalled.

    Attributes:
        weights: (R, N, E) attention on each episode, summed over the mixture of heads.
        nothing: (R, N) mass on the null slot; weights.sum(-1) + nothing == 1.
        content: (R, N, U) recalled value; None without the residual read-out.
        peak: (R, N) largest single weight.
        matched: (R, N, E) int16, how many tokens in a row, up to the query's own, each episode continues.
        followed: (R, N) in [0, 1], the part of the weights that was moved to what continues a match.
    """

    weights: Tensor
    nothing: Tensor
    content: Tensor | None
    peak: Tensor
    matched: Tensor
    followed: Tensor


class Recall(nn.Module):
    """Encodes keys, values and queries, and retrieves. Parameters only; the episodes are handed in.

    Args:
        hidden_size: D. vocab_size: V. config: of heads, widths, read-outs.

    Attributes:
        word_of_token: (V,) int32, which word a token is: each its own, until `set_words`.
        ending_of_token: (V,) int64, the last characters of each token (see `words`); none, until `set_words`.
    """

    word_of_token: Tensor
    ending_of_token: Tensor

    def __init__(self, hidden_size: int, vocab_size: int, config: HippoFormerConfig) -> None:
        super().__init__()
        heads = config.recall_n_heads
        self.config = config
        self.n_heads, self.head_dim = heads, config.recall_head_dim
        self.register_buffer("word_of_token", torch.arange(vocab_size, dtype=torch.int32))
        self.register_buffer("ending_of_token", torch.zeros(vocab_size, dtype=torch.int64))
        self.query_proj = nn.Linear(hidden_size, config.key_dim, bias=False)
        self.key_proj = nn.Linear(hidden_size, config.key_dim, bias=False)
        if config.recall_value_dim:
            self.value_proj = nn.Linear(hidden_size, config.recall_value_dim, bias=False)
        self.null_proj = nn.Linear(hidden_size, heads)
        self.head_mixture = nn.Linear(hidden_size, heads)
        self.follow_gate = nn.Linear(hidden_size, 1)
        self.match_weight = nn.Parameter(torch.tensor(_MATCH_WEIGHT))
        self.log_scale = nn.Parameter(torch.full((heads,), math.log(_SCALE)))
        self.priority_weight = nn.Parameter(torch.ones(heads))
        # An untrained memory works: a random projection keeps cosines, so an episode is found by the state that is like
        # the one that made it.
        with torch.no_grad():
            self.query_proj.weight.copy_(self.key_proj.weight)
            nn.init.zeros_(self.null_proj.weight)
            nn.init.constant_(self.null_proj.bias, _NULL)
            nn.init.zeros_(self.head_mixture.weight)
            nn.init.zeros_(self.follow_gate.weight)
            nn.init.constant_(self.follow_gate.bias, _FIRST_MATCH)

    def set_words(self, word_of_token: Tensor, ending_of_token: Tensor) -> None:
        """Tells which tokens are the same word, and how they end.

        Args:
            word_of_token: (V,) a number for each token; tokens of one number are one word.
            ending_of_token: (V,) their last characters (see `hippocampus.spelling`), 0 where none are known.

        Raises:
            InputError: another shape.
        """
        expected = tuple(self.word_of_token.shape)
        for told in (word_of_token, ending_of_token):
            if told.shape != expected:
                raise InputError(f"expected words of shape {expected}, got {tuple(told.shape)}")
        self.word_of_token.copy_(word_of_token)
        self.ending_of_token.copy_(ending_of_token)

    def resize_vocabulary(self, size: int) -> None:
        """Takes another number of tokens: new ones are words of their own, of unknown spelling."""
        words, endings = self.word_of_token[:size], self.ending_of_token[:size]
        new = torch.arange(words.shape[0], size, dtype=words.dtype, device=words.device)
        self.word_of_token = torch.cat((words, new))
        self.ending_of_token = torch.cat((endings, torch.zeros_like(new, dtype=endings.dtype)))

    @torch.no_grad()
    def centre(self, hidden: Tensor) -> None:
        """Makes untrained keys and queries see in what states differ, not what all states of this base have in common.

        States of one base point into one direction (Gemma 3: a mean cosine of 0.91), by a few large components. Both
        projections P become P diag(1 / sqrt(s + 0.1)) (1 - m m^T), m the direction of the mean (Mu & Viswanath 2018,
        arXiv:1702.01417) and s each component's standard deviation, relative to their mean.

        Args:
            hidden: (N, D) normalised states of any texts.
        """
        direction, deviation = normalize(hidden.mean(0), dim=0), hidden.std(0)
        weight = (deviation / deviation.mean() + _LEAST_DEVIATION).rsqrt()
        for projection in (self.query_proj, self.key_proj):
            scaled = projection.weight * weight
            projection.weight.copy_(scaled - torch.outer(scaled @ direction, direction))

    def encode_key(self, hidden: Tensor) -> Tensor:
        """(R, N, D) -> (R, N, K), unit length per head."""
        return self.unit_heads(project(self.key_proj, hidden).float())

    def encode_value(self, hidden: Tensor) -> Tensor:
        """(R, N, D) -> (R, N, U)."""
        return project(self.value_proj, hidden) if self.config.recall_value_dim else hidden[..., :0]

    def unit_heads(self, projected: Tensor) -> Tensor:
        """(..., K) -> (..., K), unit length per head; zero stays zero."""
        return normalize(projected.unflatten(-1, (self.n_heads, self.head_dim)), dim=-1).flatten(-2)

    def forward(
        self,
        hidden: Tensor,
        tokens: Tensor,
        episodes: Episodes,
        mass: Tensor,
        visible: Tensor,
        own_slot: Tensor,
        n_shared: int = 0,
    ) -> Recollection:
        """Retrieves for every query.

        Args:
            hidden: (R, N, D) of consecutive tokens.
            tokens: (R, N) their ids.
            episodes: E slots; `matched` is that of the query before these.
            mass: (R, E) effective priority.
            visible: (R, N, E) bool, episodes each query may recall.
            own_slot: (R,) int64, where the first query's token is; the others' follow.
            n_shared: so many slots in front are visible to all queries or to none, which saves looking at each.

        Returns:
            The recollection, in float32.
        """
        scale = self.log_scale.exp().repeat_interleave(self.head_dim)
        query = self.unit_heads(project(self.query_proj, hidden).float()) * scale
        query = query.unflatten(-1, (self.n_heads, self.head_dim)).transpose(1, 2).to(episodes.key.dtype)
        key = episodes.key.unflatten(-1, (self.n_heads, self.head_dim)).transpose(1, 2)  # (R, H, E, K/H)
        bias = self.priority_weight[:, None, None] * mass.clamp_min(1e-6).log()[:, None, None, :]  # (R, H, 1, E)
        alike = bias[..., :n_shared].masked_fill(~visible[:, None, :1, :n_shared], -torch.inf)
        bias = torch.cat((alike, bias[..., n_shared:]), dim=-1)
        hidden = hidden.to(self.null_proj.weight.dtype)
        null = self.null_proj(hidden).transpose(1, 2).unsqueeze(-1)  # (R, H, N, 1)
        mixture = torch.softmax(self.head_mixture(hidden), dim=-1).transpose(1, 2)  # (R, H, N)
        unseen = torch.where(visible[:, None, :, n_shared:], 0.0, -torch.inf)
        words, read = self.word_of_token[episodes.token.long()], self.word_of_token[tokens.long()]
        predicted, matched = predicted_words(words, episodes.position), episodes.matched
        if not self.config.following:
            predicted = torch.full_like(predicted, -1)  # no word: nothing matches, nothing is followed
        text = text_before(self.ending_of_token[episodes.token.long()], episodes.position)
        ready = self.follow_gate(hidden).float()  # (R, N, 1)

        n_queries, parts = hidden.shape[1], []
        size = _QUERY_BLOCK if hidden.device.type == "cpu" and not torch.is_grad_enabled() else n_queries
        if n_queries > _QUERY_BLOCK:
            key = key.contiguous()  # one copy that many queries share
        for low in range(0, n_queries, size):
            block = slice(low, low + size)
            if n_queries > _QUERY_BLOCK:
                similar = query[:, :, block] @ key.transpose(2, 3)  # (R, H, n, E)
            else:
                similar = (key @ query[:, :, block].transpose(2, 3)).transpose(2, 3)
            attention = self._attention(similar, bias, null[:, :, block], unseen[:, :, block])
            alike = torch.einsum("rhn,rhne->rne", mixture[:, :, block], attention).to(attention.dtype)
            length = match_lengths(predicted, read[:, block], visible[:, block], matched)
            matches = longest_matches(length, episodes.position, own_slot + low, text)
            phi = torch.sigmoid(ready[:, block] + self.match_weight * matches.length.clamp_min(1.0).log())
            parts.append((*follow(alike, matches, phi), length))
            matched = length[:, -1]
        found, followed, matched = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        nothing, weights = found[..., 0], found[..., 1:]
        content = None
        if self.config.residual_readout:
            content = (weights.to(episodes.value.dtype) @ episodes.value).float()
        return Recollection(weights, nothing, content, weights.amax(-1), matched, followed)

    def _attention(self, similar: Tensor, bias: Tensor, null: Tensor, unseen: Tensor) -> Tensor:
        """(R, H, n, E + 1) softmax over the null, in front, and the episodes.

        Args:
            similar: (R, H, n, E). bias: (R, H, 1, E). null: (R, H, n, 1).
            unseen: (R, 1, n, e) of the last e slots, -inf for those that a query does not see, 0 for the others.
        """
        if torch.is_grad_enabled():
            score = torch.cat((null, similar + bias), dim=-1)
        else:  # the same without copies on the way
            score = bias.new_empty(*similar.shape[:-1], similar.shape[-1] + 1)
            score[..., :1] = null
            score[..., 1:].copy_(similar).add_(bias)
        score[..., score.shape[-1] - unseen.shape[-1] :] += unseen
        return torch.softmax(score, dim=-1)
