"""A table that fills: what there is room for, what has failed, and lines where no terminal shows it."""

from __future__ import annotations

import re
import sys
from io import StringIO

import pytest
from rich.console import Console

from mpcache.console import terminal
from mpcache.console.live_table import PENDING, LiveTable, live_table
from tests.support.pseudo_terminal import drawn

PLACES = [(f"policy{i}", f"{budget} %") for i in range(30) for budget in (5, 10, 20)]


def test_a_cell_is_pending_until_it_is_written() -> None:
    table = LiveTable("starting ...")
    table.begin("passkey", "policy", PLACES[:6], 12)
    table.put(("policy1", "10 %"), "98 (90-100)")
    table.step()
    lines = drawn(table)
    assert " 1/12 cells" in lines[0] and lines[1] == "starting ..."
    rows = [line.split() for line in lines if line.lstrip().startswith("policy")]
    assert rows[1:] == [["policy0", *[PENDING] * 3], ["policy1", PENDING, "98", "(90-100)", PENDING]]


@pytest.mark.parametrize("height", [9, 12, 24, 60])
@pytest.mark.parametrize("latest", [0, 7, 15, 29])
def test_a_small_terminal_shows_what_is_near_the_latest_cell(height: int, latest: int) -> None:
    table = LiveTable("one line")
    table.begin("a title", "policy", PLACES, 90)
    table.put((f"policy{latest}", "20 %"), "the latest")
    for width in (24, 40, 80):
        lines = drawn(table, width, height)
        assert len(lines) < height and max(map(len, lines)) <= width
        assert any(f"policy{latest}" in line and "the latest" in line for line in lines), lines
    assert ("policy15" in "".join(drawn(table, 80, 60))) and ("5 %" in "".join(drawn(table, 80, height)))


def test_failures_are_named_below_and_leave_room_for_rows() -> None:
    table = LiveTable()
    table.begin("a title", "policy", PLACES, 90)
    for i in range(5):
        table.step(f"document {i}/quest at 10 %: its worker died")
    lines = drawn(table, 80, 14)
    assert lines[-1] == "failed: document 4/quest at 10 %: its worker died" and " 5/90 cells" in lines[0]
    assert sum("failed: " in line for line in lines) == 3 and len(lines) < 14


def test_what_was_found_counts_and_the_estimate_stands_on_the_rest() -> None:
    table = LiveTable()
    table.begin("a title", "policy", PLACES, 90)
    table.found(60)
    assert "60/90 cells, left --:--" in drawn(table)[0]
    for _ in range(3):
        table.step()
    assert re.search("63/90 cells, left 00:0[01]", drawn(table)[0])


def test_no_terminal_gets_lines_and_no_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "err", Console(file=sys.stderr, highlight=False))
    with live_table("starting ...") as table:
        table.begin("a title", "policy", PLACES, 90)
        table.say("sample 1 of 2")
        table.put(PLACES[0], "98")
        table.step("document 1: its worker died")
    assert not table.drawn and capsys.readouterr() == ("", "sample 1 of 2\n")


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(terminal, "err", Console(file=StringIO(), force_terminal=True))
    with live_table("starting ...") as table:
        assert not table.drawn
