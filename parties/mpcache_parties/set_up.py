"""Go through SETUP and CONTEXT with masks that outlive the session (`mpcache.runtime.standing`).

For each of the two, before anything secret moves:

    server -> all       identifier, layout, bytes; before that, how far the masking is
    dealer -> server    a digest of what it holds; none: then the server sends B, and the dealer the digest
    server -> client    how far that is, and the seed of V
    client -> server    a digest of its seed;  client -> dealer  the identifier

A session that is resumed goes through SETUP again, by the same masks or others; its cache has those that it
had. What prepared tapes are dealt for is masked anew instead, as `stock` does not mask at all: then nothing
of this is said.
"""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch

from mpcache.answer import TimedSession
from mpcache.choices import ProtocolName
from mpcache.errors import Desync, Mismatch
from mpcache.ledger import Ledger
from mpcache.model.prefill import Prefill
from mpcache.policy.layer_view import OwnersContext
from mpcache.rank import Rank
from mpcache.runtime.ring import Matrix
from mpcache.runtime.rng import SEED_BYTES
from mpcache.runtime.standing import (
    ClientsMasks,
    DealersMasks,
    Dealt,
    OperandPlace,
    dealt_of,
    places_digest,
    seed_digest,
)
from mpcache.transport.link import bytes_of, tensor_of
from mpcache_kernels import Backend
from mpcache_parties.facts import Facts
from mpcache_parties.masking import WHAT, Masking, Progress, masking_progress
from mpcache_parties.private_inputs import Document
from mpcache_parties.resources import SessionResources
from mpcache_parties.say import Say
from mpcache_parties.state.setups import NAME, DealerSetups, Held, Made, ServerSetups
from mpcache_parties.state.snapshot import copied

SEED_STEP = "seeds/masks"
TOLD, HELD, SEEN = "facts/masks", "facts/held", "facts/seed"  # steps of what is said, as above


def stands(facts: Facts, resources: SessionResources) -> bool:
    """Return whether the session's masks outlive it: public, and the same at all three."""
    return facts.protocol != ProtocolName.STOCK and resources.tapes is None


def set_up_bytes(ledger: Ledger) -> int:
    """Return what SETUP took at this party: bytes of tensors, both ways, on all links."""
    steps = (ledger.total("setup"), ledger.total(SEED_STEP))
    return sum(e.sent + e.received + e.offline_sent + e.offline_received for e in steps)


# ------------------------------------------------------------------------------------------- server


