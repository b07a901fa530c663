"""Questions about long texts: NarrativeQA, SCROLLS, BABILong, bAbI, and files of one's own.

    narrativeqa              whole books and film scripts (Kočiský et al. 2018, arXiv:1712.07040)
    scrolls-TASK             qasper, quality, narrative_qa, summ_screen_fd, gov_report, qmsum, contract_nli
                             (Shaham et al. 2022, arXiv:2201.03533); only train and validation have answers
    babilong-LENGTH-TASK     0k, 1k … 1M and qa1 … qa10 (Kuratov et al. 2024, arXiv:2406.10149), as babilong-4k-qa1
    babi-TASK                qa1 … qa5 from a local copy, the short stories that BABILong hides in books (as does
                             `data.babilong`); babi-10k-TASK from the larger set of it, in the folder en-10k
    FILE.jsonl               a line a question: {"context", "question", "answers"}

A local copy `DATA_DIR/NAME/SPLIT.jsonl` of any of them comes first. What is nowhere is an error.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hippoformer.errors import ConfigurationError, TextError

SCROLLS = ("qasper", "quality", "narrative_qa", "summ_screen_fd", "gov_report", "qmsum", "contract_nli")
# Two of them have no question: the whole input is to be summed up.
_SUMMARIES = ("summ_screen_fd", "gov_report")
_SUMMARISE = "What is a summary of this?"
_SCROLLS_FILES = "zip://{task}/{split}.jsonl::hf://datasets/tau/scrolls/{task}.zip"
_BABI_TASKS = {"qa1": "qa1_single-supporting-fact", "qa2": "qa2_two-supporting-facts"}
_BABI_TASKS |= {"qa3": "qa3_three-supporting-facts", "qa4": "qa4_two-arg-relations", "qa5": "qa5_three-arg-relations"}


@dataclass(frozen=True)
class Question:
    """One question about a text.

    Attributes:
        name: to tell it from others. context: the text. question: what is asked. answers: each is right.
        reasons: the sentences of the text that the answer follows from, as the data lists them, where it does.
    """

    name: str
    context: str
    question: str
    answers: tuple[str, ...]
    reasons: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """How it is put after its context; a blank and the answer follow."""
        return f"\n\nQuestion: {self.question}\nAnswer:"


def read_questions(
    name: str, split: str = "validation", data_dir: str | Path = "data", max_samples: int | None = None
) -> list[Question]:
    """Questions of a data set, or of a .jsonl file.

    Args:
        name: see the head of this module. split: which part; BABILong has none but its tasks.
        data_dir: where local copies lie. max_samples: only the first so many.

    Raises:
        ConfigurationError: an unknown name, or `max_samples` below 1.
        TextError: not to be had, damaged, or without answers.
    """
    if max_samples is not None and max_samples < 1:
        raise ConfigurationError(f"max_samples={max_samples}; expected at least 1, or none for all")
    local = Path(data_dir) / name / f"{split}.jsonl"
    if name.endswith(".jsonl") or local.is_file():
        found = _from_file(Path(name) if name.endswith(".jsonl") else local)
    elif name.startswith("babi-"):
        found = _from_babi(name.removeprefix("babi-"), split, Path(data_dir))
    else:
        found = _from_hub(name, split, local)
    questions = list(islice(found, max_samples))
    if not questions:
        raise TextError(f"{name} ({split}) holds no question; choose another split")
    return questions


def _from_file(path: Path) -> Iterator[Question]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"{path} cannot be read ({error}); expected UTF-8 lines of JSON") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            answers = row["answers"] if "answers" in row else [row["answer"]]
            yield _question(f"{path.stem}:{number}", row["context"], row["question"], answers)
        except (ValueError, KeyError, TypeError) as error:
            raise TextError(
                f"{path}, line {number}: {error!r}; expected an object with context, question, and answers or answer"
            ) from error


def _from_babi(task: str, split: str, data_dir: Path) -> Iterator[Question]:
    """Stories whose lines are numbered from 1; a question ends in a tab (a bar in some copies) and the answer."""
    part = {"validation": "train"}.get(split, split)  # bAbI has no validation split
    larger, plain = task.startswith("10k-"), task.removeprefix("10k-")
    file, folder = f"{_BABI_TASKS.get(plain, plain)}_{part}.txt", "babi/**/en-10k" if larger else "babi/**"
    places = sorted(data_dir.glob(f"{folder}/{file}"))
    if not places:
        raise TextError(
            f"babi-{task} ({split}) is not at hand: no file {file} in {data_dir / folder}; put the bAbI tasks there, "
            f"or choose one of babi-{', babi-'.join(_BABI_TASKS)}"
        )
    story: dict[str, str] = {}
    for number, line in enumerate(places[0].read_text(encoding="utf-8").splitlines(), start=1):
        position, _, text = line.partition(" ")
        if position == "1":
            story = {}
        if "\t" in text or "|" in text:
            question, answer, *supporting = re.split(r"[\t|]", text)
            context, reasons = "\n".join(story.values()), " ".join(supporting).split()
            told = tuple(story[place] for place in reasons if place in story)
            yield _question(f"babi-{task}:{number}", context, question.strip(), [answer.strip()], told)
        else:
            story[position] = text


def _from_hub(name: str, split: str, local: Path) -> Iterator[Question]:
    scrolls = re.fullmatch(rf"scrolls-({'|'.join(SCROLLS)})", name)
    babilong = re.fullmatch(r"babilong-(\d+[kM])-(qa\d+)", name)
    if scrolls:
        task = scrolls[1]
        rows = _rows(
            name, local, "json", split=split, data_files={split: _SCROLLS_FILES.format(task=task, split=split)}
        )
        yield from _scrolls(name, task, rows)
    elif babilong:
        length, task = babilong.groups()
        for number, row in enumerate(_rows(name, local, "RMT-team/babilong", name=length, split=task)):
            yield _question(f"{name}:{number}", row["input"], row["question"], [row["target"]])
    elif name == "narrativeqa":
        for number, row in enumerate(_rows(name, local, "deepmind/narrativeqa", split=split, streaming=True)):
            answers = [answer["text"] for answer in row["answers"]]
            yield _question(f"{name}:{number}", row["document"]["text"], row["question"]["text"], answers)
    else:
        raise ConfigurationError(
            f"questions of {name!r}: choose narrativeqa, scrolls-{', scrolls-'.join(SCROLLS)}, babilong-4k-qa1 and its "
            "like, babi-qa1 and its like, or a .jsonl file"
        )


def _rows(wanted: str, local: Path, path: str, /, **options: Any) -> Iterator[Mapping[str, Any]]:
    """Rows of a data set; what breaks on the way, also while streaming, is told as a `TextError`."""
    import datasets  # takes a second to import

    try:
        yield from datasets.load_dataset(path, **options)
    except Exception as error:  # the hub, HTTP and archive libraries underneath share no base class
        cause = " ".join(str(error).split())[:300]
        raise TextError(
            f"{wanted} is not at hand: no {local}, and the hub gives none ({type(error).__name__}: {cause}). Put a "
            '.jsonl file there, a line a question ({"context", "question", "answers"}), or check name and network.'
        ) from error


def _scrolls(name: str, task: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[Question]:
    """A question stands before its text, with a blank line between; rows of one id are answers to one question."""
    by_id: dict[str, tuple[str, str, list[str]]] = {}
    for row in rows:
        if row["output"] is None:
            raise TextError(f"{name}: this split has no answers; choose train or validation")
        question, _, context = row["input"].partition("\n\n")
        if task in _SUMMARIES:
            question, context = _SUMMARISE, row["input"]
        by_id.setdefault(row["id"], (context, question.strip(), []))[2].append(row["output"])
    for number, (context, question, answers) in enumerate(by_id.values()):
        yield _question(f"{name}:{number}", context, question, answers)


def _question(
    name: str, context: str, question: str, answers: Iterable[str], reasons: tuple[str, ...] = ()
) -> Question:
    kept = tuple(answer for answer in answers if isinstance(answer, str) and answer.strip())
    if not kept or not context.strip() or not question.strip():
        raise TextError(f"{name}: a question needs a context, a question and an answer; one of them is empty")
    return Question(name, context, question, kept, reasons)
