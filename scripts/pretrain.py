"""Trains the hippocampus that is shipped for SmolLM2-135M, once for each of three seeds.

    python scripts/pretrain.py                  # minutes on one GPU, a day on two CPU cores
    python scripts/pretrain.py --seeds 42       # the one that is shipped

Texts: training novels, WikiText-2 articles of the training split, other long articles, and further parts of the novels
with made-up facts in them. A run leaves `runs/pretrained-SEED`; one that exists is not made again.
"""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SEEDS = (42, 43, 44)
TEXT = (
    "data/public-domain-novels/train",
    "data/wikitext-2-raw/wiki.train.first-part.raw",
    "data/wikipedia-long-2014/train.txt",
)
# 30 novels, 58 articles, and 200 long articles.
READ = {"max_samples": 288, "max_document_tokens": 32768, "planted_documents": 30, "planted_facts": 96}
STEPS = {"max_seq_length": 512, "batch_size": 32, "max_steps": 900, "learning_rate": 2e-3, "recall_share": 0.65}
GATE = {"credit_documents": 128, "foresight_passes": 6}
OPTIONS = (
    "recall_n_heads=4",
    "residual_readout=false",
    "memory_layer=[16,24]",
    "decay_rate=0.998",
    "priority_threshold=0.0",
    "max_replay_rounds=0",
)


def folder(seed: int) -> Path:
    """Where a run leaves its weights."""
    return Path("runs") / f"pretrained-{seed}"


def command(seed: int) -> list[str]:
    """The command of the package that trains with a seed."""
    numbers = READ | STEPS | GATE | {"save_steps": 0, "logging_steps": 20, "seed": seed}
    flags = [part for name, value in numbers.items() for part in (f"--{name}", str(value))]
    places = ["--output_dir", folder(seed).as_posix(), "--cache_dir", "hidden_states"]
    return ["train", "--text", *TEXT, *flags, *places, "--set", *OPTIONS]


def main(argv: list[str] | None = None) -> int:
    """Trains what is missing; the exit status of the first command that fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="seeds of training")
    for seed in parser.parse_args(argv).seeds:
        if not (ROOT / folder(seed) / "config.json").is_file():
            line = [sys.executable, "-m", "hippoformer.cli", *command(seed)]
            if status := subprocess.run(line, cwd=ROOT).returncode:
                return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
