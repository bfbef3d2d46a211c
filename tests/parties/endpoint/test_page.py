"""The page in a browser without a window: a conversation typed, read, stopped, and failing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mpcache_parties.endpoint.app import Endpoint
from mpcache_parties.endpoint.gate import Admission
from tests.support.endpoint import listening
from tests.support.scripted_chat import Script

sync_api = pytest.importorskip("playwright.sync_api")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SIZES = {"desktop": (1280, 800), "phone": (390, 844)}
KEY = "a key of the test".replace(" ", "-")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed here"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def address(script: Script) -> Iterator[str]:
    with listening(Endpoint({"demo": script.open}, limit=1)) as at:
        yield at
        script.go.set()


@pytest.fixture(params=SIZES)
def page(request: pytest.FixtureRequest, browser: Any, address: str) -> Iterator[Any]:
    """The page, on which no script has failed and which loads nothing from elsewhere."""
    width, height = SIZES[request.param]
    faults: list[str] = []
    opened = browser.new_page(viewport={"width": width, "height": height})
    opened.set_default_timeout(10_000)
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("console", lambda said: faults.append(said.text) if "Security" in said.text else None)
    opened.on("request", lambda asked: None if asked.url.startswith(address) else faults.append(asked.url))
    opened.goto(address)
    yield opened
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    opened.close()
    assert [fault for fault in faults if not fault.startswith("data:")] == []


def ask(page: Any, text: str) -> None:
    page.get_by_label("Your question").fill(text)
    page.keyboard.press("Enter")


def answered(page: Any, number: int) -> str:
    """Wait until so many answers are complete, and return the last one."""
    page.locator(".said .cost").nth(number - 1).wait_for()
    return str(page.locator(".said.assistant p").last.inner_text())


def test_a_conversation_is_typed_and_read(page: Any, script: Script, tmp_path: Path) -> None:
    ask(page, "hello <b>there</b>")
    assert answered(page, 1) == "Heard 1: hello <b>there</b>"  # text, whatever a model writes
    assert page.locator("#log b").count() == 0
    ask(page, "more")
    assert answered(page, 2) == "Heard 2: more"
    assert page.locator(".said .cost").last.inner_text() == "2 tokens · 1 s · 276 rounds · 1.79 MB"
    assert page.locator("#turns").text_content() == "2"
    assert page.locator("#to_dealer").text_content() == "1.02 kB"
    page.get_by_role("button", name="New conversation").click()
    assert page.locator(".said").count() == 0 and page.locator("#turns").text_content() == "0"
    ask(page, "anew")
    assert answered(page, 1) == "Heard 1: anew"
    page.screenshot(path=tmp_path / "page.png")


def test_stop_ends_an_answer_and_the_conversation_goes_on(page: Any, script: Script) -> None:
    script.pace_s = 0.05
    ask(page, "many " * 300)
    page.locator(".said.assistant p", has_text="many many").wait_for()
    page.get_by_role("button", name="Stop").click()
    assert answered(page, 1).count("many") < 200
    ask(page, "on")
    assert answered(page, 2) == "Heard 2: on"


def test_an_error_is_shown_and_the_question_can_be_sent_again(page: Any, script: Script) -> None:
    script.die_after = 1
    ask(page, "hello")
    assert "the connection has ended" in page.get_by_role("alert").inner_text()
    script.die_after = None
    assert page.get_by_label("Your question").input_value() == "hello"
    page.get_by_role("button", name="Send").click()
    assert answered(page, 1) == "Heard 1: hello"


def test_setup_and_the_place_in_the_queue_are_shown(
    page: Any, script: Script, browser: Any, address: str
) -> None:
    script.setup_s = 3.0
    script.go.clear()
    ask(page, "first")
    page.get_by_role("status").get_by_text("set-up").wait_for()
    page.get_by_text("question: layer 1 of 2").wait_for()
    other = browser.new_page()
    other.goto(address)
    ask(other, "second")
    other.get_by_text("place 1 in the queue").wait_for()
    other.get_by_role("button", name="Stop").click()  # it waits no longer
    other.get_by_role("button", name="Send").wait_for()
    assert other.locator(".said").count() == 0
    other.close()
    script.go.set()
    assert answered(page, 1) == "Heard 1: first"


def test_a_document_is_chosen_where_there_are_several(browser: Any, script: Script) -> None:
    other = Script()
    with listening(Endpoint({"demo@a": script.open, "demo@b": other.open}, 1)) as at:
        page = browser.new_page()
        page.goto(at)
        assert not page.locator("#model").is_visible()
        for name, asked in (("demo@b", other), ("demo@a", script)):
            page.get_by_label("Model and document").select_option(name)
            ask(page, "hello")
            assert answered(page, 1) == "Heard 1: hello"
            assert len(asked.opened) == 1
        page.close()


def test_the_key_is_asked_for_where_there_is_one(browser: Any, script: Script) -> None:
    with listening(Endpoint({"demo": script.open}, 1), Admission(key=KEY)) as at:
        page = browser.new_page()
        page.goto(at)
        ask(page, "hello")
        assert "API key is missing or wrong" in page.get_by_role("alert").inner_text()
        page.get_by_label("API key").fill(KEY)
        page.get_by_role("button", name="Send").click()
        assert answered(page, 1) == "Heard 1: hello"
        page.close()
