"""Comparison in one opening, with arithmetic shares of the outcome (PROTOCOLS 3).

x is opened as x + r in a ring of `width` bits. msb(x) = msb(x + r) xor msb(r) xor t, where
t = [(x + r) mod 2^(width-1) < r mod 2^(width-1)] comes from a key tree for r. The dealer makes the
tree's payload 1 - 2 msb(r) and adds a share of msb(r), so that u = msb(r) xor t arrives additively,
and msb(x) = m + u - 2 m u with the public m = msb(x + r).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from mpcache.secure import fss
from mpcache.secure.correlations import Part, Request
from mpcache.secure.fss import KeyShape
from mpcache.secure.program import Opening, Program, draw, reveal
from mpcache.secure.side import Side, bytes_for


def key_parts(keys: KeyShape) -> tuple[Part, Part, Part]:
    """Seeds (each party's own), correction words and correction bits (the same at both)."""
    return (
        Part(keys.seeds, own=True),
        Part(keys.words, public=True),
        Part(keys.bits, dtype=torch.uint8, public=True),
    )


def sign_keys(
    keys: KeyShape, seeds: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """At the dealer: (msb of the masks, words, bits) for masks (n,) in a ring of depth + 1 bits."""
    top = (mask >> keys.depth) & 1
    words, bits = fss.generate(keys, seeds, mask & ((1 << keys.depth) - 1), 1 - 2 * top)
    return top, words, bits


def sign(
    side: Side,
    keys: KeyShape,
    seeds: torch.Tensor,
    words: torch.Tensor,
    bits: torch.Tensor,
    top: torch.Tensor,
    opened: torch.Tensor,
) -> torch.Tensor:
    """Shares of [x < 0] at opened values x + r (n, points); top: shares of msb(r) (n,)."""  # fmt: skip
    _, t = fss.evaluate(keys, side.number, seeds, words, bits, opened & ((1 << keys.depth) - 1))
    m = (opened >> keys.depth) & 1
    u = top.unsqueeze(-1) + t
    return side.first(m) + u - 2 * m * u


def less(side: Side, x: torch.Tensor, width: int, thresholds: Sequence[int] = (0,)) -> Program[torch.Tensor]:
    """Shares (integers) of [x < theta] for each public threshold: x (*s) -> (*s, thresholds).

    x: shares modulo 2^width of values with |x - theta| < 2^(width-1). One round, one key tree per
    element whatever the number of thresholds: the same opening is evaluated at shifted points.
    """
    n = math.prod(x.shape)
    keys = KeyShape(n, width - 1)
    seeds, words, bits = key_parts(keys)

    def derive(r: torch.Tensor, s: tuple[torch.Tensor, torch.Tensor]) -> Sequence[torch.Tensor]:
        return sign_keys(keys, s, r)

    request = Request("compare", (Part((n,)), seeds), (Part((n,)), words, bits), derive)
    r, own, top, cw, cb = yield from draw(request)
    (opened,) = yield from reveal(Opening(x.reshape(n) + r, "masked for comparison", width=bytes_for(width)))
    points = opened.unsqueeze(-1) - side.public(thresholds)
    return sign(side, keys, own, cw, cb, top, points).reshape(*x.shape, len(thresholds))
