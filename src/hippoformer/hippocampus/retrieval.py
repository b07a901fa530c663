"""Finding the passages that answer a question, by its words.

Words are those of the text, whatever the tokenizer cut (see `terms`). A word counts the more the fewer passages have it
(BM25: Robertson & Zaragoza 2009). A passage lends weight to its neighbours and surroundings, which talk of the same; it
gains by every further word of the query that stands in it or next to it, and by being said by someone the query names.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from hippoformer.errors import InputError
from hippoformer.hippocampus.passages import Passage, passage_terms
from hippoformer.hippocampus.spelling import Spelling
from hippoformer.hippocampus.terms import distinct, terms

K1, B = 1.2, 0.75  # BM25: how soon a repeated word adds no more; how much a long passage is held back
NEIGHBOURS = (0.6, 0.3)  # of a passage's score that the next one on either side gets, and the one after it
COVERAGE = 0.5  # a word's rarity counts so much once more where it stands in a passage, NEIGHBOURS[0] of it next to it
SURROUNDINGS, SURROUNDINGS_WEIGHT = 20, 2.0  # passages on either side, and the weight of their mean score
NAME = 1.0  # gain of a name or number of the query that hardly any passage has; that of common ones is less
LABEL = 1.0  # gain of a passage whose line begins with a name and a colon, if the query has the name


def retrieve(passages: Sequence[Passage], query: str, n_tokens: int, spelling: Spelling) -> list[Passage]:
    """The passages that fit a query best.

    Args:
        passages: of one row, in the order of its text.
        query: text, such as a question.
        n_tokens: of all that is returned together, at most.
        spelling: of the passages' tokens.

    Returns:
        Passages with their `score`, best first, of equals the later first; empty where no word of the query was read.
    """
    if not passages:
        return []
    fit = score(passages, query, spelling)
    found, left = [], n_tokens
    for place in np.lexsort((-np.arange(len(fit)), -fit)):
        if fit[place] <= 0:
            break
        if len(passages[place]) <= left:
            found.append(replace(passages[place], score=float(fit[place])))
            left -= len(passages[place])
    return found


def score(passages: Sequence[Passage], query: str, spelling: Spelling) -> np.ndarray:
    """(P,) how well each passage of a row fits a query; 0 where nothing in it or around it does."""
    found = [passage_terms(passage, spelling) for passage in passages]
    lengths = np.array([len(each.terms) for each in found])
    flat, owner = np.concatenate([each.terms for each in found]), np.repeat(np.arange(len(found)), lengths)
    norm = K1 * (1 - B + B * lengths / max(lengths.mean(), 1.0))
    adjacent = np.array([left.stop == right.start for left, right in pairwise(passages)], bool)  # (P - 1,)
    wanted = distinct(terms(query))
    alone, covered = np.zeros((2, len(found)))
    for term, exact in wanted.items():
        counts = np.bincount(owner[flat == term], minlength=len(found))  # (P,)
        here = counts > 0
        rarity = np.log(1 + (len(found) - here.sum() + 0.5) / (here.sum() + 0.5))
        rarity *= 1 + NAME * exact * rarity / np.log(1 + len(found))
        alone += rarity * counts * (K1 + 1) / np.maximum(counts + norm, 1e-9)
        beside = np.zeros(len(found), bool)
        beside[1:] |= here[:-1] & adjacent
        beside[:-1] |= here[1:] & adjacent
        covered += rarity * np.where(here, 1.0, NEIGHBOURS[0] * beside)
    total = surround(alone + COVERAGE * covered, adjacent)
    return total * (1 + LABEL * np.array([not each.label.isdisjoint(wanted) for each in found]))


def surround(fit: np.ndarray, adjacent: np.ndarray) -> np.ndarray:
    """(P,) scores with what neighbours and surroundings lend; a passage that was not read next lends nothing."""
    total, joined = fit.copy(), np.ones(len(fit), bool)
    for distance, weight in enumerate(NEIGHBOURS, start=1):
        joined = joined[:-1] & adjacent[distance - 1 :]
        total[distance:] += weight * joined * fit[:-distance]
        total[:-distance] += weight * joined * fit[distance:]
    sums = np.concatenate([[0.0], np.cumsum(fit)])
    low = np.maximum(np.arange(len(fit)) - SURROUNDINGS, 0)
    high = np.minimum(np.arange(len(fit)) + SURROUNDINGS + 1, len(fit))
    return total + SURROUNDINGS_WEIGHT * (sums[high] - sums[low]) / (high - low)


def mentions(words: str, spelling: Spelling) -> Callable[[Passage], bool]:
    """The condition, for `Passages.forget`, that a passage has all of these words, inflected or not.

    Raises:
        InputError: none but function words: every passage would fit.
    """
    wanted = {term for term, _ in terms(words)}
    if not wanted:
        raise InputError(f"{words!r} has no word that could be looked for; name what is to be forgotten")
    return lambda passage: wanted <= passage_terms(passage, spelling).exact.keys()
