"""Planted facts: every fact stated and asked for at the promised distance, and the text around it untouched."""

import re

import pytest

from hippoformer.data import Document
from hippoformer.data.planted import plant_facts
from hippoformer.errors import ConfigurationError

LINES = [f"line {i} of a text that says nothing else" for i in range(400)]
TEXT = Document("plain", "\n".join(LINES) + "\n", "here")


def facts_in(text: str) -> list[tuple[int, str]]:
    return [(m.start(), m.group()) for m in re.finditer(r"^(?!line ).+$", text, re.MULTILINE)]


def test_each_fact_is_stated_and_asked_for_at_the_distance_given() -> None:
    (planted,) = plant_facts([TEXT], facts=4, gap=(3000, 5000), seed=1)
    found = facts_in(planted.text)
    assert len(found) == 8
    pairs = 0
    for where, question in found:
        value = question.split()[-1].strip('".')
        before = [place for place, other in found if value in other and place < where]
        if not before:
            continue  # a statement: the first time its value is written
        pairs += 1
        # The question may be pushed on by other facts, to the end of its line, or held by the end of the text.
        assert 3000 <= where - before[0] <= 5000 + 8 * 120 or where > len(planted.text) - 500
        assert question.endswith(value), "nothing may follow an answer"
    assert pairs == 4


def test_the_text_around_the_facts_is_the_document() -> None:
    (planted,) = plant_facts([TEXT], facts=5, gap=(100, 9000), seed=2)
    assert "".join(line for line in planted.text.splitlines(True) if line.startswith("line ")) == TEXT.text


def test_draws_depend_on_seed_and_place_alone() -> None:
    one, two = plant_facts([TEXT, TEXT], facts=3, gap=(100, 200), seed=3)
    assert one.text != two.text
    assert [d.text for d in plant_facts([TEXT, TEXT], facts=3, gap=(100, 200), seed=3)] == [one.text, two.text]
    assert plant_facts([TEXT], facts=3, gap=(100, 200), seed=4)[0].text != one.text
    short = Document("short", "a\nb\n", "here")
    assert plant_facts([short], facts=3, gap=(100, 200), seed=0)[0].text == short.text
    with pytest.raises(ConfigurationError, match="gap"):
        plant_facts([TEXT], facts=1, gap=(5, 4), seed=0)
