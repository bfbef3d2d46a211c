"""Hold the kernels in Triton, for NVIDIA GPUs; `mpcache_kernels.reference` says what each of them means.

importance         window_importance, repeat_importance
cluster_summaries  cluster_extremes, cluster_means, cluster_representatives
cluster_scoring    cluster_scores, cluster_bounds
attention          select_and_attend, ragged_attend
tiles              what all of them share

Imported by `mpcache_kernels.backend` only, and only for a GPU. Inputs are float32 or bfloat16 with heads
and tokens at any stride; sums and softmaxes are float32. Nothing here uses atomics: a result is the same,
bit for bit, each time. docs/kernels.md holds the bytes and operations that each kernel cannot avoid.
"""

from mpcache_kernels.triton_kernels.attention import ragged_attend, select_and_attend
from mpcache_kernels.triton_kernels.cluster_scoring import cluster_bounds, cluster_scores
from mpcache_kernels.triton_kernels.cluster_summaries import (
    cluster_extremes,
    cluster_means,
    cluster_representatives,
)
from mpcache_kernels.triton_kernels.importance import repeat_importance, window_importance

__all__ = [
    "cluster_bounds",
    "cluster_extremes",
    "cluster_means",
    "cluster_representatives",
    "cluster_scores",
    "ragged_attend",
    "repeat_importance",
    "select_and_attend",
    "window_importance",
]
