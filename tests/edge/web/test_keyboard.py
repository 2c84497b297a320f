"""The reading page in a real Chromium, with a keyboard and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.lab.child import wait_until
from tests.simulators.browser import Browser
from tests.simulators.reading import PASSWORD, ReadingNode

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReadingNode]:
    reading = ReadingNode(tmp_path_factory.mktemp("node")).start()
    reading.person("ada", "radiologist")
    yield reading
    reading.stop()


@pytest.fixture(scope="module")
def browser(node: ReadingNode, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    window = Browser(tmp_path_factory.mktemp("browser"))
    window.open(node.url)
    window.press("ada", "Tab", PASSWORD, "Enter")
    wait_until("the worklist", lambda: window.url == node.url + "/")
    yield window
    window.close()


def focus(browser: Browser) -> str:
    return str(browser.script("return document.activeElement.textContent.trim()"))


def open_first(browser: Browser, node: ReadingNode) -> str:
    """Tabs to the first study of the worklist that has an answer, and opens it; returns its address."""
    browser.open(node.url)
    first = browser.script(
        "return [...document.querySelectorAll('tbody tr')].find(r => r.querySelector('td.right').innerText)"
        ".querySelector('a.cover').href"
    )
    for _ in range(30):
        browser.press("Tab")
        if browser.script("return document.activeElement.href ?? ''") == first:
            break
    browser.press("Enter")
    wait_until("the study", lambda: browser.url == first)
    return str(first)


def test_a_study_is_corrected_with_the_keyboard_alone(node: ReadingNode, browser: Browser) -> None:
    study = open_first(browser, node)
    answer = study.rsplit("/", 1)[1]
    browser.press("2", "Enter")
    wait_until("the label", lambda: answer in node.labels.current())
    assert node.labels.current()[answer].label == "pneumonia"
    assert node.labels.current()[answer].by == "ada"
    wait_until("the page", lambda: "Reviewed by ada: pneumonia" in browser.text())
    browser.press("w")
    wait_until("the worklist", lambda: browser.url == node.url + "/")


def test_save_and_next_opens_the_next_study_to_review(node: ReadingNode, browser: Browser) -> None:
    study = open_first(browser, node)
    browser.press("1")
    browser.press("Enter", held="Shift")
    wait_until("another page", lambda: browser.url != study)
    assert "/studies/" in browser.url
    assert study.rsplit("/", 1)[1] in node.labels.current()


def test_evidence_lies_exactly_over_the_image_and_obeys_the_keyboard(node: ReadingNode, browser: Browser) -> None:
    open_first(browser, node)

    def box(selector: str) -> list[float]:
        code = f"const b = document.querySelector('{selector}').getBoundingClientRect();"
        return list(browser.script(code + "return [b.x, b.y, b.width, b.height].map(Math.round)"))

    def opacity() -> float:
        return float(browser.script("return Number(getComputedStyle(document.getElementById('evidence')).opacity)"))

    wait_until("the image", lambda: box(".stack img")[2] > 200)
    assert box("#evidence") == box(".stack img")
    figure = box(".film figure")
    assert box(".stack img")[3] <= figure[3]
    before = opacity()
    browser.press("Right")
    assert opacity() == pytest.approx(min(1, before + 0.1))
    browser.press("e")
    assert opacity() == 0
    browser.press("e")
    assert opacity() > 0


def test_the_focus_is_always_visible(node: ReadingNode, browser: Browser) -> None:
    browser.open(node.url)
    for _ in range(9):  # skip link, pages, sign out, quarantine, and into the list
        browser.press("Tab")
        outline = browser.script("return getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", focus(browser)


def test_a_worklist_that_renews_itself_keeps_the_focus(node: ReadingNode, browser: Browser) -> None:
    browser.open(node.url)
    browser.script("const a = document.querySelector('a.cover'); a.focus(); a.dataset.old = 'yes'")
    renewed = "const a = document.querySelector('a.cover'); return a.dataset.old === undefined"
    wait_until("the list to be renewed", lambda: bool(browser.script(renewed)))
    assert browser.script("return document.activeElement === document.querySelector('a.cover')")


def test_the_policy_refuses_nothing_that_the_pages_need(node: ReadingNode, browser: Browser, tmp_path: Path) -> None:
    open_first(browser, node)
    assert browser.script("return typeof htmx") == "object"
    colour = browser.script("return getComputedStyle(document.body).backgroundColor")
    assert colour == "rgb(11, 14, 19)"
    browser.screenshot(tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 20_000
