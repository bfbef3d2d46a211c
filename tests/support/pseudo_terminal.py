"""A program on a terminal of its own: what stands on its screen, and keys that are pressed there."""

from __future__ import annotations

import contextlib
import os
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from io import StringIO

import pyte
from rich.console import Console

from mpcache.console.live_table import LiveTable
from tests.support import processes
from tests.support.paths import ROOT

CTRL_C = b"\x03"
ABOVE = 10_000  # lines that scroll off the screen and are kept


def drawn(table: LiveTable, width: int = 80, height: int = 24) -> list[str]:
    """The lines that a terminal of this size would show of a table."""
    console = Console(file=StringIO(), width=width, height=height)
    with console.capture() as caught:
        console.print(table)
    return [line.rstrip() for line in caught.get().splitlines()]


class OnTerminal:
    """A program on a terminal. child: its process.  screens: each different screen so far, as lines."""

    def __init__(self, child: subprocess.Popen[bytes], master: int, columns: int, lines: int) -> None:
        self.child, self._master = child, master
        self._screen = pyte.HistoryScreen(columns, lines, history=ABOVE)
        self._stream = pyte.ByteStream(self._screen)
        self.screens: list[list[str]] = []

    def press(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def shows(self, wanted: Callable[[str], bool], within_s: float = 60.0) -> str:
        """Wait until the screen is as wanted, and return it."""
        limit = time.monotonic() + within_s
        while not self.screens or not wanted("\n".join(self.screens[-1])):
            assert time.monotonic() < limit and self._read(), "\n".join((self.screens or [["nothing"]])[-1])
        return "\n".join(self.screens[-1])

    def end(self, within_s: float = 60.0) -> int:
        """Wait for the program's end, and return its exit code."""
        limit = time.monotonic() + within_s
        while self._read():
            assert time.monotonic() < limit, self.written
        return self.child.wait(10)

    @property
    def written(self) -> str:
        """What stands on the screen, and above it what has scrolled off."""
        above = ["".join(line[x].data for x in sorted(line)) for line in self._screen.history.top]
        return "\n".join(line.rstrip() for line in [*above, *self._screen.display])

    def _read(self) -> bool:
        """Read what is written next; False where nobody writes any more."""
        try:
            data = os.read(self._master, 65536)
        except OSError:  # what Linux says when all writers have closed it
            return False
        for piece in data.splitlines(keepends=True):  # a drawing and what wipes it out may come at once
            self._stream.feed(piece)
            now = [line.rstrip() for line in self._screen.display]
            if not self.screens or self.screens[-1] != now:
                self.screens.append(now)
        return bool(data)


@contextlib.contextmanager
def on_terminal(
    command: list[str], columns: int = 100, lines: int = 40, stdout: int | None = None
) -> Iterator[OnTerminal]:
    """Start a command on a terminal of its own, so that keys reach it. stdout: else the terminal, too."""
    assert processes.allowed, "mark a test that starts processes: @pytest.mark.processes"
    master, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (lines, columns))
    # Where tests run side by side, their environment tells another size, which would count for more.
    told = {name: text for name, text in processes.environment().items() if name not in ("LINES", "COLUMNS")}
    child = subprocess.Popen(
        ["setsid", "--ctty", *command],
        cwd=ROOT,
        env=told | {"TERM": "xterm-256color"},
        stdin=terminal,
        stderr=terminal,
        stdout=terminal if stdout is None else stdout,
    )
    os.close(terminal)
    try:
        yield OnTerminal(child, master, columns, lines)
    finally:
        child.kill()
        child.wait()
        os.close(master)
