"""Who answers a program: a computing party, the dealer, or the cost reading.

All openings of the system go through `Party.open`; all correlated randomness through `Party.draw`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from mpcache.ledger import Ledger
from mpcache.rank import Rank
from mpcache.runtime import loops, value_loops
from mpcache.runtime.meta import MetaTensor
from mpcache.runtime.program import Opening, Request
from mpcache.runtime.ring import unpack
from mpcache.runtime.rng import KeyStream, Tapes, TreeCipher
from mpcache.runtime.rows_ahead import RowsAhead
from mpcache.transport.link import Layout, Link
from mpcache.transport.message import layout_of

COMPUTING = (Rank.SERVER, Rank.CLIENT)


def sends(item: Opening, rank: Rank) -> bool:
    """Tell whether `rank` sends its share of this opening to the other computing party."""
    return (item.sender is None or item.sender is rank) and item.to is not rank


class _Round(NamedTuple):
    """What a round's two messages look like to one party.

    sent, received: for each opening where its share begins, None if it does not travel that way.
    learned: whether this party learns the opened value.
    """

    leaving: Layout
    coming: Layout
    sent: tuple[int | None, ...]
    received: tuple[int | None, ...]
    learned: tuple[bool, ...]


# Of an opening: the share's shape, bytes of an element, sender and recipient.
_Form = tuple[torch.Size, int, Rank | None, Rank | None]


@lru_cache(maxsize=4096)  # a decode step opens the same shapes again for every token
def _round_of(rank: Rank, forms: tuple[_Form, ...]) -> _Round:
    """Lay out a round's messages. Whole words travel as int64, else the low bytes of each word."""

    def one_way(sender: Rank) -> tuple[Layout, tuple[int | None, ...]]:
        there = [by in (None, sender) and to is not sender for _, _, by, to in forms]
        specs = [
            (torch.int64, tuple(shape)) if width == 8 else (torch.uint8, (*shape, width))
            for (shape, width, _, _), travels in zip(forms, there, strict=True)
            if travels
        ]
        layout = layout_of(tuple(specs))
        starts = iter(layout.starts)
        return layout, tuple(next(starts) if travels else None for travels in there)

    (leaving, sent), (coming, received) = one_way(rank), one_way(rank.peer)
    return _Round(leaving, coming, sent, received, tuple(to in (None, rank) for *_, to in forms))


def _bytes_at(data: Any, start: int, n: int, width: int) -> Any:
    """Return n words' bytes in a message's data, from byte `start` on: (n, width)."""
    return data[start : start + n * width].reshape(n, width)


class Party(ABC):
    """Answers openings, draws and blocking calls for one rank."""

    rank: Rank
    ledger: Ledger
    trees: TreeCipher | None = None  # of the phase; a party that reads shapes needs none
    # `StandingMasks` of the phase's operands that the server knows; None: they are masked anew.
    standing: Any = None
    ahead: RowsAhead | None = None  # of who makes products with standing matrices ahead

    @abstractmethod
    def begin(self, phase: str) -> None:
        """Start a phase: fresh key streams, so that no mask of another phase can come again.

        The phase's key trees grow under a key of their own, too.
        """

    @abstractmethod
    def open(self, items: Sequence[Opening], step: str) -> list[Any]:
        """Open tensors in one round; None for what this party does not learn."""

    @abstractmethod
    def draw(self, request: Request, step: str) -> list[Any]:
        """Draw this party's parts; of a kept correlation also all values (None but at the dealer)."""

    def call(self, run: Callable[[Any, str], Any], step: str) -> Any:
        """Run code that blocks and communicates by itself (CrypTen's), as this party at this step."""
        return run(self, step)

    def stream(self, kind: str) -> KeyStream | None:
        """Return one of CrypTen's own generators: `prev`, `next` (shared by both parties) and `local`."""
        return None


