"""The debug engine: it computes what the plain reading does, and nothing out of range passes it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from mpcache.engines import fast, ideal
from mpcache.engines.checked import CheckedOps, Ranges
from mpcache.errors import OutOfRange
from mpcache.policy import parse_policy
from mpcache.protocols import ranges, softmax, suite
from mpcache.protocols.activation import series
from mpcache.rank import Rank
from mpcache.runtime.program import at, run
from mpcache.runtime.shares import Share
from mpcache.session import Session
from tests.support import tiny_policies as tiny
from tests.support.harness import secure
from tests.support.policy_specs import ALL_PRIVATE


def test_the_meanings_have_the_protocols_names_and_signatures() -> None:
    for name in suite.__all__:
        mine, theirs = (inspect.signature(getattr(m, name)).parameters for m in (ideal, suite))
        assert {n: p.default for n, p in mine.items()} == {n: p.default for n, p in theirs.items()}, name


@pytest.mark.parametrize("spec", ALL_PRIVATE)
def test_it_computes_what_the_plain_reading_does(spec: str) -> None:
    """Every private policy, over a question and decode steps; and it looked at every kind of claim."""
    shape, context = tiny.shape(), tiny.tokens(24)
    chunks = [tiny.tokens(3, 2), *([t] for t in tiny.tokens(7, 3))]
    ranges = Ranges()
    logits, _ = read(spec, context, chunks, ranges)
    expected, _ = tiny.plain(spec, shape, context, chunks)
    assert max(float((a - b).abs().max()) for a, b in zip(logits, expected, strict=True)) < 5e-3
    kinds = {r.operation for r in ranges}
    assert {"truncation", "silu", "reciprocal", "exp", "softmax, narrow score"} <= kinds
    assert all(r.spare_bits > 0 and r.step for r in ranges)


def read(
    spec: str, context: list[int], chunks: list[list[int]], ranges: Ranges, scale: float = 1.0
) -> tuple[list[torch.Tensor], Session]:
    """One session of the tiny model, its first `qkv` matrix scaled."""
    shape = tiny.shape()
    policy = parse_policy(spec)
    session = Session(CheckedOps(), ranges, shape, policy.bind(len(context), shape))
    weights = tiny.model(shape).weights
    first, *rest = weights.layers
    session.setup(replace(weights, layers=(replace(first, wq=first.wq * scale), *rest)))
    session.context(tiny.prefilled(policy, shape, context), tiny.KERNELS)
    with torch.no_grad():
        logits = [session.chunk(chunk, len(chunk)) for chunk in chunks]
    return [x for x in logits if x is not None], session


def test_a_value_out_of_range_is_named_with_its_operation_step_and_bound() -> None:
    with pytest.raises(OutOfRange, match=r"softmax, narrow score at question/layer0/softmax: .* below 254;"):
        read("full", tiny.tokens(24), [tiny.tokens(3)], Ranges(), scale=200.0)
    lenient = Ranges(strict=False)
    read("full", tiny.tokens(24), [tiny.tokens(3)], lenient, scale=200.0)
    assert "softmax, narrow score" in {r.operation for r in lenient if r.spare_bits <= 0}


def one(x: float, bits: int, ring: int = 64) -> Share:
    return Share(torch.tensor([[round(x * 2**bits)]]), bits, ring=ring)


OPS = CheckedOps()
SILU, GELU = series("silu").reach, series("gelu").reach
LONGEST, LARGEST = ranges.LONGEST_ATTENDED, ranges.LARGEST_SCORE
LOW, HIGH = 2.0 ** (ranges.MEAN_SQUARE_LOW / 2), 2.0 ** (ranges.MEAN_SQUARE_HIGH / 2)
EDGES: dict[str, tuple[float, float, Callable[[float], Any]]] = {
    # the last value that is allowed, one that is not, and what they go through
    "truncation": (2.0**14 - 1, 2.0**14, lambda x: OPS.rescale(one(x, 32, 48))),
    "product with an operand": (2.0**15 - 1, 2.0**15, lambda x: OPS.linear(one(x, 16, 48), kept(1.0))),
    "masked operand": (2.0**31 - 1, 2.0**31, lambda x: ideal.mask_operand(one(x, 16), 48)),
    "silu": (SILU - 0.01, SILU, lambda x: OPS.gate("silu", one(x, 16), None)),
    "gelu": (-GELU + 0.01, -GELU, lambda x: OPS.gate("gelu", one(x, 16), None)),
    "max(x, 0)": (-(2.0**15) + 1, -(2.0**15) - 1, lambda x: OPS.relu(one(x, 16))),
    "norm, high": (HIGH * 0.99, HIGH * 1.01, lambda x: normed(one(x, 16), 1e-6)),
    "norm, low": (LOW * 1.01, LOW * 0.98, lambda x: normed(one(x, 16), 0.0)),
    "gate times up": (511.0, 513.0, lambda x: OPS.gate("silu", one(31.99, 16), one(x, 16))),
    "reciprocal, high": (LONGEST - 1, LONGEST, lambda x: OPS.reciprocal(one(x, ranges.WEIGHT_BITS))),
    "reciprocal, low": (2.0**-9, 2.0**-10, lambda x: OPS.reciprocal(one(x, ranges.WEIGHT_BITS))),
    "score": (-LARGEST + 0.01, -LARGEST, lambda x: OPS.softmax(one(x, ranges.SCORE_BITS), None)),
    "top": (1023.9, 1024.0, lambda x: OPS.topk(pair(x), 1, [pair(x).reshape(1, 2, 1)])),
    "average": (127.9, 128.1, lambda x: product(x)),
}  # fmt: skip


def kept(x: float) -> Any:
    return run(OPS.prepare(one(x, 16)), Ranges())


def normed(x: Share, eps: float) -> Any:
    return OPS.norm_linear(None, x, eps, kept(1.0))


def pair(x: float) -> Share:
    return Share(torch.tensor([[0, round(x * 2**13)]]), 13, ring=64)


def product(x: float) -> Any:
    y = yield from OPS.mul(one(x, 36, 56), one(1.0, 35))
    return (yield from OPS.rescale_to(y))


@pytest.mark.parametrize("name", EDGES)
def test_the_edge_of_each_range(name: str) -> None:
    inside, outside, program = EDGES[name]
    run(at("test", program(inside)), Ranges())
    with pytest.raises(OutOfRange, match="at test: a value of"):
        run(at("test", program(outside)), Ranges())


@pytest.mark.parametrize(("x", "right"), [(31.9, True), (62.0, False)])
def test_what_it_refuses_would_be_wrong(x: float, right: bool) -> None:
    """The private suite, on both sides of a bound: the sines of SiLU repeat from 64 on."""

    def protocol(ops: Any, share: Share) -> Any:
        return (yield from ops.rescale((yield from ops.gate("silu", share, None))))

    value = secure(protocol, torch.tensor([x])).value()
    assert (abs(float(value) - x) < 1e-2) is right


def test_softmax_at_the_end_of_its_range_in_private() -> None:
    """A score at the lowest edge neither wraps around nor hides the others."""
    edge = ranges.LARGEST_SCORE * 8 / 7 - 0.01
    s = torch.tensor([[[0.0, 1.0, -edge], [edge, 0.0, edge - 1]]])

    def protocol(ops: Any, scores: Share) -> Any:
        e, total = yield from ops.softmax(
            softmax.quantize_scores(Share(scores.data << 16, 32, ring=48)), None
        )
        return Share(torch.cat([e.data, total.data], -1), e.bits)

    for _ in range(20):  # whether a bucket comes out one too low is the masks' choice
        opened = secure(protocol, s).value()
        weights = opened[..., :3] / opened[..., 3:]
        assert (weights - torch.softmax(s.double(), -1)).abs().max() < 1e-3


def test_the_server_refuses_weights_that_are_out_of_range() -> None:
    ops = fast.FastOps(Rank.SERVER)
    x = torch.full((2, 2), 2.0**ranges.VALUE_BITS)
    with pytest.raises(OutOfRange, match="server: a weight, key or value of 16384 is out of range"):
        next(ops.prepare(ops.secret(x, x.shape, Rank.SERVER)))
    next(ops.prepare(ops.secret(x - 1, x.shape, Rank.SERVER)))


def test_spare_bits() -> None:
    ranges = Ranges()
    run(at("a", OPS.relu(one(2.0**10, 16))), ranges)
    (found,) = ranges
    assert math.isclose(found.spare_bits, 5) and found.step == "a"
