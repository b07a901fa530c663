"""Selection: which episodes stay when more compete than the store holds. One function a rule; the highest scores stay.

A rule decides who is kept and nothing else. Salience, priority, age and consolidation, and with them the weights of
recall, are the same under every rule, so that a comparison of rules compares one thing:

* **What is averaged.** When an episode leaves the window, the gate's salience, and the surprise where a rule reads it,
  are each replaced by that of the passage around it (`capture_span`). This happens under every rule.
* **What ages.** A judgement of content fades by `decay` for each segment since the episode was last reactivated. The
  scores of `salience` and `surprise` are such judgements, treated alike: they differ only in who judges. Position and
  chance are not judgements: averaged over a passage or aged they would no longer be first in, first out, or chance.

A rule of your own is one function and one entry in `RULES`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from hippoformer.configuration import HippoFormerConfig
from hippoformer.errors import ConfigurationError
from hippoformer.ops import hashed_uniform


class Candidates(Protocol):
    """The fields of `hippocampus.episodes.Episodes` that the rules below read, each (R, E); surprise (R, E, 1)."""

    position: Tensor
    age: Tensor
    surprise: Tensor

    def effective_priority(self, decay: float) -> Tensor:
        """The priority, aged."""
        ...


@dataclass(frozen=True)
class Rule:
    """An eviction policy.

    Attributes:
        score: of the episodes of R rows in E slots, (R, E) float; within a row the highest stay, of equals the newer.
        reads_surprise: the score reads `Episodes.surprise`, which costs 4 bytes an episode and is kept only then.
    """

    score: Callable[[Candidates, HippoFormerConfig], Tensor]
    reads_surprise: bool = False


def by_salience(episodes: Candidates, config: HippoFormerConfig) -> Tensor:
    """The effective priority, made of the gate's salience."""
    return episodes.effective_priority(config.decay)


def by_surprise(episodes: Candidates, config: HippoFormerConfig) -> Tensor:
    """1 - p of the base in place of the gate's judgement; without the gate's step at 0.5, which is calibrated to it."""
    return episodes.surprise.squeeze(-1) * config.decay**episodes.age


def by_chance(episodes: Candidates, config: HippoFormerConfig) -> Tensor:
    """One draw for each episode, for good."""
    return hashed_uniform(config.seed, episodes.position.long())


def by_position(episodes: Candidates, config: HippoFormerConfig) -> Tensor:
    """First in, first out."""
    return episodes.position.float()


RULES: dict[str, Rule] = {
    "salience": Rule(by_salience),
    "surprise": Rule(by_surprise, reads_surprise=True),
    "random": Rule(by_chance),
    "fifo": Rule(by_position),
}


def rule_of(config: HippoFormerConfig) -> Rule:
    """The rule that `config.selection` names.

    Raises:
        ConfigurationError: no rule has this name.
    """
    if config.selection not in RULES:
        raise ConfigurationError(f"expected selection in ({', '.join(RULES)}), got selection={config.selection!r}")
    return RULES[config.selection]
