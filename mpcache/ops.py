"""The small set of operations that the decode program and the policies are written over.

One engine per meaning: `PlainOps` (float tensors), `StockOps` (CrypTen), `FastOps` (ours), `CheckedOps`
(fixed point in the clear). Programs know two types. A `Value` is computed on: it indexes, reshapes,
transposes, sums, adds and subtracts without a message. An `Operand` was prepared once, to be multiplied
again and again: it indexes and reshapes, and nothing else. Taking one for the other does not type-check.
Each operation is a program (mpcache.runtime.program): it may cost rounds, and the readers know them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar, cast

import torch

from mpcache.model.rope import Rotation
from mpcache.rank import Rank
from mpcache.runtime.program import Program, local
from mpcache_kernels import Backend

V = TypeVar("V")  # what an engine computes on
O = TypeVar("O")  # noqa: E741 - what it multiplies by, prepared; both are the engine's own types


class Value(ABC):  # noqa: B024 - a name for programs; engines bring their own
    """A tensor of secrets as programs see it: `Share` or torch.Tensor. All of this is free."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Public sizes."""
        raise NotImplementedError

    def __add__(self, other: Value) -> Value:
        raise NotImplementedError

    def __sub__(self, other: Value) -> Value:
        raise NotImplementedError

    def __neg__(self) -> Value:
        raise NotImplementedError

    def __mul__(self, factor: int | torch.Tensor) -> Value:
        raise NotImplementedError

    def __getitem__(self, index: Any) -> Value:
        raise NotImplementedError

    def reshape(self, *shape: int) -> Value:
        raise NotImplementedError

    def transpose(self, a: int, b: int) -> Value:
        raise NotImplementedError

    def sum(self, dim: int, keepdim: bool = False) -> Value:
        raise NotImplementedError

    def expand(self, *shape: int) -> Value:
        raise NotImplementedError


class Operand(ABC):  # noqa: B024
    """A tensor prepared for repeated products: `MaskedOperand`, `Share` or torch.Tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Public sizes."""
        raise NotImplementedError

    def __getitem__(self, index: Any) -> Operand:
        raise NotImplementedError

    def reshape(self, *shape: int) -> Operand:
        raise NotImplementedError

    def transpose(self, a: int, b: int) -> Operand:
        raise NotImplementedError


class SelectionOf(ABC, Generic[V]):
    """k of n items chosen by score, obliviously; shape (*rows, k) of (*rows, n)."""

    @abstractmethod
    def gather(self, values: V) -> Program[V]:
        """Take (*rows, n, c) of the items to (*rows, k, c) of the chosen ones, in their order."""

    @abstractmethod
    def scatter(self, weights: V) -> Program[V]:
        """Put (*rows, k, c) back to the items' own places: (*rows, n, c), zero where not chosen."""

    @abstractmethod
    def prepare(self) -> Program[Any]:
        """Prepare for repeated use: every gather and scatter then opens the values alone."""

    @abstractmethod
    def refine(self, finer: Any, children: int) -> Program[Any]:
        """Join a choice among this one's chosen items, split into `children` each.

        What comes out is one choice of the n * children items, prepared.
        """

    @abstractmethod
    def marks(self) -> V:
        """Mark (*rows, n): 1 where chosen, 0 elsewhere, to be subtracted from `Ops.ones`. No cost."""


