"""Episodic memory: what a row remembers, and who may stay when there is no room for all.

An episode is one transition s -> s+1 of the row's own text: a key made from the hidden state at s, and as content the
token read at s+1 with what its hidden state adds. One buffer per row holds, from old to new,

    [ store: M = buffer_size | working: window + segment_len | blank ]

The store is ordered by position with its empty slots first; the working part is filled from the left, one slot a token;
the blank slot stays zero for ever (padding is written there, and an attention that finds nothing else rests on it).
Because the order is that of the text, "the episode after this one" is the next slot, which recall uses.

At a segment end the episodes that left the window compete with the stored ones (`admit`). Everything is vectorised over
rows; nothing here loops over tokens or asks the device for a value.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d, pad

from hippoformer.configuration import HippoFormerConfig
from hippoformer.hippocampus.selection import rule_of
from hippoformer.ops import put, take, winners

# Tokens in a row that must come again for an episode to be repeated; a power of two.
REPEATED = 16
# Salience and priority of a repeated episode, as a part of what they would be.
_WORTH_REPEATED = 1e-3


@dataclass
class Episodes:
    """The episodes of R rows, E = M + working + 1 slots each; a plain value, copied by `rows` and `replace`.

    Attributes:
        key: (R, E, K) unit vector per head.
        value: (R, E, U) content for the residual read-out.
        token: (R, E) int32, the token that was read at s+1.
        position: (R, E) int32, s+1 counted in the row's own tokens; -1 where the slot is empty.
        salience: (R, E) in [0, 1].
        surprise: (R, E, 1) 1 - p of the token under the base; (R, E, 0) where the selection rule does not read it.
        priority: (R, E) P; the importance at writing, raised by replay.
        age: (R, E) segments since the last reactivation.
        credit: (R, E) predictions owed to this episode (sum of posterior shares), fading like the priority.
        matched: (R, E) how many tokens in a row, up to the row's last, it continues (see continuation).
    """

    key: Tensor
    value: Tensor
    token: Tensor
    position: Tensor
    salience: Tensor
    surprise: Tensor
    priority: Tensor
    age: Tensor
    credit: Tensor
    matched: Tensor

    @classmethod
    def empty(cls, rows: int, config: HippoFormerConfig, dtype: torch.dtype, device: torch.device | str) -> "Episodes":
        """An empty memory for `rows` rows; keys and values in `dtype`, counters in float32."""
        slots = config.buffer_size + config.working_slots + 1

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(rows, slots, *shape, dtype=dtype, device=device)

        return cls(
            key=zeros(config.key_dim, dtype=dtype),
            value=zeros(config.recall_value_dim, dtype=dtype),
            token=zeros(dtype=torch.int32),
            position=zeros(dtype=torch.int32) - 1,
            salience=zeros(),
            surprise=zeros(int(rule_of(config).reads_surprise)),
            priority=zeros(),
            age=zeros(),
            credit=zeros(),
            matched=zeros(),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Field name -> tensor."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def valid(self) -> Tensor:
        """(R, E) bool, slots that hold an episode."""
        return self.position >= 0

    def effective_priority(self, decay: float) -> Tensor:
        """(R, E) P * decay ** age."""
        return self.priority * decay**self.age

    def map(self, function) -> "Episodes":  # type: ignore[no-untyped-def]
        """A new value with `function` applied to every tensor."""
        return Episodes(**{name: function(tensor) for name, tensor in self.tensors().items()})

    def rows(self, index: Tensor) -> "Episodes":
        """The chosen rows, copied."""
        return self.map(lambda tensor: tensor.index_select(0, index))

    def merged_rows(self, index: Tensor, other: "Episodes") -> "Episodes":
        """This value with row index[i] replaced by row i of `other`."""
        return Episodes(
            **{
                name: mine.index_copy(0, index, theirs)
                for (name, mine), theirs in zip(self.tensors().items(), other.tensors().values(), strict=True)
            }
        )

    def slots(self, low: int, high: int) -> "Episodes":
        """A view of the slots low..high of every row."""
        return self.map(lambda tensor: tensor[:, low:high])

    def write(self, index: Tensor, new: "Episodes") -> "Episodes":
        """Writes new episodes (R, N, ...) into the slots `index` (R, N); in place where no gradient is involved."""
        return Episodes(
            **{
                name: put(mine, index, theirs)
                for (name, mine), theirs in zip(self.tensors().items(), new.tensors().values(), strict=True)
            }
        )


def joined(position: Tensor) -> Tensor:
    """(R, E - 1) bool of positions (R, E): whether each slot leads to the next, which holds the token after its own."""
    return (position[:, 1:] == position[:, :-1] + 1) & (position[:, :-1] >= 0)


def repeats(token: Tensor, position: Tensor) -> Tensor:
    """(R, E) bool, whether the `REPEATED` tokens of the text from an episode's own on come again in newer episodes.

    Args:
        token, position: (R, E) of the episodes, from old to new.
    """
    n_slots, reach = token.shape[1], 1
    stretch, whole = _numbered(token.long()), position >= 0
    if n_slots < REPEATED:
        return torch.zeros_like(whole)
    # Every stretch of 1, 2, 4, ... tokens gets a number, equal ones the same (Karp, Miller & Rosenberg 1972).
    while reach < REPEATED:
        goes_on = pad((position[:, reach:] == position[:, :-reach] + reach) & whole[:, reach:], (0, reach))
        whole = whole & goes_on
        stretch = _numbered(stretch * n_slots + pad(stretch[:, reach:], (0, reach)))
        reach *= 2
    stretch = torch.where(whole, stretch, -1 - torch.arange(n_slots, device=token.device))
    in_order, order = stretch.sort(dim=-1, stable=True)
    return torch.zeros_like(whole).scatter(-1, order, pad(in_order[:, 1:] == in_order[:, :-1], (0, 1)))


def _numbered(code: Tensor) -> Tensor:
    """(R, E) int64 below E, the same for equal codes (R, E) of a row and for no others."""
    in_order, order = code.sort(dim=-1)
    number = pad(in_order[:, 1:] != in_order[:, :-1], (1, 0)).cumsum(-1)
    return torch.zeros_like(code).scatter(-1, order, number)


def importance(salience: Tensor, config: HippoFormerConfig) -> Tensor:
    """Priority of an episode: 1 up to salience 0.5, then growing over `importance_weight_range`."""
    low, high = config.importance_weight_range
    return torch.where(salience > 0.5, low + (high - low) * (2.0 * salience - 1.0), 1.0)


def admit(episodes: Episodes, leaving: Tensor, config: HippoFormerConfig) -> Episodes:
    """Lets the first `leaving` working episodes of each row compete with its store, and moves the others up.

    Args:
        episodes: the memory at a segment end.
        leaving: (R,) int64, episodes of the row that are no longer within the window.

    Returns:
        The new memory: the `buffer_size` best of store and leavers by the rule `config.selection`, and the remaining
        working episodes moved to the left.
    """
    n_stored, n_working = config.buffer_size, config.working_slots
    if config.capture_span:
        episodes = _captured(episodes, leaving, config)
    episodes = _repeats_discounted(episodes, leaving, config)
    slots = torch.arange(n_stored + n_working, device=leaving.device)
    contender = episodes.valid[:, :-1] & (slots < n_stored + leaving.unsqueeze(-1))
    with torch.no_grad():
        score = rule_of(config).score(episodes.slots(0, n_stored + n_working), config)
        kept = winners(score.masked_fill(~contender, -torch.inf), n_stored)  # (R, M)
    working = torch.arange(n_working, device=leaving.device) + n_stored + leaving.unsqueeze(-1)  # (R, W)
    blank = n_stored + n_working
    working = working.clamp_max(blank)
    index = torch.cat((kept, working, working.new_full((working.shape[0], 1), blank)), dim=-1)
    holds = take(contender, kept)
    moved = episodes.map(lambda tensor: take(tensor, index))
    moved.position[:, :n_stored].masked_fill_(~holds, -1)
    return moved


def _captured(episodes: Episodes, leaving: Tensor, config: HippoFormerConfig) -> Episodes:
    """The memory with the leavers judged by the passage they stand in: salience, the priority made of it, surprise.

    Synaptic tagging and capture (Frey & Morris 1997): what is in itself of little note is kept if it stands among
    things of note, and lost if it stands alone. A number is worth nothing without the words that say whose it is. The
    worth of a passage is the mean over `capture_span` tokens on either side of its middle; a token counts to the best
    passage whose middle is at most half as far.
    """
    low, high, span = config.buffer_size, config.buffer_size + config.working_slots, config.capture_span
    working = episodes.slots(low, high)
    real = working.valid.to(working.salience.dtype).unsqueeze(1)  # (R, 1, W)
    judgements = torch.cat((working.salience.unsqueeze(-1), working.surprise), dim=-1).transpose(1, 2)  # (R, 1 or 2, W)
    sums = avg_pool1d(torch.cat((judgements * real, real), 1), 2 * span + 1, 1, span)
    worth = sums[:, :-1] / sums[:, -1:].clamp_min(1e-6)
    worth = max_pool1d(worth, 2 * (span // 2) + 1, 1, span // 2)
    salience, surprise = worth[:, 0], worth[:, 1:].transpose(1, 2)
    leaves = torch.arange(config.working_slots, device=leaving.device) < leaving.unsqueeze(-1)

    def judged(old: Tensor, new: Tensor) -> Tensor:
        leaver = leaves.view(*leaves.shape, *[1] * (new.dim() - 2))
        return torch.cat((old[:, :low], torch.where(leaver, new, old[:, low:high]), old[:, high:]), dim=1)

    priority = importance(salience.detach(), config)
    return replace(
        episodes,
        salience=judged(episodes.salience, salience),
        surprise=judged(episodes.surprise, surprise),
        priority=judged(episodes.priority, priority),
    )


def _repeats_discounted(episodes: Episodes, leaving: Tensor, config: HippoFormerConfig) -> Episodes:
    """The memory with next to no salience and priority for leavers that the window repeats.

    Otherwise a long run of one token, a table of zeros, a rule, would take all the room there is.
    """
    low, high = config.buffer_size, config.buffer_size + config.working_slots
    repeated = repeats(episodes.token[:, low:high], episodes.position[:, low:high])
    leaves = torch.arange(config.working_slots, device=leaving.device) < leaving.unsqueeze(-1)
    worth = pad(torch.where(repeated & leaves, _WORTH_REPEATED, 1.0), (low, 1), value=1.0)
    return replace(
        episodes,
        salience=episodes.salience * worth,
        surprise=episodes.surprise * worth.unsqueeze(-1),
        priority=episodes.priority * worth,
    )
