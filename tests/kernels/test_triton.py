"""Every Triton kernel against its meaning: on the GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import mpcache_kernels
from mpcache_kernels import Backend, backend, reference
from tests.support.paths import ROOT

if sys.platform != "linux":
    pytest.skip("Triton runs on Linux only", allow_module_level=True)
if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

import triton  # noqa: E402

from mpcache.engines.plain import PlainOps  # noqa: E402
from mpcache_kernels import triton_kernels  # noqa: E402
from tests.support.policy_specs import CONTEXT, MORE, SMALL  # noqa: E402
from tests.support.tiny_policies import chunks, plain, shape, tokens  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.bfloat16]
HEAD_SIZES = [24, 32, 64, 80, 128]

pytestmark = [
    pytest.mark.skipif(
        not CUDA and "Interpreted" not in type(triton_kernels.cluster_scoring._score).__name__,
        reason="no GPU, and TRITON_INTERPRET is off",
    ),
    # The interpreter's, of lanes that are masked afterwards.
    pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """In this mode torch.empty holds NaN, so an element that a kernel does not write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def random(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def among_nan(x: torch.Tensor) -> torch.Tensor:
    """x on the device as a view, with NaN on all sides of it and odd strides."""
    around = torch.full([n + 5 for n in x.shape], torch.nan, dtype=x.dtype, device=DEVICE)
    view = around[tuple(slice(3, 3 + n) for n in x.shape)]
    return view.copy_(x)


def check(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(got.cpu().float(), want.float(), atol=tolerance, rtol=tolerance)


IMPORTANCE = [  # heads, kv_heads, T, w, first_position
    (1, 1, 1, 1, 0),
    (3, 3, 7, 7, 0),
    (4, 2, 13, 5, 8),
    (6, 1, 65, 1, 64),
    (2, 1, 10, 3, 4),  # no query sees the last tokens
    (8, 2, 300, 70, 230),
    (2, 1, 200, 40, 100),
    (3, 1, 130, 129, 1),
    (2, 1, 40, 10, 35),  # queries after the last token see them all
    (2, 1, 64, 5, 30),  # the first query misses one token of a block, of 32
    (2, 1, 70, 5, 62),  # and of 64
    (1, 1, 600, 3, 597),  # few programs, so the tokens are split
    (1, 1, 300, 2, 40),  # splits that no query sees
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "length", "w", "first"), IMPORTANCE)
def test_importance(heads: int, kv_heads: int, length: int, w: int, first: int, dtype: torch.dtype) -> None:
    q = (random(heads, w, 24, seed=1) / 24**0.5).to(dtype)
    k = random(kv_heads, length, 24, dtype=dtype, seed=2)
    got = triton_kernels.window_importance(among_nan(q), among_nan(k), first)
    assert got.shape == (length,) and got.dtype == torch.float32
    check(got, reference.window_importance(q, k, first))
    assert float(got.sum()) == pytest.approx(w, rel=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", HEAD_SIZES)
def test_importance_of_every_head_size(d: int, dtype: torch.dtype) -> None:
    q, k = random(4, 33, d, dtype=dtype, seed=1) / d**0.5, random(2, 90, d, dtype=dtype, seed=2)
    got = triton_kernels.window_importance(q.to(DEVICE), k.to(DEVICE), 57)
    check(got, reference.window_importance(q, k, 57))


def test_importance_of_large_scores_and_of_no_queries() -> None:
    q, k = 40 * random(2, 9, 32, seed=1), random(1, 70, 32, seed=2)  # exp would overflow
    got = triton_kernels.window_importance(q.to(DEVICE), k.to(DEVICE), 61)
    check(got, reference.window_importance(q, k, 61), 1e-3)
    got = triton_kernels.window_importance(q[:, :0].to(DEVICE), k.to(DEVICE), 70)
    assert torch.equal(got.cpu(), torch.zeros(70))


REPEATS = [  # heads, kv_heads, keys before the queries' own, n, first, count
    (1, 1, 1, 1, 0, 1),
    (4, 2, 13, 5, 4, 9),
    (6, 1, 40, 70, 0, 40),
    (4, 4, 90, 33, 20, 65),
    (2, 1, 20, 10, 15, 12),  # some of the tokens are queries' own, which not all see
    (2, 1, 300, 3, 4, 290),  # the tokens are split
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "before", "n", "first", "count"), REPEATS)
def test_repeat_importance(
    heads: int, kv_heads: int, before: int, n: int, first: int, count: int, dtype: torch.dtype
) -> None:
    q = (random(heads, n, 24, seed=1) / 24**0.5).to(dtype)
    k = random(kv_heads, before + n, 24, dtype=dtype, seed=2)
    rows, columns = random(n, seed=3).abs() + 0.1, random(heads, count, seed=4).abs() + 0.1
    best, query = triton_kernels.repeat_importance(
        among_nan(q), among_nan(k), first, count, rows.to(DEVICE), columns.to(DEVICE)
    )
    want, whose = reference.repeat_importance(q, k, first, count, rows, columns)
    assert best.shape == query.shape == (kv_heads, count) and query.dtype == torch.int64
    check(best, want)
    assert ((query.cpu() == whose) | ((best.cpu() - want).abs() < 1e-4)).all()
    if dtype == torch.float32:
        assert (query.cpu() == whose).double().mean() > 0.9


RAGGED = [  # rows of queries, tokens of each KV head
    (1, (1,)),
    (3, (5, 70, 1)),
    (17, (33, 32)),
    (2, (300, 8, 8, 8)),  # one head alone has later splits
    (4, (64, 0, 31)),  # one has none
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "counts"), RAGGED)
def test_ragged_attention(rows: int, counts: tuple[int, ...], dtype: torch.dtype) -> None:
    q = (random(len(counts), rows, 24, seed=1) / 24**0.5).to(dtype)
    k, v = (random(sum(counts), 24, dtype=dtype, seed=s) for s in (2, 3))
    bias = 3 * random(sum(counts), seed=4)
    starts = torch.tensor([0, *counts]).cumsum(0)
    far_q, far_k, far_v, far_bias = map(among_nan, (q, k, v, bias))
    got = triton_kernels.ragged_attend(far_q, far_k, far_v, far_bias, starts.to(DEVICE), max(counts))
    assert got.shape == q.shape and got.dtype == dtype
    want = reference.ragged_attend(q, k, v, bias, starts, max(counts))
    some = torch.tensor(counts) > 0
    check(got.cpu()[some], want[some], 1e-4 if dtype == torch.float32 else 2**-7)
    assert got.cpu()[~some].isnan().all() and not want[some].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", HEAD_SIZES)
