"""Read the client's own document on shares, chunk by chunk, before the first question."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext

from mpcache.answer import TimedSession
from mpcache.console.signals import between_chunks, token_by_token
from mpcache.errors import OutOfRange
from mpcache.phases import EVICTION
from mpcache.rank import Rank
from mpcache.report.units import duration
from mpcache_parties.facts import Facts
from mpcache_parties.resources import SessionResources


def read_private(
    me: Rank, resources: SessionResources, session: TimedSession, facts: Facts, tokens: Sequence[int] = ()
) -> None:
    """Take the client's document in, where it has one, or what an earlier run has left to do of that.

    A session that is kept is so after each chunk: a signal waits for the end of the one in flight. The dealer
    is as far ahead as the room for its tapes allows. tokens: at the client alone. Raises OutOfRange there.
    """
    if not facts.private or session.place.turn:
        return
    start, mine, chunks = time.perf_counter(), tokens if me is Rank.CLIENT else None, facts.reading.chunks
    earlier = before = sum(chunks[: session.place.step])
    with nullcontext() if resources.checkpointer.store is None else token_by_token():
        for done in session.read_document(facts.reading, mine):
            if session.in_range is False:
                number = session.place.step
                where = f"chunk {number} of" if number <= len(chunks) else "the eviction of"
                raise OutOfRange(
                    f"client: a value left its range in {where} the client's document: answers about it "
                    "would be wrong; use another model (docs/ranges.md)"
                )
            resources.checkpointer.document(session, resources.ledger)
            if me is not Rank.DEALER and done > before:
                _tell(me, resources, facts, (earlier, done), time.perf_counter() - start)
            before = done
            between_chunks(session.place.step)
    if EVICTION in session.ms and me is not Rank.DEALER:
        resources.say(
            f"{me.label}: {facts.reading.kept} of them kept, which ones nobody knows: evicted in "
            f"{duration(session.ms[EVICTION])}"
        )


def _tell(me: Rank, resources: SessionResources, facts: Facts, read: tuple[int, int], spent: float) -> None:
    """Say how far the reading is, and how long it will take. read: tokens when it began, and now."""
    earlier, done = read
    left = spent / (done - earlier) * (facts.private - done)
    more = f"; about {duration(1000 * left)} more" if done < facts.private else ""
    resources.say(
        f"{me.label}: {done} of {facts.private} tokens of the client's document read in "
        f"{duration(1000 * spent)}{more}"
    )
