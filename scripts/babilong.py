"""Teaches the base what bAbI's questions ask, on short stories, and asks about stories hidden in long novels.

    python scripts/babilong.py                 # about an hour and a half on two CPU cores

Stories of bAbI's training files in training novels, at most 400 tokens of each, teach LoRA to say first what was told
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
# Task, tokens of its texts, seed of the draw, and how many of the shorter texts are learned.
LEARNED = (("10k-qa1", "0,100,400", 1, 380), ("10k-qa2", "0,300", 2, 150))
LONGEST = 1_000  # characters
# As many episodes as reach back 128,000 tokens.
MEMORY = ("--buffer-size", "16384", "--decay-rate", "0.99975")
# As many as a text of 64,000 tokens has: what is wrong then is not the choice of what to keep.
EVERYTHING = ("--buffer-size", "65536", "--decay-rate", "0.99994")
# The longer a text, the fewer questions: file, tasks, lengths, cases, memory.
REPORTS = (
    ("babilong_test.json", "qa1,qa2", "0,1000,4000", "10,10,6", MEMORY),
    ("babilong_16k_test.json", "qa1", "16000", "5", MEMORY),
    ("babilong_64k_test.json", "qa1", "64000", "3", MEMORY),
    ("babilong_64k_all_test.json", "qa1", "64000", "3", EVERYTHING),
)


def _call(*command: Any) -> None:
    """Runs a command of the package.

    Raises:
        CalledProcessError: it failed.
    """
    subprocess.run([sys.executable, "-m", "hippoformer.cli", *map(str, command)], cwd=ROOT, check=True)


def stories() -> Path:
    """The questions that are learned, one file."""
    made, learned = RUNS / "stories.jsonl", []
    for task, lengths, seed, number in LEARNED:
        file = RUNS / f"{task}.jsonl"
        drawn = ("--task", task, "--lengths", lengths, "--samples", 200, "--seed", seed)
        _call("hide-stories", "--text", TRAINING, "--reasons", *drawn, "--output", file)
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        short = [line for line in lines if len(json.loads(line)["context"]) < LONGEST]
        random.Random(0).shuffle(short)
        learned += short[:number]
    random.Random(1).shuffle(learned)
    (ROOT / made).write_text("".join(f"{line}\n" for line in learned), encoding="utf-8")
    return made


def train(questions: Path) -> None:
    """LoRA on the answers alone."""
    size = ("--num_epochs", 1, "--batch_size", 8, "--max_seq_length", 256, "--max_document_tokens", 2048)
    rate = ("--lora_r", 16, "--learning_rate", "1e-2", "--dtype", "float32", "--logging_steps", 5, "--seed", 42)
    carried = ("--memory_off", "--hippocampus", SHIPPED)
    _call("train", "--questions", questions, *carried, *size, *rate, "--output_dir", TRAINED)


def ask(file: str, tasks: str, lengths: str, cases: str, memory: tuple[str, ...]) -> None:
    """One table of results."""
    cells = ("--tasks", tasks, "--lengths", lengths, "--cases", cases)
    asked = (*cells, "--windows", "4608", "--reply-tokens", 32, "--output", RESULTS / file)
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
