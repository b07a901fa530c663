"""Fusion: how a recollection changes the prediction.

Two read-outs of one attention.

* Residual: h + tanh(alpha) g(q) W content, with alpha = 0 at initialisation.
* Distribution: episodes vote for the token that followed them,

      p(v) = (1 - lambda (1 - nothing)) p_base(v) + lambda sum_e a(e) [token_e = v],

  lambda made by a gate from the query and from how empty, how sharp and how surely followed the recollection is
  (pointer mixtures: Merity et al. 2016, arXiv:1609.07843; nearest neighbours: Khandelwal et al. 2019,
  arXiv:1911.00172). It works untrained: the initial gate does not read the query, only the evidence. `strength` 0
  silences it: the prediction is the base's to the last bit.
"""

import torch
from torch import Tensor, nn

from hippoformer.configuration import HippoFormerConfig
from hippoformer.hippocampus.recall import Recollection

_GATE_WIDTH, _DROPOUT = 32, 0.1
# The untrained gate, in log-odds: of believing any recollection, and what null mass, the largest single weight and a
# match followed outright add. Chosen on validation texts (docs/notebook/bases.md).
_BIAS = -4.0
_EVIDENCE = (0.0, 2.5, 1.0)
# What the log of the share of episodes beyond the window adds: of what the base still sees, recall tells nothing new.
_BEYOND, _LEAST_BEYOND = 0.25, 1e-4


class Fusion(nn.Module):
    """Both read-outs and their gates. Parameters only.

    Args:
        width: n D of the states that queries are made of. hidden_size: D of the state that the residual is added to.
    """

    def __init__(self, width: int, hidden_size: int, config: HippoFormerConfig) -> None:
        super().__init__()
        self.has_residual = config.residual_readout
        self.gate_in = nn.Linear(width + 2, _GATE_WIDTH)
        self.gate_out = nn.Linear(_GATE_WIDTH, 1)
        # Straight from the evidence, beside what the query makes of it: nothing, peak, followed.
        self.evidence = nn.Parameter(torch.tensor(_EVIDENCE))
        self.beyond_weight = nn.Parameter(torch.tensor(_BEYOND))
        self.strength = nn.Parameter(torch.ones(()))
        with torch.no_grad():
            nn.init.zeros_(self.gate_out.weight)
            nn.init.constant_(self.gate_out.bias, _BIAS)
        if self.has_residual:
            self.residual_gate = nn.Linear(width, 1)
            self.residual_proj = nn.Linear(config.recall_value_dim, hidden_size, bias=False)
        self.residual_scale = nn.Parameter(torch.zeros(()))
        self.dropout = nn.Dropout(_DROPOUT)

    @property
    def is_trained(self) -> bool:
        """False while the gate does not read the query, as it is made; the first step of training changes that."""
        return bool((self.gate_out.weight != 0).any()) or bool(self.residual_scale != 0)

    @property
    def residual_is_active(self) -> bool:
        """False while the residual read-out is exactly zero and need not be computed."""
        return self.has_residual and (self.training or bool(self.residual_scale != 0))

    def residual(self, hidden: Tensor, recollection: Recollection) -> Tensor:
        """(R, N, D) to add to the hidden state, in its dtype."""
        assert recollection.content is not None
        gate = torch.sigmoid(self.residual_gate(hidden.to(self.residual_gate.weight.dtype)))
        content = self.dropout(self.residual_proj(recollection.content.to(self.residual_proj.weight.dtype)))
        return torch.tanh(self.residual_scale) * gate * content

    def mixture_weight(self, hidden: Tensor, recollection: Recollection, beyond: Tensor) -> Tensor:
        """(R, N) lambda in [0, 1]: how much recall is believed.

        Args:
            hidden: (R, N, D). recollection: of these queries.
            beyond: (R, N) the share of the episodes each query may recall that have left the window.
        """
        hidden = hidden.to(self.gate_in.weight.dtype)
        evidence = torch.stack((recollection.nothing, recollection.peak, recollection.followed), dim=-1).to(
            hidden.dtype
        )
        seen = torch.cat((hidden, evidence[..., :2]), dim=-1)
        gate = self.gate_out(torch.nn.functional.gelu(self.gate_in(seen))).squeeze(-1) + evidence @ self.evidence
        gate = gate + self.beyond_weight * beyond.clamp_min(_LEAST_BEYOND).log().to(gate.dtype)
        return self.strength.clamp(0.0, 1.0) * torch.sigmoid(gate)


def mix_target(log_prob: Tensor, weight: Tensor, nothing: Tensor, hit: Tensor) -> Tensor:
    """Fused log-probability of given tokens, without the distribution over the others.

    Args:
        log_prob: (R, N) log p_base of each token.
        weight: (R, N) lambda. nothing: (R, N) null mass. hit: (R, N) attention on episodes of that very token.

    Returns:
        (R, N); exactly log_prob where the weight is 0.
    """
    own = log_prob + torch.log1p(-weight * (1.0 - nothing))
    recalled = weight * hit
    voted = recalled > 0
    return torch.where(voted, torch.logaddexp(own, torch.where(voted, recalled, 1.0).log()), own)


def mix_distribution(log_probs: Tensor, weight: Tensor, nothing: Tensor, weights: Tensor, token: Tensor) -> Tensor:
    """Fused log-probabilities of the whole vocabulary.

    Args:
        log_probs: (R, N, V) normalised log p_base.
        weight, nothing: (R, N). weights: (R, N, E) attention. token: (R, E) what each episode votes for.

    Returns:
        (R, N, V), normalised; exactly log_probs where the weight is 0.
    """
    own = log_probs + torch.log1p(-weight * (1.0 - nothing)).unsqueeze(-1)
    ballots = token.long().unsqueeze(1).expand(weights.shape)
    votes = torch.zeros_like(log_probs).scatter_add(-1, ballots, weight.unsqueeze(-1) * weights)
    # Only the voted tokens change; episodes of one token all write the same number.
    recalled, mine = votes.gather(-1, ballots), own.gather(-1, ballots)
    voted = recalled > 0
    fused = torch.where(voted, torch.logaddexp(mine, torch.where(voted, recalled, 1.0).log()), mine)
    return own.scatter(-1, ballots, fused)
