"""The report: one page that needs nothing else, says where each number is from, and takes no text for markup."""

import json
import re
import shutil
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hippoformer.cli import app
from hippoformer.errors import ResultError
from hippoformer.figures import FIGURES, Result
from hippoformer.report import render, write_report
from hippoformer.report.reading import reading
from result_files import contents, results, write_results

pytestmark = pytest.mark.slow  # a minute to draw all figures once

VOID = {"meta", "br", "input", "link", "img", "hr", "wbr"}


class Page(HTMLParser):
    """Elements of a page with their attributes and own text; tags that do not match are collected."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[int] = []
        self.wrong: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.elements[self.open[-1]][0] != tag:
            self.wrong.append(tag)
        else:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        for index in self.open:
            self.elements[index][2].append(data)

    def all(self, tag: str, name: str | None = None) -> list[tuple[dict[str, str | None], str]]:
        """(attributes, text) of every element of a tag, and of a class where one is named."""
        return [
            (attributes, "".join(text))
            for found, attributes, text in self.elements
            if found == tag and (name is None or name in (attributes.get("class") or "").split())
        ]


@cache
def html() -> str:
    return render(results())


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(html())


def test_the_page_is_well_formed(page: Page) -> None:
    assert page.wrong == [] and page.open == []
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) > 50
    assert html().startswith("<!doctype html>")
    # Every name that a figure's drawing refers to is in the page, in that same figure.
    used = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', html())
    assert {one or other for one, other in used} <= set(ids) and len(used) > 50


def test_no_text_is_taken_for_markup(page: Page) -> None:
    """The traced text holds tags, entities, a template's brackets and the end of a script."""
    assert page.all("b") and not [text for _, text in page.all("b") if text == "no"]
    assert "He said <b>no</b> & left;" in page.all("div", "text")[0][1]
    assert "{{ 7 * 7 }} </script> came." in page.all("div", "text")[0][1]
    assert "<i>Title</i>" in page.all("section")[2][1] and not [t for _, t in page.all("i") if t == "Title"]
    assert len(page.all("script")) == 2
    hostile = contents()["wiki"]
    hostile["provenance"] |= {"command": "x </code><script>alert(1)</script>", "commit": '"><img src=x>'}
    read = Page(render([Result("<u>", "<u>.json", hostile["format"], hostile)]))
    assert len(read.all("script")) == 1 and not read.all("img") and not read.all("u") and read.wrong == []


def test_the_document_is_the_trace(page: Page) -> None:
    trace = contents()["trace"]["tokens"]
    tokens = page.all("span", "t")
    assert len(tokens) == len(trace["text"])
    written = "".join(trace["text"])
    assert "".join(text for _, text in tokens) == re.sub(r"(?<!\n)\n(?!\n)", " ", written) != written
    assert [float(a["style"].removeprefix("--s:")) for a, _ in tokens] == [round(s, 2) for s in trace["salience"]]  # type: ignore[union-attr]
    (data,) = [text for a, text in page.all("script") if a.get("id") == "trace"]
    assert json.loads(data) == {name: trace[name] for name in json.loads(data)}
    assert {"episode", "log_p", "log_p_off", "stored", "weight", "hit"} <= set(json.loads(data))


def test_tables_hold_the_numbers_of_the_files(page: Page) -> None:
    cells = [text for _, text in page.all("td")]
    memory = contents()["wiki"]["conditions"]["memory"]
    perplexity = memory["token_perplexity"]
    assert f"{perplexity['estimate']:.2f} [{perplexity['low']:.2f}, {perplexity['high']:.2f}]" in cells
    change = f"{100 * (memory['against_off']['ratio']['estimate'] - 1):+.1f} %".replace("-", "−")
    assert any(cell.startswith(f"{change} [") for cell in cells)
    assert {"2.345 [2.1, 2.6]", "2.11", "1.0123 [1.0000, 1.0300]", "−4.0 % [−5.0, −3.0]", "33.0"} <= set(cells)
    assert {"-17 [-18.1, -15.8]", "-8.9 (window-only)"} <= set(cells)
    assert {"0.491", "0.262 [0.200, 0.300]", "0.024 [0.01, 0.06]", "0.0312"} <= set(cells)
    assert {"43 % [22, 86]", "1.2"} <= set(cells)
    cards = [text for _, text in page.all("li")]
    assert any(change in card and "better in" in card and "of 2 documents" in card for card in cards)


