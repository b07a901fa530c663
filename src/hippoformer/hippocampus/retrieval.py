"""Finding the passages that answer a question, by its words.

Words are those of the text, whatever the tokenizer cut: folded to one case and one form, inflections together (Snowball
stemmers, by script), function words left out, scripts without spaces by pairs of characters. A word counts the more the
fewer passages have it (BM25: Robertson & Zaragoza 2009). A passage lends weight to its neighbours and surroundings,
which talk of the same; it gains by every further word of the query that stands in it or next to it, and by being said
by someone the query names.
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
COVERAGE = 0.5  # a word's rarity counts so much once more where it stands in a passage, NEIGHBOURS[0] of it next to it
SURROUNDINGS, SURROUNDINGS_WEIGHT = 20, 2.0  # passages on either side, and the weight of their mean score
NAME = 1.0  # gain of a name or number of the query that hardly any passage has; that of common ones is less
LABEL = 1.0  # gain of a passage whose line begins with a name and a colon, if the query has the name

_WORD = regex.compile(r"[\p{L}\p{M}\p{N}]+")
_UNSPACED = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]+")
_LABEL = regex.compile(r"\s*([\p{L}\p{M}\p{N}][\p{L}\p{M}\p{N} .'-]{0,30})[:：]\s")
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
    fit = score(passages, query, spelling)
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
        text = spelling.text(passage.token_ids, mark=True)
        label = _LABEL.match(text)
        passage.cache["terms"] = np.array(terms(text), np.uint32)
        passage.cache["label"] = frozenset(terms(label[1])) if label else frozenset()
    return passage.cache["terms"]


def score(passages: Sequence[Passage], query: str, spelling: Spelling) -> np.ndarray:
    """(P,) how well each passage of a row fits a query; 0 where nothing in it or around it does."""
    found = [passage_terms(passage, spelling) for passage in passages]
    lengths = np.array([len(each) for each in found])
    flat, owner = np.concatenate(found), np.repeat(np.arange(len(found)), lengths)
    norm = K1 * (1 - B + B * lengths / max(lengths.mean(), 1.0))
    adjacent = np.array([left.stop == right.start for left, right in pairwise(passages)], bool)  # (P - 1,)
    wanted = query_terms(query)
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
    return total * (1 + LABEL * np.array([not passage.cache["label"].isdisjoint(wanted) for passage in passages]))


def query_terms(query: str) -> dict[int, bool]:
    """What the query's words are found by, and whether the word is a name or has a digit."""
    found: dict[int, bool] = {}
    for place, word in enumerate(_WORD.findall(query)):
        exact = (place > 0 and word[0].isupper()) or any(letter.isdigit() for letter in word)
        for term in word_terms(word):
            found[term] = found.get(term, False) or exact
    return found


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
    wanted = set(terms(words))
    if not wanted:
        raise InputError(f"{words!r} has no word that could be looked for; name what is to be forgotten")
    return lambda passage: wanted <= set(passage_terms(passage, spelling).tolist())
