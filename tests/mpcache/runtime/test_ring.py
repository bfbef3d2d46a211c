"""Products in Z_2^64 against Python's integers, over the whole range of the words."""

from itertools import product as pairs

import pytest
import torch

from mpcache.runtime.ring import matmul, narrow, pack, turned, unpack, wide
from mpcache.runtime.rng import KeyStream, fresh_seed

LOWEST, HIGHEST = -(1 << 63), (1 << 63) - 1


def reference(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x @ y of two matrices by Python integers, then reduced to the signed word."""
    columns = y.T.tolist()
    sums = [[sum(a * b for a, b in zip(row, col, strict=True)) for col in columns] for row in x.tolist()]
    return torch.tensor([[(v - LOWEST) % (1 << 64) + LOWEST for v in row] for row in sums])


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (1, 128, 33), (7, 64, 5), (16, 700, 9), (33, 17, 31)])
def test_uniform_words(m: int, k: int, n: int) -> None:
    words = KeyStream(fresh_seed(), "test")
    x, y = words.tensor((m, k)), words.tensor((k, n))
    assert torch.equal(matmul(x, y), reference(x, y))


def test_the_ends_of_the_range_wrap_around() -> None:
    ends = torch.tensor(list(pairs([LOWEST, LOWEST + 1, -1, 0, 1, HIGHEST], repeat=2)))
    assert torch.equal(matmul(ends, ends.T.contiguous()), reference(ends, ends.T))
    assert torch.equal(matmul(ends.repeat(1, 300), ends.repeat(1, 300).T), reference(ends, ends.T) * 300)


def test_broadcasting_strides_and_blanks() -> None:
    words = KeyStream(fresh_seed(), "test")
    x, y = words.tensor((3, 1, 4, 6)), words.tensor((2, 5, 6)).transpose(-1, -2)
    out = matmul(x, y)
    assert out.shape == (3, 2, 4, 5)
    for i, j in pairs(range(3), range(2)):
        assert torch.equal(out[i, j], reference(x[i, 0], y[j]))
    assert matmul(x.to("meta"), y.to("meta")).shape == out.shape


@pytest.mark.parametrize(
    ("m", "k", "n"), [(0, 3, 4), (1, 0, 4), (2, 5, 0), (1, 1, 1), (1, 9, 1500), (3, 6, 1024), (5, 13, 1025)]
)
def test_narrow_matrices_multiply_as_wide_ones(m: int, k: int, n: int) -> None:
    words = KeyStream(fresh_seed(), "test")
    x, y = words.tensor((m, k)), words.tensor((k, n))
    assert torch.equal(matmul(x, y), torch.matmul(x, y))
    assert torch.equal(matmul(x, narrow(y)), torch.matmul(x, y))
    for bits, dtypes in ((16, (torch.int16,)), (24, (torch.int16, torch.int8)), (32, (torch.int32,))):
        held = narrow(small := y >> (64 - bits))
        assert torch.equal(matmul(x, held), torch.matmul(x, small)) and torch.equal(wide(held), small)
        if small.numel() > 100:
            assert (held.low.dtype, *([] if held.high is None else [held.high.dtype])) == dtypes
    above = (matmul(x, narrow(y, 48)) - torch.matmul(x, y)) & ((1 << 48) - 1)
    assert not above.any()
    ends = torch.where(y > 0, HIGHEST, LOWEST)
    assert torch.equal(matmul(x, narrow(ends)), torch.matmul(x, ends))
    strided = words.tensor((m, 2 * k))[:, ::2]
    assert torch.equal(matmul(strided, narrow(y)), torch.matmul(strided, y))
    with pytest.raises(RuntimeError, match="a product of"):
        matmul(words.tensor((1, k + 1)), narrow(y))


@pytest.mark.parametrize("width", range(1, 8))
def test_bytes_come_back(width: int) -> None:
    x = KeyStream(fresh_seed(), "test").tensor((3, 1, 5))
    assert pack(x, width).shape == (3, 1, 5, width)
    assert torch.equal(unpack(pack(x, width)), x & ((1 << 8 * width) - 1))
    assert unpack(pack(x[:0], width)).shape == (0, 1, 5)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_vectors_turn(dtype: torch.dtype) -> None:
    words = KeyStream(fresh_seed(), "test")
    x, by = words.tensor((2, 9, 16), dtype), words.tensor((2, 9))
    assert torch.equal(turned(x, by), x.gather(-1, (by.unsqueeze(-1) - torch.arange(16)) & 15))
