from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from mpcache_kernels import backend
from mpcache_kernels.reference import (
    cluster_bounds,
    cluster_extremes,
    cluster_means,
    cluster_representatives,
    cluster_scores,
    representatives,
    select_and_attend,
    window_importance,
)


def random(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "length", "w", "first"),
    [(4, 2, 13, 5, 8), (3, 3, 7, 7, 0), (6, 1, 9, 1, 8), (2, 1, 10, 3, 4), (1, 1, 1, 1, 0), (2, 2, 5, 0, 5)],
)
def test_importance_equals_the_loops(
    heads: int, kv_heads: int, length: int, w: int, first: int, dtype: torch.dtype
) -> None:
    q, k = random(heads, w, 6, seed=1).to(dtype), random(kv_heads, length, 6, seed=2).to(dtype)
    want = [0.0] * length
    for h in range(heads):
        keys = k[h // (heads // kv_heads)].tolist()
        for i, row in enumerate(q[h].tolist()):
            visible = range(first + i + 1)
            weights = [math.exp(sum(a * b for a, b in zip(row, keys[t], strict=True))) for t in visible]
            for t in visible:
                want[t] += weights[t] / sum(weights) / heads
    got = window_importance(q, k, first)
    assert got.shape == (length,) and got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor(want), atol=1e-5, rtol=1e-5)
    assert math.isclose(float(got.sum()), w, abs_tol=1e-4)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 15, 16, 17])
@pytest.mark.parametrize("size", [1, 4, 16])
def test_clusters_equal_the_loops(length: int, size: int) -> None:
    # Values far from zero, on both sides: a padding value would show.
    k = random(3, length, 5, seed=length) + torch.tensor([100.0, -100.0, 100.0])[:, None, None]
    r_max, r_min = cluster_extremes(k, size)
    means = cluster_means(k, size)
    count = math.ceil(length / size)
    assert r_max.shape == r_min.shape == means.shape == (3, count, 5)
    for h in range(3):
        for c in range(count):
            members = range(c * size, min((c + 1) * size, length))
            for d in range(5):
                values = [float(k[h, t, d]) for t in members]
                assert float(r_max[h, c, d]) == max(values)
                assert float(r_min[h, c, d]) == min(values)
                assert math.isclose(float(means[h, c, d]), sum(values) / len(values), rel_tol=1e-5)


def test_no_tokens_have_no_clusters() -> None:
    r_max, r_min = cluster_extremes(random(2, 0, 4), 3)
    assert r_max.shape == r_min.shape == cluster_means(random(2, 0, 4), 3).shape == (2, 0, 4)


def test_an_impossible_cluster_size() -> None:
    with pytest.raises(ValueError, match="cluster of 0"):
        cluster_means(random(1, 4, 2), 0)


def test_representatives_blend_the_extremes() -> None:
    r_max, r_min = cluster_extremes(random(2, 10, 4), 4)
    q = random(4, seed=9)
    scores = representatives(r_max, r_min, 0.6) @ q
    torch.testing.assert_close(scores, 0.6 * (r_max @ q) + 0.4 * (r_min @ q))
    assert torch.equal(representatives(r_max, r_min, 1.0), r_max)
    k = random(3, 11, 4, seed=3)
    assert torch.equal(cluster_representatives(k, 4, 0.6), representatives(*cluster_extremes(k, 4), 0.6))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 2), (3, 1), (2, 2)])
def test_scores_equal_the_loops(heads: int, kv_heads: int) -> None:
    q, k = random(heads, 5, seed=1), random(kv_heads, 11, 5, seed=2)
    r_max, r_min = cluster_extremes(k, 4)
    scores, bounds = cluster_scores(q, r_max), cluster_bounds(q, r_max, r_min)
    assert scores.shape == bounds.shape == (heads, 3)
    for h in range(heads):
        kv = h // (heads // kv_heads)
        for c in range(3):
            assert math.isclose(float(scores[h, c]), float(q[h] @ r_max[kv, c]), abs_tol=1e-5)
            corner = torch.where(q[h] > 0, r_max[kv, c], r_min[kv, c])  # of the box, the best for q
            assert math.isclose(float(bounds[h, c]), float(q[h] @ corner), abs_tol=1e-5)
            assert bounds[h, c] >= (k[kv, 4 * c : 4 * c + 4] @ q[h]).max() - 1e-5


@pytest.mark.parametrize(("heads", "kv_heads", "rows"), [(4, 2, 4), (4, 2, 2), (8, 2, 4), (1, 1, 1)])
@pytest.mark.parametrize(("sink", "recent", "m"), [(2, 3, 2), (0, 4, 3), (3, 0, 1), (1, 1, 0)])
def test_attention_equals_the_loops(
    heads: int, kv_heads: int, rows: int, sink: int, recent: int, m: int
) -> None:
    size, length = 4, 18  # the last cluster is ragged
    q = random(heads, 5, seed=1)
    k, v = random(kv_heads, length, 5, seed=2), random(kv_heads, length, 5, seed=3)
    n = math.ceil((length - sink - recent) / size)
    order = [torch.randperm(n, generator=torch.Generator().manual_seed(s))[:m] for s in range(rows)]
    chosen = torch.stack(order)
    if m > 1:
        chosen[0, 0] = -1
    got = select_and_attend(q, k, v, chosen, size, sink, recent)
    assert got.shape == (heads, 5)
    for h in range(heads):
        kv, clusters = h // (heads // kv_heads), chosen[h // (heads // rows)].tolist()
        middle = [t for t in range(sink, length - recent) if (t - sink) // size in clusters]
        tokens = [*range(sink), *middle, *range(length - recent, length)]
        weights = torch.stack([q[h] @ k[kv, t] for t in tokens]).softmax(0)
        want = torch.stack([w * v[kv, t] for w, t in zip(weights, tokens, strict=True)]).sum(0)
        torch.testing.assert_close(got[h], want, atol=1e-5, rtol=1e-5)


def test_choosing_everything_is_attention() -> None:
    q, k, v = random(4, 8, seed=1), random(4, 33, 8, seed=2), random(4, 33, 8, seed=3)
    got = select_and_attend(q, k, v, torch.arange(7).expand(4, -1), 4, 2, 5)
    want = torch.nn.functional.scaled_dot_product_attention(q[:, None], k, v, scale=1.0)[:, 0]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_the_backend_is_chosen_by_device_and_named() -> None:
    chosen = backend("cpu")
    assert chosen is backend(torch.device("cpu"))
    assert chosen.name == "reference"
    assert chosen.window_importance is window_importance
    with pytest.raises(RuntimeError):
        backend("abacus")


def test_a_cpu_run_does_not_import_triton() -> None:
    """Whatever the programs import, and a plaintext answer from the document to its second token."""
    program = """
import sys, torch, mpcache.cli, mpcache_parties.main
from mpcache.answer import plain_answer
from mpcache.limits import bind_policy
from mpcache.sampling import Sampling
from mpcache.config import PublicConfig
from mpcache.model import demo_model_dir, load_model
model, public = load_model(demo_model_dir()), PublicConfig(max_new_tokens=2)
policy = bind_policy(model.shape, public, 200, 3)
answer = plain_answer(model, policy, [5] * 200, [1, 2, 3], 2, Sampling(), ())
assert answer.kernels == "reference" and len(answer.ids) == 2
sys.exit('triton' in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
