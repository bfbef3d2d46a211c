"""`--protocol fast`: `Ops` assembled from this package's protocols, with few rounds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from mpcache.ops import Ops, Selection
from mpcache.rank import Rank
from mpcache.rope import rotate
from mpcache.secure import norm, softmax, topk
from mpcache.secure.linear import product, product_resident, resident, truncate
from mpcache.secure.lookup import Series, sines
from mpcache.secure.program import Opening, Program, reveal, together
from mpcache.secure.shares import Resident, Share, cat, encode
from mpcache.secure.side import Side

WEIGHT_BITS = 24  # fraction bits of softmax weights: one of them may be e^-4 of what it should be
INVERSE_BITS = 32  # of the reciprocal of their sum
SELECT_BITS, SELECT_WIDTH = 12, 24  # scores compared for a selection: |score| < 1024, steps of 2^-12
LONGEST = 1 << 15  # attended tokens per query


@cache
def series(kind: str) -> Series:
    """The step of an activation x * step(x). |x| < 32 for silu, 16 for gelu."""
    match kind:
        case "silu":
            return Series.of(torch.sigmoid, 32, 40)
        case "gelu":
            return Series.of(lambda x: 0.5 * (1 + torch.erf(x / 2**0.5)), 16, 36)
        case "gelu_tanh":
            return Series.of(lambda x: torch.sigmoid(1.5957691216 * (x + 0.044715 * x**3)), 16, 36)
    raise ValueError(f"unknown activation {kind}")


class FastOps(Ops):
    """Values carry up to `WEIGHT_BITS` fraction bits where an operation says so, else `bits`.

    A product keeps all its fraction bits; the next operation truncates what it needs (`fit`).
    """

    name = "fast"

    def __init__(self, rank: Rank, bits: int = 16, device: str = "cpu") -> None:
        self.bits, self.side = bits, Side(rank, device)

    def secret(
        self, value: torch.Tensor | None, shape: Sequence[int], owner: Rank, bits: int | None = None
    ) -> Share:
        bits = self.bits if bits is None else bits
        if value is None or self.side.rank is not owner or self.side.device == "meta":
            return Share(torch.zeros(tuple(shape), dtype=torch.int64, device=self.side.device), bits, owner)
        return Share(encode(value, bits).reshape(tuple(shape)), bits, owner)

    def fit(self, x: Share, bits: int | None = None) -> Program[Share]:
        """x at `bits` fraction bits, exactly; free if it has no more."""
        bits = self.bits if bits is None else bits
        return (yield from truncate(self.side, x, bits)) if x.bits != bits else x

    def keep(self, x: Share) -> Program[Resident]:
        x = yield from self.fit(x)
        return (yield from resident(x))

    def join(self, parts: Sequence[Any], dim: int) -> Any:
        first, *rest = parts
        for part in rest:
            first = first.append(part, dim)
        return first

    def cat(self, parts: Sequence[Share], dim: int) -> Share:
        return cat(parts, dim)

    def linear(self, x: Share, w: Resident, bias: Share | None = None) -> Program[Share]:
        if x.bits > WEIGHT_BITS:
            x = yield from self.fit(x)
        y = yield from product_resident(self.side, x, w)
        if bias is None:
            return y
        return Share(y.data + (bias.data << (y.bits - bias.bits)), y.bits)

    def add(self, x: Share, y: Share) -> Program[Share]:
        x, y = yield from together(self.fit(x), self.fit(y))
        return x + y

    def rotate(self, x: Share, cos: torch.Tensor, sin: torch.Tensor) -> Program[Share]:
        angles = (encode(t, self.bits).to(self.side.device) for t in (cos, sin))
        turned = Share(rotate(x.data, *angles), x.bits + self.bits)
        return (yield from self.fit(turned))

    def norm(self, x: Share, eps: float) -> Program[Share]:
        x = yield from self.fit(x)
        return (yield from norm.rms_norm(self.side, x, eps, self.bits))

    def gate(self, kind: str, gate: Share, up: Share | None) -> Program[Share]:
        if up is None:
            gate = yield from self.fit(gate)
            step = yield from sines(self.side, gate, series(kind))
            return (yield from product(self.side, (yield from self.fit(step)), gate))
        gate, up = yield from together(self.fit(gate), self.fit(up))
        # gate * up does not wait for the step.
        step, both = yield from together(
            sines(self.side, gate, series(kind)), product(self.side, gate, up)
        )
        step, both = yield from together(self.fit(step), self.fit(both))
        return (yield from product(self.side, step, both))

    def softmax(self, scores: Share, visible: torch.Tensor | None) -> Program[tuple[Share, Share]]:
        return (yield from softmax.softmax(self.side, scores, visible, WEIGHT_BITS))

    def average(self, weights: Share, total: Share, values: Resident) -> Program[Share]:
        def weighted() -> Program[Share]:
            y = yield from product_resident(self.side, weights, values)
            return (yield from self.fit(y, WEIGHT_BITS))

        least = 2.0 ** -(2 * softmax.SLACK)  # e^-4, and some
        out, inverse = yield from together(
            weighted(), norm.reciprocal(self.side, total, least, LONGEST, INVERSE_BITS)
        )
        return (yield from product(self.side, out, inverse))

    def top(
        self, scores: Share, k: int, values: Sequence[Share]
    ) -> Program[tuple[Selection, list[Share]]]:
        chosen, gathered = yield from topk.top(self.side, scores, k, values, SELECT_BITS, SELECT_WIDTH)
        return chosen, gathered

    def reveal(self, x: Share, to: Rank, why: str) -> Program[torch.Tensor | None]:
        x = yield from self.fit(x)
        (raw,) = yield from reveal(Opening(x.data, why, to=to))
        return None if raw is None else raw.double() / 2**x.bits