class ServerSetUp:
    """The server's part: it masks, sends the dealer what that lacks, and the client the seed."""

    def __init__(self, resources: SessionResources, session: TimedSession, facts: Facts) -> None:
        self._resources, self._session = resources, session
        self._stands = stands(facts, resources)
        setups = resources.setups if isinstance(resources.setups, ServerSetups) else ServerSetups()
        self._keeps_document = not setups.fresh_documents
        self._masking = Masking(setups, session, self._watch, resources.shards)
        self._progress: dict[str, Progress] = {}

    def weights(self, own: Document) -> None:
        """Go through SETUP."""
        session = self._session
        if not self._stands:
            return session.setup(own.model.weights)
        start = time.perf_counter()
        made = self._masking.weights(own)
        if "setup" not in session.ms:
            session.setup(None, made.tree)
        self._share("setup", made, keep=True)
        session.ms["setup"] = 1000 * (time.perf_counter() - start)
        return None

    def prefilled(self, own: Document) -> Prefill:
        """Return the pass over the document."""
        return self._masking.prefilled(own)

    def context(self, own: Document, known: OwnersContext, kernels: Backend) -> None:
        """Go through CONTEXT."""
        session = self._session
        if not self._stands:
            return session.context(known, kernels)
        start = time.perf_counter()
        made = self._masking.context(own, known, kernels)
        if "context" not in session.ms:
            session.context(None, None, copied(made.tree))
        elif self._keeps_document:
            session.cache = copied(made.tree)  # what others start with stays as it is
        self._share("context", made, keep=self._keeps_document)
        session.ms["context"] = 1000 * (time.perf_counter() - start)
        return None

    def _watch(self, phase: str, done: int, of: int) -> None:
        """Tell how far the masking is; who waits for this party hears that it works."""
        progress = self._progress.setdefault(phase, masking_progress(self._resources.say, phase))
        if progress.at(done, of):
            for link in self._resources.links.values():
                link.send_facts(TOLD, {"masked": done, "of": of})

    def _share(self, phase: str, made: Made, keep: bool) -> None:
        """See to it that dealer and client hold their parts, and that these are the right ones."""
        links, masks = self._resources.links, made.masks
        dealer, client = links[Rank.DEALER], links[Rank.CLIENT]
        about = {"identifier": made.identifier, "layout": places_digest(masks.places), "bytes": masks.nbytes}
        dealer.send_facts(TOLD, about | {"family": made.family, "keep": keep})
        held = dealer.recv_facts(HELD).get("digest")
        if held is None:
            progress, done = Progress(self._resources.say, f"server: {WHAT[phase]} sent to the dealer"), 0
            for place, sent in masks.sent():
                dealer.send(place.step, sent, [place.step] * len(sent))
                del sent  # before the next one is made
                done += place.nbytes
                if progress.at(done, masks.nbytes):
                    client.send_facts(TOLD, {"sent": done, "of": masks.nbytes})
            held = dealer.recv_facts(HELD).get("digest")
        if held != masks.digest:
            raise Mismatch(
                f"Mismatch: the dealer holds other masked {WHAT[phase]} than the server made; remove "
                f"{made.identifier:.8}... from the dealer's --setup-dir, or restart a dealer that has none"
            )
        client.send_facts(TOLD, about)
        client.send(SEED_STEP, [tensor_of(masks.seed)])
        if client.recv_facts(SEEN).get("digest") != seed_digest(masks.seed):
            raise Mismatch(
                f"Mismatch: the client holds another seed of the masked {WHAT[phase]} than the server "
                "sent; is it the same release of mpcache?"
            )


# ----------------------------------------------------------------------------------- client and dealer


class _TakingSetUp(ABC):
    """The part of a party that takes what the server has masked."""

    me: ClassVar[Rank]

    def __init__(self, resources: SessionResources, session: TimedSession, facts: Facts) -> None:
        self._resources, self._session = resources, session
        self._stands = stands(facts, resources)

    def weights(self) -> None:
        """Go through SETUP."""
        self._run("setup", lambda: self._session.setup(None))

    def context(self) -> None:
        """Go through CONTEXT."""
        self._run("context", lambda: self._session.context(None, None))

    def _run(self, phase: str, run: Callable[[], None]) -> None:
        if not self._stands:
            return run()
        start = time.perf_counter()
        hear = self._resources.links[Rank.SERVER].recv_facts
        self._take(phase, run, told(hear, self._resources.say, f"{self.me.label}: {WHAT[phase]}"))
        self._session.ms[phase] = 1000 * (time.perf_counter() - start)
        return None

    @abstractmethod
    def _take(self, phase: str, run: Callable[[], None], about: Mapping[str, Any]) -> None:
        """Take this party's part of what the server tells `about`, and run the phase with it."""

    def _with(
        self, masks: ClientsMasks | DealersMasks, run: Callable[[], None], about: Mapping[str, Any]
    ) -> None:
        self._session.party.standing = masks
        run()
        self._session.party.standing = None
        same_layout(masks.places, about, self.me)


class ClientSetUp(_TakingSetUp):
    """The client's part: it gets a seed of 32 bytes."""

    me = Rank.CLIENT

    def _take(self, phase: str, run: Callable[[], None], about: Mapping[str, Any]) -> None:
        links = self._resources.links
        (seed,) = links[Rank.SERVER].recv(SEED_STEP, [(torch.uint8, (SEED_BYTES,))])
        links[Rank.SERVER].send_facts(SEEN, {"digest": seed_digest(bytes_of(seed))})
        links[Rank.DEALER].send_facts(TOLD, {"identifier": about["identifier"]})
        shards = self._resources.shards
        self._with(ClientsMasks(bytes_of(seed), None if shards is None else shards.seeded), run, about)


