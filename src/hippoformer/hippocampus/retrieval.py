"""Finding the passages that answer a question, by its words.

Words are those of the text, whatever the tokenizer cut: folded to one case and one form, inflections together (Snowball
stemmers, by script), function words left out, scripts without spaces by pairs of characters. A word counts the more the
fewer passages have it (BM25: Robertson & Zaragoza 2009), names and numbers of the query count more, and a passage lends
weight to its neighbours and to its surroundings.
"""

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from itertools import pairwise
from zlib import crc32

import numpy as np
import regex
import snowballstemmer

from hippoformer.errors import InputError
from hippoformer.hippocampus.passages import Passage
from hippoformer.hippocampus.spelling import Spelling

K1, B = 1.2, 0.75  # BM25: how soon a repeated word adds no more; how much a long passage is held back
NEIGHBOURS = (0.6, 0.3)  # of a passage's score that the next one on either side gets, and the one after it
SURROUNDINGS, SURROUNDINGS_WEIGHT = 20, 1.0  # passages on either side, and the weight of their mean score
NAME_WEIGHT = 1.5  # of names and numbers in the query

_WORD = regex.compile(r"[\p{L}\p{M}\p{N}]+")
_UNSPACED = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]+")
_STEMMERS = {
    "LATIN": "english", "CYRILLIC": "russian", "ARABIC": "arabic", "GREEK": "greek", "DEVANAGARI": "hindi",
    "ARMENIAN": "armenian", "TAMIL": "tamil",
}  # fmt: skip
_STOP_WORDS = frozenset(
    """a an the this that these those each every either neither some any no all both such another other what which
    whose i me my mine myself you your yours yourself yourselves he him his himself she her hers herself it its itself
    we us our ours ourselves they them their theirs themselves one who whom of in to for with on at by from up about
    into over after before under between through during out off down upon than as and or but nor so if because while
    although though whether since until am is are was were be been being have has had having do does did doing done can
    could may might must shall should will would ought not s t ll ve re d m don doesn didn isn aren wasn weren haven
    hasn hadn won wouldn couldn shouldn when where why how here there then thus just also too very much many more most
    only own same again once ever yet""".split()  # noqa: SIM905
)


@cache
def _stemmer(language: str) -> Callable[[str], str]:
    return snowballstemmer.stemmer(language).stemWord


@lru_cache(maxsize=1 << 16)
def word_terms(word: str) -> tuple[int, ...]:
    """What a word of a text is found by: none for function words, pairs of characters in scripts without spaces."""
    word = unicodedata.normalize("NFKC", word).casefold()
    if word in _STOP_WORDS:
        return ()
    if unspaced := _UNSPACED.search(word):
        before, run, after = word[: unspaced.start()], unspaced[0], word[unspaced.end() :]
        pairs = [run[i : i + 2] for i in range(len(run) - 1)] or [run]
        return (*word_terms(before), *map(_term, pairs), *word_terms(after)) if word else ()
    script = unicodedata.name(word[0], "").split(" ")[0] if word else ""
    if script == "LATIN":
        word = "".join(c for c in unicodedata.normalize("NFKD", word) if not unicodedata.combining(c))
    if script in _STEMMERS:
        word = _stemmer(_STEMMERS[script])(word)
    return (_term(word),) if word else ()


def _term(word: str) -> int:
    return crc32(word.encode(errors="surrogatepass"))


def terms(text: str) -> list[int]:
    """What the words of a text are found by, in their order."""
    return [term for word in _WORD.findall(text) for term in word_terms(word)]


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
    fit = surround(passages, score(passages, query, spelling))
    found, left = [], n_tokens
    for place in np.lexsort((-np.arange(len(fit)), -fit)):
        if fit[place] <= 0:
            break
        if len(passages[place]) <= left:
            found.append(replace(passages[place], score=float(fit[place])))
            left -= len(passages[place])
    return found


def passage_terms(passage: Passage, spelling: Spelling) -> np.ndarray:
    """(words,) uint32; worked out once for all copies of a passage."""
    if "terms" not in passage.cache:
        passage.cache["terms"] = np.array(terms(spelling.text(passage.token_ids, mark=True)), np.uint32)
    return passage.cache["terms"]


def score(passages: Sequence[Passage], query: str, spelling: Spelling) -> np.ndarray:
    """(passages,) BM25 of each passage by itself."""
    found = [passage_terms(passage, spelling) for passage in passages]
    lengths = np.array([len(each) for each in found])
    flat, owner = np.concatenate(found), np.repeat(np.arange(len(found)), lengths)
    norm = K1 * (1 - B + B * lengths / max(lengths.mean(), 1.0))
    total = np.zeros(len(found))
    for term, weight in query_terms(query).items():
        counts = np.bincount(owner[flat == term], minlength=len(found))
        holders = np.count_nonzero(counts)
        rarity = np.log(1 + (len(found) - holders + 0.5) / (holders + 0.5))
        total += weight * rarity * counts * (K1 + 1) / np.maximum(counts + norm, 1e-9)
    return total


def query_terms(query: str) -> dict[int, float]:
    """The query's words and how much each counts."""
    weights: dict[int, float] = {}
    for place, word in enumerate(_WORD.findall(query)):
        exact = (place and word[0].isupper()) or any(letter.isdigit() for letter in word)
        for term in word_terms(word):
            weights[term] = max(weights.get(term, 0.0), NAME_WEIGHT if exact else 1.0)
    return weights


def surround(passages: Sequence[Passage], fit: np.ndarray) -> np.ndarray:
    """(passages,) scores with what neighbours and surroundings lend; a passage that was not read next lends nothing."""
    adjacent = np.array([left.stop == right.start for left, right in pairwise(passages)], bool)
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
    wanted = set(terms(words))
    if not wanted:
        raise InputError(f"{words!r} has no word that could be looked for; name what is to be forgotten")
    return lambda passage: wanted <= set(passage_terms(passage, spelling).tolist())
