"""What the protocols of `fast` mean, on plain fixed-point integers, and the ranges they hold for.

Each function has the name and the signature of the one in `mpcache.protocols.suite`. A Share holds the
whole secret here, as a true integer: it is not reduced to its ring, so a value that the ring cannot
hold shows. What a protocol is declared for becomes a `Claim`, whose bound comes from the protocol's own
constants; who reads the program judges it, where it knows the step. Functions are exact where a
protocol approximates: errors of tables and masks are the protocols' tests' business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mpcache.engines.plain import PlainSelection
from mpcache.model import prefill
from mpcache.ops import SelectionOf
from mpcache.protocols import linear, norm, ranges
from mpcache.protocols import reciprocal as power
from mpcache.protocols.activation import series
from mpcache.protocols.compaction import SCORE_BITS
from mpcache.protocols.compare import Digits, Keys
from mpcache.protocols.softmax import (
    quantize_scores as quantize_scores,  # each party's own arithmetic: it means itself
)
from mpcache.rank import Rank
from mpcache.runtime.program import Call, Program, local
from mpcache.runtime.shares import KnownOperand, MaskedOperand, Share, decode, encode
from mpcache.runtime.side import Side


@dataclass(frozen=True)
class Claim:
    """All of `raw` is of size below `most` (`size`), or in [least, most). bits: its fraction bits."""

    operation: str
    raw: torch.Tensor
    most: int
    bits: int = 0
    least: int | None = None

    def __call__(self, party: Any, step: str) -> None:
        raise TypeError("a claim is judged by who reads the program (mpcache.engines.checked)")


def claim(
    operation: str, raw: torch.Tensor, most: int, bits: int = 0, least: int | None = None
) -> Program[None]:
    """Claim a range, to be judged where the program is read, at the step that is known there."""
    yield Call(Claim(operation, raw, most, bits, least))


def _held(operation: str, x: Share, ring: int) -> Program[None]:
    """X is a number of its ring, positive or negative."""
    return claim(operation, x.data, 1 << (ring - 1), x.bits)


def _multiplied(
    operation: str,
    x: Share,
    y: Share | MaskedOperand | KnownOperand,
    op: Callable[..., torch.Tensor],
    ring: int,
) -> Program[Share]:
    """op(x, y) with all fraction bits, in a ring that must hold it."""
    if isinstance(y, KnownOperand):
        raise TypeError("`mask_matrix` here makes no such operand")
    data = y.data if isinstance(y, Share) else y.mask + y.opened
    bits, ring = x.bits + y.bits, min(ring, x.ring, y.ring)
    size = op(x.data.double(), data.double())  # int64 would hide what wraps around
    yield from claim(operation, size, 1 << (ring - 1), bits)
    return Share(op(x.data, data), bits, ring=ring)


# ------------------------------------------------------------------------- linear (protocols/linear.py)


def truncate(side: Side, x: Share, bits: int) -> Program[Share]:
    """Round to the nearest."""
    f = x.bits - bits
    if f <= 0 and x.ring == 64:
        return Share(x.data << -f, bits, x.owner)
    yield from claim("truncation", x.data, linear.truncation_room(x.ring) >> max(0, -f), x.bits)
    if f <= 0:
        return Share(x.data << -f, bits)
    return Share((x.data + (1 << (f - 1))) >> f, bits)


def truncate_times(side: Side, x: Share, y: Share) -> Program[Share]:
    """Multiply, x truncated first."""
    x = yield from truncate(side, x, x.bits)
    return (yield from _multiplied("product", x, y, torch.mul, 64))


def truncate_local(side: Side, x: Share, bits: int) -> Share:
    """Round to the nearest."""
    f = x.bits - bits
    return x if f <= 0 else Share((x.data + (1 << (f - 1))) >> f, bits, ring=x.ring - f)


def mask_operand(x: Share, ring: int = 64) -> Program[MaskedOperand]:
    """Prepare an operand: known, and of its ring."""
    yield from _held("masked operand", x, ring)
    return MaskedOperand(torch.zeros_like(x.data), x.data, x.bits, ring=ring)


def mask_matrix(side: Side, x: Share, ring: int = 64) -> Program[KnownOperand | MaskedOperand]:
    """Prepare a matrix as any operand."""
    return (yield from mask_operand(x, ring))


start_mask_operand = mask_operand


def finish_mask_operand(x: Share, started: MaskedOperand, joined: MaskedOperand) -> Program[MaskedOperand]:
    """Return what was joined: nothing waits."""
    return local(joined)


def matmul_masked_operand(
    side: Side, x: Share, w: MaskedOperand | KnownOperand, ring: int = 64
) -> Program[Share]:
    """Multiply by an operand, in a ring that must hold the result."""
    return _multiplied("product with an operand", x, w, torch.matmul, ring)


def product(
    side: Side, x: Share, y: Share, op: Callable[..., torch.Tensor] = torch.mul, ring: int = 64
) -> Program[Share]:
    """Multiply, in a ring that must hold the result."""
    return _multiplied("product", x, y, op, ring)


# ------------------------------------------------------------------------------------- activations


def activate(side: Side, kind: str, x: Share, up: Share | None) -> Program[Share]:
    """Return x * step(x), or that times up."""
    yield from claim(kind, x.data, series(kind).reach << x.bits, x.bits)
    for value in [x] if up is None else [x, up]:
        yield from claim("truncation", value.data, linear.truncation_room(value.ring), value.bits)
    y, bits = prefill.apply_activation(kind, decode(x.data, x.bits)), x.bits + ranges.STEP_BITS
    if up is not None:
        product = x.data * up.data >> up.bits
        yield from claim("gate times up", product, linear.truncation_room(ranges.GATE_RING), x.bits)
        y = y * decode(up.data, up.bits)
    return Share(encode(y, bits), bits)


def relu(side: Side, x: Share, width: int) -> Program[Share]:
    """Return max(x, 0)."""
    yield from claim("max(x, 0)", x.data, 1 << (width - 1), x.bits)
    return replace(x, data=x.data.clamp(min=0), owner=None)


def blur(side: Side, x: Share, by: Rank, bits: int) -> Program[torch.Tensor]:
    """None: what is learned is compared with the plain engine's."""
    return local(torch.zeros_like(x.data))