class ComputingParty(Party):
    """Rank 0 or 1: real shares over a link to the peer, corrections from the dealer.

    session: its name, which all three know.  seed: shared with the dealer.
    pair_seeds: `prev` and `next`, shared with the peer.  on_step: told the name of each round's step.
    """

    def __init__(
        self,
        rank: Rank,
        peer: Link,
        dealer: Link,
        session: str,
        seed: bytes,
        pair_seeds: dict[str, bytes],
        own_seed: bytes,
        ledger: Ledger,
        on_step: Callable[[str], None] = lambda step: None,
    ) -> None:
        self.rank, self.ledger = rank, ledger
        self._on_step = on_step
        self._peer, self._dealer, self._session = peer, dealer, session
        self._tapes = Tapes(seed)
        self.ahead = RowsAhead(seed) if rank is Rank.CLIENT else None
        self._crypten_seeds = {**pair_seeds, "local": own_seed}
        self._tape: KeyStream | None = None
        self._streams: dict[str, KeyStream] = {}

    def begin(self, phase: str) -> None:
        self._tape = self._tapes.begin(phase)
        if self.ahead is not None:
            self.ahead.begin(phase)
        self.trees = TreeCipher(self._session, phase)
        # One seed is `prev` at one party and `next` at the other: the label must not tell them apart.
        self._streams = {k: KeyStream(s, f"crypten/{phase}") for k, s in self._crypten_seeds.items()}

    def open(self, items: Sequence[Opening], step: str) -> list[Any]:
        self._on_step(step)
        forms = tuple([(item.share.shape, item.width, item.sender, item.to) for item in items])
        it = _round_of(self.rank, forms)
        sent = np.zeros(it.leaving.total, np.uint8)
        labels_out, labels_in = list[str](), list[str]()
        for item, form, leaves, comes in zip(items, forms, it.sent, it.received, strict=True):
            if leaves is not None:
                words = item.share.numpy().ravel()
                loops.pack_words(words, _bytes_at(sent, leaves, len(words), form[1]))
                labels_out.append(item.step or step)
            if comes is not None:
                labels_in.append(item.step or step)
        data = self._peer.swap(step, [sent.data], it.leaving, it.coming, labels_out, labels_in)
        came = np.frombuffer(data, np.uint8)
        came.flags.writeable = False
        return [
            self._opened(item, came, comes) if learned else None
            for item, comes, learned in zip(items, it.received, it.learned, strict=True)
        ]

    def _opened(self, item: Opening, came: Any, start: int | None) -> torch.Tensor | None:
        """Add up an opening, with what the peer sends of it, if that is anything, from byte `start` on."""
        share, width = item.share, item.width
        if start is None:
            return share & ((1 << 8 * width) - 1) if width < 8 else share
        out = np.empty(share.shape, np.int64)
        theirs = _bytes_at(came, start, out.size, width)
        if item.sender is None:
            value_loops.open_words(theirs, share.numpy().ravel(), item.xor, out.reshape(-1))
        else:
            loops.unpack_words(theirs, out.reshape(-1))
        return torch.from_numpy(out)

    def draw(self, request: Request, step: str) -> list[Any]:
        tape = self._tape
        if tape is None:
            raise RuntimeError("draw before begin")
        row = None
        if self.ahead is not None and request.matrix is not None:
            row = self.ahead.mask(request, request.matrix.held)
        parts, shares = _expand(tape, request, self.rank, row)
        sent = request.sent_to(self.rank)
        arrived = iter(self._dealer.recv(step, [p.spec for p in sent]) if sent else [])
        for part in request.derived:
            if not part.sent_to(self.rank):
                parts.append(next(shares))
            elif part.packed:
                parts.append(unpack(next(arrived)).to(part.dtype))
            else:
                parts.append(next(arrived))
        return [*parts, None] if request.keep else parts

    def stream(self, kind: str) -> KeyStream | None:
        return self._streams.get(kind)


class ShapeParty(Party):
    """Reads a program by shapes alone and books what `rank` would send and receive: the cost."""

    def __init__(self, rank: Rank = Rank.SERVER) -> None:
        self.rank, self.ledger = rank, Ledger()

    def begin(self, phase: str) -> None:
        pass

    def open(self, items: Sequence[Opening], step: str) -> list[Any]:
        for item in items:
            n = math.prod(item.share.shape) * item.width
            self.ledger.book(
                item.step or step,
                sent=n * sends(item, self.rank),
                received=n * sends(item, self.rank.peer),
            )
        self.ledger.book(step, rounds=1)
        return [MetaTensor(i.share.shape, i.share.dtype) for i in items]

    def draw(self, request: Request, step: str) -> list[Any]:
        n = sum(part.nbytes for part in request.sent_to(self.rank))
        if n:
            self.ledger.book(step, offline_received=n)
        return _answered(request, None)


