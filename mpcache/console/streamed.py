"""Show a text that comes piece by piece; on a terminal with a note of how far the next piece is.

The note stands on the line below the text, and the cursor goes back to the text's end: the next piece wipes
the note out. Elsewhere there is the text alone.
"""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType

from rich.cells import cell_len

from mpcache.console import terminal

_WIPE = "\x1b[J"  # from the cursor to the end of the screen
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_TAB = 8
QUIET_S = 0.5  # after a piece, in which the next one may come without a note: else it would flicker


class StreamedText:
    """A context manager, whose note is gone at its end.

    began: something was written.
    """

    def __init__(self, column: int = 0) -> None:
        """column: where the text begins on its line."""
        self.began = False
        self._column, self._noted, self._written = column, False, 0.0
        self._moves = sys.stdout.isatty() and terminal.err.is_terminal and not terminal.err.is_dumb_terminal

    def __enter__(self) -> StreamedText:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._noted:
            self._put(_WIPE)
            self._noted = False

    def write(self, piece: str) -> None:
        """Write what comes next. On a terminal, what would steer it is left out."""
        self.began = True
        if not self._moves:
            self._put(piece)
            return
        piece = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in piece)
        self._put(_WIPE * self._noted + piece)
        self._noted, self._written = False, time.monotonic()
        width = _width()
        for character in piece:
            self._step(character, width)

    def note(self, text: str) -> None:
        """Say how far the next piece is, until it comes; nothing where this is no terminal."""
        width = _width()
        full = self._column >= width  # the next character wraps
        if not self._moves or full or time.monotonic() < self._written + QUIET_S:
            return
        back = f"\x1b[A\x1b[{self._column + 1}G"
        self._put(f"{_WIPE}\n\r{_DIM}{text[: width - 1]}{_PLAIN}{back}")
        self._noted = True

    def _step(self, character: str, width: int) -> None:
        """Go on by a character, as the terminal does."""
        match character:
            case "\n":
                self._column = 0
            case "\t":
                self._column = min(width - 1, (self._column // _TAB + 1) * _TAB)
            case _:
                cells = cell_len(character)
                self._column = self._column + cells if self._column + cells <= width else cells

    @staticmethod
    def _put(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def _width() -> int:
    return shutil.get_terminal_size().columns
