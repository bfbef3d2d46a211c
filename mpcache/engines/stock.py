"""`--protocol stock`: CrypTen's own protocols, as they are.

Values are `Share`s at `bits` fraction bits; each operation hands them to CrypTen, which
communicates by itself and blocks, so nothing merges. Only what CrypTen lacks is added, on its own
comparisons: top-k with one-hot slots, and the range of the inverse square root.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mpcache.engines.crypten_shim import MPCTensor, call, crypten
from mpcache.model.rope import Rotation, rotate
from mpcache.ops import Engine, SelectionOf
from mpcache.rank import Rank
from mpcache.runtime.program import Call, Opening, Program, at, local, open_secret
from mpcache.runtime.shares import Share, cat, encode

# The inverse square root of a mean square v: exponents of v that are told apart (stock).
V_LOW, V_HIGH = -18, 10


def wrap(x: Share) -> Any:
    """Wrap a Share as CrypTen's tensor (CrypTen works in place: it gets a copy)."""
    return MPCTensor.from_shares(x.data.clone(), precision=x.bits)


def unwrap(t: Any) -> Share:
    """Unwrap CrypTen's tensor: a Share."""
    return Share(t.share, int(math.log2(t.encoder.scale)))


def blocking(fn: Callable[..., Any], *shares: Share) -> Program[Any]:
    """Run CrypTen code on shares; MPCTensors in the result come back as Shares."""

    def run() -> Any:
        result = fn(*(wrap(s) for s in shares))
        return tuple(unwrap(r) for r in result) if isinstance(result, tuple) else unwrap(result)

    answer = yield Call(lambda party, step: call(party, run, step))
    return answer


@dataclass(frozen=True)
class StockSelection(SelectionOf[Share]):
    """One-hot slots h (*rows, k, n), integers in arithmetic shares."""

    hot: Share

    def prepare(self) -> Program[StockSelection]:
        return local(self)

    def refine(self, finer: StockSelection, children: int) -> Program[StockSelection]:
        k = self.hot.shape[-2]

        def run(mine: Any, theirs: Any) -> Any:
            *rows, k2, _ = theirs.size()
            split = theirs.reshape(*rows, k2, k, children).transpose(-1, -2).transpose(-2, -3)
            hot = split.matmul(mine.unsqueeze(-3))  # (*rows, children, k2, n)
            return hot.transpose(-3, -2).transpose(-2, -1).reshape(*rows, k2, -1)

        hot = yield from blocking(run, self.hot, finer.hot)
        return StockSelection(hot)

    def marks(self) -> Share:
        return self.hot.sum(-2)

    def gather(self, values: Share) -> Program[Share]:
        return blocking(lambda h, v: h.matmul(v), self.hot, values)

    def scatter(self, weights: Share) -> Program[Share]:
        return blocking(lambda h, w: h.matmul(w), self.hot.transpose(-1, -2), weights)