class DealerParty(Party):
    """Rank 2: reads the program by shapes and meets every draw, in the program's own order."""

    rank = Rank.SERVER  # CrypTen asks for a rank; by shapes both computing parties run the same code

    def __init__(
        self, links: dict[Rank, Link], session: str, seeds: dict[Rank, bytes], ledger: Ledger
    ) -> None:
        self.ledger = ledger
        self._links, self._session = links, session
        self._seeds = {rank: Tapes(seed) for rank, seed in seeds.items()}
        self._tapes: dict[Rank, KeyStream] = {}
        self.ahead: RowsAhead = RowsAhead(seeds[Rank.CLIENT])

    def begin(self, phase: str) -> None:
        self._tapes = {rank: tapes.begin(phase) for rank, tapes in self._seeds.items()}
        self.ahead.begin(phase)
        self.trees = TreeCipher(self._session, phase)

    def open(self, items: Sequence[Opening], step: str) -> list[Any]:
        return [MetaTensor(i.share.shape, i.share.dtype) for i in items]

    def draw(self, request: Request, step: str) -> list[Any]:
        row = None if request.matrix is None else self.ahead.mask(request, request.matrix.dealt)
        values, shares = self._values(request, row)
        product = None if row is None else self.ahead.product(row)
        derived = request.derive(*values) if product is None else (product,)
        server, client = [], []
        for part, value in zip(request.derived, derived, strict=True):
            if part.public:
                client.append(value)
                server.append(value)
            else:
                server.append(part.correct(value, next(shares)))
        for rank, tensors in ((Rank.SERVER, server), (Rank.CLIENT, client)):
            if tensors:
                self._links[rank].send(step, tensors)
        return _answered(request, values)

    def _values(
        self, request: Request, row: torch.Tensor | None = None
    ) -> tuple[list[Any], Iterator[torch.Tensor]]:
        """Expand the random parts of both parties; and, when asked for, the client's shares of the others."""
        ours, _ = _expand(self._tapes[Rank.SERVER], request, Rank.SERVER)
        theirs, shares = _expand(self._tapes[Rank.CLIENT], request, Rank.CLIENT, row)
        both = zip(request.random, ours, theirs, strict=True)
        return [part.combine(one, other) for part, one, other in both], shares


class PortionDealer(DealerParty):
    """Deals some steps of a program as the dealer of all of them would, and goes past the others.

    Nothing that is derived is ever derived from: what a later step needs of an earlier one are random parts
    that it keeps. So those of a step that is gone past are expanded, and all else of it is skipped. It deals
    for sessions that mask their weights anew, so no row is made ahead.

    mine: whether a step is dealt.  needed: whether what another step keeps may be needed by one that is.
    drawn: how many draws the phase has had, gone past ones with them.
    """

    def __init__(
        self, links: dict[Rank, Link], session: str, seeds: dict[Rank, bytes], ledger: Ledger,
        mine: Callable[[str], bool], needed: Callable[[str], bool],
    ) -> None:  # fmt: skip
        super().__init__(links, session, seeds, ledger)
        self._mine, self._needed, self.drawn = mine, needed, 0

    def begin(self, phase: str) -> None:
        super().begin(phase)
        self.drawn = 0

    def draw(self, request: Request, step: str) -> list[Any]:
        self.drawn += 1
        if self._mine(step):
            return super().draw(request, step)
        values = None
        if request.keep and self._needed(step):
            values, _ = self._values(replace(request, derived=()))
        else:
            for part in request.random:
                for rank in COMPUTING:
                    if part.owner in (None, rank):
                        self._tapes[rank].skip(part.held)
        self._tapes[Rank.CLIENT].skip(sum(part.held for part in request.derived if not part.public))
        return _answered(request, values)


def _answered(request: Request, kept: list[Any] | None) -> list[Any]:
    """Answer a program that has shapes alone, and at the dealer the values of a kept correlation."""
    parts: list[Any] = [MetaTensor(p.shape, p.dtype) for p in request.parts]
    return [*parts, kept] if request.keep else parts


def _expand(
    tape: KeyStream, request: Request, rank: Rank, row: torch.Tensor | None = None
) -> tuple[list[Any], Iterator[torch.Tensor]]:
    """Expand what one party has of a draw from its stream: its random parts, zero if the other owns them.

    And its shares of the derived parts that it is not sent, each when it is asked for. row: the last random
    part, where that is not of the stream.
    """
    expanded = request.random[: -1 if row is not None else None]
    random = [part for part in expanded if part.owner in (None, rank)]
    derived = [part for part in request.derived if not part.sent_to(rank)]
    read = tape.tensors(tuple([(part.dtype, part.shape) for part in random + derived]))
    parts = [
        next(read) if part.owner in (None, rank) else torch.zeros(part.shape, dtype=part.dtype)
        for part in expanded
    ]
    return (parts if row is None else [*parts, row]), read
