"""Softmax on shares without a tree of maxima: three or five rounds to exp, whatever the length.

1. An upper bound of the maximum, at most 4.6 above it, from the scores' buckets.
2. exp: with d opened as d + r, e^-d is e^r, which the dealer knows, times e^-(d+r), which is public; what is
   shared of r tells which of the two wraps happened and cuts off at e^-18.3 to e^-20.6.
The division is deferred past the product with the values. Two ways to do both trade offline bytes for rounds,
as in `mpcache.protocols.compare`:

* `Keys`: a unary histogram and one key tree per element.
* `Digits`: random sums of XOR shares (`coins`) and tables (`exp_digits`), from one opening of the scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from mpcache.protocols import dcf
from mpcache.protocols.coins import Highest, bound_of
from mpcache.protocols.compare import Digits, Keys, key_parts, less
from mpcache.protocols.dcf import KeyShape
from mpcache.protocols.exp_digits import EXP_BITS, EXP_RING, ExpDigits, dealt_factor, public_factors
from mpcache.protocols.linear import masked, truncate, truncate_local
from mpcache.protocols.lookup import rotated_one_hot
from mpcache.protocols.ranges import (
    BUCKET_STEP,
    BUCKETS,
    COMPARED_BITS,
    SCORE_BITS,
    SCORE_RING,
    WINDOW_BITS,
    WINDOWS_BITS,
)
from mpcache.runtime import bit_loops
from mpcache.runtime.correlations import dealt
from mpcache.runtime.program import Part, Program, Request, RequestKind, draw, open_masked, tree_cipher
from mpcache.runtime.shares import Share
from mpcache.runtime.side import Side, drop_low_bits


def quantize_scores(scores: Share) -> Share:
    """Scores as grid points in a small ring, each party alone: 7/8 of them, error of one step.

    A factor of 7/8 makes the window of exp a power of two of grid steps.
    """
    low = scores.bits + 3 - SCORE_BITS
    if scores.ring - low < SCORE_RING:
        raise ValueError(f"scores in a ring of {scores.ring} bits are too narrow")
    return Share(drop_low_bits(scores.data * 7, low), SCORE_BITS, ring=SCORE_RING)


def bound(side: Side, scores: Share, visible: torch.Tensor | None) -> Program[torch.Tensor]:
    """Shares modulo 2^16 of a c with max < c <= max + 4, of (*b, n) visible scores: (*b, 1). Two rounds.

    |narrow score| < LARGEST_SCORE, n < LONGEST_ROW. Each score's bucket becomes a one-hot vector; their sum
    tells for each bucket how many scores lie in or above it; the buckets with any are counted.
    """
    bucket = side.plus(drop_low_bits(scores.data, scores.bits + BUCKET_STEP.bit_length() - 1), BUCKETS // 2)
    hot, opened = yield from rotated_one_hot(side, bucket, BUCKETS, torch.int16)
    if opened.is_meta:
        histogram = hot.sum(-2, dtype=torch.int64)
    else:
        histogram, numbers = _counted(hot, opened, visible)
        # A bucket is opened modulo BUCKETS, and known in a wider ring: the two are one while it is in range.
        seen = bucket if visible is None else bucket * visible
        side.watch(seen - numbers, min(16, scores.ring - scores.bits - BUCKET_STEP.bit_length() + 1))
    above = histogram.flip(-1).cumsum(-1).flip(-1)[..., 1:]
    width = 1 + scores.shape[-1].bit_length()
    none = yield from less(side, above, width, (1,), torch.int16)
    highest = side.plus(-none.squeeze(-1).sum(-1, keepdim=True), BUCKETS - 1)
    # A bucket may be one too low (`drop_low_bits`); its upper edge and one more are above every score.
    return BUCKET_STEP * side.plus(highest, 2 - BUCKETS // 2)


def _counted(
    hot: torch.Tensor, by: torch.Tensor, visible: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add up visible one-hot rows, turned: their histogram (*b, BUCKETS), and each one's number (*b, n)."""
    rows, n = math.prod(by.shape[:-1]), by.shape[-1]
    seen = torch.ones(rows, n, dtype=torch.bool) if visible is None else visible.bool().reshape(rows, n)
    counts, numbers = np.zeros((rows, BUCKETS), np.int16), np.empty((rows, n), np.int16)
    bit_loops.count_turned(
        hot.reshape(rows, n, BUCKETS).contiguous().numpy(), by.reshape(rows, n).contiguous().numpy(),
        seen.contiguous().numpy(), counts, numbers,
    )  # fmt: skip
    histogram, number = torch.from_numpy(counts).long(), torch.from_numpy(numbers).long()
    return histogram.reshape(*by.shape[:-1], BUCKETS), number.reshape(by.shape)


