"""Name the phases of a session: setup, context, the client's document, then the chunks of each turn.

The client's document is taken in chunk by chunk, `private1`, `private2`, ..., where there is one, and what is
not kept of it goes in `eviction`.

A turn is a question and its answer. Its first chunk is the question, each other one a token of the answer:
`question`, `decode1`, ... in the first turn, `turn2-question`, `turn2-decode1`, ... in the second.
"""

from __future__ import annotations

import re
from typing import NamedTuple

EVICTION = "eviction"  # of the client's document, after its last chunk
_PRIVATE = re.compile(r"private([1-9][0-9]{0,5})", re.ASCII)
_NAME = re.compile(r"(?:turn([2-9]|[1-9][0-9]{1,5})-)?(?:question|decode([1-9][0-9]{0,8}))", re.ASCII)


class ChunkPlace(NamedTuple):
    """Where a chunk stands. turn: 1, 2, ...; step: 0 for the question, else the token's number in it.

    Turn 0 is the client's document, where it is not all in; step: the phases that it has gone through.
    """

    turn: int
    step: int

    @property
    def phase(self) -> str:
        """Its phase's name."""
        name = f"decode{self.step}" if self.step else "question"
        return name if self.turn == 1 else f"turn{self.turn}-{name}"

    @property
    def reached(self) -> str:
        """How far a session is that stands here, in words."""
        if not self.turn:
            document = "the client's document"
            return f"{self.step} chunk{'s' * (self.step != 1)} of {document}" if self.step else "the context"
        if not self.step:
            return "the context" if self.turn == 1 else f"turn {self.turn - 1}"
        tokens = f"{self.step} token{'s' * (self.step != 1)}"
        return tokens if self.turn == 1 else f"{tokens} of turn {self.turn}"

    @staticmethod
    def of(phase: str) -> ChunkPlace | None:
        """Return the place that a phase's name tells; None where it is no chunk's."""
        found = _NAME.fullmatch(phase)
        return None if found is None else ChunkPlace(int(found[1] or 1), int(found[2] or 0))


PART = r"part(\d+)of(\d+)/"  # how the steps of `part_name` begin


def part_name(number: int, parts: int) -> str:
    """Name a part (1, 2, ...) of a long question, beside its phase."""
    return f"part{number}of{parts}"


DOCUMENT = ChunkPlace(0, 0)  # where the client's document begins


def private_phase(number: int) -> str:
    """Name the phase of a chunk (1, 2, ...) of the client's document."""
    return f"private{number}"


def private_chunk(phase: str) -> int | None:
    """Return which chunk of the client's document a phase takes in; None where it takes in none."""
    found = _PRIVATE.fullmatch(phase)
    return None if found is None else int(found[1])


def is_private(phase: str) -> bool:
    """Return whether a phase belongs to the client's document."""
    return phase == EVICTION or private_chunk(phase) is not None


def is_decode(phase: str) -> bool:
    """Return whether a phase takes in one token of an answer."""
    place = ChunkPlace.of(phase)
    return place is not None and place.step > 0
