"""Following stories: a memory that foretold the token just read leads to its successor, the next slot.

What recall finds by resemblance (see recall) is led forward in time. With r_{t-1}(e) the weight of episode e for the
query before, Bayes' rule against the base says how surely the text goes on as it did there,

    lead_t(e + 1) = r_{t-1}(e) [token_e = x_t] / (sum of these + nothing_{t-1} p_base(x_t)).

What is led to is favoured among what resembles, r'_t = sum_h m_h a_h,t (1 + kappa_h lead_t) / ...; and where m tokens
in a row have been what a story foretold, the story is followed outright, the longest match first (as in prediction by
partial matching, Cleary & Witten 1984, and the unbounded n-grams of Liu et al. 2024, arXiv:2401.17377):

    q_t(e) ~ (r'_t(e) + floor) m_t(e)^gamma over all e with m_t(e) > 0,     phi_t(e) = sigmoid(g(query) + w log m_t(e))
    r_t    = (1 - |f_t|) r'_t + f_t,                                        f_t(e) = phi_t(e) q_t(e)

One token in common says little, ten leave no doubt, however common each of them is.
Of many numbers told in the same words, only the one whose name was just read is still led to. Whether a token is what a
story foretold is asked of words: "Anna" at the beginning of a line is the " Anna" within one (see `model.words`). A
name cut into other tokens still counts: where m_t(e) begins, the characters that came right before in both texts are
added to it, `match_characters` of them as one token. Of equally long matches the newest counts most (`match_recency`):
who was told twice where somebody lives believes the second.

Only a few of the E slots foretold a given token. `find_leads` looks for them once; from query to query only their
weights have to be known, and those of all other slots are made at the end, for all queries at once. A processor goes
through the queries one by one; a GPU, for which every call costs as much as a large one, takes them all at once and
again until nothing changes.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from hippoformer.hippocampus.episodes import Episodes, joined
from hippoformer.model.words import CHARACTERS

_TINY = 1e-12
# What matches is not lost for resembling too little.
_FLOOR = 1e-4
# The characters before a match are those of so many tokens.
_TOKENS_BEFORE = 4
# What matches longer than so many tokens is a statement, no common phrase, and the last time it was made counts most.
TOLD_AGAIN = 3.0
# Lengths are equal that differ by less than a part of a token, for characters; all from `_LENGTHS` parts on are.
_PARTS, _LENGTHS = 64, 1 << 16


@dataclass
class Leads:
    """Which episodes foretold the tokens of N queries, and lead on to the next slot.

    Queries for which no row has such an episode are left out. Each other query has a few places, the first for the null
    and as many more as its row with the most episodes needs; left over places point to the null as well. The P places
    of all queries lie side by side. How many a query has depends on no other query, so that its sums are the same to
    the last bit whatever is read after it.

    Attributes:
        queries: which of the N, in order. places: how many each of these has.
        query: (P,) int64, whose place it is.
        column: (R, P) int64, of the episode, counting the null in front of the E slots; its successor's is the next.
        real: (R, P) 1 where an episode leads, 0 elsewhere.
        link: (R, P) int64, which place of the query before led to this episode; 0 where none of them did.
        matched: (R, P) how many tokens in a row, up to the query's own, were what led to the successor.
        newer: (R, P) how many of the same query matched as many tokens, and were read later; counted where these are
            more than `TOLD_AGAIN`.
    """

    queries: list[int]
    places: list[int]
    query: Tensor
    column: Tensor
    real: Tensor
    link: Tensor
    matched: Tensor
    newer: Tensor

    def among(self, low: int, high: int) -> tuple["Leads", slice]:
        """Those of the queries low..high, counted from there, and which of the P places they have."""
        kept = slice(bisect_left(self.queries, low), bisect_left(self.queries, high))
        first = sum(self.places[: kept.start])
        which = slice(first, first + sum(self.places[kept]))
        queries = [query - low for query in self.queries[kept]]
        shared = (self.query - low, self.column, self.real, self.link, self.matched, self.newer)
        found = (x[..., which] for x in shared)
        return Leads(queries, self.places[kept], *found), which

    def matched_slots(self, n_queries: int, n_slots: int) -> Tensor:
        """(R, N, E) `matched`, of every slot."""
        slots = self.matched.new_zeros(self.matched.shape[0], n_queries, n_slots)
        # The column of an episode is the slot of its successor: there is no null here.
        _add_at(slots, self.query, self.column, self.matched)
        return slots


@dataclass
class Before:
    """What was written before each token, in the texts of R rows: their characters, whatever tokens they were cut into.

    Attributes:
        text: (R, E) int64, before each of E slots, as `texts_before` gives it.
        own_slot: (R,) int64, of the token that the first query has read.
        share: how much of a token one character is.
    """

    text: Tensor
    own_slot: Tensor
    share: float

    def in_common(self, row: Tensor, slot: Tensor, query: Tensor) -> Tensor:
        """(M,) how much is the same before an episode's token and before a query's, in tokens."""
        there = self.text[row, slot]
        differ = there ^ self.text[row, (self.own_slot[row] + query).clamp_max(self.text.shape[1] - 1)]
        # The lowest bit that differs says after how many characters.
        bit = (differ & -differ).clamp_min(1).double().log2().round()
        same = torch.where(differ == 0, _characters(self.text)[row, slot], torch.div(bit, 8, rounding_mode="floor"))
        return same.float() * self.share


@torch.no_grad()
def find_leads(episodes: Episodes, words: Tensor, read: Tensor, visible: Tensor, before: Before | None) -> Leads:
    """Looks for them; their number is asked of the device, all else stays there.

    Args:
        episodes: E slots; `matched` is that of the query before these.
        words: (R, E) what each of them foretells. read: (R, N) words of the queries; both int32.
        visible: (R, N, E) bool, what each query may recall.
        before: what stands before a match that begins, or None if only tokens count.
    """
    rows, n_queries = read.shape
    foretold = torch.where(joined(episodes.position), words[:, :-1], -1)  # (R, E-1)
    leads = (foretold.unsqueeze(1) == read.unsqueeze(-1)) & visible[..., 1:]  # (R, N, E-1)
    # All of them in one list, row by row and query by query.
    width = leads.shape[-1]
    entry = leads.flatten().nonzero().squeeze(-1)  # (M,)
    slot, number = entry % width, entry // width
    row, query = number // n_queries, number % n_queries
    first = torch.searchsorted(entry, torch.arange(rows * n_queries + 1, device=entry.device) * width)
    most = first.diff().view(rows, n_queries).amax(0)  # (N,)
    rank = torch.arange(1, entry.numel() + 1, device=entry.device) - first[number]
    # The token before was read by the query before, and foretold by the slot before.
    earlier = torch.searchsorted(entry, entry - width - 1).clamp_max(max(entry.numel() - 1, 0))
    linked = (entry[earlier] == entry - width - 1) & (slot > 0) & (query > 0)
    so_far = torch.where(query > 0, 0.0, episodes.matched.float()[row, slot])
    if before is not None:
        begins = ~linked & (so_far == 0)
        so_far = torch.where(begins, before.in_common(row, slot, query), so_far)
    matched = _summed_along(so_far + 1.0, torch.where(linked, earlier, -1), n_queries)

    needed = torch.where(most > 0, most + 1, 0)  # (N,) places
    begin = needed.cumsum(0) - needed
    of_all = needed.tolist()
    queries = [number for number, count in enumerate(of_all) if count]

    def packed(values: Tensor) -> Tensor:
        """(M,) -> (R, P)."""
        wide = values.new_zeros(rows, sum(of_all))
        wide[row, begin[query] + rank] = values
        return wide

    return Leads(
        queries=queries,
        places=[of_all[number] for number in queries],
        query=torch.arange(n_queries, device=needed.device).repeat_interleave(needed, output_size=sum(of_all)),
        column=packed(slot + 1),
        real=packed(torch.ones_like(matched)),
        link=packed(torch.where(linked, rank[earlier], 0)),
        matched=packed(matched),
        newer=packed(_newer(matched, number)),
    )


def texts_before(ending: Tensor, position: Tensor) -> Tensor:
    """(R, E) int64, the last `CHARACTERS` characters before each slot's token, the last of them in the lowest byte.

    Args:
        ending: (R, E) the end of each slot's token; 0 where it is not known, and no text reaches over that.
        position: (R, E) of the episodes; no text reaches over a gap either.
    """
    width = ending.shape[1]
    joins, n_characters = pad(joined(position), (1, 0)), _characters(ending)
    text, length, unbroken = torch.zeros_like(ending), torch.zeros_like(ending), torch.ones_like(joins)
    for back in range(1, _TOKENS_BEFORE + 1):
        token = pad(ending, (back, 0))[:, :width]
        unbroken = unbroken & pad(joins, (back - 1, 0))[:, :width] & (token != 0)
        added = torch.where(unbroken & (length < CHARACTERS), token << (8 * length), 0)
        text = text | (added & ((1 << 8 * CHARACTERS) - 1))
        more = pad(n_characters, (back, 0))[:, :width]
        length = torch.where(unbroken, (length + more).clamp_max(CHARACTERS), length)
    return text


def _characters(text: Tensor) -> Tensor:
    """How many there are, of a byte each, none of them zero."""
    return torch.stack([(text >> 8 * place) != 0 for place in range(CHARACTERS)]).sum(0)


def _summed_along(value: Tensor, earlier: Tensor, longest: int) -> Tensor:
    """(M,) the sum of each value, of that `earlier` in its chain, and so on; -1 ends a chain of at most `longest`."""
    value = torch.cat((value, value.new_zeros(1)))
    earlier = torch.cat((earlier, earlier.new_full((1,), -1)))
    for _ in range((longest - 1).bit_length()):  # every round reaches twice as far back
        value, earlier = value + value[earlier], earlier[earlier]
    return value[:-1]


def _newer(matched: Tensor, number: Tensor) -> Tensor:
    """(M,) how many of the same query, its `number` (M,), stand in later slots and match as much; 0 for short matches,
    which are most."""
    long = (matched > TOLD_AGAIN).nonzero().squeeze(-1)
    key = number[long] * _LENGTHS + (matched[long] * _PARTS).round().long().clamp_max(_LENGTHS - 1)
    in_order, order = key.sort(stable=True)
    end = torch.searchsorted(in_order, in_order, right=True)
    newer = torch.zeros_like(matched)
    newer[long[order]] = (end - 1 - torch.arange(end.numel(), device=end.device)).to(matched.dtype)
    return newer


def _add_at(dense: Tensor, query: Tensor, column: Tensor, new: Tensor) -> None:
    """Adds (R, P) to (R, N, width), each to a column (R, P) of its query (P,), in place."""
    dense.view(dense.shape[0], -1).scatter_add_(1, query * dense.shape[-1] + column, new)


def follow(
    attention: Tensor,
    mixture: Tensor,
    kappa: Tensor,
    leads: Leads,
    surely: Tensor,
    longest: Tensor,
    own: Tensor,
    before: Tensor,
) -> tuple[Tensor, Tensor]:
    """Goes through n queries in order, each following what the one before leads to.

    Args:
        attention: (R, H, n, E + 1), null in front. mixture: (R, H, n). kappa: (H,).
        leads: of these queries.
        surely: (R, P) phi. longest: (R, P) m^gamma.
        own: (R, n) probability that the base gave each token. before: (R, E + 1) of the query before the first.

    Returns:
        (R, n, E + 1) weights, each query's summing to 1; and (R, n), the part of them that follows a story.
    """
    rows, n_heads, n_queries, width = attention.shape
    if not leads.queries:
        shares, beside = mixture.transpose(1, 2), attention.new_ones(rows, n_queries)
    else:
        flat = attention.flatten(2)  # (R, H, n (E + 1))

        def look(query: Tensor, column: Tensor) -> Tensor:
            """(R, P, H); what belongs to one query lies together, wherever the others are."""
            seen = flat.gather(-1, (query * width + column).unsqueeze(1).expand(-1, n_heads, -1))
            return seen.transpose(1, 2).contiguous()

        there = look(leads.query, leads.column + 1) * leads.real.unsqueeze(-1)
        # The null is as likely as the base says, and a little of it keeps sums from being zero.
        null = torch.cat((leads.query.new_ones(1), leads.query.diff())) > 0  # (P,) the first place of each query
        tiny = torch.where(null, _TINY, 0.0).to(attention.dtype).expand(rows, -1)
        longest = longest * leads.real
        found = _Found(there, there * kappa, longest, longest * _FLOOR + tiny, surely * leads.real)
        with torch.no_grad():
            known = look((leads.query - 1).clamp_min(0), leads.column)
            chance = torch.where(null, own[:, leads.query], leads.real)
            in_order = _turn_by_turn if attention.device.type == "cpu" else _settled
            led, shares, beside, story = in_order(leads, found, mixture, known, chance, tiny, before)
        if torch.is_grad_enabled():
            # No gradient runs back along the text: a surprising token multiplies it by 1 / p, token after token. So
            # once it is known what leads where, every query stands for itself.
            shares, beside, story = _at_once(leads, found, mixture, led, _summed_by_query(leads, mixture.shape[2]))
    weights = torch.einsum("rnh,rhne->rne", shares, attention).to(attention.dtype)  # autocast's is half
    if leads.queries:
        _add_at(weights, leads.query, leads.column + 1, story)
    return weights, 1.0 - beside


@dataclass
class _Found:
    """Of the P places of all queries: what is there, and how it matches.

    Attributes:
        there, louder: (R, P, H) attention of each head on the successor, and the same times kappa.
        long, least: (R, P) m^gamma, and what of it needs no resemblance. sure: (R, P) phi.
    """

    there: Tensor
    louder: Tensor
    long: Tensor
    least: Tensor
    sure: Tensor


def _turn_by_turn(
    leads: Leads, found: _Found, mixture: Tensor, known: Tensor, chance: Tensor, tiny: Tensor, before: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What leads where, one query after the other.

    Args:
        known: (R, P, H) attention of the query before on each episode that leads.
        chance: (R, P) how likely the token is after it: 1, and what the base says after the null.
        tiny: (R, P) added to that. mixture, before: as for `follow`.

    Returns:
        (R, P) lead; (R, n, H) what is left of the heads' shares and (R, n) of all beside the stories that are
        followed; (R, P) what is added where they lead to.
    """
    rows, _, n_queries = mixture.shape
    one = mixture.new_ones(1)
    shares = list(mixture.permute(2, 0, 1).unsqueeze(2).unbind())  # (R, 1, H)
    beside = [mixture.new_ones(rows, 1, 1)] * n_queries
    leading, stories = list[Tensor](), list[Tensor]()  # (R, 1, K) of the queries with leads, K places each

    def of_each(values: Tensor) -> Sequence[Tensor]:
        """(R, P) -> (R, 1, K) of each query; (R, P, H) -> (R, K, H)."""
        return values.unsqueeze(1).split(leads.places, -1) if values.dim() == 2 else values.split(leads.places, 1)

    turns = zip(
        leads.queries,
        of_each(leads.column),
        of_each(known),
        of_each(leads.link),
        of_each(chance),
        of_each(tiny),
        of_each(found.there),
        of_each(found.louder),
        of_each(found.long),
        of_each(found.least),
        of_each(found.sure),
        strict=True,
    )
    # As little as possible happens within a turn.
    last, story = -1, None
    for query, column, at_source, link, likely, small, at_successor, louder, long, least, sure in turns:
        if query == 0:
            weights = before.unsqueeze(1).gather(-1, column)
        elif story is not None and last == query - 1:
            weights = torch.baddbmm(story.gather(-1, link), shares[last], at_source.mT)
        else:
            weights = torch.bmm(shares[query - 1], at_source.mT)
        lead = torch.addcmul(small, weights, likely)  # (R, 1, K)
        lead = lead / lead.sum(-1, keepdim=True)
        share = shares[query] / torch.baddbmm(one, lead, louder)
        favoured = torch.bmm(share, louder.mT) * lead
        match = torch.addcmul(least, torch.baddbmm(favoured, share, at_successor.mT), long)
        match = match * sure / match.sum(-1, keepdim=True)
        rest = one - match.sum(-1, keepdim=True)
        story = torch.addcmul(match, favoured, rest)
        shares[query], beside[query], last = share * rest, rest, query
        leading.append(lead)
        stories.append(story)
    return (
        torch.cat(leading, dim=-1).squeeze(1),
        torch.cat(shares, dim=1),
        torch.cat(beside, dim=1).squeeze(-1),
        torch.cat(stories, dim=-1).squeeze(1),
    )


