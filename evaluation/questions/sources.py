"""Questions about long texts by the names of their data sets.

    narrativeqa              whole books and film scripts (Kočiský et al. 2018, arXiv:1712.07040)
    scrolls-TASK             qasper, quality, narrative_qa, summ_screen_fd, gov_report, qmsum, contract_nli
                             (Shaham et al. 2022, arXiv:2201.03533); only train and validation have answers
    babilong-LENGTH-TASK     0k, 1k ... 1M and qa1 ... qa10 (Kuratov et al. 2024, arXiv:2406.10149), as babilong-4k-qa1
    babi-TASK                qa1 ... qa5 from a local copy; babi-10k-TASK from its larger set, in the folder en-10k
    FILE.jsonl               one question a line, see `hippoformer.data.questions`

A local copy DATA_DIR/NAME/SPLIT.jsonl of any of them comes first.
"""

import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from hippoformer.data.questions import Question, make_question, read_questions
from hippoformer.errors import ConfigurationError, TextError

_SCROLLS = ("qasper", "quality", "narrative_qa", "summ_screen_fd", "gov_report", "qmsum", "contract_nli")
_SUMMARIES = ("summ_screen_fd", "gov_report")  # have no question: the whole input is to be summed up
_BABI = {
    "qa1": "qa1_single-supporting-fact",
    "qa2": "qa2_two-supporting-facts",
    "qa3": "qa3_three-supporting-facts",
    "qa4": "qa4_two-arg-relations",
    "qa5": "qa5_three-arg-relations",
}


def named_questions(
    name: str, split: str = "validation", data_dir: str | Path = "data", max_samples: int | None = None
) -> list[Question]:
    """Questions of a data set.

    Args:
        name: see the head of this module. split: BABILong has none but its tasks.
        data_dir: where local copies lie. max_samples: only the first of them.

    Raises:
        ConfigurationError: an unknown name. TextError: not available, damaged, or without answers.
    """
    local = Path(data_dir) / name / f"{split}.jsonl"
    if name.endswith(".jsonl") or local.is_file():
        return read_questions(name, split, data_dir, max_samples)
    if name.startswith("babi-"):
        return list(islice(_babi(name.removeprefix("babi-"), split, Path(data_dir)), max_samples))
    return list(islice(_hub(name, split, local), max_samples))


def write_questions(path: str | Path, questions: Iterable[Question]) -> None:
    """Writes a file that `hippoformer.data.questions` reads, and `hippoformer train --questions` learns from.

    Raises:
        ConfigurationError: a name that does not end in .jsonl.
    """
    if not str(path).endswith(".jsonl"):
        raise ConfigurationError(f"{path}: expected a name that ends in .jsonl, by which questions are known")
    rows = ({"context": q.context, "question": q.question, "answers": list(q.answers)} for q in questions)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _babi(task: str, split: str, data_dir: Path) -> Iterator[Question]:
    """Stories whose lines are numbered from 1; a question ends in a tab (a bar in some copies), the answer, and the
    numbers of the lines that it follows from.
    """
    part = "train" if split == "validation" else split  # bAbI has no validation split
    plain = task.removeprefix("10k-")
    pattern = f"babi/**/{'en-10k/' if task != plain else ''}{_BABI.get(plain, plain)}_{part}.txt"
    files = sorted(data_dir.glob(pattern))
    if not files:
        raise TextError(
            f"babi-{task} ({split}) is not available: no file {data_dir / pattern}; put the tasks there, or choose "
            f"one of babi-{', babi-'.join(_BABI)}"
        )
    story: dict[str, str] = {}
    for number, line in enumerate(files[0].read_text(encoding="utf-8").splitlines(), start=1):
        position, _, text = line.partition(" ")
        if position == "1":
            story = {}
        if "\t" in text or "|" in text:
            question, answer, *supporting = re.split(r"[\t|]", text)
            reasons = tuple(story[place] for place in " ".join(supporting).split() if place in story)
            context = "\n".join(story.values())
            yield make_question(f"babi-{task}:{number}", context, question.strip(), [answer.strip()], reasons)
        else:
            story[position] = text


def _hub(name: str, split: str, local: Path) -> Iterator[Question]:
    scrolls = re.fullmatch(rf"scrolls-({'|'.join(_SCROLLS)})", name)
    babilong = re.fullmatch(r"babilong-(\d+[kM])-(qa\d+)", name)
    if scrolls:
        file = f"zip://{scrolls[1]}/{split}.jsonl::hf://datasets/tau/scrolls/{scrolls[1]}.zip"
        by_id: dict[str, tuple[str, str, list[str]]] = {}  # rows of one id are answers to one question
        for row in _rows(name, local, "json", split=split, data_files={split: file}):
            if row["output"] is None:
                raise TextError(f"{name} ({split}) has no answers; choose train or validation")
            question, _, context = row["input"].partition("\n\n")
            if scrolls[1] in _SUMMARIES:
                question, context = "What is a summary of this?", row["input"]
            by_id.setdefault(row["id"], (context, question.strip(), []))[2].append(row["output"])
        found = iter(by_id.values())
    elif babilong:
        rows = _rows(name, local, "RMT-team/babilong", name=babilong[1], split=babilong[2])
        found = ((row["input"], row["question"], [row["target"]]) for row in rows)
    elif name == "narrativeqa":
        rows = _rows(name, local, "deepmind/narrativeqa", split=split, streaming=True)
        found = (
            (row["document"]["text"], row["question"]["text"], [answer["text"] for answer in row["answers"]])
            for row in rows
        )
    else:
        raise ConfigurationError(
            f"questions of {name!r}; expected narrativeqa, scrolls-{', scrolls-'.join(_SCROLLS)}, babilong-4k-qa1 and "
            "its like, babi-qa1 and its like, or a .jsonl file"
        )
    for number, parts in enumerate(found):
        yield make_question(f"{name}:{number}", *parts)


def _rows(wanted: str, local: Path, path: str, /, **options: Any) -> Iterator[Any]:
    """Rows of a data set of the hub; what breaks on the way, also while streaming, is a `TextError`."""
    import datasets

    try:
        yield from datasets.load_dataset(path, **options)
    except Exception as error:  # the hub, HTTP and archive libraries underneath share no base class
        cause = " ".join(str(error).split())[:300]
        raise TextError(
            f"{wanted} is not available: no {local}, and the hub gives none ({type(error).__name__}: {cause}). Put a "
            ".jsonl file there, or check name and network."
        ) from error
