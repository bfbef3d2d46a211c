"""Share what every kernel needs: tiles and their products on the GPU, and how the host cuts the work.

Names, here and in the kernels: D head size, DP the power of two that holds it; *_head and *_row strides
in elements.
"""

# A kernel's parameters are pointers and numbers of Triton's own: they have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2E); the GPU has exp2 only
LOWEST = tl.constexpr(-1e30)  # below any score, and finite: a difference of two is no NaN


@triton.jit
def load_rows(x, rows, x_row, stop, D: tl.constexpr, DP: tl.constexpr):
    """Load x[rows] as a tile (rows, DP); zero from row `stop` and from dimension D on."""
    d = tl.arange(0, DP)
    mask = (rows < stop)[:, None] & (d < D)[None, :]
    return tl.load(x + rows[:, None] * x_row + d[None, :], mask=mask, other=0)


@triton.jit
def tile_product(a, b, DOT: tl.constexpr):
    """Multiply a @ b with float32 sums.

    One tensor-core product; for float32 three, which keep its precision.
    """
    return tl.dot(a.to(DOT), b.to(DOT), input_precision="tf32x3")


# -- what the host decides


def tile_size(n: int) -> int:
    """Return the power of two that holds n and that tensor cores take: 16 or more."""
    return max(16, int(triton.next_power_of_2(n)))


def product_type(*operands: Tensor) -> tl.dtype:
    """Return the type in which operands are multiplied: bfloat16 when all of them are, else float32.

    Triton's interpreter multiplies the bit patterns of bfloat16 as integers, so it gets float32.
    """
    narrow = all(x.dtype == torch.bfloat16 for x in operands) and not triton.knobs.runtime.interpret
    return tl.bfloat16 if narrow else tl.float32


def strided(x: Tensor) -> Tensor:
    """Return x (heads, T, d) or (heads, d) with dimensions side by side.

    Raises ValueError when offsets within a head do not fit in 31 bits.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    if x.shape[-2] * x.stride(-2) >= 1 << 31:
        raise ValueError(f"{x.shape[-2]} rows of {x.stride(-2)} elements exceed 2^31 elements")
    return x


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make the GPU that holds the tensors the current one: Triton launches there."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _processors(device: torch.device) -> int:
    """Count the GPU's multiprocessors; in the interpreter a few, so that it meets splits as well."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def split_length(length: int, programs: int, block: int, device: torch.device) -> tuple[int, int]:
    """Return into how many ranges a length is cut, and their span, a multiple of `block`.

    With `programs` for each range there are enough for two on each multiprocessor, whose equal shares
    then end together.
    """
    wanted = max(1, min(2 * _processors(device) // programs, triton.cdiv(length, block)))
    span = triton.cdiv(triton.cdiv(max(length, 1), wanted), block) * block
    return triton.cdiv(max(length, 1), span), span
