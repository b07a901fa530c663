"""Writes the tables of docs/support.md from what the tests reported, so that nothing is called working untested.

    make support                                              # runs the tests marked `supports`, then this
    python scripts/support_table.py REPORT.xml [--check]      # from a JUnit report; --check writes nothing

A test says what it shows by a mark (`tests/conftest.py`). Words of two axes on one test make a cell where they cross. A
cell is marked as working where at least one test passed and none failed; a test that was skipped shows nothing.
"""

import itertools
import json
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "support.md"
BEGIN, END = "<!-- support:begin -->", "<!-- support:end -->"
# What is crossed with what, rows first, and the heading over it.
TABLES = {
    ("architecture", "mode"): "Base architectures",
    ("trainer", "architecture"): "What can be trained on which architecture",
    ("trainer", "mode"): "How training can be run",
    ("trainer", "precision"): "What can be trained in which precision",
    ("precision", "mode"): "Precisions",
}
Cells = dict[tuple[str, str], list[bool]]


def read_report(path: Path) -> tuple[dict[tuple[str, str], Cells], Cells]:
    """For each pair of axes, cell -> whether each test passed; and for each (axis, word) the same."""
    crossed: dict[tuple[str, str], Cells] = defaultdict(lambda: defaultdict(list))
    words: Cells = defaultdict(list)
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        passed = case.find("failure") is None and case.find("error") is None
        for entry in case.iterfind("properties/property[@name='supports']"):
            if case.find("skipped") is not None:
                continue
            axes = json.loads(entry.attrib["value"])  # the words of each axis
            for axis, word in ((axis, word) for axis, those in axes.items() for word in those):
                words[axis, word].append(passed)
            for one, other in itertools.permutations(axes, 2):
                for cell in itertools.product(axes[one], axes[other]):
                    crossed[one, other][cell].append(passed)
    return crossed, words


def table(cells: Cells, rows: str) -> str:
    """Crossed words as Markdown, what works most widely first."""
    wide = [defaultdict(int), defaultdict(int)]
    for cell, side in itertools.product(cells, (0, 1)):
        wide[side][cell[side]] += 1
    names, heads = (sorted(counts, key=lambda word: (-counts[word], word)) for counts in wide)
    lines = [[rows, *heads], ["---"] * (len(heads) + 1)]
    for name in names:
        found = [cells.get((name, head)) for head in heads]
        lines.append([name, *("" if passed is None else "✓" if all(passed) else "✗" for passed in found)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def render(path: Path) -> str:
    """Everything between the markers of the page, from a report."""
    crossed, words = read_report(path)
    parts = [f"## {heading}\n\n{table(crossed[axes], axes[0])}" for axes, heading in TABLES.items() if axes in crossed]
    refused = sorted(word for (axis, word), passed in words.items() if axis == "refused" and all(passed))
    if refused:
        parts.append(f"## Refused, with an error that says why\n\n{', '.join(refused)}")
    return "\n\n".join(parts)


def main(words: list[str]) -> int:
    """0 if the page is as the report says (or has been made so), 1 if --check finds that it is not."""
    block, old = render(Path(words[0])), PAGE.read_text(encoding="utf-8")
    before, after = old.split(BEGIN)[0], old.split(END)[1]
    new = f"{before}{BEGIN}\n{block}\n{END}{after}"
    if not block or (new != old and "--check" in words):
        print(f"{PAGE} is not what the tests show; run make support", file=sys.stderr)
        return 1
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
