"""Softmax at the places where its error is largest, and the bias of its exponential."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from mpcache.engines import threads
from mpcache.ops import AnyEngine
from mpcache.protocols import coins, ranges
from mpcache.protocols.coins import COINS, Highest, bound_of
from mpcache.protocols.compare import Digits, Keys
from mpcache.protocols.exp_digits import EXP_BITS, ExpDigits
from mpcache.protocols.softmax import exp, quantize_scores
from mpcache.rank import Rank
from mpcache.runtime.program import (
    Call,
    Draw,
    Open,
    Opening,
    Part,
    Program,
    Request,
    RequestKind,
    draw,
    open_masked,
    together,
)
from mpcache.runtime.rng import KeyStream, TreeCipher, derive_key
from mpcache.runtime.shares import Share, centred
from mpcache.runtime.side import Side
from tests.support import harness
from tests.support.harness import secure
from tests.support.play import Played
from tests.support.uniformity import worst_of_ring

FLOORS = (10, 10.5, 11, 11.5, 12, 12.5, 13)
OFFSETS = 24  # over one bucket of the histogram
MASKS = 1 << ranges.WINDOW_BITS  # of a window: what decides about exp's error


@pytest.fixture
def same_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the same masks in each run: the bound is a number of standard deviations."""
    number = itertools.count()

    def seed() -> bytes:
        return derive_key(bytes(32), f"test {next(number)}")

    monkeypatch.setattr(threads, "fresh_seed", seed)
    monkeypatch.setattr(harness, "fresh_seed", seed)


