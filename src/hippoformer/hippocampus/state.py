"""What the hippocampus carries from step to step: episodes, the last query's vote, token counts. One row a sequence."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hippoformer.configuration import HippoFormerConfig
from hippoformer.hippocampus.episodes import Episodes
from hippoformer.hippocampus.salience import SMOOTHED
from hippoformer.hippocampus.unigram import UnigramCounts


@dataclass
class Vote:
    """What the last query of each row recalled, kept until the token it predicts has come.

    Attributes:
        weights: (R, E) attention on each slot.
        token: (R, E) int32, what each slot voted for; the slots themselves may be rearranged before the token comes.
        nothing, mixture: (R,) null mass, and lambda.
        in_place: (R,) bool, the slots still hold the episodes that voted.
    """

    weights: Tensor
    token: Tensor
    nothing: Tensor
    mixture: Tensor
    in_place: Tensor

    @classmethod
    def none(cls, rows: int, slots: int, device: torch.device | str) -> "Vote":
        """No vote: lambda 0."""
        return cls(
            torch.zeros(rows, slots, device=device),
            torch.zeros(rows, slots, dtype=torch.int32, device=device),
            torch.ones(rows, device=device),
            torch.zeros(rows, device=device),
            torch.zeros(rows, dtype=torch.bool, device=device),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor."""
        return vars(self)


@dataclass
class MemoryState:
    """All that the hippocampus carries between steps, one row a sequence.

    Attributes:
        episodes: store and working episodes.
        vote: of the last query.
        last_hidden: (R, n D) hidden state of the last token read.
        recent_salience: (R, SMOOTHED - 1) unsmoothed salience logits of the last transitions.
        unigram: token counts of all that was read; the base's predictions move by them.
        stored_bound: no row has more stored episodes than this, known without asking the device.
    """

    episodes: Episodes
    vote: Vote
    last_hidden: Tensor
    recent_salience: Tensor
    unigram: UnigramCounts
    stored_bound: int = 0

    @classmethod
    def empty(
        cls, rows: int, width: int, config: HippoFormerConfig, dtype: torch.dtype, device: torch.device | str
    ) -> "MemoryState":
        """The state of rows that have read nothing."""
        episodes = Episodes.empty(rows, config, dtype, device)
        return cls(
            episodes,
            Vote.none(rows, episodes.position.shape[1], device),
            torch.zeros(rows, width, dtype=dtype, device=device),
            torch.zeros(rows, SMOOTHED - 1, device=device),
            UnigramCounts.empty(rows, config, device),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, flat."""
        carried = {"last_hidden": self.last_hidden, "recent_salience": self.recent_salience}
        carried |= {f"vote_{name}": tensor for name, tensor in self.vote.tensors().items()}
        carried |= {f"marginal_{name}": tensor for name, tensor in self.unigram.tensors().items()}
        return self.episodes.tensors() | carried

    def with_tensors(self, tensors: dict[str, Tensor], stored_bound: int) -> "MemoryState":
        """A state made of what `tensors` gave."""
        return MemoryState(
            Episodes(**{name: tensors[name] for name in self.episodes.tensors()}),
            Vote(**{name: tensors[f"vote_{name}"] for name in self.vote.tensors()}),
            tensors["last_hidden"],
            tensors["recent_salience"],
            UnigramCounts(**{name: tensors[f"marginal_{name}"] for name in self.unigram.tensors()}),
            stored_bound,
        )

    def map(self, function) -> "MemoryState":  # type: ignore[no-untyped-def]
        """A new state with `function` applied to every tensor."""
        mapped = {name: function(tensor) for name, tensor in self.tensors().items()}
        return self.with_tensors(mapped, self.stored_bound)

    def without_rows(self, index: Tensor) -> "MemoryState":
        """The state with the given rows as new, on a copy."""
        state = self.map(lambda tensor: tensor.index_fill(0, index, 0))
        state.episodes.position.index_fill_(0, index, -1)
        state.vote.nothing.index_fill_(0, index, 1.0)
        everyone = index.numel() == self.last_hidden.shape[0]
        return replace(state, stored_bound=0 if everyone else self.stored_bound)

    def without_episodes(self, row: int, lost: Tensor) -> "MemoryState":
        """The state in which some slots of a row, (E,) bool, are empty, and nothing is recalled from them."""
        state = self.map(Tensor.clone)
        for name, tensor in state.episodes.tensors().items():
            tensor[row, lost] = -1 if name == "position" else 0
        vote = state.vote
        vote.nothing[row] += vote.weights[row, lost].sum()
        vote.weights[row, lost] = 0
        return state

    def without_vote(self, last_hidden: Tensor) -> "MemoryState":
        """The state after tokens that were read with the memory off."""
        rows, slots = self.episodes.position.shape
        episodes = replace(self.episodes, matched=torch.zeros_like(self.episodes.matched))
        vote = Vote.none(rows, slots, last_hidden.device)
        return replace(self, episodes=episodes, vote=vote, last_hidden=last_hidden)
