"""The tables of the report, and the figures at its head, from whatever result files there are."""

from collections.abc import Callable, Sequence
from typing import Any

from hippoformer.figures.results import Result, of_format, p_value

Row = list[str]
Shown = dict[str, Any]
Make = Callable[[Result], list[Row]]


def cards(results: Sequence[Result]) -> list[Shown]:
    """The few numbers to begin with: `value`, `label`, `detail`."""
    found = []
    for result in of_format(results, "hippoformer.perplexity/1"):
        memory = result.content["conditions"].get("memory")
        if memory is None or memory["against_off"] is None:
            continue
        compared = memory["against_off"]
        found.append(
            {
                "value": _change(compared["ratio"], brackets=False),
                "label": f"perplexity, {result.title}",
                "detail": f"{_range(compared['ratio'])}, better in {compared['documents_better']} of "
                f"{compared['documents']} documents",
            }
        )
    for result in of_format(results, "hippoformer.perplexity/1")[:1]:
        memory = result.content["conditions"].get("memory")
        if memory is not None:
            window, own = memory["window_nbytes"] / 1e6, memory["memory_nbytes"] / 1e6
            found.append(
                {
                    "value": f"{own:.1f} MB",
                    "label": "of memory a text, however long",
                    "detail": f"beside {window:.1f} MB of window keys and values",
                }
            )
    return found


def tables(results: Sequence[Result]) -> list[Shown]:
    """Every table there are results for: `title`, `note`, `headings`, `rows`, `results`."""
    shown = []
    for form, title, note, headings, make in _TABLES:
        chosen = of_format(results, form)
        rows = [row for result in chosen for row in make(result)]
        if rows:
            shown.append({"title": title, "note": note, "headings": headings, "rows": rows, "results": chosen})
    return shown


def _headline(result: Result) -> list[Row]:
    return [
        [
            row["name"],
            _number(row["value"]) + _ends(row["low"], row["high"], _number),
            row["unit"] or "",
            "" if row["control"] is None else f"{_number(row['control'])} ({row['control_name']})",
            "" if row["target"] is None else _number(row["target"]),
        ]
        for row in result.content["headline"]
    ]


def _perplexity(result: Result) -> list[Row]:
    return [
        [
            result.title,
            name,
            f"{c['tokens_scored']:,}",
            _interval(c["token_perplexity"], "{:.2f}".format),
            "" if c["against_off"] is None else _change(c["against_off"]["ratio"]),
            "" if c["bits_per_byte"] is None else f"{c['bits_per_byte']:.4f}",
            f"{c['window_nbytes'] / 1e6:.1f} + {c['memory_nbytes'] / 1e6:.1f}",
        ]
        for name, c in result.content["conditions"].items()
    ]


def _recall(result: Result) -> list[Row]:
    return [
        [
            cell["kind"],
            f"{cell['distance']:,}",
            str(cell["cases"]),
            _right(cell),
            f"{100 * cell['right_off']:.0f} %",
            f"{cell['nats']:.1f}",
            f"{cell['nats_off']:.1f}",
            f"{100 * cell['kept']:.0f} %",
        ]
        for cell in result.content["cells"]
    ]


def _babilong(result: Result) -> list[Row]:
    return [
        [
            result.title,
            cell["task"],
            f"{cell['length']:,}",
            cell["condition"],
            str(cell["cases"]),
            _right(cell),
            f"{cell['nats']:.1f}",
        ]
        for cell in result.content["cells"]
    ]


def _brain(result: Result) -> list[Row]:
    return [
        [
            f"{measure['label']}, {measure['unit']}",
            rule,
            "undefined" if interval is None else _interval(interval, _number),
            "" if measure["chance"] is None else _number(measure["chance"]),
            "" if measure["target"] is None or i else _number(measure["target"]),
        ]
        for measure in result.content["measures"]
        for i, (rule, interval) in enumerate(measure["values"].items())
    ]


def _contestants(result: Result) -> list[Row]:
    return [
        [
            result.title,
            c["name"],
            c["kind"],
            _interval(c["bits_per_byte"], "{:.4f}".format),
            "" if c["against"] is None else _change(c["against"]["bits_ratio"]),
            f"{c['state_nbytes'] / 1e6:.1f}" if c["state_nbytes"] else "",
        ]
        for c in result.content["contestants"]
    ]


