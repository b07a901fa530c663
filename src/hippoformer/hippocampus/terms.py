"""What the words of a text are found by: folded to one case and one form, inflections together.

Snowball stemmers by script, function words left out, scripts without spaces by pairs of characters. A term is a hash of
32 bits.
"""

import unicodedata
from collections.abc import Callable
from functools import cache, lru_cache
from zlib import crc32

import regex
import snowballstemmer

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


def terms(text: str) -> list[tuple[int, bool]]:
    """What the words of a text are found by, in their order, and whether the word is a name or has a digit."""
    found = []
    for place, word in enumerate(_WORD.findall(text)):
        exact = (place > 0 and word[0].isupper()) or any(letter.isdigit() for letter in word)
        found += [(term, exact) for term in word_terms(word)]
    return found


def distinct(found: list[tuple[int, bool]]) -> dict[int, bool]:
    """Each of `terms` once: exact where one of its words is."""
    once: dict[int, bool] = {}
    for term, exact in found:
        once[term] = once.get(term, False) or exact
    return once
