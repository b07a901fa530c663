"""Makes the files under results/ again, from which every table of the README and the docs is written.

    python scripts/results.py                  # all that are missing
    python scripts/results.py --quick          # the headline rows alone
    python scripts/results.py novels recall    # these pieces, also where their files exist
    python scripts/results.py --list           # what there is, and how long each takes

Each piece is one command of the package, run as a user would type it; a piece whose file exists is skipped, so an
interrupted run goes on where it was. The minutes are of two CPU cores. The test texts lie in the folder `data`.
"""

import argparse
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from commands import ends_with_failure, python, write_tables

ROOT = Path(__file__).resolve().parents[1]
MODEL = ("--model", "smollm2-135m")
WIKI, NOVELS = "data/wikitext-2-raw/wiki.test.raw", "data/public-domain-novels/test"
# What the report shows to read along: free to be copied, and nothing that a number is measured on.
TRACED = "data/public-domain-novels/validation/Bennet_Babylon_1902.txt"

# Texts that training decisions used, and how much of each is read.
VALIDATION = {
    "novels": ("data/public-domain-novels/validation", "--limit-tokens", "12288"),
    "wikitext2": ("data/wikitext-2-raw/wiki.valid.raw", "--documents", "16"),
}

# What each mechanism is worth. The first is what is shipped; the others differ from it in what they name.
VARIANTS = (
    "shipped",
    "fifo:selection=fifo",
    "surprise:selection=surprise",
    "random:selection=random",
    "replay:max_replay_rounds=10",
    "replay-decay-0.99:max_replay_rounds=10,decay_rate=0.99",
    "no-following:following=false",
)
RECALL_VARIANTS = (
    *VARIANTS,
    "no-forgetting:decay_rate=1.0",
)
# Of what was told twice, does the newer count?
MOVED_VARIANTS = ("shipped", "all-the-same:match_recency=0")
BUFFERS = (0, 1024, 2048, 4096, 8192)
# How much is replayed, and how fast what is not fades.
REPLAY = tuple(
    f"rounds-{rounds}-decay-{decay}:max_replay_rounds={rounds},decay_rate={decay}"
    for decay in (0.998, 0.99, 0.95, 0.9, 0.8)
    for rounds in (0, 1, 3, 10)
)
# Of the same bytes: a window longer by 43 tokens a megabyte, so many selected keys, so many episodes.
WINDOWS = "555,598,684,857,1028,2048,4096"
SELECTED = ",".join(f"{method}:{budget}" for method in ("h2o", "snapkv") for budget in (43, 86, 172, 345, 516))
EPISODES = "1024,4096,8192"
SUITE = ("eval", "all", *MODEL, "--text", WIKI, "--long-text", NOVELS)


@dataclass(frozen=True)
class Piece:
    """One file, the command that makes it, and how long that takes."""

    file: str
    command: tuple[str, ...]
    minutes: int
    headline: bool = False

    @property
    def name(self) -> str:
        return self.file.removesuffix(".json")

    def line(self) -> list[str]:
        """The words after `python`, as they are recorded in the file."""
        script = ["benchmarks/speed.py"] if self.command[0].startswith("--") else ["-m", "hippoformer.cli"]
        path = Path("results") / self.file
        # The suite leaves a folder, and goes on with what lies there.
        output = ("--output-dir", path.parent) if "all" in self.command else ("--output", path)
        return [*script, *self.command, output[0], output[1].as_posix()]


def each_variant(options: Iterable[str]) -> tuple[str, ...]:
    """Each variant as an option of the command line."""
    return tuple(part for option in options for part in ("--variant", option))


def compared(options: Iterable[str], text: str, *more: str) -> tuple[str, ...]:
    """The command that compares variants, each named with its options."""
    return ("eval", "variants", *MODEL, "--text", text, *more, *each_variant(options))


