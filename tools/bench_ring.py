"""Measure products in Z_2^64: this project's loops beside torch's int64 matmul, in one run on one thread.

    python tools/bench_ring.py

The right operand as int64, as the 6 bytes that a ring of 48 bits takes, and as the 4, 3 or 2 bytes that hold
weights. All are checked to agree on uniform words before they are timed. GB/s: of the 4 bytes, beside what a
copy in memory reads and writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from mpcache.runtime import ring
from mpcache.runtime.rng import KeyStream, fresh_seed

SHAPES = [  # rows, inner, columns: a decode step's products in SmolLM2-135M, and chunks of 14 and 128 tokens
    (1, 576, 960),
    (1, 576, 3072),
    (1, 1536, 576),
    (1, 576, 49152),
    (1, 49152, 576),
    (14, 576, 3072),
    (14, 49152, 576),
    (128, 576, 3072),
]


def best_ms(call: Callable[[], torch.Tensor], repeats: int = 7) -> float:
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
    one, two = torch.zeros(1 << 24, dtype=torch.int64), torch.ones(1 << 24, dtype=torch.int64)
    print(f"A copy in memory: {2e-6 * one.nbytes / best_ms(lambda: two.copy_(one)):.1f} GB/s\n")
    print(
        "| product | torch int64, ms | int64 | 6 bytes | 4 | 3 | 2 | torch / 4 bytes | GB/s |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    for m, k, n in SHAPES:
        x, y = words.tensor((m, k)), words.tensor((k, n)) >> 49
        joined = [ring.Matrix(y.int(), (y >> 32).short()), ring.Matrix(y.short(), (y >> 16).char())]
        held = [ring.Matrix(y), joined[0], ring.Matrix(y.int()), joined[1], ring.narrow(y)]
        ours = [best_ms(lambda x=x, w=w: ring.matmul(x, w)) for w in held]  # type: ignore[misc]
        torchs = best_ms(lambda x=x, y=y: torch.matmul(x, y))  # type: ignore[misc]
        wanted = torch.matmul(x, y)
        if any(((ring.matmul(x, w) - wanted) & ((1 << 48) - 1)).any() for w in held):
            raise SystemExit(f"bench_ring: results differ at {m} x {k} x {n}: do not use these times")
        times = " | ".join(f"{t:.3g}" for t in (torchs, *ours))
        print(f"| {m}x{k} @ {k}x{n} | {times} | {torchs / ours[2]:.1f} | {4e-6 * k * n / ours[2]:.1f} |")


if __name__ == "__main__":
    main()
