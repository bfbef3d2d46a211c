"""Key trees: right at every point, and nothing but noise at one party."""

import numpy as np
import pytest
import torch

from mpcache.protocols.dcf import KeyShape, dcf_eval, dcf_keygen
from mpcache.runtime.rng import KeyStream, fresh_seed


def keys(n: int, depth: int, start: int, width: int = 8):  # type: ignore[no-untyped-def]
    stream = KeyStream(fresh_seed(), "test")
    shape = KeyShape(n, depth, start, width)
    alpha = stream.tensor((n,)) & ((1 << depth) - 1)
    beta = stream.tensor((n,))
    seeds = stream.tensor((n, 2)), stream.tensor((n, 2))
    return shape, alpha, beta, seeds, stream, *dcf_keygen(shape, seeds, alpha, beta)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("depth", "start"), [(1, 0), (2, 0), (5, 0), (16, 0), (23, 6), (24, 0), (62, 0), (63, 0)]
)
def test_shares_of_the_comparison(depth: int, start: int, width: int) -> None:
    shape, alpha, beta, seeds, stream, words, bits = keys(400, depth, start, width)
    whole = -1 if width == 8 else (1 << 8 * width) - 1
    top = (1 << depth) - 1
    near = torch.stack([alpha, (alpha + 1) & top, (alpha - 1) & top], 1)
    low = (1 << (depth - start)) - 1
    same_top = (alpha.unsqueeze(1) & ~low & top) | (stream.tensor((400, 3)) & low)
    x = torch.cat([near, same_top, stream.tensor((400, 3)) & top], 1)
    (w0, b0), (w1, b1) = (dcf_eval(shape, p, seeds[p], words, bits, x) for p in (0, 1))
    agree = (x >> (depth - start)) == (alpha >> (depth - start)).unsqueeze(1)
    beta = beta.unsqueeze(1) & whole
    assert torch.equal((b0 + b1) & whole, beta * (agree & (x < alpha.unsqueeze(1))))
    if start:
        assert torch.equal((w0 + w1) & whole, beta * agree)


@pytest.mark.parametrize("width", [1, 8])
def test_every_point_of_a_small_domain(width: int) -> None:
    shape, alpha, beta, seeds, _, words, bits = keys(64, 6, 0, width)
    whole = -1 if width == 8 else 255
    x = torch.arange(64).expand(64, 64).contiguous()
    one, two = (dcf_eval(shape, p, seeds[p], words, bits, x)[1] for p in (0, 1))
    below = one + two
    assert torch.equal(below & whole, (beta & whole).unsqueeze(1) * (x < alpha.unsqueeze(1)))


def test_one_partys_outputs_do_not_tell_the_secret() -> None:
    """Same points, opposite secrets: one party's evaluations look uniform, bit by bit, both times."""
    n, depth = 4000, 12
    stream = KeyStream(fresh_seed(), "test")
    shape = KeyShape(n, depth)
    x = torch.full((n, 1), 1 << 11)
    for alpha in (0, (1 << depth) - 1):
        seeds = stream.tensor((n, 2)), stream.tensor((n, 2))
        words, bits = dcf_keygen(shape, seeds, torch.full((n,), alpha), torch.ones(n, dtype=torch.int64))
        _, below = dcf_eval(shape, 0, seeds[0], words, bits, x)
        words[:, ::2] ^= stream.tensor((n, shape.levels)) & 1  # zero by construction: the control bit's place
        bits, values = bits[:, : shape.levels], bits[:, shape.levels :].contiguous()
        for tensor in (below, words, values):
            ones = np.unpackbits(tensor.numpy().view(np.uint8).reshape(n, -1), axis=1).mean(0)
            assert abs(ones - 0.5).max() < 6 / (2 * n**0.5)
        assert abs(bits.float().mean() - 1.5) < 6 * 1.12 / bits.numel() ** 0.5  # two uniform bits
