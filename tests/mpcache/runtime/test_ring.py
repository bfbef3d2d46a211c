"""Products in Z_2^64 against Python's integers, over the whole range of the words."""

from itertools import product as pairs

import pytest
import torch

from mpcache.runtime.ring import matmul
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
