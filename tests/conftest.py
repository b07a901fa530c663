"""One thread for all tests, what is slow, and the mark `supports`, from which the tables of docs/support.md are made.

Tiny models gain nothing from more threads, and sums then come in one order. A test of all architectures is in the quick
suite for four that differ most; the other architectures are marked slow.
"""

import io
import json
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from hippoformer.cli import main
from tiny import ARCHITECTURES
from tiny_training import folder  # noqa: F401, a fixture

# Grouped heads; a sliding window; two rotary tables and sliding layers; learned positions.
QUICK = {"llama", "mistral-narrow", "gemma3", "gpt2"}
AXES = {"architecture", "trainer", "precision", "mode", "refused"}


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


class Finished(NamedTuple):
    """How a command of the command line ended, and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Finished]:
    """Runs `hippoformer WORDS` in this process, with `typed` as its input."""

    def run(*words: object, typed: str = "") -> Finished:
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as error:  # as argparse ends
            code = int(error.code or 0)
        return Finished(code, *capsys.readouterr())

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks architectures as slow, and puts what a test shows into its entry of a JUnit report. Marks of a test and of
    its parameters add up.
    """
    named = {item: _architectures(item) for item in items}
    quick = {_function(item) for item, names in named.items() if names and names <= QUICK}
    for item, names in named.items():
        if names - QUICK and _function(item) in quick:
            item.add_marker("slow")
    for item in items:
        record: dict[str, object] = {}
        for mark in reversed(list(item.iter_markers("supports"))):
            record |= mark.kwargs
        if record:
            item.user_properties.append(_property(item, record))


@pytest.fixture
def shows(request: pytest.FixtureRequest) -> Callable[..., None]:
    """For a test that finds out what it shows while it runs; it carries a bare mark."""
    assert request.node.get_closest_marker("supports"), "mark the test with @pytest.mark.supports"
    return lambda **record: request.node.user_properties.append(_property(request.node, record))


def _function(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


def _architectures(item: pytest.Item) -> set[str]:
    """Those that a test's parameters name."""
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return {value for value in values if isinstance(value, str)} & set(ARCHITECTURES)


def _property(item: pytest.Item, record: dict[str, object]) -> tuple[str, str]:
    if unknown := record.keys() - AXES:
        raise pytest.UsageError(f"{item.nodeid}: supports({', '.join(unknown)}=…) is none of {', '.join(sorted(AXES))}")
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    words = {
        axis: [one.format(**parameters) for one in ([value] if isinstance(value, str) else value)]
        for axis, value in record.items()
    }
    return "supports", json.dumps(words, ensure_ascii=False)
