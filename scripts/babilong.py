"""Teaches the base what bAbI's questions ask, on short stories, and asks about stories hidden in long novels.

    python scripts/babilong.py                 # about an hour and a half on two CPU cores

Stories of bAbI's training files in training novels, at most 400 tokens of each, teach LoRA to say first what was told
and then the answer. On the base that has learned this, the shipped hippocampus learns from other stories, some of them
longer than the window, when to speak and when to leave the reply to the base. Then official test questions are asked in
test novels, up to 64,000 tokens long: `results/babilong*_test.json`. What is already there is not made again.
"""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RUNS, RESULTS = Path("runs"), Path("results")
ADAPTED, BASE, TRAINED = RUNS / "babi", RUNS / "babi-base", RUNS / "babi-memory"
TRAINING, TEST = "data/public-domain-novels/train", "data/public-domain-novels/test"
SHIPPED = "smollm2-135m"
# For LoRA: task, tokens of its texts, seed of the draw, and how many of the shorter texts are learned.
LEARNED = (("10k-qa1", "0,100,400", 1, 380), ("10k-qa2", "0,300", 2, 150))
LONGEST = 1_000  # characters
# For the hippocampus: task, tokens, seed, and how many are drawn of each length; all are learned.
REMEMBERED = (("10k-qa1", "0,200", 11, 60), ("10k-qa2", "0,300", 12, 30), ("10k-qa1", "1100", 13, 40))
# As many episodes as reach back 128,000 tokens.
MEMORY = ("--buffer-size", "16384", "--decay-rate", "0.99975")
# As many as a text of 64,000 tokens has: what is wrong then is not the choice of what to keep.
EVERYTHING = ("--buffer-size", "65536", "--decay-rate", "0.99994")
WINDOW = ("--windows", "4608")
# The longer a text, the fewer questions: file, model, tasks, lengths, cases, memory, and longer windows of the base.
REPORTS = (
    ("babilong_test.json", ADAPTED, "qa1,qa2", "0,1000,4000", "10,10,6", MEMORY, WINDOW),
    ("babilong_64k_test.json", ADAPTED, "qa1", "64000", "3", MEMORY, WINDOW),
    ("babilong_64k_all_test.json", ADAPTED, "qa1", "64000", "3", EVERYTHING, WINDOW),
    ("babilong_memory_test.json", TRAINED, "qa1", "0,1000,4000", "10,10,6", MEMORY, ()),
    ("babilong_memory_qa2_test.json", TRAINED, "qa2,qa3", "0,1000", "10,10", MEMORY, WINDOW),
    ("babilong_memory_16k_test.json", TRAINED, "qa1", "16000", "5", MEMORY, WINDOW),
)


def _call(*command: Any) -> None:
    """Runs a command of the package.

    Raises:
        CalledProcessError: it failed.
    """
    subprocess.run([sys.executable, "-m", "hippoformer.cli", *map(str, command)], cwd=ROOT, check=True)


def _drawn(task: str, lengths: str, seed: int, samples: int) -> list[str]:
    """Lines of questions about stories of training files in training novels."""
    file = RUNS / f"{task}-{seed}.jsonl"
    options = ("--task", task, "--lengths", lengths, "--samples", samples, "--seed", seed)
    _call("hide-stories", "--text", TRAINING, "--reasons", *options, "--output", file)
    return (ROOT / file).read_text(encoding="utf-8").splitlines()


def _written(lines: list[str], file: Path) -> Path:
    (ROOT / file).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file


def adapt() -> None:
    """LoRA learns the answers alone; then a base that has learned them is written."""
    learned = []
    for task, lengths, seed, number in LEARNED:
        short = [s for s in _drawn(task, lengths, seed, 200) if len(json.loads(s)["context"]) < LONGEST]
        random.Random(0).shuffle(short)
        learned += short[:number]
    random.Random(1).shuffle(learned)
    questions = _written(learned, RUNS / "stories.jsonl")
    size = ("--num_epochs", 1, "--batch_size", 8, "--max_seq_length", 256, "--max_document_tokens", 2048)
    rate = ("--lora_r", 16, "--learning_rate", "1e-2", "--dtype", "float32", "--logging_steps", 5, "--seed", 42)
    carried = ("--memory_off", "--hippocampus", SHIPPED)
    _call("train", "--questions", questions, *carried, *size, *rate, "--output_dir", ADAPTED)
    _call("export-base", "--model", ADAPTED, "--output", BASE)


def train() -> None:
    """The shipped hippocampus goes on with questions, on the base that answers them."""
    questions = _written([line for of in REMEMBERED for line in _drawn(*of)], RUNS / "remembered.jsonl")
    size = ("--num_epochs", 4, "--batch_size", 8, "--max_seq_length", 256, "--max_document_tokens", 2048)
    rate = ("--learning_rate", "5e-4", "--dtype", "float32", "--logging_steps", 5, "--seed", 42)
    recall_alone = ("--recall_share", "1.0", "--credit_documents", 0, "--cache_dir", "hidden_states")
    base = ("--base_model", BASE, "--hippocampus", SHIPPED)
    _call("train", *base, "--questions", questions, *size, *rate, *recall_alone, "--output_dir", TRAINED)


def ask(
    file: str, model: Path, tasks: str, lengths: str, cases: str, memory: tuple[str, ...], windows: tuple[str, ...]
) -> None:
    """One table of results."""
    cells = ("--tasks", tasks, "--lengths", lengths, "--cases", cases)
    asked = (*cells, *windows, "--reply-tokens", 32, "--output", RESULTS / file)
    _call("eval", "babilong", "--model", model, *memory, "--text", TEST, *asked)


def main() -> int:
    """Makes what is missing; the exit status of the first command that fails."""
    (ROOT / RUNS).mkdir(exist_ok=True)
    try:
        for folder, make in ((BASE, adapt), (TRAINED, train)):
            if not (ROOT / folder / "config.json").is_file():
                make()
        for report in REPORTS:
            if not (ROOT / RESULTS / report[0]).is_file():
                ask(*report)
        subprocess.run([sys.executable, "scripts/readme_results.py"], cwd=ROOT, check=True)
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
