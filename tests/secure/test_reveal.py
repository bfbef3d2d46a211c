"""--reveal token: the client learns the likeliest token and nothing else of the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mpcache.answer import Sampling
from mpcache.cost import cost
from mpcache.errors import BadInput
from mpcache.highest import GROUP, greedy
from mpcache.ops import Ops
from mpcache.policy import parse
from mpcache.rank import Rank
from mpcache.secure.program import Opening
from mpcache.secure.shares import Share, centred
from mpcache.session import Session
from tests.policy import tiny
from tests.secure.harness import secure
from tests.secure.play import Played, play

CHUNKS = [tiny.tokens(3, 2), [5], [7], [1]]


@pytest.mark.parametrize("n", [2, GROUP, 2 * GROUP + 1, 301])
def test_the_first_of_the_highest(n: int) -> None:
    """Against torch's argmax, over the whole declared range; of equal ones the first."""
    logits = torch.rand(6, n) * 1023 - 511.5
    logits[3] = logits[3].round()  # ties
    logits[4] = 0.25
    logits[5, n // 2 :] = 511.9

    def protocol(ops: Ops, share: Share) -> Any:
        places = []
        for row in range(6):
            places.append((yield from greedy(ops, ops.narrow(Share(share.data[row : row + 1] << 16, 32)))))
        return ops.cat(places, 0)

    played = secure(protocol, (logits * 2**16).round() / 2**16)
    found = (played.server.data + played.client.data) & ((1 << played.server.ring) - 1)
    assert found.tolist() == [int(row.argmax()) for row in (logits * 2**16).round()]


def session(reveal: str, kind: str = "fast", vocab: int = tiny.VOCAB, heard: Any = None) -> Played:
    """The chunks through a small model; `heard`: every opening at the client, appended."""
    shape, context = tiny.shape(vocab=vocab), tiny.tokens(24)
    policy = parse("full")

    def program(ops: Any, party: Any, rank: Rank) -> Any:
        if heard is not None and rank is Rank.CLIENT:
            opening = party.open

            def open_(items: list[Opening], step: str) -> Any:
                values = opening(items, step)
                heard.extend((item, value) for item, value in zip(items, values, strict=True))
                return values

            party.open = open_
        mine = rank is Rank.SERVER
        private = Session(ops, party, shape, policy.bind(24, shape), reveal)
        private.setup(tiny.model(shape).weights if mine else None)
        prefill = tiny.prefilled(policy, shape, context) if mine else None
        private.context(prefill, tiny.KERNELS if mine else None)
        return [private.chunk(c if rank is Rank.CLIENT else None, len(c)) for c in CHUNKS]

    return play(program, kind)


@pytest.mark.parametrize("vocab", [tiny.VOCAB, 50])
def test_the_tokens_are_those_of_plain_logits(vocab: int) -> None:
    plain, _ = tiny.plain("full", tiny.shape(vocab=vocab), tiny.tokens(24), CHUNKS)
    played = session("token", vocab=vocab)
    assert [int(t) for t in played.client] == [int(x.argmax()) for x in plain]
    assert played.server == [None] * len(CHUNKS)
    found = cost(tiny.shape(vocab=vocab), "full", 24, 3, new_tokens=4, reveal="token")
    ledger = played.ledgers[0].total()
    phases = [found.total(phase) for phase in found.phases]
    assert sum(t.rounds for t in phases) == ledger.rounds
    assert sum(t.server_sent for t in phases) == ledger.sent


@pytest.mark.slow
def test_the_tokens_on_stock() -> None:
    plain, _ = tiny.plain("full", tiny.shape(), tiny.tokens(24), CHUNKS)
    played = session("token", "stock")
    assert [int(t) for t in played.client] == [int(x.argmax()) for x in plain]


@pytest.mark.parametrize("reveal", ["token", "logits"])
def test_logits_are_never_opened(reveal: str) -> None:
    """What goes to the client alone is one number a step, and no opening of the run shows the logits; the
    same check sees them where they are revealed."""
    heard: list[tuple[Opening, Any]] = []
    session(reveal, vocab=50, heard=heard)
    alone = [item for item, _ in heard if item.to is not None]
    expected = ("token for the client", 1) if reveal == "token" else ("logits for the client", 50)
    assert [(item.why, item.share.numel()) for item in alone] == [expected] * len(CHUNKS)
    plain, _ = tiny.plain("full", tiny.shape(vocab=50), tiny.tokens(24), CHUNKS)
    assert shown(heard, plain[0]) is (reveal == "logits")


def shown(heard: list[tuple[Opening, Any]], logits: torch.Tensor) -> bool:
    """Whether some opening, as numbers of its width at any fixed point, is proportional to the logits."""
    for item, value in heard:
        if value is not None and value.numel() == logits.numel():
            raw = centred(value.reshape(-1), 8 * item.width).double()
            if torch.corrcoef(torch.stack([raw, logits.double()]))[0, 1] > 0.9:
                return True
    return False


def test_sampling_needs_logits() -> None:
    Sampling().check("token")
    with pytest.raises(BadInput, match="--temperature is 0.7, but with reveal: token"):
        Sampling(temperature=0.7).check("token")
