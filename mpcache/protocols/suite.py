"""The protocols that `FastOps` is assembled from, by name, and their type.

`mpcache.engines.ideal` has the same names with the same signatures, on plain fixed-point integers: a
module is a `Suite`, or does not type-check as one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from mpcache.ops import SelectionOf
from mpcache.protocols.activation import activate
from mpcache.protocols.compaction import compact
from mpcache.protocols.compare import Digits, Keys
from mpcache.protocols.linear import (
    blur,
    finish_mask_operand,
    mask_matrix,
    mask_operand,
    matmul_masked_operand,
    product,
    start_mask_operand,
    truncate,
    truncate_local,
    truncate_times,
)
from mpcache.protocols.norm import norm_linear
from mpcache.protocols.reciprocal import reciprocal
from mpcache.protocols.relu import relu
from mpcache.protocols.softmax import quantize_scores, softmax
from mpcache.protocols.topk import topk
from mpcache.rank import Rank
from mpcache.runtime.program import Program
from mpcache.runtime.shares import KnownOperand, MaskedOperand, Share
from mpcache.runtime.side import Side


class Suite(Protocol):
    """What a module has to have to be the protocols of `FastOps`."""

    def activate(self, side: Side, kind: str, x: Share, up: Share | None) -> Program[Share]: ...
    def blur(self, side: Side, x: Share, by: Rank, bits: int) -> Program[torch.Tensor]: ...
    def mask_matrix(self, side: Side, x: Share, ring: int = 64) -> Program[KnownOperand | MaskedOperand]: ...
    def mask_operand(self, x: Share, ring: int = 64) -> Program[MaskedOperand]: ...
    def start_mask_operand(self, x: Share, ring: int = 64) -> Program[MaskedOperand]: ...
    def compact(self, side: Side, scores: Share, k: int, values: Sequence[Share]) -> Program[list[Share]]: ...
    def finish_mask_operand(
        self, x: Share, started: MaskedOperand, joined: MaskedOperand
    ) -> Program[MaskedOperand]: ...
    def matmul_masked_operand(
        self, side: Side, x: Share, w: MaskedOperand | KnownOperand, ring: int = 64
    ) -> Program[Share]: ...
    def norm_linear(
        self,
        side: Side,
        stream: MaskedOperand | None,
        change: Share,
        eps: float,
        w: MaskedOperand | KnownOperand,
        turn: Callable[[Share], Share],
    ) -> Program[tuple[MaskedOperand, Share]]: ...
    def product(
        self, side: Side, x: Share, y: Share, op: Callable[..., torch.Tensor] = torch.mul, ring: int = 64
    ) -> Program[Share]: ...
    def quantize_scores(self, scores: Share) -> Share: ...
    def reciprocal(self, side: Side, x: Share, least: float, most: float) -> Program[Share]: ...
    def relu(self, side: Side, x: Share, width: int) -> Program[Share]: ...
    def softmax(
        self,
        side: Side,
        scores: Share,
        visible: torch.Tensor | None,
        bits: int,
        comparison: type[Keys] | type[Digits] = Keys,
    ) -> Program[tuple[Share, Share]]: ...
    def topk(
        self,
        side: Side,
        scores: Share,
        k: int,
        values: Sequence[Share],
        width: int,
        comparison: type[Keys] | type[Digits] = Keys,
    ) -> Program[tuple[SelectionOf[Share], list[Share]]]: ...
    def truncate(self, side: Side, x: Share, bits: int) -> Program[Share]: ...
    def truncate_local(self, side: Side, x: Share, bits: int) -> Share: ...
    def truncate_times(self, side: Side, x: Share, y: Share) -> Program[Share]: ...


__all__ = [
    "activate", "blur", "compact", "finish_mask_operand", "mask_matrix", "mask_operand",
    "matmul_masked_operand",
    "norm_linear", "product", "quantize_scores", "reciprocal", "relu", "softmax", "start_mask_operand",
    "topk", "truncate", "truncate_local", "truncate_times",
]  # fmt: skip