def recall_compared(options: Iterable[str], *more: str) -> tuple[str, ...]:
    """The command that asks variants for facts in test novels."""
    planted = ("--text", NOVELS, "--streams", "6", "--facts", "9")
    return ("eval", "recall-variants", *MODEL, *planted, *more, *each_variant(options))


def at_buffer(options: Iterable[str], buffer: int) -> tuple[str, ...]:
    """The variants with a buffer of that size."""
    return tuple(f"{v}{',' if ':' in v else ':'}buffer_size={buffer}" for v in options)


def variants(text: str, limit: int, buffer: int, options: tuple[str, ...] = VARIANTS) -> tuple[str, ...]:
    """The command that compares variants at one buffer size."""
    return compared(at_buffer(options, buffer), text, "--limit-tokens", str(limit))


def buffers(text: str, limit: int) -> tuple[str, ...]:
    """The command that compares buffer sizes, the shipped one first."""
    sizes = sorted(BUFFERS, key=lambda size: size != 2048)
    return compared((f"buffer-{size}:buffer_size={size}" for size in sizes), text, "--limit-tokens", str(limit))


def equal_bytes(windows: str, buffers: str, selected: str) -> tuple[str, ...]:
    """The command that compares ways to spend bytes of state."""
    text = ("--text", NOVELS, "--limit-characters", "40000")
    return ("eval", "bytes", *MODEL, *text, "--windows", windows, "--buffers", buffers, "--kv", selected)


def perplexity(text: str, *more: str) -> tuple[str, ...]:
    """The command of the streaming protocol."""
    return ("eval", "perplexity", *MODEL, "--text", text, *more)


def novels(limit: int, conditions: str) -> tuple[str, ...]:
    """The same of the first so many tokens of each test novel, all novels side by side."""
    return perplexity(NOVELS, "--limit-tokens", str(limit), "--batch-size", "6", "--conditions", conditions)


