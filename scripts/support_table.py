"""Writes the tables of docs/support.md from what the tests reported, so that nothing is called working untested.

    make support                                              # runs the tests marked `supports`, then this
    python scripts/support_table.py REPORT.xml                # rewrite the tables from a JUnit report of pytest
    python scripts/support_table.py REPORT.xml --check        # exit 1 if they are not what the report says

A test says what it shows by a mark, in words that may name its parameters; `tests/conftest.py` puts it into the report:

    @pytest.mark.supports(architecture="{name}", mode=("greedy", "without cache"))
    @pytest.mark.parametrize("name", ARCHITECTURES)

Words of two axes on one test make a cell where they cross. A cell is marked as working where at least one test passed
and none failed; a test that was skipped shows nothing.
"""

import argparse
import itertools
import json
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = Path("docs/support.md")
BEGIN, END = "<!-- support:begin -->", "<!-- support:end -->"
# What is crossed with what, rows first, and the heading over it.
TABLES = {
    ("architecture", "mode"): "Base architectures",
    ("trainer", "architecture"): "What can be trained on which architecture",
    ("trainer", "mode"): "How training can be run",
    ("trainer", "precision"): "What can be trained in which precision",
    ("precision", "mode"): "Precisions",
}
WORKS, FAILS = "✓", "✗"


@dataclass(frozen=True)
class Shown:
    """One thing that one test shows, by axis, and how the test ended: passed or failed."""

    axes: dict[str, str]
    test: str
    outcome: str


def read_report(path: Path) -> list[Shown]:
    """What a JUnit report of pytest says about the tests that carry the mark; one that was skipped shows nothing."""
    shown = []
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        if case.find("skipped") is not None:
            continue
        failed = case.find("failure") is not None or case.find("error") is not None
        outcome = "failed" if failed else "passed"
        test = f"{case.attrib['classname'].split('.')[-1]}.py: {case.attrib['name'].split('[')[0]}"
        for entry in case.iterfind("properties/property[@name='supports']"):
            axes = json.loads(entry.attrib["value"])  # the words of each axis
            cells = (dict(zip(axes, words, strict=True)) for words in itertools.product(*axes.values()))
            shown += [Shown(cell, test, outcome) for cell in cells]
    return shown


def verdict(outcomes: set[str]) -> str:
    """What stands in a cell."""
    if not outcomes:
        return ""
    return FAILS if "failed" in outcomes else WORKS


def crossed(shown: list[Shown], rows: str, columns: str) -> str:
    """One table as Markdown, what works most widely first; empty if no test names both axes."""
    cells: dict[tuple[str, str], set[str]] = defaultdict(set)
    for one in shown:
        if rows in one.axes and columns in one.axes:
            cells[one.axes[rows], one.axes[columns]].add(one.outcome)

    def ordered(side: int) -> list[str]:
        wide: dict[str, int] = defaultdict(int)
        for cell in cells:
            wide[cell[side]] += 1
        return sorted(wide, key=lambda words: (-wide[words], words))

    heads = ordered(1)
    lines = [[rows, *heads], ["---"] * (len(heads) + 1)]
    lines += [[row, *(verdict(cells.get((row, head), set())) for head in heads)] for row in ordered(0)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if cells else ""


def behind(shown: list[Shown]) -> str:
    """Which tests stand behind which words."""
    tests: dict[tuple[str, str], set[str]] = defaultdict(set)
    for one in shown:
        for axis in ("mode", "trainer", "precision"):
            if axis in one.axes:
                tests[axis, one.axes[axis]].add(one.test)
    lines = [f"| {axis} | {words} | {'<br>'.join(sorted(tests[axis, words]))} |" for axis, words in sorted(tests)]
    return "\n".join(["| | | tests |", "| --- | --- | --- |", *lines])


def render(shown: list[Shown]) -> str:
    """Everything between the markers of the page."""
    parts = []
    for (rows, columns), heading in TABLES.items():
        if table := crossed(shown, rows, columns):
            parts += [f"## {heading}", table]
    refused: dict[str, set[str]] = defaultdict(set)
    for one in shown:
        if "refused" in one.axes:
            refused[one.axes["refused"]].add(one.outcome)
    if names := sorted(name for name, outcomes in refused.items() if verdict(outcomes) == WORKS):
        parts += ["## Refused, with an error that says why", ", ".join(names)]
    return "\n\n".join([*parts, "## The tests behind it", behind(shown)])


def fill(page: str, block: str) -> str:
    """The page with the block between its markers."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    if page.count(BEGIN) != 1 or page.count(END) != 1 or END in before:
        raise ValueError(f"expected {BEGIN} and {END} once each, in this order")
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def main(argv: list[str] | None = None) -> int:
    """0 if the page is as the report says (or has been made so), 1 if --check finds that it is not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, help="JUnit XML of a pytest run")
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--page", type=Path, default=ROOT / PAGE, help="the page with the markers")
    arguments = parser.parse_args(argv)
    shown = read_report(arguments.report)
    if not shown:
        print(f"{arguments.report} holds no test that is marked `supports`", file=sys.stderr)
        return 1
    old = arguments.page.read_text(encoding="utf-8")
    new = fill(old, render(shown))
    if new == old:
        return 0
    if arguments.check:
        print(f"{PAGE} is not what the tests show; run make support", file=sys.stderr)
        return 1
    arguments.page.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
