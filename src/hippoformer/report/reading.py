"""The traced document as the page shows it: tokens, their colours, and the marks where recall changed a prediction."""

import math
import re
from typing import Any

from hippoformer.figures.results import Result

# A change of log p, in nats, from which a token is marked, and those from which the mark is thicker.
LEVELS = (0.1, 0.5, 2.0)
_ONE_LINE_END = re.compile(r"(?<!\n)\n(?!\n)")
_COLUMNS = ("salience", "log_p", "log_p_off", "mixture", "nothing", "hit", "episode", "weight", "stored")


def reading(trace: Result) -> dict[str, Any]:
    """What the page needs of a trace: `tokens` to lay out, `data` for what is shown of each, and a few sums."""
    content = trace.content
    columns = content["tokens"]
    # Books break their lines where the paper ended; only empty lines are kept.
    text = _ONE_LINE_END.sub(" ", "".join(columns["text"]))
    tokens, begin = [], 0
    for number, own in enumerate(columns["text"]):
        tokens.append(
            {
                "text": text[begin : begin + len(own)],
                "salience": round(columns["salience"][number], 2),
                "mark": _mark(columns, number),
                "gain": (columns["log_p"][number] or 0.0) - (columns["log_p_off"][number] or 0.0),
            }
        )
        begin += len(own)
    marked = [token for token in tokens if token["mark"]]
    far = sum("far" in token["mark"] for token in marked)
    known = [on - off for on, off in zip(columns["log_p"], columns["log_p_off"], strict=True) if on is not None]
    return {
        "title": content["document"]["title"].replace("_", " "),
        "source": content["document"]["source"],
        "window": content["model"]["window"],
        "tokens": tokens,
        "tagged": sum(columns["tagged"]) / len(tokens),
        "helped": sum("up" in token["mark"] for token in marked),
        "hurt": sum("down" in token["mark"] for token in marked),
        "gained": sum(token["gain"] for token in marked if token["gain"] > 0),
        "lost": -sum(token["gain"] for token in marked if token["gain"] < 0),
        "far": far,
        "change": 100 * (math.exp(-sum(known) / len(known)) - 1),
        "data": {name: columns[name] for name in _COLUMNS},
    }


def _mark(columns: dict[str, Any], number: int) -> str:
    """Classes of a token whose prediction recall changed; empty for the others."""
    on, off = columns["log_p"][number], columns["log_p_off"][number]
    if on is None or columns["episode"][number] is None or abs(on - off) < LEVELS[0]:
        return ""
    level = sum(abs(on - off) >= least for least in LEVELS)
    place = "far" if columns["stored"][number] else "near"
    return f"{'up' if on > off else 'down'} l{level} {place}"