def test_ragged_attention_of_every_head_size(d: int, dtype: torch.dtype) -> None:
    starts, bias = torch.tensor([0, 9, 50]), random(50, seed=3)
    q = (random(2, 3, d, seed=1) / d**0.5).to(dtype)
    k, v = random(50, d, dtype=dtype, seed=2), random(50, d, dtype=dtype, seed=4)
    there = [x.to(DEVICE) for x in (q, k, v, bias, starts)]
    got = triton_kernels.ragged_attend(there[0], there[1], there[2], there[3], there[4], 41)
    want = reference.ragged_attend(q, k, v, bias, starts, 41)
    check(got, want, 1e-4 if dtype == torch.float32 else 2**-7)


def check_clusters(k: torch.Tensor, size: int) -> None:
    given, exact = among_nan(k), k.float()
    high, low = triton_kernels.cluster_extremes(given, size)
    want_high, want_low = reference.cluster_extremes(k, size)
    assert high.dtype == low.dtype == k.dtype
    assert torch.equal(high.cpu(), want_high) and torch.equal(low.cpu(), want_low)
    tolerance = 1e-5 if k.dtype == torch.float32 else 2**-7  # a last bit: the interpreter truncates
    check(triton_kernels.cluster_means(given, size), reference.cluster_means(exact, size), tolerance)
    want = reference.cluster_representatives(exact, size, 0.6)
    check(triton_kernels.cluster_representatives(given, size, 0.6), want, tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 5, 16])
@pytest.mark.parametrize("length", [1, 4, 5, 6, 15, 16, 17, 100])
def test_clusters(length: int, size: int, dtype: torch.dtype) -> None:
    # Far from zero, on both sides: a padding value would show.
    far = torch.tensor([100.0, -100.0, 100.0])[:, None, None]
    check_clusters((random(3, length, 24, seed=length) + far).to(dtype), size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", HEAD_SIZES)
def test_clusters_of_every_head_size(d: int, dtype: torch.dtype) -> None:
    check_clusters(random(2, 70, d, dtype=dtype), 8)


def test_no_tokens_have_no_clusters_and_a_nan_key_is_not_hidden() -> None:
    assert triton_kernels.cluster_means(torch.empty(2, 0, 4, device=DEVICE), 3).shape == (2, 0, 4)
    k = random(1, 8, 16)
    k[0, 2, 3] = torch.nan
    high, low = triton_kernels.cluster_extremes(k.to(DEVICE), 4)
    assert high.isnan().nonzero().tolist() == low.isnan().nonzero().tolist() == [[0, 0, 3]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 2), (18, 1), (3, 3)])
