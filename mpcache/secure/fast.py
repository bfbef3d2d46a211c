"""`--protocol fast`: resident operands and truncation without wrap errors.

What is not here yet is inherited from CrypTen (`StockOps`). A linear layer returns its product
with all its fraction bits; the next operation truncates what it needs, exactly, in one round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mpcache.ops import Selection
from mpcache.rank import Rank
from mpcache.secure import correlations
from mpcache.secure.correlations import Request
from mpcache.secure.program import Opening, Program, draw, reveal
from mpcache.secure.ring import matmul
from mpcache.secure.shares import Resident, Share
from mpcache.secure.stock import StockOps

_LOW63 = (1 << 63) - 1


class FastOps(StockOps):
    """`Ops` with one opening per linear layer, whatever the size of its weight."""

    name = "fast"

    def first(self, x: torch.Tensor) -> torch.Tensor:
        """A public summand: the server adds it."""
        return x if self.rank is Rank.SERVER else torch.zeros_like(x)

    def fit(self, x: Share) -> Program[Share]:
        """Truncate to the default fraction bits: floor(x / 2^f) + {0, 1}, |x_raw| < 2^62, one round.

        No wrap errors (Escudero et al., eprint 2020/338; PROTOCOLS 2).
        """
        f = x.bits - self.bits
        if f == 0:
            return x
        if f < 0:
            return Share(x.data << -f, self.bits, x.owner)
        r, rc, rb = yield from draw(correlations.truncation(x.shape, f))
        (c,) = yield from reveal(Opening(x.data + self.first(torch.full_like(r, 1 << 62)) + r, "masked for truncation"))
        top, low = (c >> 63) & 1, (c & _LOW63) >> f
        carry = rb + self.first(top) - 2 * top * rb  # b = msb(r) xor msb(c)
        y = self.first(low - (1 << (62 - f))) - rc + (carry << (63 - f))
        return Share(y, self.bits)

    def keep(self, x: Share) -> Program[Resident]:
        x = yield from self.fit(x)
        mask, dealt = yield from draw(correlations.random_mask(x.shape, x.owner))
        (opened,) = yield from reveal(Opening(x.data - mask, "resident, masked", sender=x.owner))
        return Resident(mask, opened, x.bits, dealt)

    def join(self, parts: Sequence[Any], dim: int) -> Any:
        first, *rest = parts
        for part in rest:
            first = first.append(part, dim)
        return first

    def linear(self, x: Share, w: Resident, bias: Share | None = None) -> Program[Share]:
        if x.bits > self.bits:
            x = yield from self.fit(x)
        out = (*x.shape[:-1], w.shape[-1])
        a, c = yield from draw(correlations.resident_product(x.shape, w, out, x.owner))
        (e,) = yield from reveal(Opening(x.data - a, "activation, masked", sender=x.owner))
        y = c + matmul(e, w.mask) + matmul(a, w.opened) + self.first(matmul(e, w.opened))
        if bias is not None:
            y = y + (bias.data << (x.bits + w.bits - bias.bits))
        return Share(y, x.bits + w.bits)

    def add(self, x: Share, y: Share) -> Program[Share]:
        x = yield from self.fit(x)
        y = yield from self.fit(y)
        return x + y

    def _product(self, x: Share, y: Share, request: Request, op: Any) -> Program[Share]:
        a, b, c = yield from draw(request)
        d, e = yield from reveal(Opening(x.data - a, "factor, masked"), Opening(y.data - b, "factor, masked"))
        return Share(c + op(d, b) + op(a, e) + self.first(op(d, e)), x.bits + y.bits)

    def mul(self, x: Share, y: Share) -> Program[Share]:
        x = yield from self.fit(x)
        y = yield from self.fit(y)
        out = tuple(torch.broadcast_shapes(x.shape, y.shape))
        request = correlations.triple(x.shape, y.shape, out, torch.mul, "triple/mul")
        return (yield from self._product(x, y, request, torch.mul))

    def rotate(self, x: Share, cos: torch.Tensor, sin: torch.Tensor) -> Program[Share]:
        return (yield from self.fit(self.rotated(x, cos, sin)))

    def norm(self, x: Share, eps: float) -> Program[Share]:
        x = yield from self.fit(x)
        return (yield from super().norm(x, eps))

    def activation(self, x: Share, kind: str) -> Program[Share]:
        x = yield from self.fit(x)
        return (yield from super().activation(x, kind))

    def softmax(self, scores: Share, visible: torch.Tensor | None) -> Program[tuple[Share, Share]]:
        scores = yield from self.fit(scores)
        return (yield from super().softmax(scores, visible))

    def top(
        self, scores: Share, k: int, values: Sequence[Share]
    ) -> Program[tuple[Selection, list[Share]]]:
        scores = yield from self.fit(scores)
        return (yield from super().top(scores, k, values))