# ----------------------------------------------------------------------------- norm (protocols/norm.py)


def norm_linear(
    side: Side,
    stream: MaskedOperand | None,
    change: Share,
    eps: float,
    w: MaskedOperand | KnownOperand,
    turn: Callable[[Share], Share],
) -> Program[tuple[MaskedOperand, Share]]:
    """Normalise and multiply, as `norm.norm_linear`."""
    x = yield from truncate(side, change, change.bits)
    if stream is not None:
        x = replace(x, data=x.data + stream.opened)
    width = x.shape[-1]
    total = decode(x.data, x.bits).square().sum(-1, keepdim=True) + eps * width
    high, low = (
        round(width * 2.0 ** (e + 2 * x.bits)) for e in (ranges.MEAN_SQUARE_HIGH, ranges.MEAN_SQUARE_LOW)
    )
    yield from claim("norm, sum of squares", total * 4.0**x.bits, high, 2 * x.bits, low)
    y = turn((yield from _multiplied("product with an operand", x, w, torch.matmul, 64)))
    yield from _held("product with an operand", y, y.ring)
    y = truncate_local(side, y, ranges.NORM_PRODUCT_BITS)
    yield from claim(
        "product, truncated", y.data, linear.truncation_room(min(y.ring, ranges.NORM_PRODUCT_RING)), y.bits
    )
    bits = y.bits + norm.root(width, x.bits)[2]
    normed = decode(y.data, y.bits) * torch.rsqrt(total / width)
    yield from claim("normed product", normed * 2.0**bits, 1 << 63, bits)
    stream = MaskedOperand(torch.zeros_like(x.data), x.data, x.bits)
    return stream, Share(encode(normed, bits), bits)


def reciprocal(side: Side, x: Share, least: float, most: float) -> Program[Share]:
    """Return 1 / x."""
    yield from claim("reciprocal", x.data, math.ceil(most * 2**x.bits), x.bits, math.floor(least * 2**x.bits))
    _, bits = power.reciprocal_range(least, most, x.bits)
    return Share(encode(1 / decode(x.data, x.bits), bits), bits)


# ----------------------------------------------------------------------- softmax (protocols/softmax.py)


