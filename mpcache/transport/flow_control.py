"""Limit how large a frame may be, and how far a sender may be ahead.

The limit is the room that a receiver gives to frames that its program has not taken. Both ends know the
room from the ranks and from whether they have agreed on the plan. A sender stops when the room is used up
and goes on as the receiver confirms what its program took (`Ack`), so a fast dealer waits and fills no
memory; a frame that comes all the same is refused. The sender keeps these same frames, to send them again
over a new connection: one number bounds the queue of the one and the memory of the other.
"""

from __future__ import annotations

from collections import deque
from threading import Condition

from mpcache.rank import Rank

KIB, MIB = 1 << 10, 1 << 20
CHUNK_BYTES = MIB  # of tensor data in one frame
BATCH_BYTES = MIB  # of frames that go together
LAYOUT_BYTES = MIB
FACTS_BYTES = 64 * KIB
SMALL_BYTES = FACTS_BYTES + 8 * KIB  # a frame without tensors, with room for its other fields
READ_AHEAD_BYTES = 4 * MIB  # that a carrier may have read before it hands a frame over
FRAME_COST = 768  # bytes that a waiting frame takes beside its own, measured


def largest_frame(receiver: Rank, sender: Rank = Rank.SERVER) -> int:
    """Return the most bytes of a frame that this receiver takes from this sender, whatever is in it."""
    if (sender, receiver) == (Rank.CLIENT, Rank.DEALER):
        return SMALL_BYTES  # it gets facts from the client, never a tensor
    return CHUNK_BYTES + LAYOUT_BYTES + 8 * KIB


def queue_room(sender: Rank, receiver: Rank, agreed: bool) -> int:
    """Return how many bytes of frames may wait at the receiver, `FRAME_COST` for each included.

    agreed: on the plan of the session. A peer that has not come so far has little to say.
    """
    if (sender, receiver) == (Rank.CLIENT, Rank.DEALER):
        return MIB
    if not agreed:
        return 4 * MIB
    return 32 * MIB if sender is Rank.DEALER else 16 * MIB


def frame_cost(size: int) -> int:
    """Return how many bytes of the room a frame of `size` bytes takes."""
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
    def taken(self) -> int:
        """Frames that the peer's program has taken."""
        return self._taken

    @property
    def total(self) -> int:
        """Frames that were ever added."""
        return self._taken + len(self._frames)

    @property
    def half_full(self) -> bool:
        """Whether half of the room is used: the peer's program has much to take before it waits."""
        return self._cost > self.room // 2

    def fits(self, size: int) -> bool:
        """Return whether there is room for a frame of `size` bytes."""
        return self._cost + frame_cost(size) <= self.room

    def wait(self, size: int, seconds: float) -> bool:
        """Wait for `fits`, this many seconds at most; False when the time is up."""
        with self._changed:
            return self._changed.wait_for(lambda: self.fits(size), seconds)

    def add(self, frame: bytes) -> None:
        """Keep a frame that is being sent."""
        with self._changed:
            self._frames.append(frame)
            self._cost += frame_cost(len(frame))

    def took(self, frames: int) -> bool:
        """Note that the peer's program has taken this many frames in all. False if that cannot be."""
        with self._changed:
            if not self._taken <= frames <= self.total:
                return False
            while self._taken < frames:
                self._cost -= frame_cost(len(self._frames.popleft()))
                self._taken += 1
            self._changed.notify_all()
            return True

    def after(self, frames: int) -> list[bytes]:
        """Return the frames after this many, which a peer lacks. Raises ValueError if that cannot be."""
        with self._changed:
            if not self._taken <= frames <= self.total:
                raise ValueError(f"{frames} frames received, {self.total} were sent")
            return list(self._frames)[frames - self._taken :]