PIECES = (
    Piece(
        "novels_test.json",
        novels(30000, "memory,off,window-only,marginals"),
        5,
        True,
    ),
    # What of the gain is owed to any novel: as much of another one is read first.
    Piece(
        "novels_other_test.json",
        novels(8192, "memory,off,other-document"),
        3,
    ),
    Piece(
        "wikitext2_test.json",
        perplexity(WIKI, "--batch-size", "4", "--conditions", "memory,off,window-only,marginals"),
        15,
        True,
    ),
    Piece("full/recall.json", SUITE, 20),
    Piece(
        "recall_test.json",
        ("eval", "recall", *MODEL, "--text", NOVELS, "--streams", "6", "--facts", "9"),
        6,
        True,
    ),
    *(
        Piece(f"variants_{name}_validation.json", compared((*VARIANTS[:3], *VARIANTS[4::2]), *text), 4)
        for name, text in VALIDATION.items()
    ),
    *(
        Piece(f"variants_{name}_validation_{buffer}.json", compared(at_buffer(VARIANTS[:5], buffer), *text), 2)
        for buffer in (256, 1024)
        for name, text in VALIDATION.items()
    ),
    Piece("recall_variants_test.json", recall_compared(RECALL_VARIANTS), 30),
    Piece(
        "recall_moved_test.json",
        recall_compared(MOVED_VARIANTS, "--kinds", "moved", "--distances", "2000,8000"),
        6,
    ),
    Piece(
        "recall_reworded_test.json",
        (
            *("eval", "recall", *MODEL, "--text", NOVELS, "--streams", "2", "--facts", "15", "--kinds", "reworded"),
            *("--distances", "2000,8000", "--reread-tokens", "256"),
        ),
        6,
    ),
    Piece(
        "recall_million_test.json",
        (
            *("eval", "recall", *MODEL, "--text", NOVELS, "--streams", "1", "--facts", "100", "--spacing", "3200"),
            *("--distances", "2000,8000,32000,128000"),
        ),
        35,
    ),
    # Eight times the room, and an eighth of the forgetting.
    Piece(
        "recall_16384_test.json",
        (
            *("eval", "recall", *MODEL, "--buffer-size", "16384", "--decay-rate", "0.99975", "--text", NOVELS),
            *("--streams", "1", "--facts", "60", "--spacing", "3200", "--distances", "2000,8000,32000,128000"),
        ),
        35,
    ),
    Piece("bytes_novels.json", equal_bytes(WINDOWS, EPISODES, SELECTED), 60),
    # All at most a megabyte more than the window, and what nearly full attention reaches.
    Piece("bytes_novels_1mb.json", equal_bytes("555,7932", "640", "h2o:43,snapkv:43"), 20),
    # In float32, where a megabyte is a window longer by 22 tokens.
    Piece("bytes_novels_float32.json", (*equal_bytes("574", "", ""), "--dtype", "float32"), 15),
    *(Piece(f"replay_{name}_validation.json", compared(REPLAY, *text), 8) for name, text in VALIDATION.items()),
    *(
        Piece(f"salience_{name}_validation.json", ("eval", "salience", *MODEL, "--text", *text), 4)
        for name, text in VALIDATION.items()
    ),
    Piece(
        "drift_3_bits_validation.json",
        (
            *("eval", "drift", *MODEL, "--quantise-bits", "3"),
            *("--text", "data/public-domain-novels/validation", "--streams", "4"),
        ),
        6,
    ),
    Piece("trace.json", ("eval", "trace", *MODEL, "--text", TRACED, "--limit-tokens", "3000"), 1, True),
    Piece("variants_novels_256.json", variants(NOVELS, 30000, 256, VARIANTS[:6]), 12),
    Piece("variants_novels_1024.json", variants(NOVELS, 30000, 1024, VARIANTS[:6]), 14),
    *(
        Piece(
            f"variants_wikitext2_{buffer}.json", compared(at_buffer(VARIANTS[:4], buffer), WIKI, "--documents", "16"), 6
        )
        for buffer in (256, 1024)
    ),
    Piece("buffers_novels.json", buffers(NOVELS, 30000), 12),
    Piece("buffers_wikitext2.json", buffers(WIKI, 30000), 14),
    Piece(
        "speed.json",
        ("--parts", "scoring", "write", "generate", "--repeats", "5", "--score-tokens", "2048", "--new-tokens", "64"),
        2,
    ),
    Piece("speed_memory.json", ("--parts", "memory", "--long"), 6),
)


@ends_with_failure
def main(argv: list[str] | None = None) -> int:
    """Runs what is asked for; the exit status of the first command that fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("pieces", nargs="*", help="names, or their beginnings; default: all whose files are missing")
    parser.add_argument("--quick", action="store_true", help="the headline rows alone")
    parser.add_argument("--list", action="store_true", help="print the pieces and their commands")
    arguments = parser.parse_args(argv)
    chosen = [p for p in PIECES if p.headline or not arguments.quick]
    if arguments.pieces:
        chosen = [p for p in PIECES if p.name.startswith(tuple(arguments.pieces))]
        if not chosen:
            parser.error(f"no piece is called {' or '.join(arguments.pieces)}: {', '.join(p.name for p in PIECES)}")
    else:
        chosen = [p for p in chosen if not (ROOT / "results" / p.file).exists()]
    for piece in chosen if arguments.list else ():
        print(f"{piece.minutes:3d} min  {' '.join(piece.line())}")
    if arguments.list:
        return 0
    print(f"{len(chosen)} pieces, about {sum(p.minutes for p in chosen)} minutes on two cores", flush=True)
    (ROOT / "results").mkdir(exist_ok=True)
    for number, piece in enumerate(chosen, start=1):
        began = time.monotonic()
        print(f"[{number}/{len(chosen)}] {piece.name}, about {piece.minutes} minutes", flush=True)
        python(ROOT, *piece.line())
        print(f"[{number}/{len(chosen)}] {piece.name} took {(time.monotonic() - began) / 60:.1f} minutes", flush=True)
    write_tables(ROOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
