"""Softmax at the places where its error is largest, and the bias of its exponential."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from mpcache.engines import threads
from mpcache.ops import AnyEngine
from mpcache.protocols import ranges
from mpcache.protocols.softmax import exp, quantize_scores
from mpcache.rank import Rank
from mpcache.runtime.program import Draw, Open, Part, together
from mpcache.runtime.rng import KeyStream, derive_key
from mpcache.runtime.shares import Share
from mpcache.runtime.side import Side
from tests.support import harness
from tests.support.harness import secure

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
def test_one_peak_above_a_floor(n: int, floor: float, same_masks: None) -> None:
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
        assert (secure(protocol, s, v).value() - expected).abs().max() < ranges.weighted_mean_error(n)


def test_the_stated_errors_of_a_mean() -> None:
    stated = {1024: 2.12e-3, 2048: 2.92e-3, 4096: 7.88e-3, 8192: 2.19e-2}
    assert {n: float(f"{ranges.weighted_mean_error(n):.3g}") for n in stated} == stated


def exp_by_hand(d: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """e^-d of raw distances (n,), for given masks: both sides of `exp` in this thread, without a session."""
    stream = KeyStream(bytes(32), "test")
    bits = ranges.SCORE_BITS
    sides = [exp(Side(rank), Share(x, bits, ring=ranges.SCORE_RING))
             for rank, x in ((Rank.SERVER, d), (Rank.CLIENT, torch.zeros_like(d)))]  # fmt: skip
    draws = [next(side) for side in sides]
    assert isinstance(draws[0], Draw)
    mask, seed = draws[0].request.random
    assert mask == Part((len(d),)) and seed.own
    seeds = stream.tensor(seed.shape), stream.tensor(seed.shape)
    public = draws[0].request.derive(r, seeds)
    shared = torch.zeros_like(r)
    for side, x, own in zip(sides, (r, torch.zeros_like(r)), seeds, strict=True):
        ask = side.send([x, own, *public])
        assert isinstance(ask, Open)
        shared = shared + ask.items[0].share
    shares = []
    for side in sides:
        with pytest.raises(StopIteration) as stop:
            side.send([shared])
        shares.append(stop.value.value)
    assert shares[0].bits == 62
    total: torch.Tensor = shares[0].data + shares[1].data
    return total.double() / 2.0**62


@pytest.mark.parametrize(
    ("distance", "most"),
    [*((d, 1e-3) for d in (0.01, 1, 10, 11, 12, 13, 14, 15)), (15.9, 0.02), (16, 0.02), (16.5, 0.02),
     (17, 0.05), (18, 0.11)],
)  # fmt: skip
def test_the_exponential_has_no_bias_that_counts(distance: float, most: float) -> None:
    """The mean over all masks of a window: what is left is the public factor's grid of 2^-22."""
    raw = round(distance / ranges.SCORE_UNIT)
    windows = torch.randint(1 << ranges.WINDOWS_BITS, (MASKS,)) << ranges.WINDOW_BITS
    e = exp_by_hand(torch.full((MASKS,), raw), torch.arange(MASKS) + windows)
    right = torch.exp(torch.tensor(-raw * ranges.SCORE_UNIT, dtype=torch.float64))
    assert abs(e.mean() / right - 1) < most
    assert (e - right).abs().max() < 4.4e-5 * right + 1.3e-7


def test_the_exponential_over_its_whole_range() -> None:
    """Right up to the window's end, right or zero for an eighth more, zero up to the largest distance."""
    n, unit = 1 << 16, ranges.SCORE_UNIT
    end = ranges.FARTHEST_SCORE - 1
    d = torch.cat([torch.arange(1, 300), torch.randint(1, 3 << ranges.WINDOW_BITS, (n,)),
                   torch.randint(1, end, (n,)), end - torch.arange(300)])  # fmt: skip
    e = exp_by_hand(d, torch.randint(1 << (ranges.WINDOW_BITS + ranges.WINDOWS_BITS), d.shape))
    right = torch.exp(-d.double() * unit)
    near = (e - right).abs() < 4.4e-5 * right + 1.3e-7
    assert near.all() and e.abs().max() < 1
    beyond = d >= (1 << ranges.WINDOW_BITS) * 9 // 8
    assert (e[beyond] == 0).all()
