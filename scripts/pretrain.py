"""Trains the hippocampus shipped for SmolLM2-135M-Instruct, Q4_1, over three seeds, and reads test texts with each.

    python scripts/pretrain.py                  # what is missing: minutes on one GPU, a day and more on two CPU cores
    python scripts/pretrain.py --seeds 42       # this seed
    python scripts/pretrain.py --ship           # the seed that predicts validation texts best becomes the shipped one

Texts: training novels, WikiText-2 articles of the training split, other long articles, and further parts of the novels
with made-up facts in them. A run leaves `runs/pretrained-SEED` with reports of validation texts, by which `--ship`
chooses, and `results/pretrained_SEED_*_test.json`. What is already there is not made again, and a run that was
interrupted goes on. The hippocampus that is shipped now has read a ninth of this (see its card).
"""

import argparse
import json
import math
import shutil
import sys
from pathlib import Path

from commands import ends_with_failure, flags, make

ROOT = Path(__file__).resolve().parents[1]
RUNS, RESULTS, SHIPPED = Path("runs"), Path("results"), Path("src/hippoformer/pretrained/smollm2-135m")
SEEDS = (42, 43, 44)
# 30 novels, 58 articles, and 200 long articles.
TEXT = (
    "data/public-domain-novels/train",
    "data/wikitext-2-raw/wiki.train.first-part.raw",
    "data/wikipedia-long-2014/train.txt",
)
READ = {"max_samples": 288, "max_document_tokens": 12288, "planted_documents": 30, "planted_facts": 36}
STEPS = {"max_seq_length": 512, "batch_size": 32, "max_steps": 900, "learning_rate": 2e-3, "recall_share": 0.65}
GATE = {"credit_documents": 128, "foresight_passes": 6}
NOVELS, ARTICLES = "data/public-domain-novels", "data/wikitext-2-raw"
VALIDATION = {
    "novels": (f"{NOVELS}/validation", "--limit-tokens", "12288", "--batch-size", "5"),
    "articles": (f"{ARTICLES}/wiki.valid.raw", "--documents", "16", "--batch-size", "8"),
}
# As `novels_test`, `wikitext2_test` and `recall_test` ask it of the shipped one.
TEST = {
    "novels": ("perplexity", f"{NOVELS}/test", "--limit-tokens", "30000", "--batch-size", "6"),
    "articles": ("perplexity", f"{ARTICLES}/wiki.test.raw", "--batch-size", "12"),
    "recall": ("recall", f"{NOVELS}/test", "--streams", "6", "--facts", "9"),
}
CONDITIONS = ("--conditions", "memory,off,marginals")


def folder(seed: int) -> Path:
    """Where a run leaves its weights."""
    return RUNS / f"pretrained-{seed}"


def training(seed: int) -> list[str]:
    """The command that trains with a seed."""
    numbers = READ | STEPS | GATE | {"save_steps": 100, "logging_steps": 20, "seed": seed}
    places = ["--output_dir", folder(seed).as_posix(), "--cache_dir", "hidden_states"]
    places += ["--resume_from_checkpoint", "auto"]
    return ["train", "--text", *TEXT, *flags(numbers), *places]


def validation(seed: int, name: str) -> Path:
    """The report of validation texts."""
    return folder(seed) / f"{name}.json"


def reports(seed: int) -> dict[Path, list[str]]:
    """Reports and the commands that make them."""
    model = ("--model", folder(seed).as_posix())
    made = {
        validation(seed, name): ["eval", "variants", *model, "--text", *text, "--variant", "trained"]
        for name, text in VALIDATION.items()
    }
    for name, (kind, *text) in TEST.items():
        more = CONDITIONS if kind == "perplexity" else ()
        made[RESULTS / f"pretrained_{seed}_{name}_test.json"] = ["eval", kind, *model, "--text", *text, *more]
    return {file: [*command, "--output", file.as_posix()] for file, command in made.items()}


def best() -> int:
    """The seed with the lowest perplexity of both kinds of validation text, as a geometric mean.

    Raises:
        FileNotFoundError: no seed has its reports.
    """
    found: dict[int, float] = {}
    for seed in SEEDS:
        files = [ROOT / validation(seed, name) for name in VALIDATION]
        if all(file.is_file() for file in files):
            read = [json.loads(file.read_text(encoding="utf-8"))["variants"][0]["perplexity"] for file in files]
            found[seed] = math.prod(read) ** (1 / len(read))
    if not found:
        raise FileNotFoundError("no seed was trained and measured: run scripts/pretrain.py first")
    print("perplexity of validation texts: " + ", ".join(f"seed {s} {p:.3f}" for s, p in found.items()))
    return min(found, key=lambda seed: found[seed])


def ship() -> None:
    """The best run's weights become the package's."""
    seed = best()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(ROOT / folder(seed) / name, ROOT / SHIPPED / name)
    print(f"seed {seed} is in {SHIPPED}")


@ends_with_failure
def main(argv: list[str] | None = None) -> int:
    """Makes what is missing; the exit status of the first command that fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="seeds of training")
    parser.add_argument("--ship", action="store_true", help="nothing but put the best seed into the package")
    arguments = parser.parse_args(argv)
    if arguments.ship:
        ship()
        return 0
    for seed in arguments.seeds:
        make(ROOT, {folder(seed) / "config.json": training(seed)} | reports(seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
