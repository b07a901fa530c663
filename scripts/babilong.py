"""Teaches the base what bAbI's questions ask, on short stories, and asks about stories hidden in long novels.

    python scripts/babilong.py                 # about an hour and a half on two CPU cores
    python scripts/babilong.py --large         # twenty times as many stories, three tasks: minutes on one GPU

Stories of bAbI's training files in training novels teach LoRA to say first what was told and then the answer. On the
base that has learned this, the shipped hippocampus learns from other stories, some of them longer than the window, when
to speak and when to leave the reply to the base; then its gate learns, from the credit that sentences of still other
stories earn, which ones will be asked for. Then official test questions are asked in test novels, up to 64,000 tokens
long: `results/babilong*_test.json`. What is already there is not made again.
"""

import argparse
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands import ends_with_failure, hippoformer, make, write_tables

ROOT = Path(__file__).resolve().parents[1]
RUNS, RESULTS = Path("runs"), Path("results")
TRAINING, TEST = "data/public-domain-novels/train", "data/public-domain-novels/test"
SHIPPED = "smollm2-135m"
# As many episodes as reach back 128,000 tokens.
MEMORY = ("--buffer-size", "16384", "--decay-rate", "0.99975")
# As many as a text of 64,000 tokens has: what is wrong then is not the choice of what to keep.
EVERYTHING = ("--buffer-size", "65536", "--decay-rate", "0.99994")
WINDOW = ("--windows", "4608")


@dataclass(frozen=True)
class Drawn:
    """Questions of one task: tokens of their texts, seed, how many are drawn of each length and how many of all these
    are learned.
    """

    task: str
    lengths: str
    seed: int
    samples: int
    learned: int | None = None


@dataclass(frozen=True)
class Asked:
    """One table, of the model that a stage has left."""

    file: str
    stage: str
    tasks: str
    lengths: str
    cases: str
    memory: tuple[str, ...] = MEMORY
    windows: tuple[str, ...] = WINDOW


@dataclass(frozen=True)
class Scale:
    """How much is learned and asked.

    Attributes:
        name: of its folders. learned, remembered, foreseen: questions for LoRA, for the hippocampus, and for the gate
            alone, where credit was not measured before.
        longest: characters of a text that LoRA learns. adapting, training, foreseeing: options of the three.
        reply_tokens, batch_size: of the questions. asked: tables; the longer a text, the fewer questions.
    """

    name: str
    learned: tuple[Drawn, ...]
    longest: int
    adapting: tuple[Any, ...]
    remembered: tuple[Drawn, ...]
    training: tuple[Any, ...]
    reply_tokens: int
    batch_size: int
    asked: tuple[Asked, ...]
    foreseen: tuple[Drawn, ...] = ()
    foreseeing: tuple[Any, ...] = ()

    def folder(self, stage: str = "") -> Path:
        """What a stage leaves: LoRA (no name), "base" (the same as an ordinary base), "memory", or "credit"."""
        return RUNS / (f"{self.name}-{stage}" if stage else self.name)


SMALL = Scale(
    name="babi",
    learned=(Drawn("10k-qa1", "0,100,400", 1, 200, 380), Drawn("10k-qa2", "0,300", 2, 200, 150)),
    longest=1_000,
    adapting=("--batch_size", 8, "--max_seq_length", 256, "--lora_r", 16, "--learning_rate", "1e-2"),
    remembered=(
        Drawn("10k-qa1", "0,200", 11, 60),
        Drawn("10k-qa2", "0,300", 12, 30),
        Drawn("10k-qa1", "1100", 13, 40),
    ),
    training=(
        *("--num_epochs", 4, "--batch_size", 8, "--max_document_tokens", 2048),
        *("--recall_share", "1.0", "--credit_documents", 0),
        *("--max_seq_length", 1024, "--learning_rate", "1e-3"),
    ),
    foreseen=(Drawn("10k-qa1", "1500", 14, 40),),
    foreseeing=(
        *("--max_steps", 1, "--batch_size", 8, "--max_document_tokens", 2048),
        *("--recall_share", "0.0", "--credit_documents", 40, "--foresight_passes", 6),
    ),
    reply_tokens=32,
    batch_size=5,
    asked=(
        Asked("babilong_test.json", "", "qa1,qa2", "0,1000,4000", "10,10,6"),
        Asked("babilong_64k_test.json", "", "qa1", "64000", "3"),
        Asked("babilong_64k_all_test.json", "", "qa1", "64000", "3", EVERYTHING),
        Asked("babilong_memory_test.json", "memory", "qa1", "0,1000,4000", "10,10,6", windows=()),
        Asked("babilong_memory_qa2_test.json", "memory", "qa2,qa3", "0,1000", "10,10"),
        Asked("babilong_credit_test.json", "credit", "qa1", "16000,64000", "5"),
    ),
)
LARGE = Scale(
    name="babi-large",
    learned=(
        Drawn("10k-qa1", "0,100,400,1000", 1, 1200),
        Drawn("10k-qa2", "0,400", 2, 1200),
        Drawn("qa3", "0,400", 3, 800),
    ),
    longest=20_000,
    adapting=(
        *("--batch_size", 32, "--max_seq_length", 512, "--lora_r", 16, "--learning_rate", "5e-3", "--set"),
        'lora_target_modules=["q_proj","k_proj","v_proj","o_proj","gate_proj","up_proj","down_proj"]',
    ),
    remembered=(
        Drawn("10k-qa1", "0,400,1500,3000", 11, 60),
        Drawn("10k-qa2", "0,400,1500,3000", 12, 40),
        Drawn("qa3", "0,400,1500,3000", 13, 25),
    ),
    training=(
        *("--num_epochs", 3, "--batch_size", 16, "--max_document_tokens", 6144),
        *("--recall_share", "0.5", "--credit_documents", 300, "--foresight_passes", 4),
    ),
    reply_tokens=48,
    batch_size=24,
    asked=(
        Asked("babilong_large_test.json", "memory", "qa1,qa2,qa3", "0,1000,4000,16000", "24"),
        Asked("babilong_large_64k_test.json", "memory", "qa1,qa2,qa3", "64000", "24"),
    ),
)


