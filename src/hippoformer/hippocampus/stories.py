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
Of many numbers told in the same words, only the one whose name was just read is still led to.

Only a few of the E slots foretold a given token. `find_leads` looks for them once; from query to query only their
weights have to be known, and those of all other slots are made at the end, for all queries at once.
"""

from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from hippoformer.hippocampus.episodes import Episodes

_TINY = 1e-12
# What matches is not lost for resembling too little.
_FLOOR = 1e-4


@dataclass
class Leads:
    """Which episodes foretold the tokens of N queries, and lead on to the next slot.

    Kept of the L queries for which any row has such an episode. Each has K places: the first is the null, the others
    are for episodes; left over places point to the null as well.

    Attributes:
        queries: which of the N, in order.
        column: (R, L, K) int64, of the episode, counting the null in front of the E slots; its successor's is the next.
        real: (R, L, K) 1 where an episode leads, 0 elsewhere.
        link: (R, L, K) int64, which of the K of the query before led to this episode; 0 where none of them did.
        matched: (R, L, K) how many tokens in a row, up to the query's own, were what led to the successor.
    """

    queries: list[int]
    column: Tensor
    real: Tensor
    link: Tensor
    matched: Tensor

    def among(self, low: int, high: int) -> tuple["Leads", slice]:
        """Those of the queries low..high, counted from there, and which of the L they are."""
        kept = slice(bisect_left(self.queries, low), bisect_left(self.queries, high))
        queries = [query - low for query in self.queries[kept]]
        return Leads(queries, self.column[:, kept], self.real[:, kept], self.link[:, kept], self.matched[:, kept]), kept

    def matched_slots(self, n_queries: int, n_slots: int) -> Tensor:
        """(R, N, E) `matched`, of every slot."""
        slots = self.matched.new_zeros(self.matched.shape[0], n_queries, n_slots)
        # The column of an episode is the slot of its successor: there is no null here.
        _add_at(slots, self.queries, self.column, self.matched)
        return slots


@torch.no_grad()
def find_leads(episodes: Episodes, tokens: Tensor, visible: Tensor) -> Leads:
    """Looks for them; their number is asked of the device, all else stays there.

    Args:
        episodes: E slots; `matched` is that of the query before these.
        tokens: (R, N) of the queries. visible: (R, N, E) bool, what each may recall.
    """
    rows, n_queries = tokens.shape
    position = episodes.position
    follows = (position[:, 1:] == position[:, :-1] + 1) & (position[:, :-1] >= 0)  # (R, E-1)
    foretold = torch.where(follows, episodes.token[:, :-1], -1)
    leads = (foretold.unsqueeze(1) == tokens.unsqueeze(-1)) & visible[..., 1:]  # (R, N, E-1)
    # All of them in one list, row by row and query by query.
    width = leads.shape[-1]
    place = leads.flatten().nonzero().squeeze(-1)  # (M,)
    slot, number = place % width, place // width
    row, query = number // n_queries, number % n_queries
    first = torch.searchsorted(place, torch.arange(rows * n_queries + 1, device=place.device) * width)
    count = first.diff().view(rows, n_queries)
    rank = torch.arange(1, place.numel() + 1, device=place.device) - first[number]
    # The token before was read by the query before, and foretold by the slot before.
    earlier = torch.searchsorted(place, place - width - 1).clamp_max(max(place.numel() - 1, 0))
    linked = (place[earlier] == place - width - 1) & (slot > 0) & (query > 0)
    so_far = torch.where(query > 0, 0.0, episodes.matched.float()[row, slot])
    matched = _summed_along(so_far + 1.0, torch.where(linked, earlier, -1), n_queries)

    most = count.amax(0).tolist()
    queries, n_places = [q for q, n in enumerate(most) if n], 1 + max(most)

    def spread(values: Tensor) -> Tensor:
        """(M,) -> (R, L, K)."""
        wide = values.new_zeros(rows, n_queries, n_places)
        wide[row, query, rank] = values
        return wide[:, queries]

    link = torch.where(linked, rank[earlier], 0)
    return Leads(queries, spread(slot + 1), spread(torch.ones_like(matched)), spread(link), spread(matched))


def _summed_along(value: Tensor, earlier: Tensor, longest: int) -> Tensor:
    """(M,) the sum of each value, of that `earlier` in its chain, and so on; -1 ends a chain of at most `longest`."""
    value = torch.cat((value, value.new_zeros(1)))
    earlier = torch.cat((earlier, earlier.new_full((1,), -1)))
    for _ in range((longest - 1).bit_length()):  # every round reaches twice as far back
        value, earlier = value + value[earlier], earlier[earlier]
    return value[:-1]


def _at(queries: list[int], column: Tensor, width: int) -> Tensor:
    """(R, L, K) columns of some queries as places in (N, width), laid end to end."""
    return torch.tensor(queries, device=column.device).unsqueeze(-1) * width + column


def _add_at(dense: Tensor, queries: list[int], column: Tensor, new: Tensor) -> None:
    """Adds (R, L, K) to the columns of some queries in (R, N, width), in place."""
    place = _at(queries, column, dense.shape[-1]).flatten(1)
    dense.view(dense.shape[0], -1).scatter_add_(1, place, new.flatten(1))


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
        surely: (R, L, K) phi. longest: (R, L, K) m^gamma.
        own: (R, n) probability that the base gave each token. before: (R, E + 1) of the query before the first.

    Returns:
        (R, n, E + 1) weights, each query's summing to 1; and (R, n), the part of them that follows a story.
    """
    rows, n_heads, n_queries, width = attention.shape
    # Of each query: what its heads weigh, and what is left beside the stories it follows.
    shares = list(mixture.permute(2, 0, 1).unsqueeze(2).unbind())  # (R, 1, H)
    beside = [attention.new_ones(rows, 1, 1)] * n_queries
    stories: list[Tensor] = []  # (R, 1, K) of the queries with leads: what is added where they lead to
    if leads.queries:
        successor = _at(leads.queries, leads.column + 1, width).unsqueeze(1)  # (R, 1, L, K)
        source = _at([max(query - 1, 0) for query in leads.queries], leads.column, width).unsqueeze(1)

        def look(place: Tensor) -> Tensor:
            """(R, H, L, K)."""
            places = place.flatten(2).expand(-1, n_heads, -1)
            return attention.flatten(2).gather(-1, places).unflatten(-1, place.shape[2:])

        there, known = look(successor) * leads.real.unsqueeze(1), look(source)
        louder = there * kappa[:, None, None]
        # The null is as likely as the base says, and a little of it keeps sums from being zero.
        chance = torch.cat((own[:, leads.queries].unsqueeze(-1), leads.real[..., 1:]), dim=-1)
        one, tiny = attention.new_ones(1), pad(attention.new_full((rows, 1, 1), _TINY), (0, chance.shape[-1] - 1))
        longest = longest * leads.real
        turns = zip(
            leads.queries,
            known.unbind(2),
            leads.link.unsqueeze(2).unbind(1),
            chance.unsqueeze(2).unbind(1),
            there.unbind(2),
            louder.unbind(2),
            louder.transpose(1, 3).unbind(2),  # (R, K, H)
            longest.unsqueeze(2).unbind(1),
            (longest * _FLOOR + tiny).unsqueeze(2).unbind(1),
            (surely * leads.real).unsqueeze(2).unbind(1),
            strict=True,
        )
        # As little as possible happens within a turn.
        last, story = -1, None
        for query, at_source, link, likely, at_successor, led, led_of_heads, long, least, sure in turns:
            if query == 0:
                weights = before.gather(-1, leads.column[:, 0]).unsqueeze(1)
            elif story is not None and last == query - 1:
                weights = torch.baddbmm(story.gather(-1, link), shares[last], at_source)
            else:
                weights = torch.bmm(shares[query - 1], at_source)
            # No gradient runs back along the text: a surprising token multiplies it by 1 / p, token after token.
            lead = torch.addcmul(tiny, weights.detach(), likely)  # (R, 1, K)
            lead = lead / lead.sum(-1, keepdim=True)
            share = shares[query] / torch.baddbmm(one, lead, led_of_heads)
            favoured = torch.bmm(share, led) * lead
            match = torch.addcmul(least, torch.baddbmm(favoured, share, at_successor), long)
            match = match * sure / match.sum(-1, keepdim=True)
            rest = one - match.sum(-1, keepdim=True)
            story = torch.addcmul(match, favoured, rest)
            shares[query], beside[query], last = share * rest, rest, query
            stories.append(story)
    found = torch.einsum("rnh,rhne->rne", torch.cat(shares, dim=1), attention).to(attention.dtype)  # autocast's is half
    if stories:
        _add_at(found, leads.queries, leads.column + 1, torch.cat(stories, dim=1))
    return found, 1.0 - torch.cat(beside, dim=1).squeeze(-1)