def test_the_command(tmp_path: Path) -> None:
    folder, output = write_results(tmp_path / "results"), tmp_path / "report.html"
    result = CliRunner().invoke(app, ["report", str(folder), "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert len(Page(output.read_text(encoding="utf-8")).all("figure")) == len(FIGURES)
    (tmp_path / "empty").mkdir()
    result = CliRunner().invoke(app, ["report", str(tmp_path / "empty"), "--output", str(output)])
    assert result.exit_code == 2 and "holds no result file" in result.stderr
    with pytest.raises(ResultError, match="cannot be written"):
        write_report(results()[:2], tmp_path / "no" / "report.html")


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium: playwright's own, or the one of the system."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        names = ("chromium", "chromium-browser", "google-chrome", "chrome")
        found = next((path for path in map(shutil.which, names) if path), None)
        own = started.chromium.executable_path
        if not Path(own).exists() and found is None:
            pytest.skip("no Chromium on this machine: install one, or run `playwright install chromium`")
        path = own if Path(own).exists() else found
        # In a container there is often no room for its sandbox; the page is our own.
        launched = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(html(), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def window(browser: Any, address: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page, opened; at its end it must have asked for nothing and complained of nothing."""
    options = {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"} | getattr(request, "param", {})
    tab = browser.new_page(**options)
    heard: list[str] = []
    tab.on("console", lambda message: heard.append(message.text))
    tab.on("pageerror", lambda error: heard.append(str(error)))
    tab.on("request", lambda asked: heard.append(asked.url) if asked.url.startswith(("http", "file")) else None)
    tab.goto(address)
    yield tab
    assert heard == [address]
    tab.close()


def a_far_mark() -> tuple[int, dict[str, Any]]:
    """A token that recall made likelier, from beyond the window: its number, and the columns."""
    columns = contents()["trace"]["tokens"]
    read = reading(Result("trace", "trace.json", "hippoformer.trace/1", contents()["trace"]))
    return next(i for i, t in enumerate(read["tokens"]) if t["mark"].startswith("up") and "far" in t["mark"]), columns


@pytest.mark.slow
def test_pointing_at_a_word_shows_what_was_recalled(window: Any) -> None:
    number, columns = a_far_mark()
    window.hover(f'.t[data-i="{number}"]')
    said = window.inner_text("#detail")
    back = number - columns["episode"][number]
    assert f"What came to mind stood {back} token" in said and "beyond the window" in said
    gain = columns["log_p"][number] - columns["log_p_off"][number]
    assert f"+{gain:.2f} nats" in said and "× likelier by recall" in said
    assert window.inner_text("#detail blockquote mark") == columns["text"][columns["episode"][number]].strip("\n")
    assert window.locator(".t.from").get_attribute("data-i") == str(columns["episode"][number])
    window.hover('.t[data-i="0"]')
    assert "What came to mind" not in window.inner_text("#detail") and window.locator(".t.from").count() == 0


@pytest.mark.slow
def test_the_keyboard_goes_from_mark_to_mark(window: Any) -> None:
    marks = [int(m.get_attribute("data-i")) for m in window.locator(".t.near, .t.far").all()]
    far = [int(m.get_attribute("data-i")) for m in window.locator(".t.far").all()]
    assert 0 < len(far) < len(marks)

    def here() -> int:
        return int(window.evaluate("document.activeElement.dataset.i"))

    window.focus(f'.t[data-i="{marks[0]}"]')
    visited = [here()]
    for _ in marks[1:4]:
        window.keyboard.press("ArrowRight")
        visited.append(here())
    window.keyboard.press("ArrowLeft")
    assert visited == marks[:4] and here() == marks[2]
    assert window.locator(".t.here").get_attribute("data-i") == str(marks[2])
    assert "by recall" in window.inner_text("#detail")
    window.check("#only-far")
    window.focus(f'.t[data-i="{marks[2]}"]')
    window.keyboard.press("ArrowRight")
    assert here() == next(i for i in far if i > marks[2])
    # One stop for the tabulator, not one a word.
    assert window.locator(".text [tabindex='0']").count() == 1


@pytest.mark.slow
@pytest.mark.parametrize("window", [{"viewport": {"width": 360, "height": 740}, "has_touch": True}], indirect=True)
def test_on_a_phone_nothing_is_cut_off_and_a_tap_shows(window: Any) -> None:
    assert window.evaluate("document.documentElement.scrollWidth") == 360
    number, _ = a_far_mark()
    window.tap(f'.t[data-i="{number}"]')
    assert "What came to mind" in window.inner_text("#detail")
    card, word = (window.locator(where).bounding_box() for where in ("#detail", ".t.here"))
    assert card["y"] + card["height"] <= 740 and 0 <= word["y"] <= 740
