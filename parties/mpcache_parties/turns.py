"""Tell when a turn begins, and how long its question is: public words of the client to the other two.

A session with one question has one turn, which the facts tell. In a conversation the client tells each turn
before it begins, and at last that there is none. The dealer, who is ahead, says after each turn where its
tapes for it end: what it dealt for tokens that were not taken in is dropped there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import astuple, dataclass
from typing import Any

from mpcache.errors import Desync, LinkError
from mpcache.session import Session
from mpcache.transport.link import Link, Links
from mpcache_parties.facts import Facts, filled


@dataclass(frozen=True)
class TurnSizes:
    """Public sizes of one turn. question: tokens that it takes in.  limit: tokens of the answer at most."""

    question: int
    limit: int


@dataclass(frozen=True)
class PreparedTurns:
    """The turns that a conversation's tapes were dealt for. questions, answer: in tokens."""

    questions: tuple[int, ...]
    answer: int

    def sizes(self, number: int) -> TurnSizes | None:
        """Return a turn's; None where there is none."""
        left = self.questions[number - 1 :]
        return TurnSizes(left[0], filled(self.answer)) if left else None

    def __str__(self) -> str:
        """Say them in words."""
        tokens = ", ".join(map(str, self.questions))
        return f"{len(self.questions)} turns, questions of {tokens} tokens, answers of up to {self.answer}"


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


class TurnsHeard:
    """Server, dealer: the turns of a session, as they begin.

    A session that is resumed goes on with the turn that it stands in, which the client tells once more.
    """

    def __init__(
        self, client: Link, facts: Facts, session: Session, idle_s: float,
        earlier: Mapping[str, Any] | None = None, prepared: PreparedTurns | None = None,
    ) -> None:  # fmt: skip
        """Hear turns from the client, each within `idle_s` of the one before.

        earlier: as `kept` was.  prepared: what there are tapes for, in place of a dealer.
        """
        self._prepared = prepared
        self._client, self._facts, self._session, self._idle_s = client, facts, session, idle_s
        self._sizes = [TurnSizes(*sizes) for sizes in (earlier or {}).get("turns", ())]

    @property
    def go_on(self) -> bool:
        """Whether there may be further turns."""
        return self._facts.conversation

    def kept(self) -> dict[str, Any]:
        """Return what a party keeps of the turns so far: their sizes."""
        return {"turns": [list(astuple(sizes)) for sizes in self._sizes]}

    def __iter__(self) -> Iterator[TurnSizes]:
        """Yield them. Raises Desync on a turn that there is no room for, or what the link raises."""
        if not self._facts.conversation:
            yield TurnSizes(self._facts.question, self._facts.limit)
            return
        while (turn := self._heard()) is not None:
            self._check(turn)
            yield turn
            self._session.next_turn()

    def _check(self, turn: TurnSizes) -> None:
        number, step = self._session.place
        left = self._facts.room - self._session.cache.length
        if step:  # its question is there already, and tokens of its answer
            if self._sizes[number - 1 : number] != [turn]:
                raise Desync(
                    f"Desync: the client goes on with a question of {turn.question} tokens and an answer of "
                    f"up to {turn.limit}, which is not the turn {number} that it began"
                )
            return
        if self._prepared is not None:
            if turn != (there := self._prepared.sizes(number)):
                raise Desync(f"Desync: the client begins turn {number} as {turn}, the tapes are for {there}")
            return
        fits = 1 <= turn.question <= left - turn.limit and 1 <= turn.limit <= self._facts.limit
        if not fits or turn.question % self._session.grid:
            raise Desync(
                f"Desync: the client asks {turn.question} tokens and wants up to {turn.limit}; "
                f"the session has room for {left}, an answer for {self._facts.limit}"
            )
        self._sizes[number - 1 :] = [turn]

    def _heard(self) -> TurnSizes | None:
        number = self._session.place.turn
        told = self._client.recv_facts(turn_step(number), self._idle_s)
        sizes = [told.get(name) for name in ("question_tokens", "new_tokens")]
        question, limit = sizes
        if type(question) is not int or type(limit) is not int:
            raise Desync(
                f"Desync: the client says {sizes!r:.60} at {turn_step(number)}, not two whole numbers"
            )
        return TurnSizes(question, limit) if question or limit else None


def tell_dealt(links: Links, number: int) -> None:
    """Dealer: tell both that the tapes of a turn end here."""
    for link in links.values():
        link.send_facts(dealt_step(number), {})


def skip_undone(dealer: Link, number: int) -> None:
    """Server, client: drop what the dealer dealt for tokens of a turn that were not taken in."""
    dealer.skip_to_facts(dealt_step(number))
