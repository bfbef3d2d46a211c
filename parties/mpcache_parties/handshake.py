"""Open a session: the parties introduce themselves and compare what they must agree on."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from enum import StrEnum
from types import MappingProxyType

from mpcache.errors import Desync, Mismatch
from mpcache.rank import Rank
from mpcache.transport.link import Hello, Links
from mpcache.transport.session_order import AGREED

PROTOCOL_VERSION = 13
TOKENS = "max_new_tokens"
DOCUMENT = "document"  # its public name
VALUE_CHARACTERS = 80  # of a differing value, in the error's line

_KEEPING = "--state and --resume, or one that serves with --state alone"  # what to start both with

NO_NAME = "none"  # of a document: what a client says that names none
NOT_TOLD = "not told"  # in place of a name that the dealer does not hear
DOCUMENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # public

Side = tuple[Rank, Mapping[str, str]]


class KeepMode(StrEnum):
    """What a party says of keeping the session: the value of `state` in its Hello."""

    NONE = "none"
    KEPT = "kept"
    RESUMED = "resumed"
    AS_CLIENT = "as the client"  # of one that serves, and keeps sessions


AS_CLIENT = KeepMode.AS_CLIENT.value  # of a document, too


class TapeMode(StrEnum):
    """Where the dealer's part comes from: the value of `tapes` in a Hello."""

    LIVE = "live"
    PREPARED = "prepared"
    PREPARING = "prepare"  # there is no session: tapes are dealt and stored


# What the client may say: it has nobody to follow.
CLIENT_MODES = (KeepMode.NONE, KeepMode.KEPT, KeepMode.RESUMED)


class Greeting:
    """Say Hello on each link, and compare what each peer says: once for a session.

    A link that is there is greeted before the others have come, so that a mismatch does not wait for
    them. public: `PublicConfig.flat()`, and whatever else must agree.  otherwise: fields of which a peer
    hears something else.
    """

    def __init__(
        self,
        me: Rank,
        public: Mapping[str, str],
        otherwise: Mapping[Rank, Mapping[str, str]] = MappingProxyType({}),
    ) -> None:
        nonce = secrets.token_hex(16)
        self._mine = {
            peer: Hello(PROTOCOL_VERSION, me, nonce, {**public, **otherwise.get(peer, {})}) for peer in Rank
        }
        self._greeted: set[Rank] = set()
        self._heard: dict[Rank, Hello] = {}

    def look(self, links: Links) -> None:
        """Greet these peers, and compare what has come from them. Never waits. Raises as `agree` does."""
        self._greet(links)
        for peer, link in links.items():
            if peer not in self._heard and (hello := link.poll_hello()) is not None:
                self._hear(peer, hello)

    def agree(self, links: Links) -> dict[Rank, Hello]:
        """Greet every peer, and wait for all; return what each said.

        Raises Mismatch with the first differing field and both sides' values, on both sides (whichever is
        slower may get it as the PeerFailed of the other).
        """
        self._greet(links)
        for peer, link in links.items():
            if peer not in self._heard:
                self._hear(peer, link.recv_hello())
        return {peer: self._heard[peer] for peer in links}

    def _greet(self, links: Links) -> None:
        for peer, link in links.items():
            if peer not in self._greeted:
                self._greeted.add(peer)
                link.send_hello(self._mine[peer])

    def _hear(self, peer: Rank, hello: Hello) -> None:
        compare_hellos(self._mine[peer], hello, peer)
        self._heard[peer] = hello


def agree(links: Links, me: Rank, public: Mapping[str, str]) -> dict[Rank, Hello]:
    """Exchange Hello on links that are all there, as `Greeting.agree` does."""
    return Greeting(me, public).agree(links)


def compare_hellos(mine: Hello, theirs: Hello, expected: Rank) -> None:
    """Raise Mismatch unless `theirs` comes from `expected` and agrees with `mine`.

    A server or a dealer may keep the session as the client does: its `state` agrees with any of the others.
    So does the `document` of one that takes whichever the client names. A client may want fewer new tokens
    than the others are ready for.
    """
    if theirs.rank is not expected:
        raise Mismatch(
            f"Mismatch: {mine.rank.label} expects {expected.label} (rank {int(expected)}), but rank "
            f"{int(theirs.rank)} is there; check --rank and `addresses` in the config"
        )
    if theirs.version != mine.version:
        versions = [(hello.rank, str(hello.version)) for hello in (mine, theirs)]
        raise _mismatch("protocol version", versions, "release of mpcache")
    sides: list[Side] = [(hello.rank, hello.public) for hello in (mine, theirs)]
    if any(public.get("state") == KeepMode.AS_CLIENT for _, public in sides):
        sides = _without_state(sides)
    if any(public.get(DOCUMENT) == AS_CLIENT for _, public in sides):
        sides = _without_document(sides)
    if _client_asks_less(dict(sides)):
        sides = _without(sides, TOKENS)
    _compare_fields(sides[0], sides[1], "--config and flags")


