"""Tell how far the client is: it says before each decode step whether there is one.

The answer's length is public, so the words are. The dealer looks for them in the middle of a tape, too:
an answer may end while a tape is dealt that nobody will read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mpcache.errors import Desync, PeerLost
from mpcache.phases import ChunkPlace
from mpcache.rank import Rank
from mpcache.transport.link import Link, Links


class NoMoreTapes(Exception):
    """The answer has ended in the middle of a tape: a signal within the dealer, and no error."""


def more_step(place: ChunkPlace) -> str:
    """Name the step outside the program's own names: the decode program's cost is booked apart from this."""
    return f"more/{place.phase}"


def hear_more(client: Link, place: ChunkPlace) -> bool:
    """Hear whether the client goes on to this decode step. Raises Desync, or what the link raises."""
    return _said(client.recv_facts(more_step(place)), place)


def _said(facts: dict[str, Any], place: ChunkPlace) -> bool:
    more = facts.get("more")
    if not isinstance(more, bool):
        raise Desync(f"Desync: the client says {more!r:.60} at {more_step(place)}, not true or false")
    return more


class ClientPace:
    """The client's place in a turn, as far as the dealer knows it.

    begun: decode steps that the client is known to have begun; the question is step 0.  ended: whether it has
    said that there is no further one: then `begun` chunks were taken in.
    """

    def __init__(self, links: Links, turn: int, begun: int) -> None:
        self.begun, self.ended = begun, False
        self._links, self._turn = links, turn

    def goes_on(self) -> bool:
        """Wait for the client's word on its next step; return whether there is one."""
        self.begun += 1
        self.ended = not hear_more(self._links[Rank.CLIENT], self._next())
        return not self.ended

    def _next(self, ahead: int = 0) -> ChunkPlace:
        return ChunkPlace(self._turn, self.begun + ahead)

    @contextmanager
    def watched(self, step: int) -> Iterator[None]:
        """Look for the client's word before each frame of this step's tape, and while one waits for room.

        Raises NoMoreTapes within, as soon as the client has said that it does not come so far.
        """
        for link in self._links.values():
            link.before_frame = lambda: self._look(step)
        try:
            yield
        finally:
            for link in self._links.values():
                link.before_frame = _no_look

    def _look(self, step: int) -> None:
        client, server = self._links[Rank.CLIENT], self._links[Rank.SERVER]
        while self.begun < step and (facts := client.poll_facts(more_step(self._next(1)))) is not None:
            self.begun += 1
            if not _said(facts, self._next()):
                self.ended = True
                raise NoMoreTapes
        if not server.peer_left:
            return
        while self.begun < step:  # the server has heard it already
            if not self.goes_on():
                raise NoMoreTapes
        phase = ChunkPlace(self._turn, step).phase
        server.check_alive(phase)  # it may have said why
        raise PeerLost(f"dealer at {phase}: server has ended its session before the client's answer")


def _no_look() -> None:
    pass
