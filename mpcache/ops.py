"""The small set of operations that the decode program and the policies are written over.

One subclass per meaning: `PlainOps` (float tensors), `StockOps` (CrypTen), `FastOps` (ours). A
value is whatever the subclass computes on - a torch tensor or a `Share`; both index, reshape,
transpose, sum, add and subtract locally. Every operation is a program (mpcache.runtime.program):
it may cost rounds, and the readers of the program know them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from mpcache.model.rope import Rotation
from mpcache.rank import Rank
from mpcache.runtime.program import Program, local
from mpcache_kernels import Backend

Value = Any  # torch.Tensor or Share
Operand = Any  # a tensor prepared for repeated use: torch.Tensor, Share or MaskedOperand


class Selection(ABC):
    """k of n items chosen by score, obliviously; shape (*rows, k) of (*rows, n)."""

    @abstractmethod
    def gather(self, values: Value) -> Program[Value]:
        """(*rows, n, c) of the items to (*rows, k, c) of the chosen ones, in their order."""

    @abstractmethod
    def scatter(self, weights: Value) -> Program[Value]:
        """(*rows, k, c) back to the items' own places: (*rows, n, c), zero where not chosen."""

    @abstractmethod
    def prepare(self) -> Program[Selection]:
        """Prepare for repeated use: every gather and scatter then opens the values alone."""

    @abstractmethod
    def refine(self, finer: Selection, children: int) -> Program[Selection]:
        """A choice among this one's chosen items, split into `children` each, as one choice of the
        n * children items, kept."""

    @abstractmethod
    def marks(self) -> Value:
        """(*rows, n): 1 where chosen, 0 elsewhere, to be subtracted from `Ops.ones`. No cost."""


class Ops(ABC):
    """Operations on values. Shapes in the docstrings; `*b` are batch dimensions."""

    name: str
    kernels: Backend | None = None  # where values are in the clear, and whole steps may be left to kernels

    @abstractmethod
    def secret(
        self, value: torch.Tensor | None, shape: Sequence[int], owner: Rank, bits: int | None = None
    ) -> Value:
        """A tensor that `owner` knows; the others pass None. `bits`: fraction bits, if not the default."""

    @abstractmethod
    def rescale(self, x: Value) -> Program[Value]:
        """x, ready to be used more than once."""

    @abstractmethod
    def prepare(self, x: Value, ring: int = 48) -> Program[Operand]:
        """Prepare a tensor for repeated use as the right operand of `linear` (PROTOCOLS 1).

        ring: bits that the products with it need. 48 holds products of two values below 2^14, 56
        sums of softmax weights times values, 64 products of three.
        """

    def start_prepare(self, x: Value, ring: int = 48) -> Program[Operand]:
        """First half of `prepare`, for a settled x, at no round: what comes out may be joined, and is an
        operand of products whose opening shares the round of `finish_prepare`, or comes later."""
        return self.prepare(x, ring)

    def finish_prepare(self, x: Value, started: Operand, joined: Operand) -> Program[Operand]:
        """Second half: what `started` was joined to, which nothing has to wait for any more."""
        return local(joined)

    @abstractmethod
    def cat_operands(self, parts: Sequence[Operand], dim: int) -> Operand:
        """Concatenate operands; no cost."""

    @abstractmethod
    def cat(self, parts: Sequence[Value], dim: int) -> Value:
        """Concatenate values; no cost."""

    @abstractmethod
    def linear(self, x: Value, w: Operand, bias: Value | None = None) -> Program[Value]:
        """(*b, m, k) times operand (*b, k, n), plus (n,): (*b, m, n)."""

    @abstractmethod
    def scores(self, q: Value, keys: Operand) -> Program[Value]:
        """Attention scores q . k: (*b, m, d) and operand (*b, n, d) -> (*b, m, n), for `topk` and
        `softmax` only: an engine may hold them in a form of its own. They index, concatenate,
        reshape, add and subtract as values do."""

    @abstractmethod
    def norm_linear(
        self, x: Value | None, change: Value, eps: float, w: Operand, bias: Value | None = None,
        turn: Rotation | None = None,
    ) -> Program[tuple[Value, Value]]:  # fmt: skip
        """Residual connection, norm to unit root mean square, linear layer, rotation: x + change
        (m, width), and turn(norm(x + change) @ w + bias). x: what came out of here before; None: zero.
        change: may come straight out of an operation. Gains, and LayerNorm's mean, are folded into w."""

    @abstractmethod
    def rotate(self, x: Value, cos: torch.Tensor, sin: torch.Tensor) -> Program[Value]:
        """Rotary embedding of (m, heads, d) by public angles (m, d)."""

    @abstractmethod
    def gate(self, kind: str, gate: Value, up: Value | None) -> Program[Value]:
        """act(gate) * up, or act(gate): act is silu, gelu or gelu_tanh."""

    @abstractmethod
    def softmax(self, scores: Value, visible: torch.Tensor | None) -> Program[tuple[Value, Value]]:
        """(*b, n) to exp(s - max) and its sum (*b, 1). `visible`: public 0/1 (*b, n); the last
        column of a row is always visible (a token attends to itself)."""

    @abstractmethod
    def weighted_sum(self, weights: Value, values: Operand) -> Program[Value]:
        """Softmax's weights (*b, m, n) @ values (*b, n, d): (*b, m, d)."""

    @abstractmethod
    def reciprocal(self, total: Value) -> Program[Value]:
        """1 / total, of a softmax's sum."""

    @abstractmethod
    def mul(self, x: Value, y: Value) -> Program[Value]:
        """x * y, element by element: softmax's weights, or their product with values, by the inverse."""

    @abstractmethod
    def relu(self, x: Value) -> Program[Value]:
        """max(x, 0), with x's own fraction bits; |x| < 2^15."""

    @abstractmethod
    def scale(self, x: Value, factor: float) -> Value:
        """x times a public real, to 16 bits; no cost (`rescale` or `prepare` what comes out)."""

    @abstractmethod
    def value(self, x: Operand) -> Value:
        """An operand as a value; no cost."""

    @abstractmethod
    def ones(self, shape: Sequence[int]) -> Value:
        """Public marks: 1 everywhere. No cost."""

    @abstractmethod
    def mask_scores(self, scores: Value, alive: Value, far: int) -> Value:
        """Scores where alive (marks) is 1, `far` below them where it is 0. No cost."""

    def in_small_ring(self, x: Value) -> Value:
        """x, straight out of an operation, for `topk` only. No cost."""
        return x

    @abstractmethod
    def topk(
        self, scores: Value, k: int, values: Sequence[Value], limit: int = 512
    ) -> Program[tuple[Selection, list[Value]]]:
        """Choose the k highest of (*rows, n), |score| < limit, ties to the lower index, in descending
        order; gather each of `values` (*rows, n, c) to (*rows, k, c)."""

    @abstractmethod
    def reveal(self, x: Value, to: Rank, why: str) -> Program[torch.Tensor | None]:
        """The tensor in the clear, at one party only (None at the other)."""
