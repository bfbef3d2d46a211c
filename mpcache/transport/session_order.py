"""Say what is legal when: the states of a session, and the order in which a peer goes through them.

    HELLO -> SETUP -> CONTEXT -> QUESTION -> DECODE -> CLOSE

A step's first word names its state; decode steps are counted. A peer may be ahead of this party (the
dealer is), so a message is judged twice: here as it arrives, by its kind, its size and what the same
peer sent before; and by the program that takes it, which knows the exact step, dtypes and shapes.
"""

from __future__ import annotations

import re
from enum import IntEnum, StrEnum
from functools import lru_cache

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
    """Where a session is. A peer moves forward only."""

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
    "question": State.QUESTION,
}

Place = tuple[State, int]  # and the number of the decode step, else 0


@lru_cache(maxsize=4096)
def place_of(step: str) -> Place | None:
    """Return where a step belongs; None: nowhere.

    `more/decode3` and `decode3/layer0/qkv` belong to decode step 3.
    """
    first, _, rest = step.partition("/")
    if first in _WORDS:
        return _WORDS[first], 0
    found = re.fullmatch(r"decode([1-9][0-9]{0,8})", rest if first == "more" else first, re.ASCII)
    return (State.DECODE, int(found[1])) if found else None


class Order:
    """What one peer may still send. `place` is where it is, as far as its messages tell."""

    def __init__(self) -> None:
        self.place: Place = (State.HELLO, 0)
        self._greeted = False

    def complaint(self, kind: FrameKind, step: str) -> str | None:
        """Take note of a frame; say what it is and what is legal instead if it may not come now.

        kind: but for `ack` and `abort`, which may come any time.  step: of a message.
        """
        now = self.place
        place: Place = now
        if kind is FrameKind.HELLO:
            place = (State.HELLO, 0)
        elif kind is FrameKind.BYE:
            place = (State.CLOSE, 0)
        elif kind in MESSAGES:
            # A step that has no state of its own belongs to the one that the peer is in.
            place = place_of(step) or max(now, (State.SETUP, 0))
        if kind not in LEGAL[place[0]] or place < now or (kind is FrameKind.HELLO and self._greeted):
            at = f" at {step}" if step else ""
            return f"{kind}{at} in state {_name(now)}"
        self._greeted = True
        self.place = place
        return None


def _name(place: Place) -> str:
    state, number = place
    return f"{state.name} {number}" if number else state.name
