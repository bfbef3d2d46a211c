"""A text that streams, seen on a terminal of a few lines."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from mpcache.console import streamed, terminal
from mpcache.console.streamed import StreamedText

WIDTH, HEIGHT = 20, 4


class Screen(io.StringIO):
    """A small terminal: it wraps, scrolls, and knows the sequences that are used."""

    def __init__(self) -> None:
        super().__init__()
        self.lines = [[" "] * WIDTH for _ in range(HEIGHT)]
        self.row = self.column = 0

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        for part in re.findall(r"\x1b\[(?:\d*)[A-Zm]|.|\n|\r", text):
            self._take(part)
        return len(text)

    def _take(self, part: str) -> None:
        if part.startswith("\x1b["):
            number, kind = part[2:-1], part[-1]
            match kind:
                case "A":
                    self.row = max(0, self.row - int(number or 1))
                case "G":
                    self.column = int(number) - 1
                case "J":
                    blank = [[" "] * WIDTH for _ in range(HEIGHT - self.row - 1)]
                    self.lines[self.row][self.column :] = [" "] * (WIDTH - self.column)
                    self.lines[self.row + 1 :] = blank
        elif part == "\r":
            self.column = 0
        elif part == "\n":
            self._down()
        else:
            assert part.isprintable(), part
            if self.column == WIDTH:
                self._down()
            self.lines[self.row][self.column] = part
            self.column += 1

    def _down(self) -> None:
        self.row, self.column = self.row + 1, 0
        if self.row == HEIGHT:
            self.lines = [*self.lines[1:], [" "] * WIDTH]
            self.row = HEIGHT - 1

    def shown(self) -> list[str]:
        return ["".join(line).rstrip() for line in self.lines]


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    made = Screen()
    monkeypatch.setattr(streamed, "sys", SimpleNamespace(stdout=made))
    monkeypatch.setattr(streamed, "_width", lambda: WIDTH)
    monkeypatch.setattr(streamed, "QUIET_S", 0.0)
    monkeypatch.setattr(terminal, "err", Console(file=made, force_terminal=True, width=WIDTH))
    monkeypatch.setenv("TERM", "xterm")
    return made


def test_a_note_is_seen_below_the_text_and_gone_with_the_next_piece(screen: Screen) -> None:
    screen.write("> who?\n")
    with StreamedText() as text:
        for number, piece in enumerate(["Maria", " Keller", " is the director", ".\nAnd", " so on"]):
            text.note(f"token {number}: layer 3 of 30")
            assert f"token {number}: layer 3 of"[: WIDTH - 1] in screen.shown()[screen.row + 1]
            text.write(piece)
            assert not any("token" in line for line in screen.shown())
        text.note("token 5")
    assert screen.shown() == ["Maria Keller is the", "director.", "And so on", ""]  # the last note made room


def test_a_text_that_scrolls_and_a_line_that_is_full_lose_nothing(screen: Screen) -> None:
    words = [f"w{number:03} " for number in range(24)]  # four to a line, whose last is full
    with StreamedText() as text:
        for word in words:
            text.note("on its way")
            text.write(word)
    assert screen.shown() == [*("".join(words[at : at + 4]).rstrip() for at in (12, 16, 20)), ""]


def test_a_piece_that_comes_soon_has_no_note(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "QUIET_S", 60.0)
    with StreamedText() as text:
        text.write("a")
        text.note("token 2")
        assert screen.shown()[:2] == ["a", ""]


def test_what_would_steer_a_terminal_is_not_written(screen: Screen) -> None:
    with StreamedText() as text:
        text.write("a\x1b[2Jb\x07c\x9bd")
    assert screen.shown()[0] == "a\ufffd[2Jb\ufffdc\ufffdd"


def test_a_pipe_gets_the_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with StreamedText() as text:
        text.note("layer 1")
        text.write("a\x1bb")
    assert capsys.readouterr().out == "a\x1bb" and text.began
