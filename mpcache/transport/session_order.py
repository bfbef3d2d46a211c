"""Say what is legal when: the states of a session, and the order in which a peer goes through them.

    HELLO -> SETUP -> CONTEXT -> QUESTION -> DECODE -> QUESTION -> DECODE ... -> CLOSE

A step's first word names its state; turns and decode steps are counted. A peer may be ahead of this party
(the dealer is), so a message is judged twice: here as it arrives, by its kind, its size and what the same
peer sent before; and by the program that takes it, which knows the exact step, dtypes and shapes.
"""

from __future__ import annotations

import re
from enum import IntEnum, StrEnum
from functools import lru_cache
from typing import NamedTuple

from mpcache.phases import EVICTION, ChunkPlace, private_chunk

AGREED = "facts/agreed"  # the last step before anything secret moves: what each makes of the public facts


class FrameKind(StrEnum):
    """What a frame is: the name of the field of `Frame` that is set (protos/mpcache_protos/party.proto)."""

    HELLO = "hello"
    TENSORS = "tensors"
    FACTS = "facts"
    ACK = "ack"
    ABORT = "abort"
    BYE = "bye"
    UNKNOWN = "an unknown message"


MESSAGES = frozenset({FrameKind.TENSORS, FrameKind.FACTS})


class State(IntEnum):
    """Where a session is. A peer moves forward only; a turn's QUESTION comes after the DECODE before it."""

    HELLO = 0
    SETUP = 1  # seeds, facts, masked weights
    CONTEXT = 2
    QUESTION = 3
    DECODE = 4
    CLOSE = 5


# Which kinds of frames may come in which state; `abort` may come in all of them.
LEGAL = {
    State.HELLO: frozenset({FrameKind.HELLO}),
    State.SETUP: MESSAGES,
    State.CONTEXT: MESSAGES,
    State.QUESTION: MESSAGES,
    State.DECODE: MESSAGES,
    State.CLOSE: frozenset({FrameKind.BYE}),
}
_WORDS = {
    "seeds": State.SETUP,
    "facts": State.SETUP,
    "setup": State.SETUP,
    "context": State.CONTEXT,
}


class Place(NamedTuple):
    """How far a peer is. turn: 0 before the first; step: of DECODE, else 0."""

    turn: int
    state: State
    step: int = 0


_EVICTED = Place(0, State.CONTEXT, 1 << 30)
_END = Place(1 << 30, State.CLOSE)


@lru_cache(maxsize=4096)
def place_of(step: str) -> Place | None:
    """Return where a step belongs; None: nowhere.

    `private2/layer0/qkv` belongs to the second chunk of the client's document, `more/decode3` and
    `decode3/layer0/qkv` to decode step 3, `turn/2` to the second turn's question.
    """
    first, _, rest = step.partition("/")
    if first == EVICTION:
        return _EVICTED
    if first in _WORDS:
        return Place(0, _WORDS[first])
    if first == "turn":
        number = re.fullmatch(r"[1-9][0-9]{0,5}", rest, re.ASCII)
        return Place(int(number[0]), State.QUESTION) if number else None
    if (number_read := private_chunk(first)) is not None:
        return Place(0, State.CONTEXT, number_read)
    chunk = ChunkPlace.of(rest if first == "more" else first)
    if chunk is None:
        return None
    return Place(chunk.turn, State.DECODE if chunk.step else State.QUESTION, chunk.step)


class Order:
    """What one peer may still send. `place` is where it is, as far as its messages tell."""

    def __init__(self) -> None:
        self.place = Place(0, State.HELLO)
        self._greeted = False

    def begin_again(self) -> None:
        """Let the peer go through all states once more, after HELLO."""
        self.place = Place(0, State.SETUP)

    def complaint(self, kind: FrameKind, step: str) -> str | None:
        """Take note of a frame; say what it is and what is legal instead if it may not come now.

        kind: but for `ack` and `abort`, which may come any time.  step: of a message.
        """
        now = self.place
        place: Place = now
        if kind is FrameKind.HELLO:
            place = Place(0, State.HELLO)
        elif kind is FrameKind.BYE:
            place = _END
        elif kind in MESSAGES:
            # A step that has no state of its own belongs to the one that the peer is in.
            place = place_of(step) or max(now, Place(0, State.SETUP))
        if kind not in LEGAL[place.state] or place < now or (kind is FrameKind.HELLO and self._greeted):
            at = f" at {step}" if step else ""
            return f"{kind}{at} in state {_name(now)}"
        self._greeted = True
        self.place = place
        return None


def _name(place: Place) -> str:
    turn = f" of turn {place.turn}" if 1 < place.turn < _END.turn else ""
    return place.state.name + (f" {place.step}" if place.step else "") + turn
