"""Tell when a turn begins, and how long its question is: public words of the client to the other two.

A session with one question has one turn, which the facts tell. In a conversation the client tells each turn
before it begins, and at last that there is none. The dealer, who is ahead, says after each turn where its
tapes for it end: what it dealt for tokens that were not taken in is dropped there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from mpcache.errors import Desync, LinkError
from mpcache.session import Session
from mpcache.transport.link import Link, Links
from mpcache_parties.facts import Facts


@dataclass(frozen=True)
class TurnSizes:
    """Public sizes of one turn. question: tokens that it takes in.  limit: tokens of the answer at most."""

    question: int
    limit: int


def turn_step(number: int) -> str:
    """Name the step outside the program's own names."""
    return f"turn/{number}"


def dealt_step(number: int) -> str:
    """Name the step at which the dealer's tapes for a turn end."""
    return f"dealt/{number}"


def announce_turn(links: Links, number: int, turn: TurnSizes | None) -> None:
    """Client: tell the others the next turn, or (None) that there is none."""
    sizes = {"question_tokens": 0, "new_tokens": 0}
    if turn is not None:
        sizes = {"question_tokens": turn.question, "new_tokens": turn.limit}
    for link in links.values():
        with suppress(
            LinkError
        ):  # who is gone fails where it is needed; a conversation that ends needs nobody
            link.send_facts(turn_step(number), sizes)


def turns_heard(client: Link, facts: Facts, session: Session, idle_s: float) -> Iterator[TurnSizes]:
    """Server, dealer: yield the turns of a session as they begin; one that is resumed goes on with its own.

    Raises Desync on a turn that there is no room for, or what the link raises.
    """
    if not facts.conversation:
        yield TurnSizes(facts.question, facts.limit)
        return
    while (turn := _heard(client, session.place.turn, idle_s)) is not None:
        left = facts.room - session.cache.length
        fits = 1 <= turn.question <= left - turn.limit and 1 <= turn.limit <= facts.limit
        if not fits or turn.question % session.grid:
            raise Desync(
                f"Desync: the client asks {turn.question} tokens and wants up to {turn.limit}; "
                f"the session has room for {left}, an answer for {facts.limit}"
            )
        yield turn
        session.next_turn()


def _heard(client: Link, number: int, idle_s: float) -> TurnSizes | None:
    told = client.recv_facts(turn_step(number), idle_s)
    sizes = [told.get(name) for name in ("question_tokens", "new_tokens")]
    question, limit = sizes
    if type(question) is not int or type(limit) is not int:
        raise Desync(f"Desync: the client says {sizes!r:.60} at {turn_step(number)}, not two whole numbers")
    return TurnSizes(question, limit) if question or limit else None


def tell_dealt(links: Links, number: int) -> None:
    """Dealer: tell both that the tapes of a turn end here."""
    for link in links.values():
        link.send_facts(dealt_step(number), {})


def skip_undone(dealer: Link, number: int) -> None:
    """Server, client: drop what the dealer dealt for tokens of a turn that were not taken in."""
    dealer.skip_to_facts(dealt_step(number))
