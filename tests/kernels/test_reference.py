from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from kernels import backend
from kernels.reference import cluster_extremes, cluster_means, representatives, window_importance


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


def test_the_backend_is_chosen_by_device_and_named() -> None:
    chosen = backend("cpu")
    assert chosen is backend(torch.device("cpu"))
    assert chosen.name == "reference"
    assert chosen.window_importance is window_importance
    with pytest.raises(RuntimeError):
        backend("abacus")


def test_a_cpu_run_does_not_import_triton() -> None:
    program = "import sys, kernels; kernels.backend('cpu'); sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
