"""What commands write on: tables on stdout; progress, notes and errors on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

Say = Callable[[str], None]  # takes one line for the user
PIPE_WIDTH = 110  # columns of a table that no terminal shows
WIDEST = 1000  # columns that no table needs

err = Console(stderr=True, highlight=False)


def stdout() -> Console:
    """Return a console on stdout, PIPE_WIDTH wide where stdout is no terminal."""
    shown = sys.stdout is not None and sys.stdout.isatty()
    return Console(highlight=False, width=None if shown else PIPE_WIDTH)


def print_table(console: Console, table: Table) -> None:
    """Print a table whole: beyond the console's width where it must, since rich would leave columns out."""
    wide = console.options.update_width(WIDEST)
    console.width = max(kept := console.width, Measurement.get(console, wide, table).minimum)
    try:
        console.print(table, crop=False)
    finally:
        console.width = kept


def say(text: str) -> None:
    """Print a line on stderr, as it is; where stderr cannot take it, nobody is told."""
    with suppress(OSError):
        if err.is_terminal:
            err.print(text, markup=False, emoji=False, soft_wrap=True)
        else:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()


@contextmanager
def progress(first: str, prefix: str = "") -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """Give a function that says how far the work is, on stderr, and one that ends this.

    On a terminal there is one moving line, which begins with `first` and which the second function ends;
    elsewhere each call prints a line.
    """
    if not err.is_terminal:
        yield (lambda text: say(prefix + text)), (lambda: None)
        return
    with err.status(prefix + first) as status:
        yield (lambda text: status.update(prefix + text)), status.stop
