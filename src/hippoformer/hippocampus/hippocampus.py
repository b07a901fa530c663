"""The hippocampus: all boxes of the picture, wired together behind one door.

`Hippocampus.read(state, reading)` takes what the base made of a piece of text, at most to the end of each row's own
segment, and answers with what each token recalls. Rows that end a segment are consolidated. What is stored is computed
from hidden states that no recollection has touched, so encoding and retrieval are separate phases (Hasselmo 1995) and
any chunking of a stream gives the same numbers.

Token t (0-based) of a row completes the episode t-1 -> t. Query t sees the episodes completed at or before t, and
predicts token t+1. Two things are carried over a step's edge: the hidden state of the last token (its key is made when
the next token completes the episode), and the vote of the last query, by which the next token will be judged.
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
from hippoformer.hippocampus.recall import Recall, Recollection
from hippoformer.hippocampus.replay import consolidate
from hippoformer.hippocampus.salience import SMOOTHED, SalienceGate, last_of_each_row
from hippoformer.hippocampus.selection import rule_of
from hippoformer.hippocampus.state import MemoryState, Vote
from hippoformer.ops import column_of, last_of, put, recall_mask


@dataclass(frozen=True)
class BaseReading:
    """What the base made of N more tokens of each row: all that a memory needs to know, live or from disk.

    Attributes:
        tokens: (R, N) int64, padding on the right.
        hidden: (R, N, n D) untouched hidden states of the memory layers.
        log_prob: (R, N) of each token under the base, 0 for a row's very first.
        read: tokens each row had read before. new: how many of the N are real; none beyond the row's segment end.
    """

    tokens: Tensor
    hidden: Tensor
    log_prob: Tensor
    read: list[int]
    new: list[int]

    @property
    def done(self) -> list[int]:
        """Tokens each row has read now."""
        return [before + n for before, n in zip(self.read, self.new, strict=True)]

    def ended(self, segment_len: int) -> list[int]:
        """The rows that have come to the end of a segment with it."""
        return [
            row for row, (n, done) in enumerate(zip(self.new, self.done, strict=True)) if n and not done % segment_len
        ]


@dataclass
class StepOutput:
    """What a step found for its N tokens.

    Attributes:
        recollection: of the N queries, over e slots of the episodes.
        token: (R, e) int32, what those episodes vote for.
        mixture: (R, N) lambda of each query.
        residual: (R, N, D) to add to the final hidden states, or None where that read-out is off.
        prior_mixture, prior_nothing, hit: (R, N) lambda and null mass of the query before each token, and its
            attention on episodes of that very token: how each token was predicted.
        forecast: (R, N) log-odds of usefulness, by the gate.
        salience: (R, N) in [0, 1], made of it.
        importance: (R, N) priority each transition was stored with.
        replayed: (R,) int64, episodes that the consolidation at this step's end reactivated; None where no row ended a
            segment.
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
    replayed: Tensor | None = None


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
        self.fusion = Fusion(self.width, hidden_size, config)
        self.drift_calibrator = EmbeddingDriftCalibrator(vocab_size, config)
        self.configure(config)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Hippocampus":
        """What `to`, `half`, `cuda` and their like call: moves to other devices, and stays in float32 whatever the
        base computes in (see `ops.project`).
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
        self.config = self.recall.config = config

    def resize_vocabulary(self, size: int) -> None:
        """Follows a base whose embeddings were resized to `size` tokens."""
        self.recall.resize_vocabulary(size)
        self.drift_calibrator.resize_vocabulary(size)

    def empty_state(self, rows: int, dtype: torch.dtype, device: torch.device | str) -> MemoryState:
        """The state of rows that have read nothing; keys and values in `dtype`."""
        return MemoryState.empty(rows, self.width, self.config, dtype, device)

    def normed(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., n D) with each layer's part normalised: inner layers have a few very large components."""
        parts = hidden.unflatten(-1, (-1, self.hidden_size))
        return layer_norm(parts, (self.hidden_size,)).flatten(-2)

    def read(
        self, state: MemoryState, reading: BaseReading, frozen: bool = False, credit: bool = False
    ) -> tuple[StepOutput, MemoryState]:
        """Encodes and recalls; consolidates rows that end a segment.

        Args:
            state: where each row stands; its buffers are reused where no gradient is involved.
            reading: what the base read.
            frozen: the store is read-only; what leaves the window is dropped.
            credit: also note which episodes predicted what came (`Episodes.credit`). Replay always does.

        Returns:
            What was found, and the new state.
        """
        output, state = self._step(state, reading, credit or self.config.max_replay_rounds > 0)
        if rows := reading.ended(self.config.segment_len):
            state, output.replayed = self._end_segment(state, reading.done, rows, frozen)
        return output, state

    def skip(self, state: MemoryState, reading: BaseReading, written: bool) -> MemoryState:
        """The state after text of which nothing was recalled or stored.

        Args:
            written: whether the state holds any episode; those in the window leave it, and are dropped.
        """
        state = state.without_vote(last_of(reading.hidden, reading.new, state.last_hidden))
        if written and (rows := reading.ended(self.config.segment_len)):
            state, _ = self._end_segment(state, reading.done, rows, frozen=True)
        return state

    def _step(self, state: MemoryState, reading: BaseReading, credit: bool) -> tuple[StepOutput, MemoryState]:
        config, hidden, device = self.config, reading.hidden, reading.hidden.device
        n_new, surprise = hidden.shape[1], -reading.log_prob
        length, read = torch.tensor(reading.new, device=device), column_of(reading.read, device)
        column = torch.arange(n_new, device=device)
        tokens = reading.tokens.to(torch.int32)  # comparing numbers of two widths costs several times as much
        is_real = (column < length.unsqueeze(-1)) & (read + column > 0)  # token 0 completes nothing
        dtype = self.recall.key_proj.weight.dtype
        untouched = torch.cat((state.last_hidden.unsqueeze(1), hidden), dim=1)  # (R, N+1, n D)
        queries = self.normed(untouched.to(dtype) if torch.is_grad_enabled() else untouched)
        before, after = queries[:, :-1], queries[:, 1:]

        first = torch.tensor([config.buffer_size + working_fill(d, config) for d in reading.read], device=device)
        low, high = self._occupied(state, reading)
        blank = state.episodes.position.shape[1] - 1
        place = torch.where(is_real, first.unsqueeze(-1) + column, blank)  # (R, N)
        new = self._encode(state, before, after, tokens, surprise, read + column, is_real)
        episodes = state.episodes.write(place, new)
        # The gate judges token t by what was complete before t; recall of query t may already use t.
        known = episodes.slots(low, high)
        visible = recall_mask(known.valid, first - low, n_new + 1)
        forecast, extended = self.salience_gate(
            before, after, surprise.to(dtype), known, visible[:, :-1], state.recent_salience
        )
        salience = torch.sigmoid(forecast - self.salience_gate.tagging_threshold)
        weight = importance(salience.detach(), config)
        episodes = replace(
            episodes,
            salience=put(episodes.salience, place, torch.where(is_real, salience.detach(), 0.0)),
            priority=put(episodes.priority, place, torch.where(is_real, weight, 0.0)),
        )
        known = episodes.slots(low, high)
        mass = known.effective_priority(config.decay)
        n_shared = max(config.buffer_size - low, 0)
        recollection = self.recall(after, tokens, known, mass, visible[:, 1:], first - low, n_shared)
        stored = known.valid[:, :n_shared].sum(-1, keepdim=True)
        beyond = stored / visible[:, 1:].sum(-1).clamp_min(1)
        mixture = self.fusion.mixture_weight(after, recollection, beyond)

        # Token 0 of the step was predicted by the vote carried over, the others by the queries before them.
        vote = state.vote
        prior_mixture = torch.cat((vote.mixture.unsqueeze(-1), mixture[:, :-1]), dim=-1)
        prior_nothing = torch.cat((vote.nothing.unsqueeze(-1), recollection.nothing[:, :-1]), dim=-1)
        carried = vote.weights * (vote.token == tokens[:, :1])  # (R, E)
        right = recollection.weights[:, :-1] * (known.token.unsqueeze(1) == tokens[:, 1:].unsqueeze(-1))  # (R, N-1, e)
        hit = torch.cat((carried.sum(-1, keepdim=True), right.sum(-1)), dim=-1)
        if credit:
            with torch.no_grad():
                own = (-surprise).exp() * (1.0 - prior_mixture * (1.0 - prior_nothing))
                share = torch.where(is_real, prior_mixture / (own + prior_mixture * hit).clamp_min(1e-12), 0.0)
                carried = carried * (share[:, 0] * vote.in_place).unsqueeze(-1)
                earned = torch.einsum("rn,rne->re", share[:, 1:], right)
                episodes = self._give_credit(episodes, carried, earned, low)
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
        return output, replace(
            state,
            episodes=replace(episodes, matched=_of_last_query(recollection.matched, length, low, episodes.matched)),
            vote=_next_vote(vote, output, length, low),
            last_hidden=last_of(hidden, reading.new, state.last_hidden),
            recent_salience=last_of_each_row(extended, length, SMOOTHED - 1),
        )

    def _end_segment(
        self, state: MemoryState, done: list[int], rows: list[int], frozen: bool
    ) -> tuple[MemoryState, Tensor]:
        """The consolidation of the given rows, each of which has just read a whole number of segments.

        Returns:
            The new state, and (R,) how many episodes replay reactivated.
        """
        config, device = self.config, state.last_hidden.device
        index = torch.tensor(rows, device=device)
        everyone = len(rows) == state.last_hidden.shape[0]
        before = state.episodes if everyone else state.episodes.rows(index)
        leaving = [working_fill(done[r] - 1, config) + 1 - working_fill(done[r], config) for r in rows]
        replayed = torch.zeros(len(done), dtype=torch.int64, device=device)
        episodes = admit(before, torch.tensor(leaving, device=device), config)
        if frozen:
            stored = before.slots(0, config.buffer_size).tensors()
            episodes = Episodes(
                **{
                    name: torch.cat((stored[name], tensor[:, config.buffer_size :]), dim=1)
                    for name, tensor in episodes.tensors().items()
                }
            )
        else:
            segment = torch.tensor([done[r] // config.segment_len for r in rows], device=device)
            episodes, reactivated = consolidate(episodes, segment, config)
            replayed = replayed.index_copy(0, index, reactivated)
        if not everyone:
            episodes = state.episodes.merged_rows(index, episodes)
        bound = state.stored_bound if frozen else min(config.buffer_size, state.stored_bound + max(leaving))
        vote = replace(state.vote, in_place=state.vote.in_place.index_fill(0, index, False))
        return replace(state, episodes=episodes, vote=vote, stored_bound=bound), replayed

    def _occupied(self, state: MemoryState, reading: BaseReading) -> tuple[int, int]:
        """The span of slots that can hold anything, so that short texts do not pay for an empty store."""
        n_stored = self.config.buffer_size
        spans = zip(reading.read, reading.new, strict=True)
        return n_stored - state.stored_bound, n_stored + max(working_fill(d, self.config) + n for d, n in spans)

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
            credit=none,
            matched=none,
        )

    def _give_credit(self, episodes: Episodes, carried: Tensor, earned: Tensor, low: int) -> Episodes:
        """Adds to stored episodes their share of each prediction that came true.

        Only the store earns: its episodes are beyond the window, where nothing else could have known.

        Args:
            carried: (R, E) earned at the step's first token. earned: (R, e) at the others, from slot `low` on.
        """
        n_stored = self.config.buffer_size
        credit = episodes.credit.clone() if torch.is_grad_enabled() else episodes.credit
        credit[:, :n_stored] += carried[:, :n_stored]
        credit[:, low:n_stored] += earned[:, : n_stored - low]
        return replace(episodes, credit=credit)


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
