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

from dataclasses import dataclass

import torch
from torch import Tensor

from hippoformer.hippocampus.episodes import Episodes

_TINY = 1e-12
# What matches is not lost for resembling too little.
_FLOOR = 1e-4


@dataclass
class Leads:
    """Which episodes foretold the token of each of N queries, and lead to the next slot: K - 1 of a query, at most.

    Columns count the null in front of the E slots. The first of the K is the null, which leads nowhere; so does what
    fills up queries with fewer.

    Attributes:
        column: (R, N, K) int64, of the episode; that of its successor is the next.
        real: (R, N, K) bool, where an episode leads.
        link: (R, N, K) int64, which of the K of the query before led to this episode; 0 where none of them did.
        matched: (R, N, K) how many tokens in a row, up to the query's own, were what led to the successor.
        leading: of each query, whether anything leads anywhere in any row.
    """

    column: Tensor
    real: Tensor
    link: Tensor
    matched: Tensor
    leading: list[bool]

    def of(self, queries: slice) -> "Leads":
        """Those of some of the queries."""
        return Leads(
            self.column[:, queries],
            self.real[:, queries],
            self.link[:, queries],
            self.matched[:, queries],
            self.leading[queries],
        )

    def matched_slots(self, n_slots: int) -> Tensor:
        """(R, N, E) `matched`, of every slot."""
        none = self.matched.new_zeros(*self.matched.shape[:2], n_slots)
        return none.scatter_add(-1, self.column, self.matched)  # a column without the null: the successor's slot


@torch.no_grad()
def find_leads(episodes: Episodes, tokens: Tensor, visible: Tensor) -> Leads:
    """Looks for them, with the device's answer awaited once.

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
    slot, query = place % width, place // width
    first = torch.searchsorted(place, torch.arange(rows * n_queries + 1, device=place.device) * width)
    rank = torch.arange(1, place.numel() + 1, device=place.device) - first[query]
    # Queries are consecutive, so what led here is one query and one slot before.
    earlier = torch.searchsorted(place, place - width - 1).clamp_max(max(place.numel() - 1, 0))
    linked = (place[earlier] == place - width - 1) & (slot > 0) & (query % n_queries > 0)
    before = torch.where(query % n_queries > 0, 0.0, episodes.matched.float()[query // n_queries, slot])
    matched = _summed_along(before + 1.0, torch.where(linked, earlier, -1), n_queries)

    count = first.diff().view(rows, n_queries)
    most = count.amax(0).tolist()
    shape = (rows, n_queries, 1 + max(most))

    def spread(values: Tensor) -> Tensor:
        """(M,) -> (R, N, K)."""
        wide = values.new_zeros(rows * n_queries, shape[-1])
        wide[query, rank] = values
        return wide.view(shape)

    real = torch.arange(shape[-1], device=place.device)
    real = (real > 0) & (real <= count.unsqueeze(-1))
    link = torch.where(linked, rank[earlier], 0)
    return Leads(spread(slot + 1), real, spread(link), spread(matched), [n > 0 for n in most])


def _summed_along(value: Tensor, earlier: Tensor, longest: int) -> Tensor:
    """(M,) the sum of each value, of that `earlier` in its chain, and so on; -1 ends a chain of at most `longest`."""
    value = torch.cat((value, value.new_zeros(1)))
    earlier = torch.cat((earlier, earlier.new_full((1,), -1)))
    for _ in range((longest - 1).bit_length()):  # every round reaches twice as far back
        value, earlier = value + value[earlier], earlier[earlier]
    return value[:-1]


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
        surely: (R, n, K) phi. longest: (R, n, K) m^gamma.
        own: (R, n) probability that the base gave each token. before: (R, E + 1) of the query before the first.

    Returns:
        (R, n, E + 1) weights, each query's summing to 1; and (R, n), the part of them that follows a story.
    """
    n_heads, real = mixture.shape[1], leads.real
    # Of each query: what the heads weigh, all told, and what its stories add to that.
    shares = list(mixture.permute(2, 0, 1).unsqueeze(2).unbind())  # (R, 1, H)
    stories = [attention.new_zeros(attention.shape[0], 1, real.shape[-1])] * len(shares)  # (R, 1, K)
    followed = [attention.new_zeros(attention.shape[0], 1, 1)] * len(shares)
    if any(leads.leading):
        to = (leads.column + 1).unsqueeze(1).expand(-1, n_heads, -1, -1)  # (R, H, n, K)
        there = attention.gather(-1, to) * real.unsqueeze(1)
        louder = there * kappa[:, None, None]
        source = leads.column[:, 1:].unsqueeze(1).expand(-1, n_heads, -1, -1)
        known = attention[:, :, :-1].gather(-1, source).unbind(2)  # (R, H, K), of the query before
        longest = longest * real
        chance = real.to(own.dtype)
        chance[..., 0] = own
        turns = zip(
            there.unbind(2),
            louder.unbind(2),
            louder.transpose(1, 3).unbind(2),  # (R, K, H)
            longest.unsqueeze(2).unbind(1),
            (longest * _FLOOR).unsqueeze(2).unbind(1),
            surely.unsqueeze(2).unbind(1),
            chance.unsqueeze(2).unbind(1),
            leads.link.unsqueeze(2).unbind(1),
            strict=True,
        )
        # One turn a token that anything foretold: as little as possible happens within it.
        for turn, (resembles, led, led_heads, long, least, sure, likely, link) in enumerate(turns):
            if not leads.leading[turn]:
                continue
            if turn:
                weights = torch.baddbmm(stories[turn - 1].gather(-1, link), shares[turn - 1], known[turn - 1])
            else:
                weights = before.gather(-1, leads.column[:, 0]).unsqueeze(1)
            # No gradient runs back along the text: a surprising token multiplies it by 1 / p, token after token.
            lead = weights.detach() * likely  # (R, 1, K)
            lead = lead / lead.sum(-1, keepdim=True).add_(_TINY)
            share = shares[turn] / torch.bmm(lead, led_heads).add_(1.0)
            favoured = torch.bmm(share, led) * lead
            match = torch.addcmul(least, torch.bmm(share, resembles) + favoured, long)
            match = match * sure / match.sum(-1, keepdim=True).add_(_TINY)
            followed[turn] = match.sum(-1, keepdim=True)
            rest = 1.0 - followed[turn]
            shares[turn], stories[turn] = share * rest, torch.addcmul(match, favoured, rest)
    found = torch.einsum("rnh,rhne->rne", torch.cat(shares, dim=1), attention)
    if any(leads.leading):
        found = found.scatter_add(-1, leads.column + 1, torch.cat(stories, dim=1))
    return found, torch.cat(followed, dim=1).squeeze(-1)
