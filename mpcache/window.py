"""How far a sender may be ahead: the room that a receiver gives to frames its program has not taken.

Both ends know the room from the ranks alone. A sender stops when it is used up and goes on as the
receiver confirms what its program took (`Ack`), so a fast dealer waits and fills no memory; what
comes all the same is refused. The sender keeps these same frames, to send them again over a new
connection: one number bounds the queue of the one and the memory of the other.
"""

from __future__ import annotations

from collections import deque
from threading import Condition

from mpcache.rank import Rank

MIB = 1 << 20
FRAME_COST = 512  # bytes that a waiting frame takes beside its own


def room(sender: Rank, receiver: Rank) -> int:
    """Bytes of frames that may wait at the receiver, `FRAME_COST` for each included."""
    if receiver is Rank.DEALER:
        return 8 * MIB  # it gets a few facts, never a tensor
    return 32 * MIB if sender is Rank.DEALER else 16 * MIB


def cost(size: int) -> int:
    """What a frame of `size` bytes takes of the room."""
    return size + FRAME_COST


class Sent:
    """Frames that were sent and that the peer's program has not taken. Safe for several threads."""

    def __init__(self, room: int) -> None:
        self.room = room
        self._frames: deque[bytes] = deque()
        self._taken = 0  # frames before the first of these
        self._cost = 0
        self._changed = Condition()

    @property
    def total(self) -> int:
        """Frames that were ever added."""
        return self._taken + len(self._frames)

    def fits(self, size: int) -> bool:
        """Whether there is room for a frame of so many bytes."""
        return self._cost + cost(size) <= self.room

    def wait(self, size: int, seconds: float) -> bool:
        """Wait for `fits`; False when the time is up."""
        with self._changed:
            return self._changed.wait_for(lambda: self.fits(size), seconds)

    def add(self, frame: bytes) -> None:
        """Keep a frame that is being sent."""
        with self._changed:
            self._frames.append(frame)
            self._cost += cost(len(frame))

    def took(self, frames: int) -> bool:
        """The peer's program has taken so many in all. False if that cannot be."""
        with self._changed:
            if not self._taken <= frames <= self.total:
                return False
            while self._taken < frames:
                self._cost -= cost(len(self._frames.popleft()))
                self._taken += 1
            self._changed.notify_all()
            return True

    def after(self, frames: int) -> list[bytes]:
        """What a peer that has got so many lacks. Raises ValueError if that cannot be."""
        with self._changed:
            if not self._taken <= frames <= self.total:
                raise ValueError(f"{frames} frames received, {self.total} were sent")
            return list(self._frames)[frames - self._taken :]
