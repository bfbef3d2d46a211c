"""Read the client's own document on shares, chunk by chunk, before the first question."""

from __future__ import annotations

import time
from collections.abc import Sequence

from mpcache.answer import TimedSession
from mpcache.console.signals import check_stop
from mpcache.errors import OutOfRange
from mpcache.phases import EVICTION
from mpcache.rank import Rank
from mpcache.report.units import duration
from mpcache_parties.facts import Facts
from mpcache_parties.resources import SessionResources


def read_private(
    me: Rank, resources: SessionResources, session: TimedSession, facts: Facts, tokens: Sequence[int] = ()
) -> None:
    """Take the client's document in, where it has one. tokens: at the client alone.

    The dealer is as far ahead as the room for its tapes allows. Raises OutOfRange at the client.
    """
    if not facts.private:
        return
    start, mine, before = time.perf_counter(), tokens if me is Rank.CLIENT else None, 0
    for done in session.read_document(facts.reading, mine):
        check_stop()
        if me is not Rank.DEALER and done > before:
            spent = time.perf_counter() - start
            left = spent / done * (facts.private - done)
            more = f"; about {duration(1000 * left)} more" if done < facts.private else ""
            resources.say(
                f"{me.label}: {done} of {facts.private} tokens of the client's document read in "
                f"{duration(1000 * spent)}{more}"
            )
        before = done
    if facts.reading.eviction is not None and me is not Rank.DEALER:
        resources.say(
            f"{me.label}: {facts.reading.kept} of them kept, which ones nobody knows: evicted in "
            f"{duration(session.ms[EVICTION])}"
        )
    if session.in_range is False:
        raise OutOfRange(
            "client: a value left its range while the client's document was read: answers about it would be "
            "wrong; use another model (docs/ranges.md)"
        )
