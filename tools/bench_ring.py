"""Measure products in Z_2^64: torch's int64 matmul beside limbs in float64 BLAS, in one run on one thread.

    python tools/bench_ring.py

Limbs have 22 bits, so that a sum over k <= 512 stays below 2^53: six float64 products modulo 2^64.
Both are checked to agree on uniform words before they are timed. The right operand's limbs are split
beforehand, as a masked operand's would be.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from mpcache.runtime import ring
from mpcache.runtime.rng import KeyStream, fresh_seed

SHAPES = [  # x and y: a decode step's products, then whole chunks
    ((1, 128), (128, 512)),
    ((1, 512), (512, 2048)),
    ((8, 1, 64), (8, 64, 1024)),
    ((64, 128), (128, 512)),
    ((256, 512), (512, 512)),
    ((512, 512), (512, 512)),
]
LIMB = 22
LARGEST_INNER = 512


def split(x: torch.Tensor) -> list[torch.Tensor]:
    """Cut words into three float64 limbs, lowest first; the top one holds the 20 bits that are left."""
    return [((x >> (LIMB * i)) & ((1 << LIMB) - 1)).double() for i in range(3)]


def limb_product(xs: list[torch.Tensor], ys: list[torch.Tensor]) -> torch.Tensor:
    """Multiply modulo 2^64 operands already split.

    Raises ValueError for an inner dimension above LARGEST_INNER.
    """
    if xs[0].shape[-1] > LARGEST_INNER:
        raise ValueError(f"inner dimension {xs[0].shape[-1]}: float64 sums are exact up to {LARGEST_INNER}")
    pairs = [(i, j) for i in range(3) for j in range(3 - i)]
    terms = [(xs[i] @ ys[j]).long() << (LIMB * (i + j)) for i, j in pairs]
    return torch.stack(terms).sum(0)


def best_ms(call: Callable[[], torch.Tensor], repeats: int = 15) -> float:
    """Measure the quickest of several calls, in milliseconds."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken) * 1e3


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    words = KeyStream(fresh_seed(), "bench")
    print(f"{'product':<30}{'int64 ms':>10}{'limbs ms':>10}{'limbs / int64':>15}")
    for a, b in SHAPES:
        x, y = words.tensor(a), words.tensor(b)
        ys = split(y)
        if not torch.equal(ring.matmul(x, y), limb_product(split(x), ys)):
            raise SystemExit(f"bench_ring: limbs and int64 differ at {a} x {b}: do not use these times")
        whole = best_ms(lambda x=x, y=y: ring.matmul(x, y))  # type: ignore[misc]
        limbs = best_ms(lambda x=x, ys=ys: limb_product(split(x), ys))  # type: ignore[misc]
        name = f"{'x'.join(map(str, a))} @ {'x'.join(map(str, b))}"
        print(f"{name:<30}{whole:>10.3f}{limbs:>10.3f}{limbs / whole:>15.1f}")


if __name__ == "__main__":
    main()
