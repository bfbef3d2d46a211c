"""Rotate queries and keys by their positions (Su et al., RoFormer, arXiv 2104.09864), half-rotation layout.

Dimension i of a head turns together with dimension i + head_dim/2, as in Hugging Face's Llama
checkpoints. Tables are in float64: at position 100 000 a float32 angle is off by 4e-3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mpcache.model.shape import ModelShape


def frequencies(shape: ModelShape) -> Tensor:
    """Compute the angle per position of each pair, in radians: (head_dim / 2,) float64, scaling applied."""
    d = shape.head_dim
    frequency = shape.rope_theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    scaling = shape.rope_scaling
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    # Llama 3.1: by how often a pair turns within the original context, slow ones are stretched.
    turns = scaling.original * frequency / (2 * math.pi)
    keep = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
    return keep * frequency + (1 - keep) * frequency / scaling.factor


def rope_tables(shape: ModelShape, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Compute cos and sin for integer `positions` (m,).

    Each is (m, head_dim) float64, on the positions' device.
    """
    angles = positions.to(torch.float64)[:, None] * frequencies(shape).to(positions.device)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys x (m, heads, head_dim) with tables (m, head_dim); keeps x's dtype."""
    low, high = x.chunk(2, dim=-1)
    rotated = torch.cat((-high, low), dim=-1)
    return x * cos[:, None].to(x.dtype) + rotated * sin[:, None].to(x.dtype)


@dataclass(frozen=True)
class Rotation:
    """The rotation of the first `heads` heads of rows (m, all heads * head_dim).

    cos, sin: (m, head_dim), from `rope_tables`. The other heads stay as they are.
    """

    heads: int
    cos: Tensor
    sin: Tensor

    def __call__(self, x: Tensor, bits: int | None = None) -> Tensor:
        """Rotate x. With `bits`, x is fixed point and comes out with `bits` fraction bits more."""
        cos, sin = self.cos, self.sin
        if bits is not None:
            cos, sin = (torch.round(t * 2**bits).to(torch.int64) for t in (cos, sin))
        m, d = cos.shape
        parts = x.reshape(m, -1, d)
        rest = parts[:, self.heads :]
        rotated = [rotate(parts[:, : self.heads], cos, sin), rest if bits is None else rest << bits]
        return torch.cat(rotated, 1).reshape(m, -1)
