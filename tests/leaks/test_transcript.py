"""What a party receives: sizes, order and reasons do not depend on secrets, contents look uniform."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch

from mpcache.policy import parse_policy
from mpcache.rank import Rank
from mpcache.runtime.party import ComputingParty
from mpcache.runtime.program import Opening
from mpcache.session import Session
from mpcache.transport.link import Layout
from tests.support import tiny_policies as tiny
from tests.support.play import play
from tests.support.swaps import pieces
from tests.support.uniformity import largest_deviation, worst_of_ring

SPEC = "mpcache:coarse=4,fine=2,n_keep=20,recent=2,sink=1"
CONTEXT, QUESTION = 24, 3


class Transcript:
    """Everything that one party receives, by its link and its reason."""

    def __init__(self) -> None:
        self.slots: list[tuple[str, str, tuple[int, ...], str]] = []
        self.words: dict[tuple[str, int], list[np.ndarray]] = defaultdict(list)  # by reason and ring

    def watch(self, party: ComputingParty, reasons: list[list[Opening]]) -> None:
        receive, swap = party._dealer.recv, party._peer.swap

        def received(step: str, *rest: Any) -> Any:
            arrived = receive(step, *rest)
            # Correction bits of key trees are two bits in a byte; see test_dcf.
            self.slots += [("dealer", step, tuple(tensor.shape), "tape") for tensor in arrived]
            return arrived

        def swapped(step: str, outgoing: Any, leaving: Layout, coming: Layout, *labels: Any) -> Any:
            data = swap(step, outgoing, leaving, coming, *labels)
            if coming.text:
                for item, words in zip(reasons.pop(0), pieces(data, coming), strict=True):
                    self.slots.append(("peer", step, (*item.share.shape, item.width), item.why))
                    self.words[item.why, item.ring].append(words.reshape(-1, item.width))
            return data

        party._dealer.recv = received  # type: ignore[assignment,method-assign]
        party._peer.swap = swapped  # type: ignore[assignment,method-assign]


def listen(seed: int, question: list[int], who: Rank, protocol: str) -> Transcript:
    """One context and question of fixed size; weights, document and question differ with the seed."""
    shape = tiny.shape()
    context = tiny.tokens(CONTEXT, seed)
    bound = parse_policy(SPEC).bind(CONTEXT, shape)
    heard = Transcript()

    def program(ops: Any, party: Any, rank: Rank) -> None:
        if rank is who:
            reasons: list[list[Opening]] = []
            heard.watch(party, reasons)
            opening = party.open

            def open_(items: Any, step: str) -> Any:
                coming = [i for i in items if i.sender in (None, rank.peer) and i.to in (None, rank)]
                if coming:
                    reasons.append(coming)
                return opening(items, step)

            party.open = open_
        mine = rank is Rank.SERVER
        session = Session(ops, party, shape, bound)
        session.setup(tiny.model(shape, seed).weights if mine else None)
        prefill = tiny.prefilled(bound.policy, shape, context, seed) if mine else None
        session.context(prefill, tiny.KERNELS if mine else None)
        session.chunk(question if rank is Rank.CLIENT else None, QUESTION)
        session.chunk([question[0]] if rank is Rank.CLIENT else None, 1)

    play(program, protocol)
    return heard


@pytest.fixture(scope="module", params=["fast", "fast-bits"])
def transcripts(request: Any) -> dict[tuple[Rank, int], Transcript]:
    questions = {0: [1, 2, 3], 1: [9, 9, 9]}
    return {
        (who, s): listen(s, q, who, request.param)
        for who in (Rank.SERVER, Rank.CLIENT)
        for s, q in questions.items()
    }


@pytest.mark.parametrize("who", [Rank.SERVER, Rank.CLIENT])
def test_slots_do_not_depend_on_secrets(transcripts: Any, who: Rank) -> None:
    first, second = transcripts[who, 0], transcripts[who, 1]
    assert len(first.slots) > 100
    assert first.slots == second.slots


@pytest.mark.parametrize("who", [Rank.SERVER, Rank.CLIENT])
def test_openings_look_uniform(transcripts: Any, who: Rank) -> None:
    """Each reason's significant bits, over all of a run: every bit balanced, bytes uniform (6 sigma).

    The client's logits are the one thing that is not masked: its server share is uniform all the same.
    """
    for seed in (0, 1):
        words = transcripts[who, seed].words
        assert any(why == "ranks, rotated" for why, _ in words)
        for (why, ring), parts in words.items():
            data = np.concatenate(parts)
            assert worst_of_ring(data, ring) < 6, (who, why, ring, len(data))


def test_the_check_sees_a_planted_bug() -> None:
    """A mask that is one bit short, or a share sent bare, does not pass."""
    uniform = np.random.default_rng(0).integers(0, 256, 40_000, dtype=np.uint8)
    assert largest_deviation(uniform) < 6
    assert largest_deviation(uniform & np.uint8(0x7F)) > 6
    ranks = np.random.default_rng(1).integers(0, 256, (4000, 1), dtype=np.uint8)
    assert worst_of_ring(ranks, 4) < 6
    assert worst_of_ring(ranks & np.uint8(0xF7), 4) > 6  # a rank below 8 of 16, noise above
    assert worst_of_ring(ranks & np.uint8(0xEF), 4) < 6  # above its ring nothing counts
    bare = (torch.randn(5000) * 2**16).long().view(torch.uint8).numpy()
    assert largest_deviation(bare) > 6


def test_a_stream_is_never_read_twice() -> None:
    """Masks of two phases, and of the same phase of two sessions, have nothing in common."""
    from mpcache.runtime.rng import KeyStream, fresh_seed

    seed = fresh_seed()
    assert not torch.equal(KeyStream(seed, "tape/a").tensor((64,)), KeyStream(seed, "tape/b").tensor((64,)))
    assert not torch.equal(
        KeyStream(seed, "tape/a").tensor((64,)), KeyStream(fresh_seed(), "tape/a").tensor((64,))
    )
    stream = KeyStream(seed, "tape/a")
    assert not torch.equal(stream.tensor((64,)), stream.tensor((64,)))