def _client_asks_less(sides: Mapping[Rank, Mapping[str, str]]) -> bool:
    """Return whether a client wants no more new tokens than the other is ready for."""
    if Rank.CLIENT not in sides:
        return False
    said = {rank: public.get(TOKENS, "") for rank, public in sides.items()}
    if not all(value.isascii() and value.isdigit() and len(value) < 10 for value in said.values()):
        return False
    wanted = int(said.pop(Rank.CLIENT))
    return wanted <= min(map(int, said.values()), default=0)


def _without(sides: Sequence[Side], name: str) -> list[Side]:
    return [(rank, {n: value for n, value in public.items() if n != name}) for rank, public in sides]


def _without_state(sides: Sequence[Side]) -> list[Side]:
    """Return what is left to compare where one party keeps as the client does.

    Raises Mismatch if `state` is none of what that rank may say: the client itself has nobody to follow.
    """
    for rank, public in sides:
        if public.get("state") not in (CLIENT_MODES if rank is Rank.CLIENT else tuple(KeepMode)):
            said = [(rank, _shown(public.get("state"))) for rank, public in sides]
            raise _mismatch("state", said, _KEEPING)
    return _without(sides, "state")


def _without_document(sides: Sequence[Side]) -> list[Side]:
    """Return what is left to compare where one party takes the document that the client names.

    Raises Mismatch where the client names none as it should.
    """
    for rank, public in sides:
        name = public.get(DOCUMENT, "")
        if rank is Rank.CLIENT and name != NOT_TOLD and not DOCUMENT_NAME.fullmatch(name):
            said = [(rank, _shown_field(DOCUMENT, public)) for rank, public in sides]
            raise _mismatch(DOCUMENT, said, "release of mpcache")
    return _without(sides, DOCUMENT)


def confirm_facts(links: Links, me: Rank, facts: Mapping[str, str]) -> None:
    """Compare what each party has made of the public facts, before anything secret moves.

    facts: the model's shape, lengths, kernels and the policy's plan, flat. Each party computes its
    own, so that a plan of another release, or facts that differ from peer to peer, end the session
    here. Raises Mismatch as `agree` does.
    """
    for link in links.values():
        link.send_facts(AGREED, facts)
    for peer, link in links.items():
        theirs = link.recv_facts(AGREED)
        if not all(isinstance(value, str) for value in theirs.values()):
            raise Desync(f"Desync: {peer.label}'s facts are not text; is it the same version?")
        _compare_fields((me, facts), (peer, theirs), "release of mpcache")


def _compare_fields(mine: Side, theirs: Side, remedy: str) -> None:
    """Raise Mismatch for the first field that differs: the same one at both, so in the lower rank's order."""
    sides = sorted([mine, theirs], key=lambda side: side[0])
    for name in dict.fromkeys([*sides[0][1], *sides[1][1]]):
        values = [(rank, fields.get(name)) for rank, fields in sides]
        if values[0][1] != values[1][1]:
            shown = [(rank, _shown_field(name, fields)) for rank, fields in sides]
            remedy = _KEEPING if name == "state" else remedy
            raise _mismatch(name[:VALUE_CHARACTERS], shown, remedy)


def _shown_field(name: str, fields: Mapping[str, str]) -> str:
    """Return a field's value as an error tells it to all parties: not a name that is kept from one."""
    hidden = name == DOCUMENT and fields.get("hide_document") == str(True)
    return "another" if hidden else _shown(fields.get(name))


def _shown(value: str | None) -> str:
    return "not set" if value is None else " ".join(value.split())[:VALUE_CHARACTERS] or "empty"


def _mismatch(name: str, sides: Sequence[tuple[Rank, str]], remedy: str) -> Mismatch:
    values = ", ".join(f"{value} at {rank.label}" for rank, value in sorted(sides))
    return Mismatch(f"Mismatch: {name} is {values}; start both with the same {remedy}")
