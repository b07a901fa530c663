"""Fills the results blocks of README.md, docs/all-results.md and the model card from the JSON files under results/.

    python scripts/readme_results.py            # rewrite the blocks
    python scripts/readme_results.py --check    # exit 1 if one is not what the files say

The README has the headline, one table; docs/all-results.md has every report. Seven kinds of files are read, told apart
by their `format`: reports of `hippoformer eval perplexity`, `eval recall`, `eval variants`, `eval recall-variants`,
`eval babilong` and `eval bytes` with --output, and of `benchmarks/speed.py`. No figure in a block is typed by hand.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
PERPLEXITY, RECALL = "hippoformer.perplexity/1", "hippoformer.recall/1"
VARIANTS, RECALL_VARIANTS = "hippoformer.variants/1", "hippoformer.recall_variants/1"
COMPARISON, SPEED, BABILONG = "hippoformer.comparison/1", "hippoformer.speed/1", "hippoformer.babilong/1"
# Which kinds a file's block holds (none: the headline), and where the results lie, seen from there.
BLOCKS: dict[str, tuple[tuple[str, ...], str]] = {
    "README.md": ((), "results"),
    "docs/all-results.md": (
        (PERPLEXITY, RECALL, SPEED, VARIANTS, RECALL_VARIANTS, BABILONG, COMPARISON),
        "../results",
    ),
    "src/hippoformer/pretrained/smollm2-135m/README.md": ((PERPLEXITY, RECALL), "../../../../results"),
}
EMPTY = "No results are stored yet: `results/` holds no report."

Content = dict[str, Any]


def read_results(folder: Path) -> dict[str, Content]:
    """File name -> content of every JSON file of the folder, by name."""
    return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def headline(results: dict[str, Content]) -> str:
    """The table of the README: the base at two windows and the shipped memory.

    Raises:
        KeyError: a report that the table quotes is missing.
    """

    def perplexity(condition: Content) -> str:
        return _interval(condition["token_perplexity"], lambda x: f"{x:.2f}")

    rows = []
    for name, text in (("novels_test", "6 novels"), ("wikitext2_test", "60 encyclopedia articles")):
        off, on = (results[f"{name}.json"]["conditions"][condition] for condition in ("off", "memory"))
        rows.append([f"perplexity per token, {text}", perplexity(off), "", perplexity(on), _link(f"{name}.json")])
    name = "bytes_novels.json"
    found = {contestant["name"]: contestant for contestant in results[name]["contestants"]}
    who = [found[contestant] for contestant in ("base, window 512", "base, window 4096", "hippoformer")]
    bits = [_interval(contestant["bits_per_byte"], lambda x: f"{x:.3f}") for contestant in who]
    rows.append(["bits per byte, first 40,000 characters of each novel", *bits, _link(name)])
    rows.append(["state per row", *(f"{contestant['state_nbytes'] / 1e6:.1f} MB" for contestant in who), _link(name)])
    name = "recall_test.json"
    for cell in results[name]["cells"]:
        if cell["kind"] == "home" and cell["distance"] in (8_000, 32_000):
            fact = f"facts recalled after {cell['distance']:,} tokens"
            rows.append([fact, f"{100 * cell['right_off']:.0f} %", "", _right(cell), _link(name)])
    name = "speed.json"
    for measure, says in (("streamed scoring", "reading"), ("generate, 64 tokens from token 4000", "generating")):
        speed = next(row for row in results[name]["results"] if row["measure"].startswith(measure))
        off, on = (f"{speed[key]:,.1f} {speed['unit']}" for key in ("reference", "value"))
        rows.append([f"speed, {says}", off, "", on, _link(name)])
    return _table(("", "base, window 512", "base, window 4,096", "HippoFormer, window 512", "report"), rows)


def render(results: dict[str, Content], kinds: tuple[str, ...]) -> str:
    """The Markdown between the markers: a table for each kind that there are reports of."""
    tables = {
        PERPLEXITY: (PERPLEXITY_HEADINGS, _perplexity_rows),
        RECALL: (RECALL_HEADINGS, _recall_rows),
        VARIANTS: (VARIANTS_HEADINGS, _variant_rows),
        RECALL_VARIANTS: (RECALL_VARIANTS_HEADINGS, _recall_variant_rows),
        BABILONG: (BABILONG_HEADINGS, _babilong_rows),
        COMPARISON: (COMPARISON_HEADINGS, _comparison_rows),
        SPEED: (SPEED_HEADINGS, _speed_rows),
    }
    parts: list[str] = []
    shown: dict[str, Content] = {}
    for kind in kinds:
        reports = {name: content for name, content in results.items() if content.get("format") == kind}
        headings, rows = tables[kind]
        if reports:
            parts.append(_table(headings, [row for item in reports.items() for row in rows(*item)]))
            shown |= reports
    if parts:
        parts.append(_origins(shown))
    return "\n\n".join(parts) or EMPTY


PERPLEXITY_HEADINGS = (
    "report", "condition", "documents", "tokens", "token perplexity", "against memory off", "bits/byte", "state per row"
)  # fmt: skip
RECALL_HEADINGS = ("report", "fact", "tokens ago", "cases", "right", "right, memory off", "answer still stored")
VARIANTS_HEADINGS = ("report", "variant", "token perplexity", "against the base", "against the first", "memory")
RECALL_VARIANTS_HEADINGS = ("report", "variant", "tokens ago", "cases", "right", "against the first, points")
BABILONG_HEADINGS = (
    "report", "task", "tokens", "reading", "cases", "right", "nats", "needed: stored", "needed: read again"
)  # fmt: skip
COMPARISON_HEADINGS = ("report", "who", "state per row", "token perplexity", "bits/byte", "bits against the first")
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


def _recall_rows(name: str, report: Content) -> list[list[str]]:
    return [
        [
            _link(name),
            cell["kind"] + ending.replace("_", ", "),
            f"{cell['distance']:,}",
            str(cell["cases"]),
            _right(cell, ending),
            f"{100 * cell['right_off']:.0f} %",
            f"{100 * cell['kept']:.0f} %",
        ]
        for cell in report["cells"]
        for ending in ("", "_reread")
        if f"right{ending}" in cell
    ]


def _right(cell: Content, ending: str = "") -> str:
    right, low, high = (100 * cell[f"{name}{ending}"] for name in ("right", "low", "high"))
    return f"{right:.0f} % [{low:.0f}, {high:.0f}]"


def _variant_rows(name: str, report: Content) -> list[list[str]]:
    def change(x: float) -> str:
        return f"{100 * (x - 1):+.2f} %"

    def against_the_first(variant: Content) -> str:
        if variant["against"] is None:
            return ""
        of_seeds = variant.get("ratio_of_each_seed", [])
        seeds = f"; seeds {', '.join(f'{100 * (x - 1):+.2f}' for x in of_seeds)}" if len(of_seeds) > 1 else ""
        return _interval(variant["against"]["ratio"], change) + seeds

    return [
        [
            _link(name),
            variant["name"],
            f"{variant['perplexity']:.2f}",
            _interval(variant["against_base"]["ratio"], change),
            against_the_first(variant),
            f"{variant['memory_nbytes'] / 1e6:.2f} MB",
        ]
        for variant in report["variants"]
    ]


def _recall_variant_rows(name: str, report: Content) -> list[list[str]]:
    return [
        [
            _link(name),
            variant["name"],
            f"{int(distance):,}",
            str(sum(cell["cases"] for cell in variant["cells"] if cell["distance"] == int(distance))),
            _interval(right, lambda x: f"{100 * x:.0f} %"),
            "" if variant["against"] is None else _interval(variant["against"][distance], lambda x: f"{100 * x:+.0f}"),
        ]
        for variant in report["variants"]
        for distance, right in variant["right"].items()
    ]


def _babilong_rows(name: str, report: Content) -> list[list[str]]:
    return [
        [
            _link(name),
            cell["task"],
            f"{cell['length']:,}",
            cell["condition"],
            str(cell["cases"]),
            _right(cell),
            f"{cell['nats']:.2f}",
            *("" if cell.get(part) is None else f"{100 * cell[part]:.0f} %" for part in ("stored", "reread")),
        ]
        for cell in report["cells"]
    ]


def _comparison_rows(name: str, report: Content) -> list[list[str]]:
    rows = []
    for contestant in report["contestants"]:
        against = contestant["against"]
        rows.append(
            [
                _link(name),
                contestant["name"],
                f"{contestant['state_nbytes'] / 1e6:.1f} MB",
                f"{contestant['token_perplexity']:.2f}",
                _interval(contestant["bits_per_byte"], lambda x: f"{x:.4f}"),
                "" if against is None else _interval(against["bits_ratio"], lambda x: f"{100 * (x - 1):+.2f} %"),
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
        "Brackets: 95 % intervals; of perplexities by bootstrap over documents, of shares by Wilson's formula, of "
        "shares of all facts together and their differences by bootstrap over questions. State: window + memory. "
        "Speed: medians of alternating runs.\n\n" + table
    )


def _link(name: str) -> str:
    return f"[{name.removesuffix('.json')}](results/{name})"


def _table(headings: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def fill(page: str, block: str) -> str:
    """The page with the block between its markers.

    Raises:
        ValueError: the markers do not stand there once each, in order.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"the file must hold {BEGIN} and {END} once each, in this order")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{block}\n{END}{rest.split(END)[1]}"


def main(argv: list[str] | None = None) -> int:
    """Rewrites or checks; 0 when every file says what the results say."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a block is out of date")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder with README.md and results/")
    arguments = parser.parse_args(argv)
    results, stale = read_results(arguments.root / "results"), []
    for file, (kinds, links) in BLOCKS.items():
        path = arguments.root / file
        old = path.read_text(encoding="utf-8")
        block = render(results, kinds) if kinds else headline(results)
        new = fill(old, block.replace("](results/", f"]({links}/"))
        if old != new:
            stale.append(file)
        if not arguments.check:
            path.write_text(new, encoding="utf-8")
    if arguments.check and stale:
        print(f"out of date: {', '.join(stale)}; run python scripts/readme_results.py", file=sys.stderr)
    return int(arguments.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
