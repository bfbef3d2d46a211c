"""The small set of operations that the decode program and the policies are written over.

One subclass per meaning: `PlainOps` (float tensors), `StockOps` (CrypTen), `FastOps` (ours). A
value is whatever the subclass computes on - a torch tensor or a `Share`; both index, reshape,
transpose, sum, add and subtract locally. Every operation is a program (mpcache.secure.program):
it may cost rounds, and the readers of the program know them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from mpcache.rank import Rank
from mpcache.secure.program import Program

Value = Any  # torch.Tensor or Share
Operand = Any  # a tensor prepared for repeated use: torch.Tensor, Share or Resident


class Selection(ABC):
    """k of n items chosen by score, obliviously; shape (*rows, k) of (*rows, n)."""

    @abstractmethod
    def scatter(self, weights: Value) -> Program[Value]:
        """(*rows, k, c) back to the items' own places: (*rows, n, c), zero where not chosen."""


class Ops(ABC):
    """Operations on values. Shapes in the docstrings; `*b` are batch dimensions."""

    name: str

    @abstractmethod
    def secret(self, value: torch.Tensor | None, shape: Sequence[int], owner: Rank, bits: int | None = None) -> Value:
        """A tensor that `owner` knows; the others pass None. `bits`: fraction bits, if not the default."""

    @abstractmethod
    def keep(self, x: Value) -> Program[Operand]:
        """Prepare a tensor for repeated use as the right operand of `linear` (PROTOCOLS 1)."""

    @abstractmethod
    def join(self, parts: Sequence[Operand], dim: int) -> Operand:
        """Concatenate operands; no cost."""

    @abstractmethod
    def cat(self, parts: Sequence[Value], dim: int) -> Value:
        """Concatenate values; no cost."""

    @abstractmethod
    def linear(self, x: Value, w: Operand, bias: Value | None = None) -> Program[Value]:
        """(*b, m, k) times operand (*b, k, n), plus (n,): (*b, m, n)."""

    @abstractmethod
    def add(self, x: Value, y: Value) -> Program[Value]:
        """x + y where either may come straight out of an operation."""

    @abstractmethod
    def rotate(self, x: Value, cos: torch.Tensor, sin: torch.Tensor) -> Program[Value]:
        """Rotary embedding of (m, heads, d) by public angles (m, d)."""

    @abstractmethod
    def norm(self, x: Value, eps: float) -> Program[Value]:
        """(m, width) to unit root mean square; gains, and LayerNorm's mean, are folded into weights."""

    @abstractmethod
    def gate(self, kind: str, gate: Value, up: Value | None) -> Program[Value]:
        """act(gate) * up, or act(gate): act is silu, gelu or gelu_tanh."""

    @abstractmethod
    def softmax(self, scores: Value, visible: torch.Tensor | None) -> Program[tuple[Value, Value]]:
        """(*b, n) to exp(s - max) and its sum (*b, 1). `visible`: public 0/1 (*b, n); the last
        column of a row is always visible (a token attends to itself)."""

    @abstractmethod
    def average(self, weights: Value, total: Value, values: Operand) -> Program[Value]:
        """weights (*b, m, n) @ values (*b, n, d) / total (*b, m, 1): softmax's deferred division."""

    @abstractmethod
    def top(self, scores: Value, k: int, values: Sequence[Value]) -> Program[tuple[Selection, list[Value]]]:
        """Choose the k highest of (*rows, n), ties to the lower index, in descending order; gather
        each of `values` (*rows, n, c) to (*rows, k, c)."""

    @abstractmethod
    def reveal(self, x: Value, to: Rank, why: str) -> Program[torch.Tensor | None]:
        """The tensor in the clear, at one party only (None at the other)."""