@pytest.mark.parametrize(
    "n", [64, 1024, 2048, *(pytest.param(n, marks=pytest.mark.slow) for n in (4096, 8192))]
)
@pytest.mark.parametrize("floor", FLOORS)
@pytest.mark.parametrize("kind", ["fast", pytest.param("fast-bits", marks=pytest.mark.slow)])
def test_one_peak_above_a_floor(n: int, floor: float, kind: str, same_masks: None) -> None:
    """All weights of the floor err alike where exp is biased; the offset decides how loose the bound is."""
    v = torch.ones(1, n, 1)
    v[0, 0] = -1
    offsets = torch.arange(OFFSETS) / OFFSETS * ranges.BUCKET_STEP * 8 / 7

    def protocol(ops: AnyEngine, scores: Share, values: Share) -> Any:
        kept = yield from ops.prepare(values, ranges.WEIGHTED_SUM_RING)
        e, total = yield from ops.softmax(quantize_scores(scores), None)
        out, inverse = yield from together(ops.weighted_sum(e, kept), ops.reciprocal(total))
        return (yield from ops.rescale((yield from ops.mul(out, inverse))))

    for some in torch.split(offsets, max(1, OFFSETS * 1024 // n)):
        s = torch.full((1, len(some), n), -float(floor))
        s[..., 0] = 0
        s = s + some.unsqueeze(-1)
        expected = torch.softmax(s.double(), -1) @ v.double()
        value = secure(protocol, s, v, kind=kind).value()
        assert (value - expected).abs().max() < ranges.weighted_mean_error(n)


def test_the_stated_errors_of_a_mean() -> None:
    stated = {1024: 2.12e-3, 2048: 2.92e-3, 4096: 7.88e-3, 8192: 2.19e-2}
    assert {n: float(f"{ranges.weighted_mean_error(n):.3g}") for n in stated} == stated


def exp_by_hand(d: torch.Tensor, r: torch.Tensor, by: type[Keys] | type[Digits]) -> torch.Tensor:
    """e^-d of raw distances (n,), for given masks: both sides of one exponential in this thread."""
    stream, zeros = KeyStream(bytes(32), "test"), torch.zeros_like(r)
    sides: list[Program[Any]]
    if by is Digits:
        table = ExpDigits((len(d),))
        (entries,) = (stream.tensor(p.shape, p.dtype) for p in table.random)
        derived = table.derive(r, entries)
        drawn = [entries, *derived], [torch.zeros_like(x) for x in (entries, *derived)]
        sides = [table.of(Side(rank), drawn[rank], d + r) for rank in (Rank.SERVER, Rank.CLIENT)]
        return finished(sides, [next(side) for side in sides])
    sides = [exp(Side(rank), Share(x, ranges.SCORE_BITS, ring=ranges.SCORE_RING))
             for rank, x in ((Rank.SERVER, d), (Rank.CLIENT, zeros))]  # fmt: skip
    for side in sides:
        assert isinstance(next(side), Call)
    draws = [side.send(TreeCipher("test", "exp")) for side in sides]
    assert isinstance(draws[0], Draw)
    mask, seed = draws[0].request.random
    assert mask == Part((len(d),)) and seed.own
    seeds = stream.tensor(seed.shape), stream.tensor(seed.shape)
    public = draws[0].request.derive(r, seeds)
    asks = [side.send([x, own, *public]) for side, x, own in zip(sides, (r, zeros), seeds, strict=True)]
    return finished(sides, asks)


def finished(sides: list[Program[Any]], asks: list[Any]) -> torch.Tensor:
    """Open what both ask for, which is the last, and add up what they return, with 62 fraction bits."""
    (one,), (two,) = (ask.items for ask in asks)
    opened = one.share ^ two.share if one.xor else one.share + two.share
    opened = opened & ((1 << 8 * one.width) - 1)
    shares: list[torch.Tensor] = []
    for side in sides:
        with pytest.raises(StopIteration) as stop:
            side.send([opened])
        share = stop.value.value
        shares.append(share.data if isinstance(share, Share) else share)
    return (shares[0] + shares[1]).double() / 2.0**EXP_BITS


@pytest.mark.parametrize(
    ("distance", "most"),
    [*((d, 1e-3) for d in (0.01, 1, 10, 11, 12, 13, 14, 15)), (15.9, 0.02), (16, 0.02), (16.5, 0.02),
     (17, 0.05), (18, 0.11)],
)  # fmt: skip
@pytest.mark.parametrize("by", [Keys, Digits])
def test_the_exponential_has_no_bias_that_counts(
    distance: float, most: float, by: type[Keys] | type[Digits]
) -> None:
    """The mean over all masks of a window: what is left is the public factor's grid of 2^-22."""
    raw = round(distance / ranges.SCORE_UNIT)
    windows = torch.randint(1 << ranges.WINDOWS_BITS, (MASKS,)) << ranges.WINDOW_BITS
    e = exp_by_hand(torch.full((MASKS,), raw), torch.arange(MASKS) + windows, by)
    right = torch.exp(torch.tensor(-raw * ranges.SCORE_UNIT, dtype=torch.float64))
    assert abs(e.mean() / right - 1) < most
    assert (e - right).abs().max() < 4.4e-5 * right + 1.3e-7


@pytest.mark.parametrize("by", [Keys, Digits])
def test_the_exponential_over_its_whole_range(by: type[Keys] | type[Digits]) -> None:
    """Right up to the window's end, right or zero for an eighth more, zero up to the largest distance."""
    n, unit = 1 << 16, ranges.SCORE_UNIT
    end = ranges.FARTHEST_SCORE - 1
    d = torch.cat([torch.arange(1, 300), torch.randint(1, 3 << ranges.WINDOW_BITS, (n,)),
                   torch.randint(1, end, (n,)), end - torch.arange(300)])  # fmt: skip
    e = exp_by_hand(d, torch.randint(1 << (ranges.WINDOW_BITS + ranges.WINDOWS_BITS), d.shape), by)
    right = torch.exp(-d.double() * unit)
    near = (e - right).abs() < 4.4e-5 * right + 1.3e-7
    assert near.all() and e.abs().max() < 1
    beyond = d >= (1 << ranges.WINDOW_BITS) * 9 // 8
    assert (e[beyond] == 0).all()


def highest(scores: torch.Tensor, visible: torch.Tensor | None = None) -> Played:
    """The bound of rows of scores by coins, at SCORE_BITS in the ring of scores; and what was opened."""

    def protocol(ops: Any, x: Share) -> Program[Any]:
        how, narrow = Highest(x.shape), quantize_scores(x)
        random = (Part(x.shape), *how.random)
        request = Request(RequestKind.HIGHEST, random, how.derived, how.derive, how.work)
        r, *parts = yield from draw(request)
        (c,) = yield from open_masked(Opening(narrow.data + r, "scores, masked", ring=ranges.SCORE_RING))
        number = yield from how.find(ops.side, parts, c, visible)
        return Share(bound_of(ops.side, number), ranges.SCORE_BITS)

    return secure(protocol, scores, kind="fast-bits")


def slack(scores: torch.Tensor) -> torch.Tensor:
    """How far the bound lies above each row's maximum."""
    played = highest(scores)
    raw = centred((played.server.data + played.client.data), ranges.SCORE_RING)
    return raw * ranges.SCORE_UNIT - scores.amax(-1, keepdim=True)


@pytest.mark.parametrize("parts", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_the_bound_by_coins_is_close_above_the_maximum(parts: int) -> None:
    """Up to 10^4 rows, whose highest score lies at any place of any bucket, and at both ends of the range."""
    edge = ranges.LARGEST_SCORE * 8 / 7 - 0.01
    for _ in range(parts):
        rows = [torch.rand(200, 2) * 2 * edge - edge, torch.tensor([[edge, edge], [-edge, -edge]])]
        above = slack(torch.cat(rows).double())
        assert above.min() > 0 and above.max() <= ranges.BOUND_SLACK + 1e-3
    above = slack(torch.randn(4, 1024).double() * 40)
    assert above.min() > 0 and above.max() <= ranges.BOUND_SLACK + 1e-3


def test_coins_that_are_no_coins_make_a_wrong_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros find every bucket empty: the bound rests on the coins, and the test above would see it."""
    monkeypatch.setattr(coins, "public_coins", lambda key, n: torch.zeros(n, dtype=torch.int64))
    assert slack(torch.zeros(3, 5).double()).max() < 0


def test_coins_are_fair_and_the_same_at_both_parties() -> None:
    one = coins.public_coins(TreeCipher("session", "question").key, 4096)
    assert torch.equal(one, coins.public_coins(TreeCipher("session", "question").key, 4096))
    assert not torch.equal(one, coins.public_coins(TreeCipher("session", "decode1").key, 4096))
    bits = (one.unsqueeze(-1) >> torch.arange(64)) & 1
    assert (bits[:, :COINS].double().mean(0) - 0.5).abs().max() < 6 * 0.5 / 64
    assert not bits[:, COINS:].any() and len(set(one.tolist())) == len(one)


@pytest.mark.parametrize("score", [-200.0, 0.0, 200.0])
def test_what_is_opened_of_buckets_and_windows_is_uniform(score: float) -> None:
    """Whatever the scores: flat ones, of which every bucket's sum is the same or zero."""
    seen: dict[tuple[str, int], list[torch.Tensor]] = {}

    def protocol(ops: Any, x: Share) -> Program[Any]:
        program, reply = ops.softmax(quantize_scores(x), None), None
        while True:
            try:
                ask = program.send(reply)
            except StopIteration as stop:
                return stop.value
            reply = yield ask
            if isinstance(ask, Open) and ops.side.device == "cpu" and ops.side.rank is Rank.CLIENT:
                for item, value in zip(ask.items, reply, strict=True):
                    seen.setdefault((item.why, item.ring), []).append(value)

    secure(protocol, torch.full((12, 300), score).double(), kind="fast-bits")
    assert {"buckets, summed and masked", "buckets' digits, masked", "windows, compared and masked",
            "scores, masked", "bound, masked"} <= {why for why, _ in seen}  # fmt: skip
    for (why, ring), values in seen.items():
        words = torch.cat([v.reshape(-1) for v in values]).contiguous()
        data = words.view(torch.uint8).reshape(-1, 8).numpy()[:, : -(-ring // 8)]
        assert worst_of_ring(data, ring) < 6, why