class Engine(ABC, Generic[V, O]):
    """Operations on an engine's own values. Shapes in the docstrings; `*b` are batch dimensions."""

    name: str
    kernels: Backend | None = None  # where values are in the clear, and whole steps may be left to kernels

    @abstractmethod
    def secret(
        self, value: torch.Tensor | None, shape: Sequence[int], owner: Rank, bits: int | None = None
    ) -> V:
        """Hold a tensor that `owner` knows; the others pass None. bits: fraction bits, or the default."""

    @abstractmethod
    def rescale(self, x: V) -> Program[V]:
        """Bring x back to the usual fraction bits, to be used more than once."""

    @abstractmethod
    def prepare(self, x: V, ring: int = 48) -> Program[O]:
        """Prepare a tensor for repeated use as the right operand of `linear`. At most one round.

        ring: bits that the products with it need. 48 holds products of two values below 2^14, 56
        sums of softmax weights times values, 64 products of three.
        """

    def prepare_own(
        self, value: torch.Tensor | None, shape: Sequence[int], owner: Rank, ring: int = 48
    ) -> Program[O]:
        """Hold and prepare a tensor that `owner` knows, the others pass None: `secret`, then `prepare`."""
        return self.prepare(self.secret(value, shape, owner), ring)

    def start_prepare(self, x: V, ring: int = 48) -> Program[O]:
        """Run the first half of `prepare`, for a rescaled x, at no round.

        What comes out may be joined, and is an operand of products whose opening shares the round of
        `finish_prepare`, or comes later.
        """
        return self.prepare(x, ring)

    def finish_prepare(self, x: V, started: O, joined: O) -> Program[O]:
        """Run the second half: what `started` was joined to, which nothing has to wait for any more."""
        return local(joined)

    @abstractmethod
    def cat_operands(self, parts: Sequence[O], dim: int) -> O:
        """Concatenate operands; no cost."""

    @abstractmethod
    def cat(self, parts: Sequence[V], dim: int) -> V:
        """Concatenate values; no cost."""

    @abstractmethod
    def linear(self, x: V, w: O, bias: V | None = None) -> Program[V]:
        """Multiply (*b, m, k) by an operand (*b, k, n), plus (n,): (*b, m, n)."""

    @abstractmethod
    def scores(self, q: V, keys: O) -> Program[V]:
        """Score q . k: (*b, m, d) and operand (*b, n, d) -> (*b, m, n), for `topk` and `softmax` only.

        An engine may hold scores in a form of its own. They index, concatenate, reshape, add and subtract
        as values do.
        """

    @abstractmethod
    def as_scores(self, x: V) -> V:
        """Return values as `scores` holds them, to be added to scores. No cost."""

    @abstractmethod
    def norm_linear(
        self, x: O | None, change: V, eps: float, w: O, bias: V | None = None, turn: Rotation | None = None
    ) -> Program[tuple[O, V]]:
        """Add to the residual stream, normalise to unit root mean square, multiply and rotate.

        Returns x + change (m, width), and turn(norm(x + change) @ w + bias).
        x: what came out of here before; None: zero.  change: may come straight out of an operation.
        Gains, and LayerNorm's mean, are folded into w.
        """

    @abstractmethod
    def rotate(self, x: V, cos: torch.Tensor, sin: torch.Tensor) -> Program[V]:
        """Rotate (m, heads, d) by public angles (m, d): rotary embedding."""

    @abstractmethod
    def gate(self, kind: str, gate: V, up: V | None) -> Program[V]:
        """Return act(gate) * up, or act(gate): act is silu, gelu or gelu_tanh."""

    @abstractmethod
    def softmax(self, scores: V, visible: torch.Tensor | None) -> Program[tuple[V, V]]:
        """Turn (*b, n) into exp(s - c), c near the row's maximum, and its sum (*b, 1).

        visible: public 0/1 (*b, n); the last column of a row is always visible (a token attends to itself).
        """

    @abstractmethod
    def weighted_sum(self, weights: V, values: O) -> Program[V]:
        """Multiply softmax's weights (*b, m, n) by values (*b, n, d): (*b, m, d)."""

    @abstractmethod
    def reciprocal(self, total: V) -> Program[V]:
        """Return 1 / total, of a softmax's sum."""

    @abstractmethod
    def mul(self, x: V, y: V) -> Program[V]:
        """Return x * y, element by element: softmax's weights, or their sum of values, by the reciprocal."""

    @abstractmethod
    def relu(self, x: V) -> Program[V]:
        """Return max(x, 0), with x's own fraction bits; |x| < 2^15."""

    @abstractmethod
    def scale(self, x: V, factor: float) -> V:
        """Multiply by a public real, to 16 bits; no cost (`rescale` or `prepare` what comes out)."""

    @abstractmethod
    def value(self, x: O) -> V:
        """Return an operand as a value; no cost."""

    @abstractmethod
    def ones(self, shape: Sequence[int]) -> V:
        """Return public marks: 1 everywhere. No cost."""

    @abstractmethod
    def mask_scores(self, scores: V, alive: V, far: int) -> V:
        """Leave scores where alive (marks) is 1, put them `far` lower where it is 0. No cost."""

    def in_small_ring(self, x: V) -> V:
        """Return x, straight out of an operation, for `topk` only. No cost."""
        return x

    @abstractmethod
    def topk(
        self, scores: V, k: int, values: Sequence[V], limit: int = 512
    ) -> Program[tuple[SelectionOf[V], list[V]]]:
        """Choose the k highest of (*rows, n) in descending order, and gather each of `values` by them.

        |score| < limit; ties go to the lower index. values: (*rows, n, c) become (*rows, k, c).
        """

    def compact(self, scores: V, k: int, values: Sequence[V], limit: int) -> Program[list[V]]:
        """Keep k rows of (*rows, n) by score, for good: each of values (*rows, n, c) becomes (*rows, k, c).

        0 <= score <= limit, to 2^-16 of it; ties go to the lower index. They come by score, which
        tells nobody where they were. What comes out is to be prepared.
        """
        chosen, _ = yield from self.topk(scores, k, [cast(Any, scores).reshape(*scores.shape, 1)], limit)  # type: ignore[attr-defined]
        kept = []
        for value in values:
            kept.append((yield from chosen.gather(value)))
        return kept

    @abstractmethod
    def reveal(self, x: V, to: Rank, why: str) -> Program[torch.Tensor | None]:
        """Open a secret to one party alone, for a reason: the tensor in the clear, None at the other."""

    def start_verdict(self, rounds: int) -> Program[Any]:
        """Close the books on the values seen so far, after so many rounds of what runs beside this.

        It goes beside the next round. What comes out is for `finish_verdict`; None where nobody looks.
        """
        return local(None)

    def finish_verdict(self, started: Any) -> Program[torch.Tensor | None]:
        """Tell the client alone, in one round, whether all these values were in their ranges (1,)."""
        return local(None)


def as_tensor(x: Value | Operand) -> torch.Tensor:
    """Take what the plain engine computes on as the tensor that it is. Raises TypeError for anything else."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"only the plain engine's values are in the clear, not {type(x).__name__}")
    return x


def as_value(x: torch.Tensor) -> Value:
    """Let a program of the plain engine go on with a tensor."""
    return cast(Value, x)


# As programs see them. Engines, whose values are of their own types, come in through `AnyEngine`.
Ops = Engine[Value, Operand]
Selection = SelectionOf[Value]
AnyEngine = Engine[Any, Any]
