"""The audit's page: what is in it, and what a browser shows, on a screen, on a telephone and on paper."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mpcache.audit.page import page
from mpcache.cost.pricing import price
from mpcache.model import demo_model_dir, load_shape
from tests.support.audit_command import run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    quality = [
        {"task": "recall", "policy": policy, "budget_percent": budget, "question": "after",
         "accuracy": accuracy, "ci95": [accuracy - 0.1, accuracy], "n": 50, "engine": "plain"}
        for policy, budget, accuracy in [("full", 100, 0.99), ("mpcache", 40, 0.8), ("mpcache", 60, 0.95)]
    ]  # fmt: skip
    (folder / "q.json").write_text(json.dumps({"model": "demo", "context_tokens": 880, "rows": quality}))
    done = run(
        "--context", "100,200", "--policy", "full", "--policy", "mpcache", "--report", str(folder / "r.html"),
        "--quality", str(folder / "q.json"), "--protocol", "fast",
    )  # fmt: skip
    assert done.exit_code == 0, done.exception
    return folder / "r.html"


def test_the_page_needs_nothing_else(report: Path) -> None:
    text = report.read_text()
    assert not re.search(r"""(?:src|href|action)\s*=\s*["']?(?!data:)\w*:?//""", text)
    assert "@import" not in text and "url(" not in text and "fetch(" not in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])  # type: ignore[index]
    assert {row["policy"] for row in data["rows"]} == {"full", "mpcache"} and data["command"]
    assert all(row["ops"] for row in data["rows"])
    assert report.stat().st_size < 300_000


def test_quality_is_priced_at_its_budget(report: Path) -> None:
    data = json.loads(re.search(r'id="data">(.*?)</script>', report.read_text(), re.S)[1])  # type: ignore[index]
    points = data["quality_points"]
    assert len(points) == 3 * 2 * 2  # rows, contexts, networks
    half = next(p for p in points if p["budget_percent"] == 60 and p["context_tokens"] == 200)
    assert half["accuracy"] == 0.95 and half["ci95"] == [0.85, 0.95] and half["task"] == "recall"
    exact = price(load_shape(demo_model_dir()), half["priced"], 200).total("decode")
    assert half["rounds_per_token"] == exact.rounds and half["online_bytes_per_token"] == exact.online
    fewer = next(p for p in points if p["budget_percent"] == 40 and p["context_tokens"] == 200)
    assert fewer["priced"] != half["priced"] and fewer["accuracy"] == 0.8


def test_data_cannot_end_its_script() -> None:
    hostile = "</script><script>alert(1)</script>"
    text = page({"shape": hostile, "rows": [], "quality": [{"policy": hostile, "accuracy": 1}]}, None)
    assert hostile not in text and text.count("</script>") == 2


# --------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    with sync_api.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def shown(browser: Any, report: Path, width: int, address: str = "", **options: Any) -> Any:
    """Open the page; what it complains of fails the test."""
    view = browser.new_page(viewport={"width": width, "height": 900}, **options)
    complaints: list[str] = []
    view.on("console", lambda message: complaints.append(message.text))
    view.on("pageerror", lambda error: complaints.append(str(error)))
    view.goto(report.as_uri() + address)
    view.wait_for_selector("html[data-ready=yes]")
    assert complaints == []
    return view


@pytest.mark.parametrize("width", [1400, pytest.param(400, marks=pytest.mark.slow)])
def test_the_page_renders_in_a_browser(browser: Any, report: Path, width: int) -> None:
    view = shown(browser, report, width)
    assert view.locator("#rows tbody tr").count() == 2
    assert view.locator("#bars rect").count() == 2 * 2 * 4 and view.locator("circle").count() == 3
    text = view.locator("body").inner_text() + "".join(view.locator("svg text").all_text_contents())
    assert "NaN" not in text and "undefined" not in text
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    assert "demo, documents of 880 tokens" in view.locator("#measured-on").inner_text()
    assert re.search(r"mpcache \d+\.\d+\S*, \d{4}-\d\d-\d\d", view.locator("#about").inner_text())


