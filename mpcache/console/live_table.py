"""Show a sweep's table while it fills: drawn anew in place on a terminal, lines of progress elsewhere.

It stands on stderr and is gone at its end: what a sweep found is printed on stdout, once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from mpcache.console import terminal

PENDING = "\u00b7"  # in a cell that has nothing yet
NAMED = 3  # failures that are named below the table: the last ones
PER_SECOND = 4  # drawings
AROUND = 8  # lines of the drawing that are neither rows nor failures, one spare among them
MEMORY_S = 3600.0  # of cells' times, which the estimate stands on


class LiveTable:
    """Cells of a sweep with what is in them so far, how many are done, and which have failed.

    drawn: whether a terminal shows it; where none does, `say` prints lines and the rest is not seen.
    """

    def __init__(self, first: str = "", drawn: bool = False) -> None:
        self.drawn = drawn
        self._line, self._title, self._corner = first, "", ""
        self._texts: dict[tuple[str, str], str] = {}
        self._latest = ("", "")
        self._failures: list[str] = []
        self._progress = Progress(
            SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TextColumn("cells, left"),
            TimeRemainingColumn(compact=True), console=terminal.err, speed_estimate_period=MEMORY_S,
        )  # fmt: skip
        self._bar = self._progress.add_task("", total=0, visible=False)

    def begin(self, title: str, corner: str, places: Sequence[tuple[str, str]], cells: int) -> None:
        """Begin an empty table in place of the one before.

        places: row and column of each cell, in their order; corner: what the rows are.
        cells: how many are to be done, several to a place.
        """
        self._title, self._corner, self._latest = title, corner, places[0]
        self._texts = dict.fromkeys(places, PENDING)
        self._progress.reset(self._bar, total=cells, visible=True)

    def put(self, place: tuple[str, str], text: str) -> None:
        """Write what a cell has now."""
        self._texts[place], self._latest = text or PENDING, place

    def found(self, cells: int) -> None:
        """Count cells that were there before: the estimate does not stand on them."""
        self._progress.reset(self._bar, completed=int(self._progress.tasks[0].completed) + cells)

    def step(self, failed: str | None = None) -> None:
        """Count a cell that is done. failed: its name and why, if it gave nothing."""
        self._failures += [] if failed is None else [failed]
        self._progress.advance(self._bar)

    def say(self, text: str) -> None:
        """Say what is being done, in a line of the drawing or one of its own."""
        self._line = text
        if not self.drawn:
            terminal.say(text)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        named = self._failures[-NAMED:]
        yield from self._progress.get_renderables()
        yield Text(self._line, no_wrap=True, overflow="ellipsis")
        if self._texts:
            yield self._fitting(console, options, max(1, console.height - AROUND - len(named)))
        for failure in named:
            yield Text(f"failed: {failure}", style="red", no_wrap=True, overflow="ellipsis")

    def _fitting(self, console: Console, options: ConsoleOptions, room: int) -> Table:
        """Lay out what the terminal has room for: rows and columns around the latest cell."""
        rows = _near(list(dict.fromkeys(row for row, _ in self._texts)), self._latest[0], room)
        columns = list(dict.fromkeys(column for _, column in self._texts))
        wide = options.update_width(terminal.WIDEST)
        for some in range(len(columns), 0, -1):
            table = self._laid_out(rows, _near(columns, self._latest[1], some))
            if Measurement.get(console, wide, table).maximum <= options.max_width:
                break
        return table

    def _laid_out(self, rows: Sequence[str], columns: Sequence[str]) -> Table:
        table = Table(
            title=Text(self._title, no_wrap=True, overflow="ellipsis"), title_justify="left",
            title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0),
        )  # fmt: skip
        table.add_column(self._corner, no_wrap=True, max_width=40)
        lines = [[self._texts.get((row, column), "") for column in columns] for row in rows]
        for column in columns:
            table.add_column(Text(column), justify="right", no_wrap=True)
        for row, line in zip(rows, lines, strict=True):
            table.add_row(Text(row), *map(Text, line))
        return table


@contextmanager
def live_table(first: str) -> Iterator[LiveTable]:
    """Draw a table on stderr for as long as this lasts, where that is a terminal. first: its line."""
    err = terminal.err
    table = LiveTable(first, err.is_terminal and not err.is_dumb_terminal)
    if not table.drawn:
        yield table
        return
    shown = sys.stdout is not None and sys.stdout.isatty()  # what is printed on stdout stays there else
    with Live(table, console=err, refresh_per_second=PER_SECOND, transient=True, redirect_stdout=shown):
        yield table


def _near(names: list[str], wanted: str, room: int) -> list[str]:
    """Return as many neighbours as there is room for, the wanted one in their middle or as near to it."""
    first = max(0, min(names.index(wanted) - room // 2, len(names) - room))
    return names[first : first + room]
