"""Content words and function words of English, by a list of the closed classes, and the class of each token.

Words are found in the text, not in the tokens: a token has the class of the word that most of its characters belong to.
"""

import re
from collections import Counter
from collections.abc import Sequence

CONTENT, FUNCTION, OTHER = CLASSES = ("content", "function", "other")

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")  # letters of any script, with apostrophes inside; digits
# Determiners, pronouns, prepositions, conjunctions, auxiliaries, particles, wh-words and pro-adverbs.
_LIST = """
    a an the this that these those each every either neither some any no all both half several few
    many much more most less least enough such another other what which whose
    i me my mine myself you your yours yourself yourselves he him his himself she her hers herself it its itself us we
    our ours ourselves they them their theirs themselves one oneself who whom whoever whomever whatever whichever
    someone somebody something anyone anybody anything everyone everybody everything nobody nothing none
    thou thee thy thine ye
    of in to for with on at by from up about into over after beneath under above across against along
    among amongst around as before behind below beside besides between beyond despite down during except inside like
    near off onto opposite out outside past per round since than through throughout till toward towards underneath
    unlike until unto upon via within without amid amidst notwithstanding
    and but or nor so yet if because although though while whereas unless lest whether once
    am is are was were be been being have has had having do does did doing done can could may might
    must shall should will would ought cannot need dare
    not n't 't 's 've 're 'll 'd 'm s t ll ve re d m
    when where why how whenever wherever here there then thus hence therefore however whence thence whither"""
FUNCTION_WORDS = frozenset(_LIST.split())


def word_class(word: str) -> str:
    """Function words by the list, with what they contract to; other words with a letter are content words."""
    word = word.lower().replace("’", "'")
    stem, apostrophe, _ = word.partition("'")
    if word in FUNCTION_WORDS or (apostrophe and (stem in FUNCTION_WORDS or word.endswith("n't"))):
        return FUNCTION
    return CONTENT if any(letter.isalpha() for letter in word) else OTHER


def token_classes(text: str, offsets: Sequence[tuple[int, int]]) -> list[str]:
    """The word class of each token.

    Args:
        text: what was tokenised. offsets: character span of each token, as a fast tokenizer gives them.

    Returns:
        One class a token: that of the first of the words that share most characters with it; "" where a token covers
        no character.
    """
    classes, word_at = [], [-1] * len(text)
    for number, match in enumerate(_WORD.finditer(text)):
        classes.append(word_class(match[0]))
        word_at[match.start() : match.end()] = [number] * len(match[0])
    found = []
    for start, end in offsets:
        words = Counter(word for word in word_at[start:end] if word >= 0).most_common(1)
        found.append(classes[words[0][0]] if words else OTHER if end > start else "")
    return found
