"""Where a text pauses: the ends of sentences, lines and turns, in any script, at which it is cut into passages."""

import re
from bisect import bisect_right
from codecs import getincrementaldecoder
from itertools import accumulate

from hippoformer.configuration import LONGEST_PASSAGE
from hippoformer.hippocampus.spelling import Spelling

SHORTEST, SHORTEST_LINE, LONGEST = 16, 4, LONGEST_PASSAGE  # tokens of a passage
AHEAD = 8  # tokens after the longest passage that may decide where it ends
WRAPPED = range(50, 91)  # characters of a line that may have been broken for its length, within a sentence

_CLOSING = "\"'”’»›)\\]}」』】）〉》*_"
_STOP = f"(?P<stop>[.!?…‥]+[{_CLOSING}]*(?=\\s|$)|[。！？｡．؟۔।॥։၊။]+[{_CLOSING}]*)"
_PAUSE = re.compile(rf"(?:{_STOP}|(?=\n)|(?<=\S)(?=[^\S\n]+\n))(?P<space>\s*)")
# Where a passage that would be too long is cut, best first: any stop or line end, a comma, a space.
_SOFT = (re.compile(rf"{_STOP}\s*|\n\s*"), re.compile(r"(?:[,;:–—](?=\s)|[，、；：،؛])\s*"), re.compile(r"\s+"))
_LAST_WORD = re.compile(r"[^\W\d_]+$")
_ABBREVIATIONS = frozenset(
    """mr mrs ms dr st prof rev gen col capt lt sgt maj cmdr hon gov sen rep pres messrs mme mlle mt ft no nos vol fig
    ch pp op vs cf ca approx viz eg ie sra srta dra nr hr fr bd ул им см стр тов""".split()  # noqa: SIM905
)


def find_cut(spelling: Spelling, ids: list[int], column: int) -> int:
    """Where the passage that begins with these tokens ends; 0 where later tokens may still decide.

    Args:
        ids: at most LONGEST + 8 tokens. column: characters of their first line that stand before them.
    """
    pieces = [spelling.marked_pieces[number] for number in ids]
    blob = b"".join(pieces)
    text = getincrementaldecoder("utf-8")("surrogateescape").decode(blob)  # without a last character that is incomplete
    ends = list(accumulate(map(len, pieces)))  # bytes up to and with each token
    enough = len(ids) == LONGEST + AHEAD

    def boundary(low: int, high: int) -> int:
        """The last place between tokens from character `low` to character `high`; 0: none."""
        if len(text) != len(blob):
            low, high = (len(text[:at].encode(errors="surrogateescape")) for at in (low, high))
        place = bisect_right(ends, high)
        while place and ends[place - 1] >= low and _cuts_character(blob, ends[place - 1]):
            place -= 1
        return place if place and ends[place - 1] >= low else 0

    sentence = 0
    for match in _PAUSE.finditer(text):
        if match.end() == len(text) and not enough:
            return 0
        least = _shortest(text, match, column)
        place = boundary(match.start("space"), match.end()) if least else 0
        if place > LONGEST:
            break
        if least and place >= least:
            if least == SHORTEST_LINE:
                return place
            sentence = place
    if not enough or sentence:
        return sentence if enough else 0
    for pattern in _SOFT:
        places = [boundary(len(match[0].rstrip()) + match.start(), match.end()) for match in pattern.finditer(text)]
        if fitting := [place for place in places if SHORTEST <= place <= LONGEST]:
            return fitting[-1]
    whole = [place for place in range(SHORTEST, LONGEST + 1) if not _cuts_character(blob, ends[place - 1])]
    return whole[-1] if whole else LONGEST


def _cuts_character(blob: bytes, offset: int) -> bool:
    return offset < len(blob) and blob[offset] & 0xC0 == 0x80


def _shortest(text: str, match: re.Match[str], column: int) -> int:
    """Tokens that a passage must have to end at this pause; 0: it is none."""
    line_ends = match["space"].count("\n")
    ended = match["stop"] is not None and not text[match.end() : match.end() + 1].islower()
    if ended and match["stop"] == ".":
        last = _LAST_WORD.search(text[max(0, match.start() - 12) : match.start()])
        ended = last is None or not _abbreviates(last[0])
    if line_ends == 1 and not ended:
        before = text.rfind("\n", 0, match.start()) + 1
        length = match.start("space") - before + (0 if before else column)
        return 0 if length in WRAPPED else SHORTEST_LINE
    return SHORTEST_LINE if line_ends else SHORTEST if ended else 0


def _abbreviates(word: str) -> bool:
    return word.lower() in _ABBREVIATIONS or (len(word) == 1 and word.isupper() and word != "I")