def _drawn(scale: Scale, drawn: Drawn) -> list[str]:
    """Lines of questions about stories of training files in training novels."""
    file = RUNS / f"{scale.name}-{drawn.task}-{drawn.seed}.jsonl"
    options = ("--lengths", drawn.lengths, "--samples", drawn.samples, "--seed", drawn.seed, "--output", file)
    make(ROOT, {file: ["hide-stories", "--text", TRAINING, "--reasons", "--task", drawn.task, *options]})
    return (ROOT / file).read_text(encoding="utf-8").splitlines()


def _written(lines: list[str], file: Path) -> Path:
    (ROOT / file).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file


def adapt(scale: Scale) -> None:
    """LoRA learns the answers alone; then a base that has learned them is written."""
    learned = []
    for drawn in scale.learned:
        short = [s for s in _drawn(scale, drawn) if len(json.loads(s)["context"]) < scale.longest]
        random.Random(0).shuffle(short)
        learned += short[: drawn.learned]
    random.Random(1).shuffle(learned)
    questions = _written(learned, RUNS / f"{scale.name}-stories.jsonl")
    size = ("--num_epochs", 1, "--max_document_tokens", 2048, "--dtype", "float32", "--logging_steps", 5, "--seed", 42)
    carried = ("--memory_off", "--hippocampus", SHIPPED, "--output_dir", scale.folder())
    hippoformer(ROOT, "train", "--questions", questions, *carried, *size, *scale.adapting)
    hippoformer(ROOT, "export-base", "--model", scale.folder(), "--output", scale.folder("base"))


def train(scale: Scale) -> None:
    """The shipped hippocampus goes on with questions, on the base that answers them."""
    _learn(scale, "memory", scale.remembered, SHIPPED, scale.training)


def foresee(scale: Scale) -> None:
    """Its gate goes on with the credit of texts longer than the window; recall stays as it is, but for one step."""
    _learn(scale, "credit", scale.foreseen, scale.folder("memory"), scale.foreseeing)


def _learn(scale: Scale, stage: str, drawn: tuple[Drawn, ...], hippocampus: Any, options: tuple[Any, ...]) -> None:
    questions = _written([line for of in drawn for line in _drawn(scale, of)], RUNS / f"{scale.name}-{stage}.jsonl")
    size = ("--max_seq_length", 256, "--dtype", "float32", "--logging_steps", 5, "--seed", 42)
    kept = ("--cache_dir", "hidden_states", "--output_dir", scale.folder(stage))
    base = ("--base_model", scale.folder("base"), "--hippocampus", hippocampus, "--learning_rate", "5e-4")
    hippoformer(ROOT, "train", *base, "--questions", questions, *size, *options, *kept)


def question(scale: Scale, asked: Asked) -> list[Any]:
    """The command that makes one table of results."""
    cells = ("--tasks", asked.tasks, "--lengths", asked.lengths, "--cases", asked.cases, *asked.windows)
    replies = ("--reply-tokens", scale.reply_tokens, "--batch-size", scale.batch_size)
    model = ("--model", scale.folder(asked.stage), *asked.memory)
    return ["eval", "babilong", *model, "--text", TEST, *cells, *replies, "--output", RESULTS / asked.file]


@ends_with_failure
def main(argv: list[str] | None = None) -> int:
    """Makes what is missing; the exit status of the first command that fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--large", action="store_true", help="what a GPU can learn and answer in minutes")
    scale = LARGE if parser.parse_args(argv).large else SMALL
    (ROOT / RUNS).mkdir(exist_ok=True)
    stages = {"base": adapt, "memory": train} | ({"credit": foresee} if scale.foreseen else {})
    for stage, learn in stages.items():
        if not (ROOT / scale.folder(stage) / "config.json").is_file():
            learn(scale)
    make(ROOT, {RESULTS / asked.file: question(scale, asked) for asked in scale.asked})
    write_tables(ROOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