def _settled(
    leads: Leads, found: _Found, mixture: Tensor, known: Tensor, chance: Tensor, tiny: Tensor, before: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_turn_by_turn` in few large steps: all queries at once, each after what the last round made of the one before.

    The first query is right after the first round, the next one a round later at the latest. What a query gives hardly
    depends on the one ten before it, so that after some ten rounds nothing changes, to the last bit: what is then found
    is what going in order finds.
    """
    n_queries = mixture.shape[2]
    at_first = leads.query == 0
    source = (leads.query - 1).clamp_min(0)
    place = _place_before(leads)
    summed = _summed_in_places(leads, n_queries)
    shares, beside, story = mixture.transpose(1, 2), mixture.new_ones(mixture[:, 0].shape), torch.zeros_like(tiny)
    for _ in range(n_queries):
        carried = story.gather(-1, place) + (shares[:, source] * known).sum(-1)
        weights = torch.where(at_first, before.gather(-1, leads.column), carried)
        lead = torch.addcmul(tiny, weights, chance)
        lead = lead / summed(lead)[:, leads.query]
        earlier = shares, story
        shares, beside, story = _at_once(leads, found, mixture, lead, summed)
        if torch.equal(shares, earlier[0]) and torch.equal(story, earlier[1]):
            break
    return lead, shares, beside, story


def _place_before(leads: Leads) -> Tensor:
    """(R, P) which of all places led to each; one of a null, whose story is 0, where none did."""
    begins, begin = dict[int, int](), 0
    for query, count in zip(leads.queries, leads.places, strict=True):
        begins[query] = begin
        begin += count
    # From which place on `link` counts, for each query: its own first one is a null.
    counted_from = torch.tensor([begins.get(query - 1, begins[query]) for query in leads.queries])
    # Those of the first query may go to one before all these.
    links = torch.tensor([query - 1 in begins for query in leads.queries])
    counts = torch.tensor(leads.places)
    device = leads.link.device
    return counted_from.repeat_interleave(counts).to(device) + leads.link * links.repeat_interleave(counts).to(device)


def _summed_in_places(leads: Leads, n_queries: int) -> Callable[[Tensor], Tensor]:
    """Sums (R, P, ...) over the places of each query: (R, n, ...), every time in the same order."""
    counts = [0] * n_queries
    for query, count in zip(leads.queries, leads.places, strict=True):
        counts[query] = count
    device, number = leads.query.device, torch.tensor(counts)
    rank = torch.arange(max(counts))
    begin = number.cumsum(0) - number
    place = torch.where(rank < number.unsqueeze(-1), begin.unsqueeze(-1) + rank, int(number.sum())).to(device)

    def summed(values: Tensor) -> Tensor:
        none = values.new_zeros(values.shape[0], 1, *values.shape[2:])
        return torch.cat((values, none), dim=1)[:, place].sum(2)

    return summed


def _summed_by_query(leads: Leads, n_queries: int) -> Callable[[Tensor], Tensor]:
    """The same without room for places that are not there; on a GPU in any order."""

    def summed(values: Tensor) -> Tensor:
        sums = values.new_zeros(values.shape[0], n_queries, *values.shape[2:])
        return sums.index_add(1, leads.query, values)

    return summed


def _at_once(
    leads: Leads, found: _Found, mixture: Tensor, lead: Tensor, summed: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The last three of `_turn_by_turn`, of all queries together; `summed` sums over the places of each."""
    share = mixture.transpose(1, 2) / (1.0 + summed(lead.unsqueeze(-1) * found.louder))  # (R, n, H)
    of_place = share[:, leads.query]
    favoured = (of_place * found.louder).sum(-1) * lead
    match = found.least + (favoured + (of_place * found.there).sum(-1)) * found.long
    match = match * found.sure / summed(match)[:, leads.query]
    rest = 1.0 - summed(match)
    return share * rest.unsqueeze(-1), rest, match + favoured * rest[:, leads.query]
