"""Hold the kernels of the plaintext path behind one seam.

`backend(device)` is asked once per run, where the device is chosen; its name is shown to the user.
A kernel is four things, which change together:

its meaning    a naive function in `mpcache_kernels.reference`
the kernel     a function of the same name in `mpcache_kernels.triton_kernels`
its test       tests/kernels/test_triton.py (against the reference), tests/kernels/test_reference.py
its benchmark  tools/bench_kernels.py; docs/kernels.md holds what it measures

A new kernel is one of each, and a field of `Backend`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from mpcache_kernels import reference


@dataclass(frozen=True)
class Backend:
    """One implementation of every kernel; the signatures are those in `mpcache_kernels.reference`."""

    name: str
    window_importance: Callable[[Tensor, Tensor, int], Tensor]
    repeat_importance: Callable[[Tensor, Tensor, int, int, Tensor, Tensor], tuple[Tensor, Tensor]]
    cluster_extremes: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    cluster_means: Callable[[Tensor, int], Tensor]
    representatives: Callable[[Tensor, Tensor, float], Tensor]
    cluster_representatives: Callable[[Tensor, int, float], Tensor]
    cluster_scores: Callable[[Tensor, Tensor], Tensor]
    cluster_bounds: Callable[[Tensor, Tensor, Tensor], Tensor]
    select_and_attend: Callable[[Tensor, Tensor, Tensor, Tensor, int, int, int], Tensor]
    ragged_attend: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], Tensor]


REFERENCE = Backend(
    name="reference",
    window_importance=reference.window_importance,
    repeat_importance=reference.repeat_importance,
    cluster_extremes=reference.cluster_extremes,
    cluster_means=reference.cluster_means,
    representatives=reference.representatives,
    cluster_representatives=reference.cluster_representatives,
    cluster_scores=reference.cluster_scores,
    cluster_bounds=reference.cluster_bounds,
    select_and_attend=reference.select_and_attend,
    ragged_attend=reference.ragged_attend,
)


def backend(device: torch.device | str) -> Backend:
    """Return the kernels for tensors on `device`: Triton's on a GPU that has Triton, else the reference.

    Triton is imported here, and only for a GPU: an installation without one never loads it.
    """
    # A name that torch does not know fails here, not at the first kernel.
    return _gpu() if torch.device(device).type == "cuda" else REFERENCE


@cache
def _gpu() -> Backend:
    if find_spec("triton") is None:
        return replace(REFERENCE, name="reference (Triton is not installed)")
    from mpcache_kernels import triton_kernels

    return Backend(
        name="triton",
        window_importance=triton_kernels.window_importance,
        repeat_importance=triton_kernels.repeat_importance,
        cluster_extremes=triton_kernels.cluster_extremes,
        cluster_means=triton_kernels.cluster_means,
        representatives=reference.representatives,  # element by element, and small
        cluster_representatives=triton_kernels.cluster_representatives,
        cluster_scores=triton_kernels.cluster_scores,
        cluster_bounds=triton_kernels.cluster_bounds,
        select_and_attend=triton_kernels.select_and_attend,
        ragged_attend=triton_kernels.ragged_attend,
    )
