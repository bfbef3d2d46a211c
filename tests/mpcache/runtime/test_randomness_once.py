"""Every key, mask and correlation is used once: no byte of a key stream is read twice, in whole sessions."""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import Any

import pytest

from mpcache.errors import Reuse
from mpcache.policy import parse_policy
from mpcache.rank import Rank
from mpcache.runtime import rng
from mpcache.runtime.rng import Tapes, fresh_seed
from mpcache.session import Session
from tests.support import tiny_policies as tiny
from tests.support.play import play

SPEC = "mpcache:coarse=4,fine=2,n_keep=20,recent=2,sink=1"


class Reads:
    """Which bytes of which key stream were read, by whom (a thread is a party)."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.spans: dict[tuple[str, bytes], list[tuple[int, int]]] = defaultdict(list)
        create, read = rng.KeyStream.__init__, rng.KeyStream.read

        def init(stream: Any, seed: bytes, label: str, start: int = 0) -> None:
            create(stream, seed, label, start)
            stream.key, stream.place = rng.derive_key(seed, label), start

        def reading(stream: Any, n: int) -> bytearray:
            who = threading.current_thread().name
            self.spans[who, stream.key].append((stream.place, stream.place + n))
            stream.place += n
            return read(stream, n)

        patch.setattr(rng.KeyStream, "__init__", init)
        patch.setattr(rng.KeyStream, "read", reading)

    def twice(self) -> int:
        """Bytes that one party read more than once."""
        again = 0
        for spans in self.spans.values():
            end = 0
            for first, last in sorted(spans):
                again += max(0, min(last, end) - first)
                end = max(end, last)
        return again


def run_session() -> None:
    shape, context = tiny.shape(), tiny.tokens(24)
    bound = parse_policy(SPEC).bind(24, shape)

    def program(ops: Any, party: Any, rank: Rank) -> None:
        threading.current_thread().name = rank.label
        mine = rank is Rank.SERVER
        session = Session(ops, party, shape, bound)
        session.setup(tiny.model(shape).weights if mine else None)
        prefill = tiny.prefilled(bound.policy, shape, context) if mine else None
        session.context(prefill, tiny.KERNELS if mine else None)
        for chunk in ([1, 2, 3], [4], [5]):
            session.chunk(chunk if rank is Rank.CLIENT else None, len(chunk))

    play(program)


def test_no_byte_of_a_key_stream_is_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = Reads(monkeypatch)
    run_session()
    assert {who for who, _ in reads.spans} == {"server", "client", "dealer"}
    assert sum(last - first for spans in reads.spans.values() for first, last in spans) > 1_000_000
    assert reads.twice() == 0


def test_the_check_sees_a_phase_whose_randomness_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted bug: all phases share one label, and nothing refuses it."""
    reads = Reads(monkeypatch)
    monkeypatch.setattr(Tapes, "begin", lambda tapes, phase: rng.KeyStream(tapes._seed, "tape"))
    run_session()
    assert reads.twice() > 100_000


def test_a_phase_begins_once() -> None:
    tapes = Tapes(fresh_seed())
    tapes.begin("decode1")
    tapes.begin("decode2")
    with pytest.raises(Reuse, match="the randomness of decode1 was used already"):
        tapes.begin("decode1")


def test_parties_and_dealer_refuse_a_phase_that_ran() -> None:
    def program(ops: Any, party: Any, rank: Rank) -> None:
        party.begin("question")
        with pytest.raises(Reuse):
            party.begin("question")

    play(program)
