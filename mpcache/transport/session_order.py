"""What is legal when: the states of a session, and the order in which a peer goes through them.

    HELLO -> SETUP -> CONTEXT -> QUESTION -> DECODE -> CLOSE

A step's first word names its state; decode steps are counted. A peer may be ahead of this party (the
dealer is), so a message is judged twice: here as it arrives, by its kind, its size and what the same
peer sent before; and by the program that takes it, which knows the exact step, dtypes and shapes.
"""

from __future__ import annotations

import re
from enum import IntEnum
from functools import lru_cache

MESSAGES = frozenset({"tensors", "facts"})
AGREED = "facts/agreed"  # the last step before anything secret moves: what each makes of the public facts


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
    State.HELLO: frozenset({"hello"}),
    State.SETUP: MESSAGES,
    State.CONTEXT: MESSAGES,
    State.QUESTION: MESSAGES,
    State.DECODE: MESSAGES,
    State.CLOSE: frozenset({"bye"}),
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
    """Where a step belongs: `more/decode3` and `decode3/layer0/qkv` to decode step 3. None: nowhere."""
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

    def complaint(self, kind: str, step: str) -> str | None:
        """Take note of a frame; say what it is and what is legal instead if it may not come now.

        kind: `hello`, `tensors`, `facts` or `bye`.  step: of a message.
        """
        now = self.place
        place: Place = now
        if kind == "hello":
            place = (State.HELLO, 0)
        elif kind == "bye":
            place = (State.CLOSE, 0)
        elif kind in MESSAGES:
            # A step that has no state of its own belongs to the one that the peer is in.
            place = place_of(step) or max(now, (State.SETUP, 0))
        if kind not in LEGAL[place[0]] or place < now or (kind == "hello" and self._greeted):
            at = f" at {step}" if step else ""
            return f"{kind}{at} in state {_name(now)}"
        self._greeted = True
        self.place = place
        return None


def _name(place: Place) -> str:
    state, number = place
    return f"{state.name} {number}" if number else state.name