def softmax(
    side: Side,
    scores: Share,
    visible: torch.Tensor | None,
    bits: int,
    comparison: type[Keys] | type[Digits] = Keys,
) -> Program[tuple[Share, Share]]:
    """Compute what is visible; the rest is free: it takes part in no bound and in no sum."""
    raw, grid = scores.data, ranges.SCORE_BITS
    mask = torch.ones_like(raw) if visible is None else visible.expand(raw.shape)
    seen = raw * mask
    yield from claim("softmax, row", torch.tensor([raw.shape[-1]]), ranges.LONGEST_ROW)
    yield from claim("softmax, narrow score", seen, ranges.LARGEST_SCORE << grid, grid)
    step = ranges.BUCKET_STEP << grid
    highest = raw.masked_fill(mask == 0, torch.iinfo(torch.int64).min).amax(-1, keepdim=True)
    c = (highest // step + 2) * step  # two buckets above, as `softmax.bound`
    d = torch.where(mask == 1, c - raw, 1)
    yield from claim("exp", d, ranges.FARTHEST_SCORE, grid, 1)
    e = encode(torch.exp(-d.double() * ranges.SCORE_UNIT), bits)
    e = e * mask * (d.double() * ranges.SCORE_UNIT < ranges.EXP_WINDOW)
    return Share(e, bits), Share(e.sum(-1, keepdim=True), bits)


# ------------------------------------------------------------------------- selection (protocols/topk.py)


class IdealSelection(SelectionOf[Share]):
    """Known places, shares to gather and scatter."""

    def __init__(self, places: PlainSelection) -> None:
        self.places = places

    def gather(self, values: Share) -> Program[Share]:
        ring = min(values.ring, ranges.SELECTION_RING)
        yield from _held("gather", values, ring)
        return replace(values, data=self.places.pick(values.data), ring=ring)

    def scatter(self, weights: Share) -> Program[Share]:
        yield from _held("scatter", weights, ranges.SELECTION_RING)
        data = yield from self.places.scatter(weights.data)
        return replace(weights, data=data, ring=ranges.SELECTION_RING)

    def prepare(self) -> Program[IdealSelection]:
        return local(self)

    def refine(self, finer: IdealSelection, children: int) -> Program[IdealSelection]:
        return IdealSelection((yield from self.places.refine(finer.places, children)))

    def marks(self) -> Share:
        return Share(self.places.marks().to(torch.int64), 0)


def topk(
    side: Side,
    scores: Share,
    k: int,
    values: Sequence[Share],
    width: int,
    comparison: type[Keys] | type[Digits] = Keys,
) -> Program[tuple[IdealSelection, list[Share]]]:
    """Choose the k highest, ties to the lower index."""
    raw = scores.data
    apart = raw.amax(-1) - raw.amin(-1)
    yield from claim("top, difference", apart, 1 << (width - 1), scores.bits)
    ring = min(v.ring for v in values)
    order = torch.sort(raw, dim=-1, descending=True, stable=True).indices
    places = PlainSelection(order[..., :k], raw.shape[-1])
    pieces = []
    for value in values:
        yield from _held("top, gathered", value, ring)
        pieces.append(replace(value, data=places.pick(value.data), ring=ring))
    return IdealSelection(places), pieces


# ----------------------------------------------------------------- eviction (protocols/compaction.py)


def compact(side: Side, scores: Share, k: int, values: Sequence[Share]) -> Program[list[Share]]:
    """Keep the k rows of highest score, ties to the lower index."""
    yield from claim("compact, score", scores.data, 1 << SCORE_BITS, least=0)
    order = torch.sort(scores.data, dim=-1, descending=True, stable=True).indices
    places = PlainSelection(order[..., :k], scores.shape[-1])
    return [replace(value, data=places.pick(value.data), owner=None) for value in values]


__all__ = [
    "Claim", "IdealSelection", "activate", "blur", "claim", "compact", "finish_mask_operand", "mask_matrix",
    "mask_operand", "matmul_masked_operand", "norm_linear", "product", "quantize_scores", "reciprocal",
    "relu", "softmax", "start_mask_operand", "topk", "truncate", "truncate_local", "truncate_times",
]  # fmt: skip
