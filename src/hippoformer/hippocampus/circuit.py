"""The hippocampus: all boxes of the picture wired together, one segment's piece at a time.

`step` reads hidden states of at most one segment per row and answers with what each token recalls; `end_segment` is the
sleep between segments. What is stored is computed from hidden states that no recollection has touched, so encoding and
retrieval are separate phases (Hasselmo 1995) and any chunking of a stream gives the same numbers.

Time, exactly: row token t (0-based) completes the episode t-1 -> t. Query t sees the episodes completed at or before
t, and predicts token t+1. Two things are carried over a step's edge: the hidden state of the last token (its key is
made when the next token completes the episode), and the vote of the last query, by which the next token will be judged.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from hippoformer.configuration import HippoFormerConfig
from hippoformer.hippocampus.drift import EmbeddingDriftCalibrator
from hippoformer.hippocampus.episodes import Episodes, admit, importance
from hippoformer.hippocampus.fusion import Fusion
from hippoformer.hippocampus.marginals import Marginals
from hippoformer.hippocampus.recall import Recall, Recollection
from hippoformer.hippocampus.replay import ReplayReport, consolidate
from hippoformer.hippocampus.salience import SalienceGate, last_of_each_row
from hippoformer.hippocampus.selection import rule_of
from hippoformer.tensors.masks import recall_mask
from hippoformer.tensors.ragged import last_of
from hippoformer.tensors.selection import put


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
        recent_salience: (R, salience_min_duration - 1) unsmoothed salience logits of the last transitions.
        marginals: of all that was read; the base's predictions move by them, whoever reads with it keeps them.
        stored_bound: no row has more stored episodes than this, known without asking the device.
    """

    episodes: Episodes
    vote: Vote
    last_hidden: Tensor
    recent_salience: Tensor
    marginals: Marginals
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
            torch.zeros(rows, config.salience_min_duration - 1, device=device),
            Marginals.empty(rows, config, device),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, flat."""
        carried = {"last_hidden": self.last_hidden, "recent_salience": self.recent_salience}
        carried |= {f"vote_{name}": tensor for name, tensor in self.vote.tensors().items()}
        carried |= {f"marginal_{name}": tensor for name, tensor in self.marginals.tensors().items()}
        return self.episodes.tensors() | carried

    def map(self, function) -> "MemoryState":  # type: ignore[no-untyped-def]
        """A new state with `function` applied to every tensor."""
        return replace(
            self,
            episodes=self.episodes.map(function),
            vote=Vote(**{name: function(tensor) for name, tensor in self.vote.tensors().items()}),
            last_hidden=function(self.last_hidden),
            recent_salience=function(self.recent_salience),
            marginals=Marginals(**{name: function(tensor) for name, tensor in self.marginals.tensors().items()}),
        )

    def with_tensors(self, tensors: dict[str, Tensor], stored_bound: int) -> "MemoryState":
        """A state made of what `tensors` gave."""
        return MemoryState(
            Episodes(**{name: tensors[name] for name in self.episodes.tensors()}),
            Vote(**{name: tensors[f"vote_{name}"] for name in self.vote.tensors()}),
            tensors["last_hidden"],
            tensors["recent_salience"],
            Marginals(**{name: tensors[f"marginal_{name}"] for name in self.marginals.tensors()}),
            stored_bound,
        )

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


@dataclass
class StepOutput:
    """What a step found for its N tokens.

    Attributes:
        recollection: of the N queries, over the slots low..high of the episodes.
        token: (R, high - low) int32, what those episodes vote for.
        mixture: (R, N) lambda of each query.
        residual: (R, N, D) for the hidden states, or None where that read-out is off.
        prior_mixture, prior_nothing, hit: (R, N) lambda and null mass of the query before each token, and its
            attention on
            episodes of that very token: how each token was foretold.
        forecast: (R, N) log-odds of usefulness, by the gate.
        salience: (R, N) in [0, 1], made of it.
        importance: (R, N) weight each transition was stored with.
    """

    recollection: Recollection
    token: Tensor
    mixture: Tensor
    residual: Tensor | None
    prior_mixture: Tensor
    prior_nothing: Tensor
    hit: Tensor
    forecast: Tensor
    salience: Tensor
    importance: Tensor


class Hippocampus(nn.Module):
    """Gate, recall, fusion and drift calibrator over an explicit state. Parameters only.

    Args:
        hidden_size: D of the base model; n layers of it are read, width n D.
        vocab_size: V of the base model.
        config: every option.
    """

    def __init__(self, hidden_size: int, vocab_size: int, config: HippoFormerConfig) -> None:
        super().__init__()
        self.hidden_size, self.width = hidden_size, hidden_size * len(config.memory_layers)
        self.salience_gate = SalienceGate(self.width, config)
        self.recall = Recall(self.width, vocab_size, config)
        self.fusion = Fusion(self.width, config)
        self.drift_calibrator = EmbeddingDriftCalibrator(vocab_size, config)
        self.configure(config)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Hippocampus":
        """What `to`, `half`, `cuda` and their like call: moves to other devices, and stays in float32 whatever the
        base computes in (see `tensors.precision`).
        """

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def configure(self, config: HippoFormerConfig) -> None:
        """Takes other options; those that shape parameters must be as they were.

        Raises:
            ConfigurationError: a selection rule that does not exist.
        """
        rule_of(config)
        self.config = config
        self.recall.configure(config)
        self.fusion.configure(config)

    def resize_vocabulary(self, size: int) -> None:
        """Follows a base whose embeddings were resized to `size` tokens."""
        self.recall.resize_vocabulary(size)
        self.drift_calibrator.resize_vocabulary(size)

    def normed(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., n D) with each layer's part normalised: inner layers have a few very large components."""
        parts = hidden.unflatten(-1, (-1, self.hidden_size))
        return layer_norm(parts, (self.hidden_size,)).flatten(-2)

    def step(
        self, state: MemoryState, done: list[int], hidden: Tensor, tokens: Tensor, surprise: Tensor, new: list[int]
    ) -> tuple[StepOutput, MemoryState]:
        """Reads up to N tokens of each row, none beyond the row's segment end.

        Args:
            state: where each row stands; its buffers are reused where no gradient is involved.
            done: tokens each row has read before.
            hidden: (R, N, n D) untouched hidden states of the new tokens, padding on the right.
            tokens: (R, N) their ids.
            surprise: (R, N) -log p_base of each given what came before; 0 for a row's very first token.
            new: how many of the N are real, per row.

        Returns:
            What was found, and the new state.
        """
        config, device = self.config, hidden.device
        n_new = hidden.shape[1]
        length = torch.tensor(new, device=device)
        read = torch.tensor(done, device=device)
        column = torch.arange(n_new, device=device)
        tokens = tokens.to(state.episodes.token.dtype)  # comparing numbers of two widths costs several times as much
        is_real = (column < length.unsqueeze(-1)) & (read.unsqueeze(-1) + column > 0)  # token 0 completes nothing
        dtype = self.recall.key_proj.weight.dtype
        untouched = torch.cat((state.last_hidden.unsqueeze(1), hidden), dim=1)  # (R, N+1, D)
        queries = self.normed(untouched.to(dtype) if torch.is_grad_enabled() else untouched)
        before, after = queries[:, :-1], queries[:, 1:]

        first = torch.tensor([config.buffer_size + working_fill(d, config) for d in done], device=device)
        low, high = self._occupied(state, done, new)
        blank = state.episodes.position.shape[1] - 1
        place = torch.where(is_real, first.unsqueeze(-1) + column, blank)  # (R, N)
        episodes = state.episodes.write(
            place, self._encode(state, before, after, tokens, surprise, read.unsqueeze(-1) + column, is_real)
        )
        # The gate judges token t by what was complete before t; recall of query t may already use t.
        known = episodes.slots(low, high)
        visible = recall_mask(known.valid, first - low, n_new + 1)
        forecast, extended = self.salience_gate(
            before,
            after,
            surprise.to(dtype),
            known,
            visible[:, :-1],
            state.recent_salience,
        )
        salience = torch.sigmoid(forecast - self.salience_gate.tagging_threshold)
        weight = importance(salience.detach() if config.credit_only_gate else salience, config)
        episodes = replace(
            episodes,
            salience=put(episodes.salience, place, torch.where(is_real, salience, 0.0)),
            priority=put(episodes.priority, place, torch.where(is_real, weight, 0.0)),
        )
        known = episodes.slots(low, high)
        mass = known.effective_priority(config.decay) * known.strength
        n_shared = max(config.buffer_size - low, 0)
        recollection = self.recall(after, tokens, known, mass, visible[:, 1:], first - low, n_shared)
        beyond = visible[:, 1:, :n_shared].sum(-1) / visible[:, 1:].sum(-1).clamp_min(1)
        mixture = self.fusion.mixture_weight(after, recollection, beyond)

        # Token 0 of the step was foretold by the vote carried over, the others by the queries before them.
        vote = state.vote
        prior_mixture = torch.cat((vote.mixture.unsqueeze(-1), mixture[:, :-1]), dim=-1)
        prior_nothing = torch.cat((vote.nothing.unsqueeze(-1), recollection.nothing[:, :-1]), dim=-1)
        carried = vote.weights * (vote.token == tokens[:, :1])  # (R, E)
        foretold = recollection.weights[:, :-1] * (
            known.token.unsqueeze(1) == tokens[:, 1:].unsqueeze(-1)
        )  # (R, N-1, e)
        hit = torch.cat((carried.sum(-1, keepdim=True), foretold.sum(-1)), dim=-1)
        with torch.no_grad():
            own = (-surprise).exp() * (1.0 - prior_mixture * (1.0 - prior_nothing))
            share = torch.where(is_real, prior_mixture / (own + prior_mixture * hit).clamp_min(1e-12), 0.0)  # (R, N)
            carried = carried * (share[:, 0] * vote.in_place).unsqueeze(-1)
            episodes = self._give_credit(episodes, carried, torch.einsum("rn,rne->re", share[:, 1:], foretold), low)
        output = StepOutput(
            recollection=recollection,
            token=known.token.clone(),
            mixture=mixture,
            residual=self.fusion.residual(after, recollection) if self.fusion.residual_is_active else None,
            prior_mixture=prior_mixture,
            prior_nothing=prior_nothing,
            hit=hit,
            forecast=forecast,
            salience=salience,
            importance=weight,
        )
        vote = self._next_vote(vote, output, length, low)
        return output, replace(
            state,
            episodes=replace(episodes, matched=_of_last_query(recollection.matched, length, low, episodes.matched)),
            vote=vote,
            last_hidden=last_of(hidden, new, state.last_hidden),
            recent_salience=last_of_each_row(extended, length, config.salience_min_duration - 1),
        )

    def end_segment(
        self, state: MemoryState, done: list[int], rows: list[int], frozen: bool = False
    ) -> tuple[MemoryState, ReplayReport]:
        """The consolidation of the given rows, each of which has just read a whole number of segments.

        Args:
            state: of all rows.
            done: tokens each row has read, all rows.
            rows: which rows ended a segment.
            frozen: the store is read-only; what leaves the window is dropped.

        Returns:
            The new state and what replay did to those rows.
        """
        config, device = self.config, state.last_hidden.device
        index = torch.tensor(rows, device=device)
        everyone = len(rows) == state.last_hidden.shape[0]
        episodes = state.episodes if everyone else state.episodes.rows(index)
        leaving = [working_fill(done[r] - 1, config) + 1 - working_fill(done[r], config) for r in rows]
        leave = torch.tensor(leaving, device=device)
        segment = torch.tensor([done[r] // config.segment_len for r in rows], device=device)
        before, episodes = episodes, admit(episodes, leave, config)
        if frozen:
            nothing = torch.zeros_like(segment)
            report = ReplayReport(nothing, nothing, nothing)
            stored = before.slots(0, config.buffer_size).tensors()
            kept = {
                name: torch.cat((stored[name], tensor[:, config.buffer_size :]), dim=1)
                for name, tensor in episodes.tensors().items()
            }
            episodes = Episodes(**kept)
        else:
            episodes, report = consolidate(episodes, segment, config)
        if not everyone:
            episodes = state.episodes.merged_rows(index, episodes)
        bound = state.stored_bound if frozen else min(config.buffer_size, state.stored_bound + max(leaving))
        vote = replace(state.vote, in_place=state.vote.in_place.index_fill(0, index, False))
        return replace(state, episodes=episodes, vote=vote, stored_bound=bound), report

    def _occupied(self, state: MemoryState, done: list[int], new: list[int]) -> tuple[int, int]:
        """The span of slots that can hold anything, so that short texts do not pay for an empty store."""
        config = self.config
        low = config.buffer_size - state.stored_bound
        high = config.buffer_size + max(working_fill(d, config) + n for d, n in zip(done, new, strict=True))
        return low, high

    def _encode(
        self,
        state: MemoryState,
        before: Tensor,
        after: Tensor,
        tokens: Tensor,
        surprise: Tensor,
        position: Tensor,
        is_real: Tensor,
    ) -> Episodes:
        """Episodes of the new tokens, not yet judged; all zero where `is_real` does not hold, so that the blank slot,
        where padding is written, stays blank."""
        wide, none = is_real.unsqueeze(-1), torch.zeros(is_real.shape, device=is_real.device)
        unlikely = torch.where(is_real, 1.0 - torch.exp(-surprise.detach().float()), 0.0).unsqueeze(-1)
        return Episodes(
            key=torch.where(wide, self.recall.encode_key(before), 0.0),
            value=torch.where(wide, self.recall.encode_value(after), 0.0),
            token=torch.where(is_real, tokens, 0),
            position=torch.where(is_real, position, -1),
            salience=none,
            surprise=unlikely.expand(*none.shape, state.episodes.surprise.shape[-1]),
            priority=none,
            age=none,
            strength=is_real.to(none.dtype),
            credit=none,
            matched=none,
        )

    def _give_credit(self, episodes: Episodes, carried: Tensor, earned: Tensor, low: int) -> Episodes:
        """Adds to stored episodes the share of the predictions they are owed, their part of what was believed.

        Only the store earns: its episodes are beyond the window, where nothing else could have known.

        Args:
            carried: (R, E) earned at the step's first token. earned: (R, e) at the others, from slot `low` on.
        """
        n_stored = self.config.buffer_size
        credit = episodes.credit.clone() if torch.is_grad_enabled() else episodes.credit
        credit[:, :n_stored] += carried[:, :n_stored]
        credit[:, low:n_stored] += earned[:, : n_stored - low]
        return replace(episodes, credit=credit)

    @staticmethod
    def _next_vote(before: Vote, output: StepOutput, length: Tensor, low: int) -> Vote:
        """The vote of each row's last query; rows without a new token keep theirs."""
        moved = length > 0
        index = (length - 1).clamp_min(0).unsqueeze(-1)
        token = torch.zeros_like(before.token)
        token[:, low : low + output.token.shape[-1]] = output.token
        return Vote(
            weights=_of_last_query(output.recollection.weights, length, low, before.weights),
            token=torch.where(moved.unsqueeze(-1), token, before.token),
            nothing=torch.where(moved, output.recollection.nothing.gather(1, index).squeeze(1), before.nothing),
            mixture=torch.where(moved, output.mixture.gather(1, index).squeeze(1), before.mixture),
            in_place=moved | before.in_place,
        )


def _of_last_query(weights: Tensor, length: Tensor, low: int, before: Tensor) -> Tensor:
    """(R, E) of (R, N, e) weights over the slots from `low` on those of each row's last query; `before` where a row has
    none."""
    index = (length - 1).clamp_min(0)[:, None, None].expand(-1, 1, weights.shape[-1])
    full = torch.zeros_like(before)
    full[:, low : low + weights.shape[-1]] = weights.gather(1, index).squeeze(1)
    return torch.where(length.unsqueeze(-1) > 0, full, before)


def working_fill(done: int, config: HippoFormerConfig) -> int:
    """Working slots in use after `done` tokens of a row: the window at the last segment end, and the tokens since."""
    since = done % config.segment_len
    return min(done - since, config.window) + since
