"""Programs: what a protocol asks of the outside, and how programs are put together.

A protocol is a generator. It yields what it needs - an opening, correlated randomness, a call that
blocks - and goes on with the answer. The four readings (DESIGN, "One decode program") differ only
in who answers. `yield from` composes in sequence, `together` in lockstep with merged openings, and
`at` names a step.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch

from mpcache.rank import Rank
from mpcache.runtime.correlations import Request

T = TypeVar("T")


@dataclass(frozen=True)
class Opening:
    """One tensor to open: each sender's share goes to the recipients, who add them up.

    to: the recipient, or None for both computing parties.  why: the reason, for the audit.
    sender: the only party whose share is not zero, or None.
    xor: the shares are XOR shares.  width: bytes per element; the result is modulo 2^(8 width).
    """

    share: torch.Tensor
    why: str
    to: Rank | None = None
    sender: Rank | None = None
    xor: bool = False
    width: int = 8
    step: str = ""


@dataclass(frozen=True)
class Open:
    """Openings that travel in one message: one round. Answered by a tensor (or None) for each."""

    items: tuple[Opening, ...]
    step: str = ""

    def under(self, name: str) -> Open:
        items = tuple(replace(i, step=_join(name, i.step)) for i in self.items)
        return Open(items, _join(name, self.step))


@dataclass(frozen=True)
class Draw:
    """Correlated randomness from the dealer. Answered by this party's parts."""

    request: Request
    step: str = ""

    def under(self, name: str) -> Draw:
        return replace(self, step=_join(name, self.step))


@dataclass(frozen=True)
class Call:
    """A function that communicates by itself and blocks (CrypTen). Answered by its result."""

    run: Callable[[], Any]
    step: str = ""

    def under(self, name: str) -> Call:
        return replace(self, step=_join(name, self.step))


Ask = Open | Draw | Call
Program = Generator[Ask, Any, T]


class Answers(Protocol):
    """Who a program is read by."""

    def open(self, items: Sequence[Opening], step: str) -> list[Any]: ...
    def draw(self, request: Request, step: str) -> list[Any]: ...
    def call(self, run: Callable[[], Any], step: str) -> Any: ...


def _join(name: str, step: str) -> str:
    return f"{name}/{step}" if step else name


def open_masked(*openings: Opening) -> Program[list[Any]]:
    """Open tensors in one round."""
    answer: list[Any] = yield Open(openings)
    return answer


def draw(request: Request) -> Program[list[Any]]:
    """This party's parts of a correlation (`Party.draw`)."""
    answer: list[Any] = yield Draw(request)
    return answer


def at(name: str, program: Program[T]) -> Program[T]:
    """Run `program` with all that it asks booked under `name`."""
    reply: Any = None
    while True:
        try:
            ask = program.send(reply)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
        reply = yield ask.under(name)


def together(*programs: Program[Any]) -> Program[list[Any]]:
    """Run independent programs in lockstep; what they open at the same time shares one message."""
    results: list[Any] = [None] * len(programs)
    waiting: dict[int, Open] = {}

    def advance(i: int, reply: Any) -> Program[None]:
        try:
            ask = programs[i].send(reply)
            while not isinstance(ask, Open):
                reply = yield ask
                ask = programs[i].send(reply)
            waiting[i] = ask
        except StopIteration as stop:
            results[i] = stop.value

    for i in range(len(programs)):
        yield from advance(i, None)
    while waiting:
        batch, waiting = waiting, {}
        # The round is booked where the first of them is; the bytes of each stay its own.
        step = next(iter(batch.values())).step
        items = tuple(
            replace(item, step=item.step or ask.step) for ask in batch.values() for item in ask.items
        )
        replies = yield Open(items, step)
        for i, ask in batch.items():
            mine, replies = replies[: len(ask.items)], replies[len(ask.items) :]
            yield from advance(i, mine)
    return results


def local(value: T) -> Program[T]:
    """A program that asks nothing."""
    return value
    yield  # pragma: no cover - makes this function a generator


def run(program: Program[T], answers: Answers) -> T:
    """Read a program: answer what it asks until it returns."""
    reply: Any = None
    while True:
        try:
            ask = program.send(reply)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
        match ask:
            case Open(items, step):
                reply = answers.open(items, step)
            case Draw(request, step):
                reply = answers.draw(request, step)
            case Call(fn, step):
                reply = answers.call(fn, step)
