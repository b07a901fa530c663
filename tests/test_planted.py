"""Planted facts: every fact twice, at the promised distance, and the text around it untouched."""

import re

import pytest

from hippoformer.data import Document
from hippoformer.data.planted import plant_facts
from hippoformer.errors import ConfigurationError

LINES = [f"line {i} of a text that says nothing else" for i in range(400)]
TEXT = Document("plain", "\n".join(LINES) + "\n", "here")


def facts_in(text: str) -> list[tuple[int, str]]:
    return [(m.start(), m.group()) for m in re.finditer(r"^(?!line ).+$", text, re.MULTILINE)]


def test_each_fact_is_told_twice_at_the_distance_asked_for() -> None:
    (planted,) = plant_facts([TEXT], facts=4, gap=(3000, 5000), seed=1)
    found = facts_in(planted.text)
    assert len(found) == 8
    for _, sentence in found:
        first, second = (where for where, other in found if other == sentence)
        # The later telling may be pushed on by other facts, to the end of its line, or held by the end of the text.
        assert 3000 <= second - first <= 5000 + 4 * 80 + 60 or second > len(planted.text) - 400


def test_the_text_around_the_facts_is_the_document() -> None:
    (planted,) = plant_facts([TEXT], facts=5, gap=(100, 9000), seed=2)
    assert "".join(line for line in planted.text.splitlines(True) if line.startswith("line ")) == TEXT.text


def test_draws_depend_on_seed_and_place_alone() -> None:
    one, two = plant_facts([TEXT, TEXT], facts=3, gap=(100, 200), seed=3)
    assert one.text != two.text
    assert [d.text for d in plant_facts([TEXT, TEXT], facts=3, gap=(100, 200), seed=3)] == [one.text, two.text]
    assert plant_facts([TEXT], facts=3, gap=(100, 200), seed=4)[0].text != one.text


def test_short_documents_come_back_as_they_are() -> None:
    short = Document("short", "a\nb\n", "here")
    assert plant_facts([short], facts=3, gap=(100, 200), seed=0)[0].text == short.text


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="gap"):
        plant_facts([TEXT], facts=1, gap=(5, 4), seed=0)
