"""Fills the results block of README.md from the JSON files under results/.

    python scripts/readme_results.py            # rewrite the block
    python scripts/readme_results.py --check    # exit 1 if it is not what the files say

The model card of the shipped hippocampus has such a block too (--readme FILE --links ../../../../results).

Two kinds of files are read, told apart by their `format`: reports of `hippoformer eval perplexity --output` and of
`benchmarks/speed.py`. Others are left alone. No figure in the block is typed by hand.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
PERPLEXITY, SPEED = "hippoformer.perplexity/1", "hippoformer.speed/1"
EMPTY = "No results are stored yet: `results/` holds no report."

Content = dict[str, Any]


def read_results(folder: Path) -> dict[str, Content]:
    """File name -> content of every JSON file of the folder, by name; empty where there is no folder."""
    return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def render(results: dict[str, Content]) -> str:
    """The Markdown between the markers."""
    perplexity = {name: content for name, content in results.items() if content.get("format") == PERPLEXITY}
    speed = {name: content for name, content in results.items() if content.get("format") == SPEED}
    parts = []
    if perplexity:
        parts.append(
            _table(PERPLEXITY_HEADINGS, [row for item in perplexity.items() for row in _perplexity_rows(*item)])
        )
    if speed:
        parts.append(_table(SPEED_HEADINGS, [row for item in speed.items() for row in _speed_rows(*item)]))
    if parts:
        parts.append(_origins(perplexity | speed))
    return "\n\n".join(parts) or EMPTY


PERPLEXITY_HEADINGS = (
    "report", "condition", "documents", "tokens", "token perplexity", "against memory off", "bits/byte", "state per row"
)  # fmt: skip
SPEED_HEADINGS = ("report", "measured", "value", "reference", "ratio", "tokens")


def _perplexity_rows(name: str, report: Content) -> list[list[str]]:
    rows = []
    for condition, result in report["conditions"].items():
        against = result["against_off"]
        bits = result["bits_per_byte"]
        rows.append(
            [
                _link(name),
                condition,
                str(len(report["documents"])),
                f"{result['tokens_scored']:,}",
                _interval(result["token_perplexity"], lambda x: f"{x:.2f}"),
                "" if against is None else _interval(against["ratio"], lambda x: f"{100 * (x - 1):+.1f} %"),
                "" if bits is None else f"{bits:.4f}",
                f"{result['window_nbytes'] / 1e6:.1f} + {result['memory_nbytes'] / 1e6:.1f} MB",
            ]
        )
    return rows


def _speed_rows(name: str, report: Content) -> list[list[str]]:
    rows = []
    for result in report["results"]:
        digits = ".2f" if result["unit"] == "µs/token" else ",.1f"
        value, reference = (
            "" if result[key] is None else f"{result[key]:{digits}} {result['unit']}" for key in ("value", "reference")
        )
        ratio = "" if result["ratio"] is None else f"{result['ratio']:.3f}"
        rows.append([_link(name), result["measure"], value, reference, ratio, f"{result['tokens']:,}"])
    return rows


def _interval(interval: Content, show: Any) -> str:
    text: str = show(interval["estimate"])
    if interval["low"] is None or interval["high"] is None:
        return text
    return f"{text} [{show(interval['low'])}, {show(interval['high'])}]"


def _origins(reports: dict[str, Content]) -> str:
    """What was run, where, and from which commit; one line a report."""
    rows = []
    for name, report in reports.items():
        origin = report["provenance"]
        commit = "no checkout" if origin["commit"] is None else f"`{origin['commit'][:12]}`"
        if origin["dirty"]:
            commit += " with uncommitted changes"
        hardware = origin["gpu"] or f"{origin['cpu']}, {origin['cpus']} CPUs, {origin['torch_threads']} threads"
        settings = report.get("model") or report["settings"]
        dtype, window, buffer = settings["dtype"], settings["window"], settings["buffer_size"]
        model = f"{dtype}, window {window}, buffer {buffer}"
        rows.append([_link(name), f"`{origin['command']}`", model, hardware, commit, origin["date"][:10]])
    table = _table(("report", "command", "model", "hardware", "commit", "date"), rows)
    return (
        "Brackets: 95 % bootstrap intervals over documents. State: window + memory. "
        "Speed: medians of alternating runs.\n\n" + table
    )


def _link(name: str) -> str:
    return f"[{name.removesuffix('.json')}](results/{name})"


def _table(headings: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def fill(readme: str, block: str) -> str:
    """The README with the block between its markers.

    Raises:
        ValueError: the markers do not stand there once each, in order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"README.md must hold {BEGIN} and {END} once each, in this order")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{block}\n{END}{rest.split(END)[1]}"


def main(argv: list[str] | None = None) -> int:
    """Rewrites or checks; 0 when README.md says what the files say."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the block is out of date")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--links", default="results", help="where the reports lie, seen from the file that is filled")
    arguments = parser.parse_args(argv)
    old = arguments.readme.read_text(encoding="utf-8")
    new = fill(old, render(read_results(arguments.results)).replace("](results/", f"]({arguments.links}/"))
    if arguments.check:
        if old != new:
            print(
                "The results block of README.md is out of date: run python scripts/readme_results.py", file=sys.stderr
            )
        return int(old != new)
    arguments.readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
