"""--reveal token: the client learns the likeliest token and nothing else of the logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mpcache.argmax import GROUP, greedy
from mpcache.choices import Reveal
from mpcache.cost.pricing import price
from mpcache.engines import ideal
from mpcache.errors import BadInput
from mpcache.ops import AnyEngine
from mpcache.policy import parse_policy
from mpcache.protocols import suite
from mpcache.protocols.ranges import BLUR_BITS
from mpcache.rank import Rank
from mpcache.runtime.program import Opening
from mpcache.runtime.shares import Share, centred
from mpcache.sampling import Sampling
from mpcache.session import Session
from tests.support import tiny_policies as tiny
from tests.support.harness import secure
from tests.support.play import Played, play

VERDICT = ("whether all was in range", 1)
CHUNKS = [tiny.tokens(3, 2), [5], [7], [1]]


@pytest.mark.parametrize("n", [2, GROUP, 2 * GROUP + 1, 301])
def test_one_of_the_highest(n: int) -> None:
    """Against torch's argmax, over the whole declared range; of equal ones any."""
    logits = torch.rand(6, n) * 1023 - 511.5
    logits[3] = logits[3].round()  # ties
    logits[4] = 0.25
    logits[5, n // 2 :] = 511.9

    def protocol(ops: AnyEngine, share: Share) -> Any:
        places = []
        for row in range(6):
            places.append(
                (yield from greedy(ops, ops.in_small_ring(Share(share.data[row : row + 1] << 16, 32))))
            )
        return ops.cat(places, 0)

    played = secure(protocol, (logits * 2**16).round() / 2**16)
    found = (played.server.data + played.client.data) & ((1 << played.server.ring) - 1)
    raw = (logits * 2**16).round()
    assert torch.equal(raw.gather(-1, found.reshape(6, 1)).squeeze(-1), raw.amax(-1))
    assert found[:3].tolist() == raw[:3].argmax(-1).tolist()


def session(reveal: str, kind: str = "fast", vocab: int = tiny.VOCAB, heard: Any = None) -> Played:
    """The chunks through a small model; `heard`: every opening at the client, appended."""
    shape, context = tiny.shape(vocab=vocab), tiny.tokens(24)
    policy = parse_policy("full")

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
    shape = tiny.shape(vocab=vocab)
    found = price(shape, "full", 24, 3, new_tokens=4, reveal=Reveal.TOKEN, standing=False)
    ledger = played.ledgers[Rank.SERVER].total()
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
    """What goes to the client alone is one number a step, and whether all was in range; no opening of the run
    shows the logits. The same check sees them where they are revealed."""
    heard: list[tuple[Opening, Any]] = []
    session(reveal, vocab=50, heard=heard)
    alone = [item for item, _ in heard if item.to is not None]
    expected = ("token for the client", 1) if reveal == "token" else ("logits for the client", 50)
    assert [(item.why, item.share.numel()) for item in alone] == [expected, VERDICT] * len(CHUNKS)
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


def peak(logits: torch.Tensor) -> float:
    """How far the logits' spectrum stands out above chance: about exponential with mean 1 where they have
    no step in common, the chance of more than this being one in a million over all frequencies: 1."""
    n = (logits * 2**20).round().long()
    n = n - n.min()
    size = 1 << int(n.max() * 2).bit_length()
    power = torch.fft.rfft(torch.bincount(n, minlength=size).float()).abs().square() / len(n)
    return float(power[size // 1000 :].max()) / math.log(size / 2 / 1e-6)


@pytest.mark.parametrize("rms", [0.05, 0.25, 1.0])
def test_logits_do_not_tell_the_size_of_what_was_normed(rms: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact logits are whole numbers of 2^-18 / rms, which a transform over the vocabulary finds."""
    x = torch.randn(1, 64)
    x = (x / x.square().mean().sqrt() * rms * 2**16).round() / 2**16
    w = (torch.randn(64, 512) / 4 * 2**16).round() / 2**16

    def protocol(ops: AnyEngine, x: Share, w: Share) -> Any:
        _, y = yield from ops.norm_linear(None, x, 1e-5, (yield from ops.prepare(w)))
        return (yield from ops.reveal(y[0], Rank.CLIENT, "logits for the client"))

    seen = secure(protocol, x, w).client
    expected = (x.double() @ w.double())[0] * torch.rsqrt(x.double().square().mean() + 1e-5)
    assert (seen - expected).abs().max() < 6 * 2.0**-BLUR_BITS + 1e-3 < 0.02
    assert peak(seen) < 1
    monkeypatch.setattr(suite, "blur", ideal.blur)
    assert peak(secure(protocol, x, w).client) > 2  # the check sees what it is for


@pytest.mark.parametrize(("rms", "most"), [(1.0, 1.03), (0.1, 1.045), (0.05, 1.09)])
def test_the_variance_over_repeats_is_that_of_the_blur(rms: float, most: float) -> None:
    """Each run's rounding noise reaches the logits divided by rms: a client that asks often sees how much.

    The numbers are docs/threat-model.md's and five standard deviations of 64 repeats; they may not grow.
    """
    width, vocab, repeats = 128, 1000, 64
    x = torch.randn(1, width, dtype=torch.float64)
    x = x / x.square().mean().sqrt() * rms
    w = (torch.randn(width, vocab) * (3.9 / width**0.5) * 2**16).round().double() / 2**16

    def protocol(ops: AnyEngine, x: Share, w: Share) -> Any:
        w = yield from ops.prepare(w)
        _, y = yield from ops.norm_linear(None, Share(x.data, 32, ring=48), 1e-5, w)
        return (yield from ops.reveal(y, Rank.CLIENT, "logits for the client"))

    seen = secure(protocol, x.repeat(repeats, 1), w, bits=32).client
    assert seen.shape == (repeats, vocab)
    ratio = float(seen.var(0).mean()) * 4.0**BLUR_BITS
    assert 0.97 < ratio < most