@pytest.mark.parametrize("n", [1, 31, 33, 130])
def test_scores(heads: int, kv_heads: int, n: int, dtype: torch.dtype) -> None:
    q = random(heads, 24, dtype=dtype, seed=1)
    high, low = (random(kv_heads, n, 24, dtype=dtype, seed=s) for s in (2, 3))
    got = triton_kernels.cluster_scores(among_nan(q), among_nan(high))
    assert got.shape == (heads, n) and got.dtype == torch.float32
    check(got, reference.cluster_scores(q, high))
    got = triton_kernels.cluster_bounds(among_nan(q), among_nan(high), among_nan(low))
    check(got, reference.cluster_bounds(q, high, low))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", HEAD_SIZES)
def test_scores_of_every_head_size(d: int, dtype: torch.dtype) -> None:
    q = random(4, d, dtype=dtype)
    high, low = (random(2, 9, d, dtype=dtype, seed=s) for s in (2, 3))
    on = [x.to(DEVICE) for x in (q, high, low)]
    check(triton_kernels.cluster_scores(*on[:2]), reference.cluster_scores(q, high))
    check(triton_kernels.cluster_bounds(*on), reference.cluster_bounds(q, high, low))


def check_attend(
    heads: int, kv_heads: int, rows: int, length: int, d: int, size: int, sink: int, recent: int, m: int,
    dtype: torch.dtype, none: int = 0, index: torch.dtype = torch.int64,
) -> None:  # fmt: skip
    """`m` choices per row, of which the first row's last `none` are no cluster."""
    q = (random(heads, d, seed=1) / d**0.5).to(dtype)
    k, v = (random(kv_heads, length, d, dtype=dtype, seed=s) for s in (2, 3))
    n = -(-(length - sink - recent) // size)
    draw = torch.Generator().manual_seed(4)
    chosen = torch.stack([torch.randperm(n, generator=draw)[:m] for _ in range(rows)])
    if m:
        chosen[-1, 0] = n - 1  # the ragged one
        chosen[0, m - none :] = -1
    want = reference.select_and_attend(q.float(), k.float(), v.float(), chosen, size, sink, recent)

    attended = torch.zeros(kv_heads, length, dtype=torch.bool)
    attended[:, :sink] = attended[:, length - recent :] = True
    for row, clusters in enumerate(chosen.tolist()):
        for begin in (sink + c * size for c in clusters if c >= 0):
            attended[row // (rows // kv_heads), begin : min(begin + size, length - recent)] = True
    k[~attended] = v[~attended] = torch.nan  # what nobody chose is not read
    got = triton_kernels.select_and_attend(
        among_nan(q), among_nan(k), among_nan(v), among_nan(chosen.float()).to(index), size, sink, recent
    )
    assert got.shape == (heads, d) and got.dtype == dtype
    check(got, want, 1e-4 if dtype == torch.float32 else 2e-2)  # bfloat16 weights and result


ATTEND = [  # heads, kv_heads, rows, T, size, sink, recent, m
    (1, 1, 1, 1, 4, 0, 1, 0),  # the generated token alone
    (1, 1, 1, 1, 4, 0, 0, 1),  # a cluster of one
    (4, 2, 4, 103, 8, 4, 11, 5),  # per head
    (4, 2, 2, 103, 8, 4, 11, 5),  # per KV head
    (8, 2, 4, 103, 8, 4, 11, 5),  # per half group
    (2, 2, 2, 70, 5, 0, 3, 14),  # no sink, a size that is no power of two, everything chosen
    (3, 1, 1, 70, 16, 5, 0, 3),  # no recent window
    (2, 1, 2, 90, 17, 1, 9, 2),
    (18, 1, 1, 60, 15, 2, 7, 2),  # a large group
    (2, 1, 2, 400, 16, 4, 20, 20),  # several splits
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ATTEND)
def test_select_and_attend(case: tuple[int, ...], dtype: torch.dtype) -> None:
    heads, kv_heads, rows, length, size, sink, recent, m = case
    check_attend(heads, kv_heads, rows, length, 24, size, sink, recent, m, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", HEAD_SIZES)
def test_select_and_attend_of_every_head_size(d: int, dtype: torch.dtype) -> None:
    check_attend(4, 2, 4, 90, d, 8, 4, 11, 4, dtype, none=2, index=torch.int32)


def test_a_head_that_attends_to_nothing() -> None:
    q, k, v = random(2, 16), random(2, 8, 16, seed=1), random(2, 8, 16, seed=2)
    chosen = torch.tensor([[-1, -1], [1, -1]])
    want = reference.select_and_attend(q, k, v, chosen, 4, 0, 0)
    q, k, v, chosen = (x.to(DEVICE) for x in (q, k, v, chosen))
    got = triton_kernels.select_and_attend(q, k, v, chosen, 4, 0, 0).cpu()
    assert got[0].isnan().all() and want[0].isnan().all()
    check(got[1], want[1])


def test_a_second_run_is_equal_bit_for_bit() -> None:
    q, q_w = random(4, 24).to(DEVICE), random(4, 30, 24, seed=1).to(DEVICE)
    k, v = (random(2, 200, 24, seed=s).to(DEVICE) for s in (2, 3))
    chosen = torch.arange(5, device=DEVICE).expand(4, -1)
    first, second = (triton_kernels.window_importance(q_w, k, 170) for _ in range(2))
    assert torch.equal(first, second)
    first, second = (triton_kernels.select_and_attend(q, k, v, chosen, 16, 4, 10) for _ in range(2))
    assert torch.equal(first, second)


def test_impossible_sizes() -> None:
    k = random(1, 4, 16).to(DEVICE)
    with pytest.raises(ValueError, match="cluster of 0"):
        triton_kernels.cluster_means(k, 0)
    one = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    for implementation in (triton_kernels, reference):
        with pytest.raises(ValueError, match="cluster of 0"):
            implementation.select_and_attend(k[:, 0], k, k, one, 0, 0, 1)
        with pytest.raises(ValueError, match="sink of 2 and 3 recent tokens, of 4"):
            implementation.select_and_attend(k[:, 0], k, k, one, 4, 2, 3)
        with pytest.raises(ValueError, match="2 rows of choices for 1 heads"):
            implementation.select_and_attend(k[:, 0], k, k, one.expand(2, -1), 4, 1, 1)


def test_a_gpu_gets_triton_and_without_it_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    mpcache_kernels._gpu.cache_clear()
    chosen = backend("cuda:0")
    assert chosen.name == "triton" and chosen is backend(torch.device("cuda"))
    ours = {f.name for f in fields(Backend) if hasattr(triton_kernels, f.name)}
    assert ours == {f.name for f in fields(Backend)} - {"name", "representatives"}
    assert all(getattr(chosen, name) is getattr(triton_kernels, name) for name in ours)
    monkeypatch.setattr(mpcache_kernels, "find_spec", lambda name: None)
    mpcache_kernels._gpu.cache_clear()
    assert backend("cuda").name == "reference (Triton is not installed)"
    mpcache_kernels._gpu.cache_clear()


@pytest.mark.parametrize(
    "policy", ["mpcache, shared, summed, refreshed", "mpcache, bound", "quest", "compact"]
)
def test_policies_run_on_them(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eviction, clusters, scores and attention of the plain engine, against the single operations."""
    mpcache_kernels._gpu.cache_clear()
    spec, s, ask = (SMALL | MORE)[policy], shape(), chunks(3, 1, 1, 1, 1)
    want, _ = plain(spec, s, tokens(CONTEXT), ask)
    if not CUDA:  # this prefill is on the CPU
        monkeypatch.setattr("tests.support.tiny_policies.KERNELS", backend("cuda"))
    got, _ = plain(spec, s, tokens(CONTEXT), ask, ops=PlainOps(backend("cuda"), DEVICE))
    for a, b in zip(got, want, strict=True):
        check(a, b, 1e-3)


@pytest.mark.slow
def test_every_launch_compiles_for_hopper(tmp_path: Path) -> None:
    d = 80  # the tiles of 128, and their masks as well
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    program = [sys.executable, "-m", "tests.support.compile_for_hopper", str(d)]
    root = ROOT
    done = subprocess.run(program, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_longer_contexts(dtype: torch.dtype) -> None:
    q, k = random(4, 210, 64, dtype=dtype, seed=1) / 8, random(2, 1050, 64, dtype=dtype, seed=2)
    got = triton_kernels.window_importance(q.to(DEVICE), k.to(DEVICE), 840)
    check(got, reference.window_importance(q, k, 840))
    check_clusters(k, 16)
    check_attend(8, 2, 8, 2051, 64, 16, 4, 31, 25, dtype, none=7)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU: 32k tokens are hours in the interpreter")
@pytest.mark.parametrize("dtype", DTYPES)
def test_full_size(dtype: torch.dtype) -> None:
    q, k = random(32, 6554, 128, dtype=dtype, seed=1) / 128**0.5, random(8, 32768, 128, dtype=dtype, seed=2)
    want = reference.window_importance(q.cuda().double(), k.cuda().double(), 26214)  # float32 inside
    check(triton_kernels.window_importance(q.cuda(), k.cuda(), 26214), want.cpu(), 1e-3)
    check_clusters(k, 16)
    check_attend(32, 8, 32, 32768, 128, 16, 4, 16, 400, dtype)
    check_attend(32, 8, 8, 32768, 128, 16, 4, 16, 400, dtype)


def test_the_kernels_are_what_is_tested() -> None:
    """On a CPU through the interpreter, on a GPU compiled."""
    assert triton.knobs.runtime.interpret is not CUDA
