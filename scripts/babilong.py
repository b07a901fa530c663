"""Teaches the base what bAbI's questions ask, on short stories, and asks about stories hidden in long novels.

    python scripts/babilong.py                 # minutes on one GPU, a day on two CPU cores

Stories of bAbI's training files in training novels, at most 1,000 tokens of each, teach LoRA to say first what was told
and then the answer; the shipped hippocampus is carried along untouched. Then official test questions are asked in test
novels, up to 64,000 tokens long: `results/babilong*_test.json`. What is already there is not made again.
"""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RUNS, TRAINED, RESULTS = Path("runs"), Path("runs/babi"), Path("results")
TRAINING, TEST = "data/public-domain-novels/train", "data/public-domain-novels/test"
SHIPPED = "smollm2-135m"
# Task, tokens of its texts, seed of the draw, and how many are learned.
LEARNED = (
    ("10k-qa1", 0, 1, 1500),
    ("10k-qa1", 100, 2, 1500),
    ("10k-qa1", 400, 3, 1500),
    ("10k-qa1", 1000, 4, 500),
    ("10k-qa2", 0, 1, 2500),
    ("10k-qa2", 400, 2, 2500),
    ("qa3", 0, 1, 1000),
)
# As many episodes as reach back 128,000 tokens where facts are told as facts.
MEMORY = ("--buffer-size", "16384", "--decay-rate", "0.99975")
ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = 25
# File, lengths, and what differs from `MEMORY`.
REPORTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("babilong_test.json", "0,1000,4000", MEMORY),
    ("babilong_16k_test.json", "16000", MEMORY),
    ("babilong_64k_test.json", "64000", MEMORY),
    # As many as there are tokens: nothing is lost, so what is wrong is not the choice of what to keep.
    ("babilong_64k_all_test.json", "64000", ("--buffer-size", "65536", "--decay-rate", "0.99994")),
)


def _call(*command: Any) -> None:
    """Runs a command of the package.

    Raises:
        CalledProcessError: it failed.
    """
    subprocess.run([sys.executable, "-m", "hippoformer.cli", *map(str, command)], cwd=ROOT, check=True)


def stories() -> Path:
    """The questions that are learned, one file."""
    made, learned = RUNS / "stories.jsonl", list[str]()
    for task, length, seed, number in LEARNED:
        file = RUNS / f"{task}-{length}.jsonl"
        drawn = ("--task", task, "--lengths", length, "--samples", number, "--seed", seed)
        _call("hide-stories", "--text", TRAINING, "--reasons", *drawn, "--output", file)
        learned += (ROOT / file).read_text(encoding="utf-8").splitlines()
    random.Random(1).shuffle(learned)
    (ROOT / made).write_text("".join(f"{line}\n" for line in learned), encoding="utf-8")
    return made


def train(questions: Path) -> None:
    """LoRA on the answers alone."""
    size = ("--num_epochs", 1, "--batch_size", 32, "--max_seq_length", 256, "--max_document_tokens", 2048)
    rate = ("--lora_r", 16, "--learning_rate", "5e-3", "--logging_steps", 20, "--seed", 42)
    carried = ("--memory_off", "--hippocampus", SHIPPED, "--set", f"lora_target_modules={json.dumps(ADAPTED)}")
    _call("train", "--questions", questions, *size, *rate, "--output_dir", TRAINED, *carried)


def ask(file: str, lengths: str, memory: tuple[str, ...]) -> None:
    """One table of results."""
    cells = ("--tasks", "qa1,qa2,qa3", "--lengths", lengths, "--cases", CASES, "--batch-size", CASES)
    asked = (*cells, "--windows", "4608", "--reply-tokens", 48, "--output", RESULTS / file)
    _call("eval", "babilong", "--model", TRAINED, *memory, "--text", TEST, *asked)


def main() -> int:
    """Makes what is missing; the exit status of the first command that fails."""
    (ROOT / RUNS).mkdir(exist_ok=True)
    try:
        if not (ROOT / TRAINED / "config.json").is_file():
            train(stories())
        for report in REPORTS:
            if not (ROOT / RESULTS / report[0]).is_file():
                ask(*report)
        subprocess.run([sys.executable, "scripts/readme_results.py"], cwd=ROOT, check=True)
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
