"""The mutations still fit the package; `make mutations` runs them."""

import pytest

from run_mutations import TESTS, mutate, read_mutations

MUTATIONS = read_mutations()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[f"{one['file']}: {one['what']}" for one in MUTATIONS])
def test_a_mutation_changes_the_package_and_its_test_exists(mutation: dict[str, str]) -> None:
    path, text = mutate(mutation)
    assert text != path.read_text(encoding="utf-8")
    file, _, name = mutation["test"].partition("::")
    assert f"\ndef {name.partition('[')[0]}(" in (TESTS / file).read_text(encoding="utf-8")


def test_a_snippet_that_is_gone_is_refused() -> None:
    with pytest.raises(ValueError, match=r"errors\.py contains 'no such line' 0 times"):
        mutate({"file": "errors.py", "old": "no such line", "new": ""})
