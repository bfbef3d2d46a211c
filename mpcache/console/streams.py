"""Stand on whatever stdin, stdout and stderr the caller gave: closed, of another encoding, or full."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from typing import TextIO

from mpcache.errors import SystemRefusal

STRICT = ("strict", "surrogateescape")  # ways of encoding that fail; others are the caller's choice


def open_streams() -> None:
    """Put the null device where a stream is closed, and make no character one that cannot be written.

    Were a closed one left alone, the next file to be opened would take its number.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors in STRICT:
            stream.reconfigure(errors="backslashreplace")


def own_stdout(encoding: str, errors: str = "strict") -> TextIO:
    """Return stdout for this project alone: what libraries print there goes to stderr from now on."""
    sys.stdout.flush()
    own = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding=encoding, errors=errors)
    os.dup2(2, 1)
    return own


@contextmanager
def written_out() -> Iterator[None]:
    """Write at the end what is left of stdout. Raises SystemRefusal where it cannot be, once.

    Where nobody reads any more there is nobody to tell.
    """
    try:
        yield
    finally:
        _give_up(sys.stderr)
        failed = _give_up(sys.stdout)
        if isinstance(failed, BrokenPipeError):
            raise SystemExit(1)
        if failed is not None:
            raise SystemRefusal.of(failed, "stdout")


def _give_up(stream: TextIO) -> OSError | None:
    """Flush; let go what cannot be written, since the interpreter tries once more at its end."""
    try:
        stream.flush()
    except OSError as error:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            stream.flush()
        return error
    return None
