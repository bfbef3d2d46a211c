"""Signals that end a process in order: peers are told, children are ended, one line is printed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from types import FrameType

from mpcache.errors import MpcacheError

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(MpcacheError):
    """A signal asked this process to end."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.exit_code = 128 + number


class _Asked:
    """What signals have asked of this process so far."""

    waiting = 0  # sessions that are in the middle of a token, which is to be finished
    stop: Stopped | None = None


@cache
def _taken() -> tuple[signal.Signals, ...]:
    """Return the stop signals that end this process: all but those that its caller has it ignore (nohup)."""
    return tuple(each for each in STOPS if signal.getsignal(each) is not signal.SIG_IGN)


def _on_stop(handler: Callable[[int, FrameType | None], None]) -> None:
    for each in _taken():
        signal.signal(each, handler)


def stop_at_once(who: str) -> None:
    """Make a stop signal end this process with one line, until `stop_on_signals` takes over.

    For the time of imports: nothing needs an end in order yet, and a library may catch what is raised.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        with suppress(OSError):
            os.write(2, f"error: {who}: stopped by {signal.Signals(number).name}\n".encode())
        os._exit(128 + number)

    _on_stop(stop)


def stop_on_signals(who: str) -> None:
    """Make a stop signal raise Stopped in the main thread; a second one ends the process at once.

    While a session decodes (`token_by_token`) the first one waits for the end of the token in flight.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        _on_stop(lambda number, frame: os._exit(128 + number))
        _Asked.stop = Stopped(f"{who}: stopped by {signal.Signals(number).name}", number)
        if not _Asked.waiting:
            raise _Asked.stop

    _Asked.stop = None
    _on_stop(stop)


@contextmanager
def token_by_token() -> Iterator[None]:
    """Keep a stop signal from tearing a token: `between_tokens` raises what the signal asked for."""
    _Asked.waiting += 1
    try:
        yield
    finally:
        _Asked.waiting -= 1


def stopping() -> bool:
    """Return whether a stop signal has come."""
    return _Asked.stop is not None


def between_tokens(done: int) -> None:
    """Raise Stopped if a signal has come, where no token is in flight and `done` tokens are done."""
    _stop_after(f"{done} token{'s' * (done != 1)}")


def between_chunks(done: int) -> None:
    """Raise Stopped likewise between chunks of the client's document, where `done` of them are in."""
    _stop_after(f"{done} chunk{'s' * (done != 1)} of the client's document")


def _stop_after(what: str) -> None:
    if _Asked.stop is not None:
        raise Stopped(f"{_Asked.stop} after {what}", _Asked.stop.exit_code - 128)


def check_stop() -> None:
    """Raise Stopped if a signal has come; called now and then while sessions are awaited."""
    if _Asked.stop is not None:
        raise _Asked.stop


def ignore_signals() -> None:
    """Ignore stop signals at the end of a process: nothing is left to stop, and its exit code is known."""
    _taken()  # looked at before: what the caller ignores is not what is ignored here
    for each in STOPS:
        signal.signal(each, signal.SIG_IGN)