@pytest.mark.slow
def test_the_view_is_in_the_address(browser: Any, report: Path) -> None:
    view = shown(browser, report, 1400)
    view.get_by_label("context", exact=True).select_option("200")
    view.locator("th button", has_text="online").click()
    view.locator("th button", has_text="online").click()
    view.get_by_label("policies", exact=True).fill("mp")
    address = view.evaluate("location.hash")
    for part in (
        "model=demo",
        "version=",
        "context=200",
        "sort=online_bytes_per_token",
        "down=yes",
        "filter=mp",
    ):
        assert part in address
    again = shown(browser, report, 1400, address)
    assert again.locator("#rows tbody").inner_html() == view.locator("#rows tbody").inner_html()
    assert again.locator("th[aria-sort=descending]").inner_text() == "online"
    assert not again.locator("#other").is_visible()
    wrong = shown(browser, report, 1400, "#model=gpt2&context=7&sort=nonsense")
    assert "made for model gpt2" in wrong.locator("#other").inner_text()
    assert wrong.locator("#rows tbody tr").count() == 2
    wrong.get_by_label("policies", exact=True).fill("no such policy")
    assert "No policy has this in its name" in wrong.locator("#rows").inner_text()


@pytest.mark.slow
def test_axes_are_log_with_round_ticks(browser: Any, report: Path) -> None:
    view = shown(browser, report, 1400)
    for ticks in (view.locator("#bars .tick"), view.locator("#scatter .tick")):
        names = ticks.all_text_contents()
        assert names and all(re.fullmatch(r"\d\.?\d?0*,?0* ?\w*", name) for name in names), names
    drawn = view.evaluate("""() => {
      const axis = logAxis([1e3, 1e6], "bytes", 1.1);
      return [axis.at(1e4) - axis.at(1e3), axis.at(1e6) - axis.at(1e5), axis.ticks.map(WRITTEN.bytes),
              logTicks(100, 4e7, "ms").map(ms)];
    }""")
    assert drawn[0] == pytest.approx(drawn[1])
    assert drawn[2] == ["1 kB", "10 kB", "100 kB", "1 MB"]
    assert drawn[3] == ["100 ms", "1 s", "10 s", "100 s", "10 min", "100 min", "10 h"]


@pytest.mark.slow
def test_tips_on_hover_on_focus_and_on_touch(browser: Any, report: Path) -> None:
    view = shown(browser, report, 400, has_touch=True)
    mark, tip = view.locator("circle").nth(1), view.locator("#tip")
    assert not tip.is_visible()
    mark.hover()
    assert "n = 50" in tip.inner_text()
    view.mouse.move(1, 1)
    assert not tip.is_visible()
    mark.focus()
    assert tip.is_visible() and mark.get_attribute("aria-label") == tip.inner_text()
    box = tip.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 400
    view.keyboard.press("Escape")
    assert not tip.is_visible()
    view.locator("#bars rect").first.tap()
    assert "rounds" not in tip.inner_text() and "100 tokens" in tip.inner_text()
    view.get_by_role("button", name="to full", exact=True).focus()
    assert "above 1 it is slower" in tip.inner_text()


@pytest.mark.slow
def test_the_first_column_stays_on_a_telephone(browser: Any, report: Path) -> None:
    view = shown(browser, report, 400)
    first, online = view.locator("tbody td").first, view.locator("tbody tr").first.locator("td").nth(4)
    before, far = first.bounding_box()["x"], online.bounding_box()["x"]
    view.evaluate("document.querySelector('.wide').scrollLeft = 300")
    assert first.bounding_box()["x"] == pytest.approx(before, abs=2)
    assert online.bounding_box()["x"] < far - 100
    assert view.locator("th button").first.bounding_box()["height"] >= 40


@pytest.mark.slow
def test_paper_is_light_and_holds_the_table(browser: Any, report: Path, tmp_path: Path) -> None:
    """From dark mode, too: black on white, no controls, and no column beyond the page."""
    view = shown(browser, report, 1400, color_scheme="dark")
    view.emulate_media(media="print", color_scheme="dark")
    view.set_viewport_size({"width": 688, "height": 1000})  # A4 within its margins
    assert view.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert view.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not view.locator("#choices").is_visible() and "network lan" in view.locator("#view").inner_text()
    assert "recall, question after, plain; time" in view.locator("#evaluation").inner_text()
    assert "online bytes per token" in view.locator("#amount").inner_text()
    wide = view.locator("#rows").bounding_box()
    assert wide["x"] + wide["width"] <= 690
    written = tmp_path / "page.pdf"
    view.pdf(path=str(written), format="A4")
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", written.read_bytes())) <= 3
