"""Every nonlinear gate against its reference, over the range that its docstring declares."""

import math

import pytest
import torch
import torch.nn.functional as F

from mpcache.engines.registry import FAST
from mpcache.protocols import compare, ranges, softmax
from mpcache.protocols import reciprocal as power
from mpcache.protocols.activation import series
from mpcache.protocols.linear import truncate, truncate_local
from mpcache.protocols.lookup import lookup
from mpcache.protocols.softmax import quantize_scores
from mpcache.rank import Rank
from mpcache.runtime.program import Opening, Part, Request, RequestKind, draw, open_masked, together
from mpcache.runtime.shares import Share, centred
from tests.support.harness import secure
from tests.support.play import reconstruct


def test_comparison_with_thresholds() -> None:
    x = torch.randint(-(1 << 22), 1 << 22, (500,))
    thetas = (0, 5, -(1 << 20), 1 << 21)
    x[:4], x[4] = torch.tensor(thetas), -1

    def protocol(ops, share):  # type: ignore[no-untyped-def]
        return Share((yield from compare.less(ops.side, share.data, 24, thetas)), 0)

    played = secure(protocol, x, bits=0)
    assert torch.equal(played.value().long(), (x.unsqueeze(-1) < torch.tensor(thetas)).long())
    assert played.ledgers[Rank.SERVER].total().rounds == 1
    assert played.ledgers[Rank.SERVER].total().sent == 3 * 500


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int64])
@pytest.mark.parametrize("width", [2, 3, 4, 9, 13, 16, 20, 24, 32, 40, 63])
def test_signs_over_the_whole_ring(dtype: torch.dtype, width: int) -> None:
    half, edges = 1 << (width - 1), torch.tensor([0, -1, 1, -2])
    x = torch.cat([torch.tensor([half - 1, -half]), edges.clamp(-half, half - 1)])
    x = torch.cat([x, torch.randint(-half, half, (300,))])

    def protocol(ops, share):  # type: ignore[no-untyped-def]
        how = yield from compare.Keys.of(len(x), width, dtype)
        request = Request(
            RequestKind.COMPARE, (Part(x.shape), *how.random), how.derived, how.derive, how.work
        )
        r, *parts = yield from draw(request)
        (c,) = yield from open_masked(Opening(share.data + r, "masked", ring=width))
        return Share((yield from how.sign(ops.side, parts, c)), 0)

    played = secure(protocol, x, bits=0)
    signs = (played.server.data + played.client.data).to(dtype)
    assert torch.equal(signs, (x < 0).to(dtype))
    assert played.ledgers[Rank.SERVER].total().rounds == 1


def test_lookup_wraps_around() -> None:
    x, table = torch.arange(-40, 40), torch.arange(32) ** 2

    def protocol(ops, share):  # type: ignore[no-untyped-def]
        return Share((yield from lookup(ops.side, share.data, table)), 0)

    assert torch.equal(secure(protocol, x, bits=0).value().long(), table[x % 32])


@pytest.mark.parametrize(("kind", "edge"), [("silu", 43.9), ("gelu", 21.9), ("gelu_tanh", 21.9)])
@pytest.mark.parametrize("gated", [False, True])
def test_activations(kind: str, edge: float, gated: bool) -> None:
    x = torch.cat([torch.linspace(-edge, edge, 600), torch.tensor([0.0, 1e-4, -1e-4])])
    up = torch.randn(x.shape) * 3

    def raised(share: Share) -> Share:  # as a product leaves it
        return Share(share.data << 16, 32, ring=48)

    def protocol(ops, a, b):  # type: ignore[no-untyped-def]
        return (yield from ops.rescale((yield from ops.gate(kind, raised(a), raised(b) if gated else None))))

    act = F.silu(x) if kind == "silu" else F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")
    expected = act * up if gated else act
    error = (secure(protocol, x, up).value() - expected).abs()
    # Each factor is off by half a unit as it is encoded and by one as each party drops bits by itself
    # (`truncate_local`); the step's slope is below 1.1, and the product goes out within three units.
    units = 2.0**-16 * (3 + 1.5 * (1.1 * up.abs() + x.abs()) if gated else torch.tensor(3.0))
    assert (error <= 1.5e-4 * (x * up if gated else x).abs() + units).all()
    assert max(abs(b) for b in series(kind).b[-3:]) < 1e-4


@pytest.mark.parametrize("variance", [1e-6, 1e-5, 1e-4, 1e-2, 1.0, 1e2, 1e4, 1e5])
@pytest.mark.parametrize("width", [64, 172])
def test_norm_over_the_whole_range_of_variances(variance: float, width: int) -> None:
    """The norm of stream + change, times a matrix: relative 3e-5, and the product's 18 fraction bits."""

    def scaled(x: torch.Tensor) -> torch.Tensor:
        x = x / x.square().mean(-1, keepdim=True).sqrt() * variance**0.5
        return (x * 2**16).round() / 2**16

    x, w = scaled(torch.randn(4, width)), torch.randn(width, 24) / width**0.5
    half = scaled(torch.randn(4, width) / 2)
    w = (w * 2**16).round() / 2**16
    eye = torch.ones(width, 1)

    def protocol(ops, x, w, half, eye):  # type: ignore[no-untyped-def]
        w, eye = yield from together(ops.prepare(w), ops.prepare(eye))
        # twice, as in a layer: what was opened once is the stream of the next
        stream, _ = yield from ops.norm_linear(None, half, 1e-6, eye)
        (stream, y) = yield from ops.norm_linear(stream, x - half, 1e-6, w)
        return y, ops.value(stream)

    played = secure(protocol, x, w, half, eye)
    y, stream = (reconstruct(*pair) for pair in zip(played.server, played.client, strict=True))
    assert (stream - x).abs().max() <= 4 * 2**-16  # two additions, each within two units
    x = stream  # what was normed
    root = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    expected = x @ w.double() * root
    error = (y - expected).abs()
    assert (error <= 3.2e-5 * expected.abs() + 2.5 * 2**-18 * root + 1e-7).all()
    assert played.ledgers[Rank.SERVER].total().rounds == 1 + 4 + 4


