"""The guard: a value out of its range sets the step's bit, whatever protocol it meets; none in range does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from mpcache.engines.fast import FastOps
from mpcache.protocols import activation, linear, norm, reciprocal, relu, softmax, topk
from mpcache.protocols.compare import Digits, Keys
from mpcache.protocols.fence import Fence, truncation_fence
from mpcache.protocols.ranges import LARGEST_RANK, SCORE_BITS, SCORE_RING
from mpcache.protocols.verdict import field_product, finish_verdict, start_verdict
from mpcache.rank import Rank
from mpcache.runtime.correlations import mask_parts
from mpcache.runtime.guard import Guard
from mpcache.runtime.program import Program
from mpcache.runtime.shares import MaskedOperand, Share
from mpcache.runtime.side import Side
from tests.support.harness import secure
from tests.support.play import Played

UNIT = 2**-16
Check = Callable[[FastOps, Share], Program[Any]]


def judged(protocol: Check, x: torch.Tensor, bits: int = 16) -> bool:
    """Tell whether the client learns that all was in range: the protocol on x, and the verdict."""

    def program(ops: FastOps, share: Share) -> Program[Any]:
        yield from protocol(ops, share)
        started = yield from start_verdict(ops.side, 0)
        return (yield from finish_verdict(started))

    played: Played = secure(program, x, bits=bits)
    assert played.server is None
    return bool(played.client)


def spread(*planted: float) -> torch.Tensor:
    """A vector of ordinary values, with these among them."""
    return torch.cat([torch.randn(40), torch.tensor(planted), torch.zeros(5)]).double()


def truncated(ops: FastOps, x: Share) -> Program[Any]:
    return linear.truncate(ops.side, replace(x, ring=32), 10)


def scaled(ops: FastOps, x: Share) -> Program[Any]:
    return linear.truncate_times(ops.side, replace(x, ring=32), x)


def both(ops: FastOps, x: Share) -> Program[Any]:
    return linear.truncate_product(ops.side, replace(x, ring=32), replace(x, ring=32), 64)


def gated(ops: FastOps, x: Share) -> Program[Any]:
    return activation.activate(ops.side, "silu", replace(x, ring=28), None)


def gelu(ops: FastOps, x: Share) -> Program[Any]:
    return activation.activate(ops.side, "gelu", replace(x, ring=28), None)


def gate_times_up(ops: FastOps, x: Share) -> Program[Any]:
    gate = replace(x, data=x.data * 0 + ops.side.constant(30 << 16, x.data), ring=28)
    return activation.activate(ops.side, "silu", gate, replace(x, ring=32))


def positive(ops: FastOps, x: Share) -> Program[Any]:
    return relu.relu(ops.side, x, 32)


def weighed(ops: FastOps, x: Share) -> Program[Any]:
    scores = Share(x.data >> 16 - SCORE_BITS, SCORE_BITS, ring=SCORE_RING)
    return softmax.softmax(ops.side, scores.reshape(1, -1), None, 22)


def weighed_by_digits(ops: FastOps, x: Share) -> Program[Any]:
    scores = Share(x.data >> 16 - SCORE_BITS, SCORE_BITS, ring=SCORE_RING)
    return softmax.softmax(ops.side, scores.reshape(1, -1), None, 22, Digits)


@pytest.mark.parametrize("by", [Keys, Digits])
def test_a_score_that_is_not_seen_may_lie_above_the_others(by: type[Keys] | type[Digits]) -> None:
    """A later token of a question is not seen: its exponential leaves its range, and counts for nothing."""
    scores = torch.cat([torch.tensor([-90.0, -88.0]), torch.linspace(-88, -70, 400)]).double()

    def weighed_unseen(ops: FastOps, x: Share) -> Program[Any]:
        narrow = Share(x.data >> 16 - SCORE_BITS, SCORE_BITS, ring=SCORE_RING)
        visible = (torch.arange(len(scores)) < 2).long().unsqueeze(0)
        return softmax.softmax(ops.side, narrow.reshape(1, -1), visible, 22, by)

    assert judged(weighed_unseen, scores)
    scores[-1] = 300  # nor is it anybody's matter where it lies
    assert judged(weighed_unseen, scores)


def ranked(ops: FastOps, x: Share) -> Program[Any]:
    return topk.topk(ops.side, replace(x, ring=40), 2, [x.reshape(-1, 1)], 27)


def ranked_by_digits(ops: FastOps, x: Share) -> Program[Any]:
    return topk.topk(ops.side, replace(x, ring=40), 2, [x.reshape(-1, 1)], 27, Digits)


def inverted(ops: FastOps, x: Share) -> Program[Any]:
    return reciprocal.reciprocal(ops.side, x[40:-5], 1 / 512, 8192)


def normed(ops: FastOps, x: Share) -> Program[Any]:
    """With a matrix of zeros."""
    x = x[30:].reshape(1, -1)
    one = torch.zeros(x.shape[-1], 2, dtype=torch.int64)
    w = MaskedOperand(one, one, 16, None if ops.side.device == "cpu" else one)
    return norm.norm_linear(ops.side, None, replace(x, ring=32), 1e-5, w, lambda y: y)


RANGES = [
    pytest.param(truncated, (16383.9, -16384.0), (24577, -24577, 40000), id="truncation"),
    pytest.param(scaled, (16383.9, -16384.0), (24577, -24577, 40000), id="truncation times a factor"),
    pytest.param(both, (16383.9, -16384.0), (24577, -(2.0**17), 2.0**40), id="truncations, wider shares"),
    pytest.param(gated, (43.99, -44.0), (52.1, -52.1, 64, 500, -970), id="silu"),
    pytest.param(gelu, (21.99, -22.0), (26.1, -26.1, 32, 500, -990), id="gelu"),
    pytest.param(gate_times_up, (540, -540), (900, -900, 10000), id="gate times up"),
    pytest.param(positive, (2.0**14 - 1, -(2.0**14)), (2.0**15, -(2.0**15) - 1, 2.0**17), id="max(x, 0)"),
    pytest.param(weighed, (253.9, -253.9), (258.1, -258.1, 300, -500, 700), id="softmax"),
    pytest.param(
        weighed_by_digits, (253.9, -253.9), (257, -258.1, 300, -500, 700, 767, -767), id="softmax by digits"
    ),
    pytest.param(ranked, (LARGEST_RANK - 0.1, -LARGEST_RANK), (512.1, -512.1, 1500), id="top-k"),
    pytest.param(ranked_by_digits, (LARGEST_RANK - 0.1,), (512.1, -512.1), id="top-k by digits"),
    pytest.param(inverted, (1 / 512, 8191.0), (1 / 700, 8193, 70000, -1), id="reciprocal"),
    pytest.param(normed, (0.005, 1300), (2200, 9000), id="norm"),
]


@pytest.mark.parametrize(("protocol", "inside", "outside"), RANGES)
def test_what_leaves_its_range_sets_the_bit(
    protocol: Check, inside: tuple[float, ...], outside: tuple[float, ...]
) -> None:
    assert judged(protocol, spread(*inside))
    for value in outside:
        assert not judged(protocol, spread(value)), value


@pytest.mark.parametrize("ring", [24, 32, 40])
def test_a_truncation_that_is_wrong_is_always_seen(ring: int) -> None:
    """A carry of the low bits may leave a value out of range right; that one may pass, and no other."""
    room = 1 << (ring - 2)
    wide, near = torch.randint(-5 * room // 2, 5 * room // 2, (4000,)), torch.randint(-9, 9, (500,)) + room
    x = torch.cat([wide, near])
    r = torch.randint(0, 1 << ring, x.shape)
    c = (x + room + r) & ((1 << ring) - 1)
    rc, rb = mask_parts(r, 0, ring)
    truncated = linear.Truncated(c, ring, rb, rc).share(Side(Rank.SERVER))
    fence, seen = truncation_fence(ring), list[torch.Tensor]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Guard, "note", lambda self, data: seen.append(torch.from_numpy(data)))
        fence.watch(Side(Rank.SERVER), fence.tables(r), c)
    flagged, wrong = seen[0].bool(), truncated != x
    assert not (wrong & ~flagged).any() and not (flagged & (x < room) & (x >= -room)).any()
    assert wrong.any() and (~wrong & flagged).any()


def test_a_table_is_one_of_its_digit() -> None:
    fence, digits = Fence(20, 8, 3, 200), torch.arange(256) << 12
    bits = torch.stack([(fence.tables(digits)[:, d >> 3] >> (d & 7)) & 1 for d in range(256)], -1)
    apart = (torch.arange(256) - torch.arange(256).unsqueeze(-1)) & 255
    assert torch.equal(bits.bool(), (apart < 3) | (apart > 200))


def test_the_field_has_inverses() -> None:
    """x^(2^64 - 2) is 1 / x: no factor but zero takes a difference away."""
    for x in torch.randint(-(1 << 62), 1 << 62, (3, 1)):
        inverse, power = torch.tensor([1]), x
        for _ in range(63):
            power = field_product(power, power)
            inverse = field_product(inverse, power)
        assert field_product(inverse, x).item() == 1


def test_what_the_client_learns_of_a_difference_is_random() -> None:
    """The same value out of range, over and over: another number each time, over all its bits."""

    def program(ops: FastOps, x: Share) -> Program[Any]:
        found = []
        for _ in range(64):
            ops.side.watch(x.data)
            share = yield from start_verdict(ops.side, 0)
            found.append(share)
        return found

    played = secure(program, torch.tensor([3.0]))
    words = {int(a ^ b) for a, b in zip(played.server, played.client, strict=True)}
    ones = sum(bin(word & ((1 << 64) - 1)).count("1") for word in words)
    assert len(words) == 64 and abs(ones - 32 * 64) < 6 * 32
