"""Measure the Triton kernels' time and bandwidth, beside torch eager and torch.compile of the reference.

Per kernel: the fewest bytes it can move (each row that is needed read once, each result written once)
over its time, against what a device copy reaches (bytes read plus bytes written). Median times by CUDA
events, over several input sets that together exceed the L2 cache. Needs a GPU; exit code 2 without one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from mpcache_kernels import REFERENCE, Backend, backend

CLUSTER, SINK, RECENT = 16, 4, 16  # tokens
CHUNK = 2048  # tokens that are read a second time at once
WINDOW, ATTENDED = 0.2, 0.2  # of the context: the queries that judge importance; the tokens attended to
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One kernel at one size: how to call it, what to call it on, and what it cannot avoid."""

    name: str
    call: Callable[[Backend], Callable[..., Tensor | tuple[Tensor, Tensor]]]
    draw: Callable[[], tuple[Tensor | int | float, ...]]
    bytes: int
    flops: int = 0  # where arithmetic, not memory, is the limit


def cases(tokens: int, heads: int, kv: int, d: int, dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Yield every kernel at one size: tokens of context, query heads, KV heads, head size d."""

    def normal(*size: int) -> Tensor:
        return torch.randn(size, dtype=dtype, device=device)

    item, n = dtype.itemsize, -(-tokens // CLUSTER)
    keys, reps = kv * tokens * d * item, kv * n * d * item

    w = int(WINDOW * tokens)
    pairs = heads * sum(range(tokens - w + 1, tokens + 1))
    yield Case(
        "window_importance",
        lambda b: b.window_importance,
        lambda: (normal(heads, w, d) / d**0.5, normal(kv, tokens, d), tokens - w),
        heads * w * d * item + keys + 4 * tokens,
        2 * 2 * d * pairs,
    )
    again = min(tokens, CHUNK)
    yield Case(
        "repeat_importance",
        lambda b: b.repeat_importance,
        lambda: (
            normal(heads, again, d) / d**0.5, normal(kv, SINK + 2 * again, d), SINK, again,
            normal(again).abs(), normal(heads, again).abs(),
        ),
        heads * again * d * item + kv * (SINK + 2 * again) * d * item + 12 * kv * again,
        2 * 2 * d * heads * again * (SINK + 2 * again + again // 2) // 2,
    )  # fmt: skip
    yield Case(
        "cluster_extremes",
        lambda b: b.cluster_extremes,
        lambda: (normal(kv, tokens, d), CLUSTER),
        keys + 2 * reps,
    )
    yield Case(
        "cluster_means", lambda b: b.cluster_means, lambda: (normal(kv, tokens, d), CLUSTER), keys + reps
    )
    yield Case(
        "cluster_representatives",
        lambda b: b.cluster_representatives,
        lambda: (normal(kv, tokens, d), CLUSTER, 0.6),
        keys + reps,
    )
    rest = heads * d * item + 4 * heads * n
    yield Case(
        "cluster_scores",
        lambda b: b.cluster_scores,
        lambda: (normal(heads, d), normal(kv, n, d)),
        reps + rest,
    )
    yield Case(
        "cluster_bounds",
        lambda b: b.cluster_bounds,
        lambda: (normal(heads, d), normal(kv, n, d), normal(kv, n, d)),
        2 * reps + rest,
    )

    counts = [max(1, 2 * int(ATTENDED * tokens) * (i + 1) // (kv + 1)) for i in range(kv)]  # none alike
    yield Case(
        "ragged_attend",
        lambda b: b.ragged_attend,
        lambda: (
            normal(kv, heads // kv, d) / d**0.5, normal(sum(counts), d), normal(sum(counts), d),
            normal(sum(counts)).float(), torch.tensor([0, *counts], device=device).cumsum(0), max(counts),
        ),
        2 * heads * d * item + sum(counts) * (2 * d * item + 4),
    )  # fmt: skip
    yield attention("per head", heads, tokens, heads, kv, d, dtype, device)
    if kv < heads:
        yield attention("per KV head", kv, tokens, heads, kv, d, dtype, device)


def attention(
    name: str, rows: int, tokens: int, heads: int, kv: int, d: int, dtype: torch.dtype, device: str
) -> Case:
    """Make a case of select_and_attend: random clusters for each of `rows`, a sink, a recent window."""
    clusters = (tokens - SINK - RECENT) // CLUSTER  # no ragged one, so that all choices are alike
    recent = tokens - SINK - clusters * CLUSTER
    m = int(ATTENDED * clusters)

    def choose() -> Tensor:
        return torch.rand(rows, clusters, device=device).argsort(1)[:, :m]

    def draw() -> tuple[Tensor | int | float, ...]:
        q = torch.randn(heads, d, dtype=dtype, device=device) / d**0.5
        k, v = torch.randn(2, kv, tokens, d, dtype=dtype, device=device)
        return q, k, v, choose(), CLUSTER, SINK, recent

    # The heads of a group may choose the same cluster; rows of K and V that any of them needs count once.
    needed = torch.zeros(kv, clusters, device=device).scatter_(1, choose().reshape(kv, -1), 1.0)
    distinct = int(needed.sum()) * CLUSTER + kv * (SINK + recent)
    moved = 2 * distinct * d * dtype.itemsize + 2 * heads * d * dtype.itemsize + 8 * rows * m
    return Case(f"select_and_attend {name}", lambda b: b.select_and_attend, draw, moved)


def milliseconds(call: Callable[..., object], inputs: list[tuple[Tensor | int | float, ...]]) -> float:
    """Measure one call, the median of many; the inputs take turns."""
    from triton.testing import do_bench

    turns = cycle(inputs)
    return float(do_bench(lambda: call(*next(turns)), warmup=50, rep=200, return_mode="median"))


def error(got: Tensor | tuple[Tensor, Tensor], want: Tensor | tuple[Tensor, Tensor]) -> float:
    """Compute ||got - want|| / ||want||."""
    a, b = (torch.cat(x if isinstance(x, tuple) else (x,)).double() for x in (got, want))
    return float((a - b).norm() / b.norm())


def copy_bandwidth(device: str) -> float:
    """Measure the bytes read plus written per second by a 2 GiB copy."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / (1e-3 * milliseconds(target.copy_, [(source,)]))


def measure(case: Case, chosen: Backend, copy: float, l2: int, with_compile: bool) -> str:
    """Measure one case and return its line of the table."""
    inputs = [case.draw() for _ in range(min(32, max(2, -(-4 * l2 // case.bytes))))]
    ours, eager = case.call(chosen), case.call(REFERENCE)
    wrong = error(ours(*inputs[0]), eager(*inputs[0]))
    ms, eager_ms = milliseconds(ours, inputs), milliseconds(eager, inputs)
    compile_ms = float("nan")
    if with_compile:
        torch._dynamo.reset()
        compile_ms = milliseconds(torch.compile(eager, dynamic=False), inputs)
    rate = case.bytes / (1e-3 * ms)
    limit = f"{case.flops / ms / 1e9:6.0f} TFLOP/s" if case.flops else f"{100 * rate / copy:6.0f} % of copy"
    return (
        f"{case.bytes / 1e6:9.1f} {ms:9.4f} {rate / 1e9:8.0f} {limit:>15} "
        f"{eager_ms:10.4f} {compile_ms:10.4f} {eager_ms / ms:8.1f}x {compile_ms / ms:8.1f}x {wrong:9.1e}"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[32, 8])
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes minutes")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_kernels: no GPU here; the kernels are timed on one", file=sys.stderr)
        sys.exit(2)
    chosen = backend("cuda")
    if chosen.name != "triton":
        print(f"bench_kernels: the kernels are {chosen.name}; install triton", file=sys.stderr)
        sys.exit(2)

    torch.manual_seed(0)
    device = torch.cuda.get_device_properties("cuda")
    copy = copy_bandwidth("cuda")
    print(f"{device.name}, torch {torch.__version__}; a copy moves {copy / 1e9:.0f} GB/s (read + written)")
    print(f"{options.tokens} tokens, {options.heads} heads of {options.head_size}, clusters of {CLUSTER}")
    print(
        f"{'kernel':30} {'kv':>3} {'type':4} {'MB':>9} {'ms':>9} {'GB/s':>8} {'':>15} "
        f"{'eager ms':>10} {'compile ms':>10} {'/eager':>9} {'/compile':>9} {'error':>9}"
    )
    for kv in options.kv_heads:
        for name in options.dtype:
            sizes = (options.tokens, options.heads, kv, options.head_size)
            for case in cases(*sizes, DTYPES[name], "cuda"):
                if options.only in case.name:
                    line = measure(case, chosen, copy, device.L2_cache_size, not options.no_compile)
                    print(f"{case.name:30} {kv:3} {name:4} {line}", flush=True)


if __name__ == "__main__":
    main()
