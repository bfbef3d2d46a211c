"""Compiles every launch of the Triton kernels for a Hopper GPU (sm_90), with none present.

The interpreter accepts programs that the compiler refuses, and knows no shared memory; this program
asks the compiler, for the very tiles and types that the host code would launch. One line per kernel.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from mpcache_kernels import triton_kernels

SHARED_BYTES = 227 * 1024  # what one program may have on an H100 or H200

compiled: set[str] = set()


def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
    if kernel.hash not in compiled:
        compiled.add(kernel.hash)
        print(f"{kernel.metadata.name}: {kernel.metadata.shared} bytes of shared memory")
        assert kernel.metadata.shared <= SHARED_BYTES, "too much shared memory"


run, JITFunction.run = JITFunction.run, compile_only
driver.set_active(
    SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_device_interface=lambda: torch.cuda,
    )
)

for d in map(int, sys.argv[1:]):
    for dtype in (torch.float32, torch.bfloat16):
        # The second: numbers equal to 1 become constants of the program.
        for heads, kv_heads, length, w, size, always in ((8, 2, 1024, 200, 16, 12), (1, 1, 3, 1, 1, 1)):
            q_w, q = torch.ones(heads, w, d, dtype=dtype), torch.ones(heads, d, dtype=dtype)
            k, r = torch.ones(kv_heads, length, d, dtype=dtype), torch.ones(kv_heads, w, d, dtype=dtype)
            triton_kernels.window_importance(q_w, k, length - w)
            ones, columns = torch.ones(w), torch.ones(heads, length - w)
            triton_kernels.repeat_importance(q_w, k, 0, length - w, ones, columns)
            triton_kernels.cluster_extremes(k, size)
            triton_kernels.cluster_means(k, size)
            triton_kernels.cluster_representatives(k, size, 0.6)
            triton_kernels.cluster_scores(q, r)
            triton_kernels.cluster_bounds(q, r, r)
            for choosing in {kv_heads, heads}:
                chosen = torch.zeros(choosing, 1 if heads == 1 else 12, dtype=torch.int64)
                triton_kernels.select_and_attend(q, k, k, chosen, size, always, always)
            starts = torch.zeros(kv_heads + 1, dtype=torch.int64)
            rows = q.reshape(kv_heads, heads // kv_heads, d)
            triton_kernels.ragged_attend(rows, k[0], k[0], torch.ones(length), starts, length)
            triton_kernels.window_importance(q_w, k[:, :1], 0)
            triton_kernels.cluster_means(k[:, :1], size)
print(len(compiled), "compiled")