class DealerSetUp(_TakingSetUp):
    """The dealer's part: it finds the masked tensors again, or receives them."""

    me = Rank.DEALER

    def __init__(self, resources: SessionResources, session: TimedSession, facts: Facts) -> None:
        super().__init__(resources, session, facts)
        setups = resources.setups
        self._setups = setups if isinstance(setups, DealerSetups) else DealerSetups()

    def _take(self, phase: str, run: Callable[[], None], about: Mapping[str, Any]) -> None:
        links = self._resources.links
        server, identifier, family = links[Rank.SERVER], about["identifier"], str(about.get("family"))
        held = self._setups.find(identifier, family)
        if held is not None:
            server.send_facts(HELD, {"digest": held.digest})
            self._with(DealersMasks(held.next_of()), run, about)
        else:
            server.send_facts(HELD, {"digest": None})
            held = self._received(phase, run, about, family)
            server.send_facts(HELD, {"digest": held.digest})
            if about.get("keep") is True:
                self._setups.keep(identifier, held)
        if (theirs := links[Rank.CLIENT].recv_facts(TOLD).get("identifier")) != identifier:
            raise Mismatch(
                f"Mismatch: the set-up of the {WHAT[phase]} is {theirs!r:.40} at client, {identifier!r:.40} "
                "at dealer; start both anew"
            )

    def _received(self, phase: str, run: Callable[[], None], about: Mapping[str, Any], family: str) -> Held:
        server, masks, digest = self._resources.links[Rank.SERVER], list[Dealt](), hashlib.sha256()
        progress = Progress(self._resources.say, f"dealer: {WHAT[phase]} received")
        total, done, shards = int(about["bytes"]), 0, self._resources.shards
        if shards is not None and phase == "setup":
            shards.room_for(total)

        def take(place: OperandPlace) -> Dealt:
            nonlocal done
            parts = server.recv(place.step, place.specs)
            for part in parts:
                digest.update(part.reshape(-1).view(torch.uint8).numpy().data)
            mine = dealt_of(place, parts)
            if shards is not None and isinstance(mine, Matrix):
                mine = shards.dealt(place, mine)
            masks.append(mine)
            progress.at(done := done + place.nbytes, total)
            return masks[-1]

        found = DealersMasks(take)
        self._with(found, run, about)
        if shards is not None and phase == "setup":
            shards.say_settled()
        return Held(family, found.places, masks, digest.hexdigest())


# -------------------------------------------------------------------------------------------- both


def told(hear: Callable[[str], dict[str, Any]], say: Say, who: str) -> dict[str, Any]:
    """Hear of a set-up from the server, and meanwhile how far it is. Raises Desync."""
    ways: dict[str, Progress] = {}
    while "identifier" not in (about := hear(TOLD)):
        for way in ("masked", "sent"):
            done, of = about.get(way), about.get("of")
            if type(done) is int and type(of) is int:
                doing = "being masked at the server" if way == "masked" else "sent to the dealer"
                progress = ways.setdefault(way, Progress(say, f"{who} {doing}"))
                progress.at(done, of)
    if not NAME.fullmatch(str(about["identifier"])) or type(about.get("bytes")) is not int:
        raise Desync(
            f"Desync: the server names a set-up {about['identifier']!r:.60}; is it the same version?"
        )
    return about


def same_layout(places: list[OperandPlace], about: Mapping[str, Any], me: Rank) -> None:
    """Compare what this party's program asked for with what the server masked. Raises Mismatch."""
    if (mine := places_digest(places)) != about.get("layout"):
        raise Mismatch(
            f"Mismatch: the layout of the set-up is {str(about.get('layout')):.16} at server, {mine:.16} at "
            f"{me.label}: shapes, rings or fraction bits differ; start both with the same release of mpcache"
        )
