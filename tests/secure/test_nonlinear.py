"""Every nonlinear gate against its reference, over the range that its docstring declares."""

import pytest
import torch
import torch.nn.functional as F

from mpcache.secure import compare, norm, softmax
from mpcache.secure.activation import series
from mpcache.secure.lookup import lookup
from mpcache.secure.shares import Share
from mpcache.secure.softmax import narrow
from tests.secure.harness import secure

torch.manual_seed(0)


def test_comparison_with_thresholds() -> None:
    x = torch.randint(-(1 << 22), 1 << 22, (500,))
    thetas = (0, 5, -(1 << 20), 1 << 21)
    x[:4], x[4] = torch.tensor(thetas), -1

    def protocol(ops, share):  # type: ignore[no-untyped-def]
        return Share((yield from compare.less(ops.side, share.data, 24, thetas)), 0)

    played = secure(protocol, x, bits=0)
    assert torch.equal(played.value().long(), (x.unsqueeze(-1) < torch.tensor(thetas)).long())
    assert played.ledgers[0].total().rounds == 1
    assert played.ledgers[0].total().sent == 3 * 500


def test_lookup_wraps_around() -> None:
    x, table = torch.arange(-40, 40), torch.arange(32) ** 2

    def protocol(ops, share):  # type: ignore[no-untyped-def]
        return Share((yield from lookup(ops.side, share.data, table)), 0)

    assert torch.equal(secure(protocol, x, bits=0).value().long(), table[x % 32])


@pytest.mark.parametrize(("kind", "edge"), [("silu", 31.9), ("gelu", 15.9), ("gelu_tanh", 15.9)])
@pytest.mark.parametrize("gated", [False, True])
def test_activations(kind: str, edge: float, gated: bool) -> None:
    x = torch.cat([torch.linspace(-edge, edge, 600), torch.tensor([0.0, 1e-4, -1e-4])])
    up = torch.randn(x.shape) * 3

    def raised(share: Share) -> Share:  # as a product leaves it
        return Share(share.data << 16, 32, ring=48)

    def protocol(ops, a, b):  # type: ignore[no-untyped-def]
        return (yield from ops.settle((yield from ops.gate(kind, raised(a), raised(b) if gated else None))))

    act = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh")}[kind](x)
    expected = act * up if gated else act
    error = (secure(protocol, x, up).value() - expected).abs()
    scale = x.abs() * (up.abs() if gated else 1) + (up.abs() if gated else 1)
    assert (error <= 1.5e-4 * scale + 1e-4).all()
    assert max(abs(b) for b in series(kind).b[-3:]) < 1e-4


@pytest.mark.parametrize("variance", [1e-6, 1e-4, 1e-2, 1.0, 1e2, 1e5])
@pytest.mark.parametrize("width", [64, 172])
def test_norm_over_the_whole_range_of_variances(variance: float, width: int) -> None:
    x = torch.randn(4, width)
    x = x / x.square().mean(-1, keepdim=True).sqrt() * variance**0.5
    x = (x * 2**16).round() / 2**16

    def protocol(ops, share):  # type: ignore[no-untyped-def]
        return (yield from ops.norm(share, 1e-6))

    expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    played = secure(protocol, x)
    error = (played.value() - expected).abs()
    assert (error <= 4e-4 * expected.abs() + 1e-3 * expected.abs().max() * (variance < 1e-5) + 3e-5).all()
    assert played.ledgers[0].total().rounds == 7


def test_reciprocal() -> None:
    x = torch.tensor([0.01, 0.5, 1.0, 1.0001, 1.9999, 2.0, 77.0, 4095.9]).unsqueeze(-1)

    def protocol(ops, share):  # type: ignore[no-untyped-def]
        return (yield from norm.reciprocal(ops.side, share, 2**-9, 4096, 28))

    assert ((secure(protocol, x, bits=20).value() * x - 1).abs() < 4e-4).all()


@pytest.mark.parametrize(("n", "scale"), [(1, 1.0), (2, 3.0), (16, 1.0), (300, 3.0), (300, 40.0), (300, 0.0)])
def test_attention_output(n: int, scale: float) -> None:
    """softmax(s) V: relative to the largest value, 6e-4, flat scores and single peaks alike."""
    s, v = (torch.randn(4, 2, n) * scale).clamp(-200, 200), torch.randn(4, n, 8)

    def dividing(ops, scores, values):  # type: ignore[no-untyped-def]
        # The division in the open: only numerator and denominator are under test here.
        e, total = yield from ops.softmax(narrow(scores), None)
        return Share(torch.cat([e.data, total.data], -1), e.bits)

    opened = secure(dividing, s, v).value()
    weights = opened[..., :n] / opened[..., n:]
    assert (
        weights @ v.double() - torch.softmax(s.double(), -1) @ v.double()
    ).abs().max() < 6e-4 * v.abs().max()


@pytest.mark.slow
def test_attention_output_of_long_rows() -> None:
    test_attention_output(4096, 3.0)


def test_hidden_scores_change_nothing() -> None:
    s = torch.randn(1, 3, 6)
    s[..., 1] = 90.0  # would dominate if it were seen
    visible = torch.tensor([[1, 0, 1, 1, 0, 1]] * 3)

    def protocol(ops, scores):  # type: ignore[no-untyped-def]
        e, total = yield from ops.softmax(narrow(scores), visible)
        return Share(torch.cat([e.data, total.data], -1), e.bits)

    opened = secure(protocol, s).value()
    weights = opened[..., :6] / opened[..., 6:]
    expected = torch.softmax(s.masked_fill(visible == 0, -torch.inf), -1)
    assert (weights - expected).abs().max() < 5e-4


def test_the_bound_is_close_above_the_maximum() -> None:
    s = torch.cat(
        [torch.randn(40, 1, 30) * 20, torch.full((1, 1, 30), -200.0), torch.full((1, 1, 30), 200.0)]
    )

    def protocol(ops, scores):  # type: ignore[no-untyped-def]
        return Share((yield from softmax.bound(ops.side, narrow(scores), None)), 0)

    above = secure(protocol, s).value() * 8 / 7 - s.amax(-1, keepdim=True)
    assert above.min() > 0 and above.max() <= softmax.SLACK + 1e-3
