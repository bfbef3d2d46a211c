"""Time the kernels of `compact` on a CPU: their reference beside what torch has for the same.

    python tools/bench_kernels_cpu.py [--tokens 1000 4000] [--heads 9] [--kv-heads 3] [--head-size 64]

Triton's interpreter says whether a kernel is right, not how quick it is; without a GPU the reference is what
runs (tools/bench_kernels.py is for one). torch's own: for `repeat_importance` the whole map of a group's
heads, softmax and maximum; for `ragged_attend` one scaled_dot_product_attention over heads that are padded to
the longest, with the biases as its mask. CPU time of one thread, the least of several; the two take turns.
Prints Markdown rows: times, their ratio, the largest difference.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mpcache_kernels import REFERENCE

SINK, KEPT = 4, 0.2  # tokens; of the context, the mean over KV heads
RUNS = 7

Call = Callable[[], Tensor]


def importance(tokens: int, heads: int, kv: int, d: int) -> tuple[Call, Call]:
    """Return both ways to score a second reading of so many tokens."""
    q, k = torch.randn(heads, tokens, d) / d**0.5, torch.randn(kv, SINK + 2 * tokens, d)
    rows, columns = torch.rand(tokens), torch.rand(heads, tokens)
    later = torch.ones(tokens, tokens, dtype=torch.bool).triu_(1)

    def own() -> Tensor:
        found = []
        for group, keys, mine in zip(q.chunk(kv), k, columns.chunk(kv), strict=True):
            scores = group @ keys.T
            scores[..., SINK + tokens :].masked_fill_(later, -torch.inf)
            seen = scores.softmax(-1)[..., SINK : SINK + tokens] * rows[:, None]
            found.append((seen.max(1).values * mine).max(0).values)
        return torch.stack(found)

    return lambda: REFERENCE.repeat_importance(q, k, SINK, tokens, rows, columns)[0], own


def attention(tokens: int, heads: int, kv: int, d: int) -> tuple[Call, Call]:
    """Return both ways to attend to heads of different length: the n-th keeps n parts of the whole."""
    counts = [max(1, 2 * int(KEPT * tokens) * (i + 1) // (kv + 1)) for i in range(kv)]
    q = torch.randn(kv, heads // kv, d) / d**0.5
    k, v, bias = torch.randn(sum(counts), d), torch.randn(sum(counts), d), torch.randn(sum(counts))
    starts = torch.tensor([0, *counts]).cumsum(0)
    size = (kv, max(counts))
    held_k, held_v, mask = (
        torch.zeros(*size, d),
        torch.zeros(*size, d),
        torch.full((kv, 1, size[1]), -torch.inf),
    )
    for head, (begin, n) in enumerate(zip(starts.tolist(), counts, strict=False)):
        held_k[head, :n], held_v[head, :n] = k[begin : begin + n], v[begin : begin + n]
        mask[head, 0, :n] = bias[begin : begin + n]

    def own() -> Tensor:
        return F.scaled_dot_product_attention(q[None], held_k[None], held_v[None], mask[None], scale=1.0)[0]

    return lambda: REFERENCE.ragged_attend(q, k, v, bias, starts, max(counts)), own


def milliseconds(calls: tuple[Call, Call]) -> tuple[float, float]:
    """Measure both, in turns."""
    taken: tuple[list[float], list[float]] = [], []
    for _ in range(RUNS):
        for call, times in zip(calls, taken, strict=True):
            start = time.process_time()
            call()
            times.append(1e3 * (time.process_time() - start))
    return min(taken[0]), min(taken[1])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1000, 4000])
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--head-size", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| kernel | tokens | reference, ms | torch's own, ms | own / reference | largest difference |")
    print("|---|---|---|---|---|---|")
    for tokens in options.tokens:
        for name, make in (("repeat_importance", importance), ("ragged_attend", attention)):
            calls = make(tokens, options.heads, options.kv_heads, options.head_size)
            off = float((calls[0]() - calls[1]()).abs().max())
            ours, own = milliseconds(calls)
            print(
                f"| {name} | {tokens} | {ours:.3g} | {own:.3g} | {own / ours:.2f} | {off:.0e} |", flush=True
            )


if __name__ == "__main__":
    main()