def _salience(result: Result) -> list[Row]:
    return [
        [result.title, rule["rule"], *(_interval(rule[name], "{:.3f}".format) for name in _CREDIT)]
        for rule in result.content["rules"]
    ]


def _quality(result: Result) -> list[Row]:
    memory, off = result.content["conditions"]["memory"], result.content["conditions"]["off"]
    rows = []
    for metric in memory:
        compared = result.content["differences"].get(metric)
        p = None if compared is None else p_value(compared["test"])
        rows.append(
            [
                metric.replace("_", " "),
                _interval(memory[metric], _number),
                _interval(off[metric], _number),
                "" if compared is None else _interval(compared["difference"], _number),
                "" if p is None else _number(p),
            ]
        )
    return rows


_CREDIT = ("spearman", "pearson", "held")

_TABLES: tuple[tuple[str, str, str, tuple[str, ...], Make], ...] = (
    (
        "hippoformer.evaluation/1",
        "Headline",
        "Brackets are 95 % intervals. The control is what the same measure gives without what is being measured.",
        ("measure", "value", "unit", "control", "the original's"),
        _headline,
    ),
    (
        "hippoformer.perplexity/1",
        "Perplexity of streamed text",
        "Every document is read in order from an empty state and every token after the first scored once. “off” is the "
        "base model alone with the same window; “window-only” recalls from the window; “other-document” remembers "
        "another text. Brackets: 95 % bootstrap intervals over documents.",
        ("text", "reading", "tokens", "token perplexity", "against off", "bits/byte", "state, MB"),
        _perplexity,
    ),
    (
        "hippoformer.recall/1",
        "Facts told once",
        "Made-up facts planted in long texts and asked for later. Right: every token of the answer. Brackets: 95 % "
        "intervals by Wilson's formula.",
        ("fact", "tokens ago", "cases", "right", "right, off", "−log p", "−log p, off", "still stored"),
        _recall,
    ),
    (
        "hippoformer.babilong/1",
        "Stories hidden in books",
        "Questions about stories of bAbI whose sentences are hidden in a book, by the least number of tokens read. "
        "Right: every token of the answer. “window”: the base alone, which reads only so many. Brackets: 95 % "
        "intervals by Wilson's formula.",
        ("report", "task", "tokens", "reading", "cases", "right", "−log p"),
        _babilong,
    ),
    (
        "hippoformer.brain/1",
        "Brain-like behaviour",
        "Each measure under the trained gate and its controls, with 95 % intervals.",
        ("measure", "gate", "value", "chance", "the original's"),
        _brain,
    ),
    (
        "hippoformer.salience/1",
        "Salience and what a memory turns out to be worth",
        "Correlation of each rule with the credit a transition earns, and the share of all credit that the tenth it "
        "ranks highest holds. Means over documents with 95 % intervals.",
        ("text", "rule", "Spearman", "Pearson", "credit held"),
        _salience,
    ),
    (
        "hippoformer.quality/1",
        "Continuations against the true text",
        "Greedy continuations of long texts; memory minus off, with 95 % intervals and p corrected for the number of "
        "metrics.",
        ("metric", "memory", "off", "difference", "p"),
        _quality,
    ),
    (
        "hippoformer.comparison/1",
        "Other ways to read the same text",
        "Bits per byte can be compared between tokenizers. Brackets: 95 % bootstrap intervals over documents.",
        ("comparison", "name", "kind", "bits/byte", "against the reference", "state, MB"),
        _contestants,
    ),
)


def _number(value: float) -> str:
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _right(cell: Shown) -> str:
    return f"{100 * cell['right']:.0f} %" + _ends(cell["low"], cell["high"], lambda x: f"{100 * x:.0f}")


def _ends(low: float | None, high: float | None, show: Callable[[float], str]) -> str:
    return "" if low is None or high is None else f" [{show(low)}, {show(high)}]"


def _interval(interval: Shown, show: Callable[[float], str]) -> str:
    return show(interval["estimate"]) + _ends(interval["low"], interval["high"], show)


def _change(ratio: Shown, brackets: bool = True) -> str:
    """A ratio as a change in per cent."""
    change = _percent(ratio["estimate"]) + " %"
    return change + (_ends(ratio["low"], ratio["high"], _percent) if brackets else "")


def _range(ratio: Shown) -> str:
    if ratio["low"] is None or ratio["high"] is None:
        return "one document"
    return f"95 % interval {_percent(ratio['low'])} to {_percent(ratio['high'])} %"


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f}".replace("-", "−")