class StockOps(Engine[Share, Share]):
    """`Ops` on CrypTen. bits: fraction bits of every value (CrypTen's precision)."""

    name = "stock"

    def __init__(self, rank: Rank, bits: int = 16, device: str = "cpu") -> None:
        self.rank, self.bits, self.device = rank, bits, device

    def secret(
        self, value: torch.Tensor | None, shape: Sequence[int], owner: Rank, bits: int | None = None
    ) -> Share:
        bits = self.bits if bits is None else bits
        if value is None or self.rank is not owner or self.device == "meta":
            data = torch.zeros(tuple(shape), dtype=torch.int64, device=self.device)
        else:
            data = encode(value.cpu(), bits).reshape(tuple(shape))
        return Share(data, bits, owner)

    def rescale(self, x: Share) -> Program[Share]:
        return local(x)

    def prepare(self, x: Share, ring: int = 48) -> Program[Share]:
        return local(x)

    def cat_operands(self, parts: Sequence[Share], dim: int) -> Share:
        return cat(parts, dim)

    def cat(self, parts: Sequence[Share], dim: int) -> Share:
        return cat(parts, dim)

    def linear(self, x: Share, w: Share, bias: Share | None = None) -> Program[Share]:
        y: Share = yield from blocking(lambda a, b: a.matmul(b), x, w)
        return y if bias is None else y + bias

    def scores(self, q: Share, keys: Share) -> Program[Share]:
        return (yield from self.linear(q, keys.transpose(-1, -2)))

    def as_scores(self, x: Share) -> Share:
        return x

    def norm_linear(
        self, x: Share | None, change: Share, eps: float, w: Any, bias: Share | None = None,
        turn: Rotation | None = None,
    ) -> Program[tuple[Share, Share]]:  # fmt: skip
        x = change if x is None else x + change
        y = yield from self.linear((yield from at("norm", self.norm(x, eps))), w, bias)
        if turn is not None:
            turn = Rotation(turn.heads, turn.cos.to(self.device), turn.sin.to(self.device))
            # CrypTen's truncation: each party divides its own share, no message (docs/design.md, 13).
            y = Share(turn(y.data, self.bits).div(1 << self.bits, rounding_mode="trunc"), y.bits)
        return x, y

    def rotate(self, x: Share, cos: torch.Tensor, sin: torch.Tensor) -> Program[Share]:
        rotated = self.rotated(x, cos, sin)
        return local(Share(rotated.data.div(1 << self.bits, rounding_mode="trunc"), x.bits))

    def rotated(self, x: Share, cos: torch.Tensor, sin: torch.Tensor) -> Share:
        """Multiply by public fixed-point angles: `bits` more fraction bits, no truncation yet."""
        c, s = encode(cos, self.bits), encode(sin, self.bits)
        return Share(rotate(x.data, c.to(self.device), s.to(self.device)), x.bits + self.bits)

    def norm(self, x: Share, eps: float) -> Program[Share]:
        """(m, width) to unit root mean square."""
        width = x.shape[-1]

        def run(x: Any) -> Any:
            # The mean square with twice the fraction bits: small variances keep their digits.
            raw = MPCTensor.from_shares(x.share, precision=0).square().sum(-1, keepdim=True)
            raw.share = raw.share.div(width, rounding_mode="trunc")
            raw = raw + round(eps * 2 ** (2 * self.bits))
            exponents = range(V_LOW, V_HIGH)
            thresholds = torch.tensor([1 << (2 * self.bits + j) for j in exponents])
            above = raw.ge(thresholds.to(self.device))  # (m, J), 1 1 1 0 0: v >= 2^j
            hot = above.clone()
            hot.share = above.share.clone()
            hot.share[..., :-1] -= above.share[..., 1:]
            # v below every threshold counts as the lowest exponent.
            lowest = 1 - above[..., :1]
            hot.share[..., :1] += lowest.share
            shifts = torch.tensor([1 << (V_HIGH - 1 - j) for j in exponents], device=self.device)
            unit = raw * (hot * shifts).sum(-1, keepdim=True)  # v * 2^(top - j), in [2^top, 2^(top+1))
            unit.share = unit.share.div(1 << (self.bits + V_HIGH - 1), rounding_mode="trunc")
            unit = MPCTensor.from_shares(unit.share, precision=self.bits)
            roots = encode(torch.tensor([2.0 ** (-j / 2) for j in exponents]), self.bits)
            root = MPCTensor.from_shares(
                (hot.share * roots.to(self.device)).sum(-1, keepdim=True), precision=self.bits
            )
            return x * (unit.inv_sqrt() * root)

        return blocking(run, x)

    def gate(self, kind: str, gate: Share, up: Share | None) -> Program[Share]:
        def activate(x: Any) -> Any:
            if kind == "silu":
                return x * x.sigmoid()
            cube = x * x.square()
            return x * ((x + cube * 0.044715) * (2 * math.sqrt(2 / math.pi))).sigmoid()

        if up is None:
            return blocking(activate, gate)
        return blocking(lambda g, u: activate(g) * u, gate, up)

    def softmax(self, scores: Share, visible: torch.Tensor | None) -> Program[tuple[Share, Share]]:
        if visible is not None:
            # A hidden score becomes the row's own last one: it cannot raise the maximum.
            scores = scores * visible + scores[..., -1:] * (1 - visible)

        def run(s: Any) -> Any:
            return (s - s.max(-1, keepdim=True)[0]).exp()

        e = yield from blocking(run, scores)
        if visible is not None:
            e = e * visible
        return e, e.sum(-1, keepdim=True)

    def weighted_sum(self, weights: Share, values: Share) -> Program[Share]:
        return blocking(lambda w, v: w.matmul(v), weights, values)

    def reciprocal(self, total: Share) -> Program[Share]:
        def run(t: Any) -> Any:
            # CrypTen's start value diverges above 666: an eighth of 1..5000 stays below.
            with crypten.cfg.temp_override({"functions.reciprocal_all_pos": True}):
                return t.div(8).reciprocal().div(8)

        return blocking(run, total)

    def mul(self, x: Share, y: Share) -> Program[Share]:
        return blocking(lambda a, b: a * b, x, y)

    def relu(self, x: Share) -> Program[Share]:
        return blocking(lambda a: a.relu(), x)

    def scale(self, x: Share, factor: float) -> Share:
        scaled = x * round(factor * 2**self.bits)
        return Share(scaled.data.div(1 << self.bits, rounding_mode="trunc"), x.bits)

    def value(self, x: Share) -> Share:
        return x

    def ones(self, shape: Sequence[int]) -> Share:
        return self.secret(torch.ones(tuple(shape)), shape, Rank.SERVER, bits=0)

    def mask_scores(self, scores: Share, alive: Share, far: int) -> Share:
        away = (alive - self.ones(alive.shape)) * (far << scores.bits)
        return scores + Share(away.data, scores.bits)

    def topk(
        self, scores: Share, k: int, values: Sequence[Share], limit: int = 512
    ) -> Program[tuple[StockSelection, list[Share]]]:
        n = scores.shape[-1]
        first, second = torch.triu_indices(n, n, 1)

        def run(s: Any) -> Any:
            beats = s[..., first].ge(s[..., second])  # first < second: ties go to the lower index
            # rank_i = how many beat i: later ones that it does not beat, earlier ones that beat it.
            rank = torch.zeros(*s.shape[:-1], n, dtype=torch.int64, device=s.device)
            share = beats.share.expand(*s.shape[:-1], len(first))
            rank.index_add_(-1, second.to(s.device), share)
            rank.index_add_(-1, first.to(s.device), -share)
            losses = MPCTensor.from_shares(rank, precision=0)
            losses = losses + (n - 1 - torch.arange(n, device=s.device))
            slots = torch.arange(k, device=s.device).unsqueeze(-1)  # (k, 1)
            spread = losses.share.unsqueeze(-2).expand(*s.shape[:-1], k, n).clone()
            distance = MPCTensor.from_shares(spread, precision=0) - slots
            # CrypTen's eq returns 2^16 for integers; equality to zero does not need their scale.
            return MPCTensor.from_shares(distance.share, precision=16).eq(0)

        hot = yield from blocking(run, scores)
        chosen = StockSelection(hot)
        gathered = []
        for value in values:
            gathered.append((yield from chosen.gather(value)))
        return chosen, gathered

    def reveal(self, x: Share, to: Rank, why: str) -> Program[torch.Tensor | None]:
        raw = yield from open_secret(Opening(x.data, why, to=to))
        return None if raw is None else raw.double() / 2**x.bits