@pytest.mark.parametrize("least", [2.0**-9, 2.0**-3])
def test_reciprocal_over_its_whole_range(least: float) -> None:
    """Every exponent from 2^-9 to 2^13, both ends and the places between."""
    x = torch.logspace(math.log2(least), 13, 1500, base=2.0, dtype=torch.float64)[:-1].unsqueeze(-1)
    unit = 2.0**-ranges.WEIGHT_BITS
    x = torch.cat([x, torch.tensor([[2.0**13 - unit], [1.0], [2.0 - unit], [2.0], [77.0]])])
    x = ((x / unit).floor() * unit).clamp(min=least)

    def protocol(ops, share):  # type: ignore[no-untyped-def]
        return (yield from power.reciprocal(ops.side, share, least, 2.0**13))

    played = secure(protocol, x, bits=ranges.WEIGHT_BITS)
    assert ((played.value() * x - 1).abs() < 2e-4).all()
    assert played.ledgers[Rank.SERVER].total().rounds == 2


EDGE = ranges.LARGEST_SCORE * 8 / 7 - 0.01  # scores are below this in size
SCORES = {
    "small": lambda n: torch.randn(2, 2, n) * 3,
    "large": lambda n: (torch.randn(2, 2, n) * 120).clamp(-EDGE, EDGE),
    "flat": lambda n: torch.zeros(2, 2, n),
    "flat, highest": lambda n: torch.full((2, 2, n), EDGE),
    "flat, lowest": lambda n: torch.full((2, 2, n), -EDGE),
    "one peak": lambda n: torch.full((2, 2, n), -EDGE).index_fill(-1, torch.tensor([n // 2]), EDGE),
    "tiny": lambda n: torch.randn(2, 2, n) * 1e-4,
    # What each weight is off by weighs most here: the sum is the peak's weight, as low as e^-4.6.
    "peak and floor": lambda n: (
        (torch.randn(2, 2, n) - 11.5).index_fill(-1, torch.tensor([n // 2]), 0.0) + torch.rand(2, 2, 1) * 8
    ),
}


LONG = [pytest.param(n, protocol, marks=pytest.mark.slow) for n in (1024, 4096, 5000) for protocol in FAST]


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize(
    ("n", "protocol"), [*((n, "fast") for n in (1, 16, 64, 256)), (17, "fast-bits"), *LONG]
)
def test_attention_output(n: int, kind: str, protocol: str) -> None:
    """softmax(s) V as a layer computes it, division and all."""
    s, v = SCORES[kind](n), torch.randn(2, n, 8)

    def attend(ops, scores, values):  # type: ignore[no-untyped-def]
        values = yield from ops.prepare(values, ranges.WEIGHTED_SUM_RING)
        e, total = yield from ops.softmax(quantize_scores(scores), None)
        out, inverse = yield from together(ops.weighted_sum(e, values), ops.reciprocal(total))
        return (yield from ops.rescale((yield from ops.mul(out, inverse))))

    expected = torch.softmax(s.double(), -1) @ v.double()
    bound = ranges.weighted_mean_error(n) if kind == "peak and floor" else 6e-4
    assert (secure(attend, s, v, kind=protocol).value() - expected).abs().max() < bound * v.abs().max()


def test_the_largest_weight_fits_its_ring() -> None:
    """A distance of one step: e^-d is 1.4e-4 below 1, where the truncation's range ends."""
    d = torch.arange(1, 9).repeat(500) * 2.0**-ranges.SCORE_BITS

    def protocol(ops, d):  # type: ignore[no-untyped-def]
        e = yield from softmax.exp(ops.side, d)
        return (
            yield from truncate(ops.side, truncate_local(ops.side, e, ranges.WEIGHT_BITS), ranges.WEIGHT_BITS)
        )

    error = secure(protocol, d, bits=ranges.SCORE_BITS).value() - torch.exp(-d.double() * 8 / 7)
    assert error.abs().max() < 4.5e-5 < ranges.SCORE_UNIT


@pytest.mark.parametrize("kind", FAST)
def test_hidden_scores_change_nothing(kind: str) -> None:
    s = torch.randn(1, 3, 6)
    s[..., 1] = 90.0  # would dominate if it were seen
    visible = torch.tensor([[1, 0, 1, 1, 0, 1]] * 3)

    def protocol(ops, scores):  # type: ignore[no-untyped-def]
        e, total = yield from ops.softmax(quantize_scores(scores), visible)
        return Share(torch.cat([e.data, total.data], -1), e.bits, ring=e.ring)

    opened = secure(protocol, s, kind=kind).value()
    weights = opened[..., :6] / opened[..., 6:]
    expected = torch.softmax(s.masked_fill(visible == 0, -torch.inf), -1)
    assert (weights - expected).abs().max() < 5e-4


def test_the_bound_is_close_above_the_maximum() -> None:
    s = torch.cat(
        [torch.randn(40, 1, 30) * 20, torch.full((1, 1, 30), -200.0), torch.full((1, 1, 30), 200.0)]
    )

    def protocol(ops, scores):  # type: ignore[no-untyped-def]
        return Share((yield from softmax.bound(ops.side, quantize_scores(scores), None)), 0)

    above = centred(secure(protocol, s).value().long(), 16) * 8 / 7 - s.amax(-1, keepdim=True)
    assert above.min() > 0 and above.max() <= ranges.BOUND_SLACK + 1e-3