def exp(side: Side, d: Share) -> Program[Share]:
    """Compute e^-d of a narrow d > 0 with 62 fraction bits. One round.

    It is zero from 20.6 on, and from 18.3 on at times. Relative error 4.4e-5, and 1.2e-7 absolute: the two
    factors' bits, without bias down to e^-15; the grid adds 1.4e-4 relative. d < FARTHEST_SCORE.
    """
    n = math.prod(d.shape)
    keys = KeyShape(n, COMPARED_BITS + WINDOWS_BITS, start=WINDOWS_BITS)
    seeds, words, bit_parts = key_parts(keys)
    whole, rest = (1 << EXP_RING) - 1, WINDOW_BITS - COMPARED_BITS
    cipher = yield from tree_cipher()

    def derive(r: torch.Tensor, s: tuple[torch.Tensor, torch.Tensor]) -> Sequence[torch.Tensor]:
        return dcf.dcf_keygen(keys, cipher, s, (r & whole) >> rest, dealt_factor(r))

    request = Request(RequestKind.EXP, (Part((n,)), seeds), (words, bit_parts), derive, keys.work(points=2))
    r, own, cw, cb = yield from draw(request)
    (c,) = yield from open_masked(masked(d.data.reshape(n) + r, EXP_RING, "masked for exp"))
    if c.is_meta:
        return Share(torch.empty_like(d.data), EXP_BITS)
    c = (c & whole).unsqueeze(-1)
    # d lies in the window if c and r share their top bits, or if c's top bits are one higher and its low bits
    # are not above r's. Leading bits tell. Where these are equal in the second case d is about a window, on
    # either side of its end: the formula holds on both.
    same, _ = dcf.dcf_eval(keys, cipher, side.number, own, cw, cb, c >> rest)
    before = ((c - (1 << WINDOW_BITS)) & whole) >> rest
    lowest = before & ((1 << COMPARED_BITS) - 1) == 0  # not above any: the top bits decide alone
    window, below = dcf.dcf_eval(keys, cipher, side.number, own, cw, cb, before - (~lowest).long())
    wrapped = torch.where(lowest, window, below)
    own, next_ = public_factors(c)
    return Share((same * own + wrapped * next_).reshape(d.shape), EXP_BITS)


def exp_by_keys(side: Side, scores: Share, visible: torch.Tensor | None) -> Program[Share]:
    """e^(s - c) of narrow scores (*b, n). Three rounds."""
    c = yield from bound(side, scores, visible)
    return (yield from exp(side, Share((c << SCORE_BITS) - scores.data, SCORE_BITS)))


def exp_by_digits(side: Side, scores: Share, visible: torch.Tensor | None) -> Program[Share]:
    """e^(s - c) of narrow scores (*b, n). Five rounds; the scores are opened once, c under its own mask."""
    highest, digits = Highest(scores.shape), ExpDigits(scores.shape)
    request = Request(
        RequestKind.HIGHEST, (Part(scores.shape), *highest.random), highest.derived, highest.derive,
        highest.work, keep=True,
    )  # fmt: skip
    r, *parts, kept = yield from draw(request)
    (opened,) = yield from open_masked(masked(scores.data + r, SCORE_RING, "scores, masked"))
    c = bound_of(side, (yield from highest.find(side, parts, opened, visible)))

    def derive(mask: torch.Tensor, entries: torch.Tensor) -> Sequence[torch.Tensor]:
        return digits.derive(mask - dealt(kept)[0], entries)

    request = Request(
        RequestKind.EXP_DIGITS, (Part(tuple(c.shape)), *digits.random), digits.derived, derive, digits.work
    )
    mask, *parts = yield from draw(request)
    (bound,) = yield from open_masked(masked(c + mask, EXP_RING, "bound, masked"))
    return Share((yield from digits.of(side, parts, bound - opened)), EXP_BITS)


def softmax(
    side: Side,
    scores: Share,
    visible: torch.Tensor | None,
    bits: int,
    comparison: type[Keys] | type[Digits] = Keys,
) -> Program[tuple[Share, Share]]:
    """Turn narrow scores (*b, n) into e^(s - c) at `bits` fraction bits, and its sum (*b, 1).

    Four rounds, six where `Digits` compare.

    Each weight is off by 1.4e-4 of itself (the grid) and by 2^-bits / 2 more (a standard deviation), while
    their sum may be as low as e^-BOUND_SLACK. With the bits of `ranges.weight_bits` the weighted mean of n
    values comes out within `ranges.weighted_mean_error` of the largest of them, for scores of any size below
    LARGEST_SCORE: 2e-4 + 6e-5 sqrt(n) for n <= 2048, 7.9e-3 for 4096 and 2.2e-2 for 8192. It takes a peak
    above a floor of e^-10 to e^-13 for each of the others to come near it: rows of normal, flat or single
    scores stay below 6e-4, for n up to 5000.
    """
    if visible is not None:
        visible = visible.to(scores.data.device).expand(scores.shape)
    by = exp_by_digits if comparison is Digits else exp_by_keys
    e = yield from by(side, scores, visible)
    e = truncate_local(side, e, bits)
    # What is not seen may lie above the bound, where exp is out of its range: it is zero before it is looked
    # at, and after, since a truncation may add one.
    e = yield from truncate(side, e if visible is None else e * visible, bits)
    if visible is not None:
        e = e * visible
    return e, e.sum(-1, keepdim=True)
