"""e^-d of a distance that is opened masked, by tables of the mask's digits: one round.

docs/protocols.md, section 9.3.

d is opened as c = d + r modulo 2^23: e^-d is e^r, which the dealer knows, times e^-c, which is public, up to
wraps. The dealer shares by XOR the one-hot vector of r's window and a table of [v < r's next digit]; c
chooses the entries that tell which wrap happened. They are opened under one-bit masks, and the dealer shares
e^r times the products of these masks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mpcache.protocols.lookup import TOGETHER, apart, words_for
from mpcache.protocols.ranges import COMPARED_BITS, EXP_WINDOW, SCORE_UNIT, WINDOW_BITS, WINDOWS_BITS
from mpcache.runtime import deal_loops, value_loops
from mpcache.runtime.program import Opening, Part, Program, Shape, Work, open_masked
from mpcache.runtime.ring import elements_of
from mpcache.runtime.side import Side

KEY_BITS, PUBLIC_BITS = 40, 22  # fraction bits of e^(r - window) and of e^-(d + r)
EXP_BITS = KEY_BITS + PUBLIC_BITS
EXP_RING = WINDOW_BITS + WINDOWS_BITS  # what distances are opened modulo
_LOW = (1 << WINDOW_BITS) - 1
_REST = WINDOW_BITS - COMPARED_BITS
_ENTRIES = 3  # bits that are opened of each exponential


def dealt_factor(r: torch.Tensor) -> torch.Tensor:
    """Return e^(r - window) of masks, r modulo a window, with KEY_BITS fraction bits."""
    factor: torch.Tensor = torch.exp((r & _LOW).double() * SCORE_UNIT - EXP_WINDOW) * 2**KEY_BITS
    return factor.round().to(torch.int64)


def public_factors(c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return e^-c modulo a window with PUBLIC_BITS fraction bits: for d in c's own window, and one below."""
    factor = torch.exp(-(c & _LOW).double() * SCORE_UNIT) * 2**PUBLIC_BITS
    return (factor * math.exp(EXP_WINDOW)).round().to(torch.int64), factor.round().to(torch.int64)


@dataclass(frozen=True)
class ExpDigits:
    """Exponentials of (*rows, n): 49 bytes each from the dealer, to the server alone, and 3 opened bits."""

    shape: Shape

    @property
    def random(self) -> tuple[Part, ...]:
        """Masks of the entries, joined."""
        return (Part(words_for(self.shape), torch.int32, xor=True),)

    @property
    def derived(self) -> tuple[Part, ...]:
        """[v = r's window] as 64 bits, [v < r's next digit] as 8, and e^r times products of the masks."""
        return (
            Part(self.shape, xor=True),
            Part(self.shape, torch.uint8, xor=True),
            Part((*self.shape, 5)),
        )

    @property
    def work(self) -> Work:
        """Count one comparison each, and its products."""
        n = math.prod(self.shape)
        return Work(comparisons=n, multiply_adds=4 * n)

    def derive(self, r: torch.Tensor, masks: torch.Tensor) -> Sequence[torch.Tensor]:
        """Derive at the dealer, for distances' masks r (*rows, n)."""
        windows, products = np.empty(self.shape, np.int64), np.empty((*self.shape, 5), np.int64)
        below = np.empty(self.shape, np.uint8)
        each = (x.contiguous().numpy().reshape(-1)
                for x in (r, apart(masks, _ENTRIES, self.shape[-1]), dealt_factor(r)))  # fmt: skip
        deal_loops.exp_parts(
            *each, WINDOW_BITS, (1 << WINDOWS_BITS) - 1, _REST, (1 << COMPARED_BITS) - 1,
            windows.reshape(-1), below.reshape(-1), products.reshape(-1, 5),
        )  # fmt: skip
        return torch.from_numpy(windows), torch.from_numpy(below), torch.from_numpy(products)

    def of(self, side: Side, drawn: Sequence[Any], c: Any) -> Program[torch.Tensor]:
        """Shares of e^-d at EXP_BITS, of 0 < d < FARTHEST_SCORE opened as c (*rows, n). One round.

        Zero from 20.6 on, and from 18.3 on at times.  drawn: `random` and `derived`.
        """
        masks, windows, below, products = drawn
        masks, n = masks.to(torch.int64), self.shape[-1]
        # XOR shares of [r's window is c's], [it is the one below], [c's next digit - 1 < r's]; where that
        # digit is 0 the third one is no matter: it counts as true, publicly.
        entries = torch.empty_like(masks)
        if not c.is_meta:
            value_loops.window_entries(
                *elements_of(windows, below, c), _REST, COMPARED_BITS, WINDOWS_BITS,
                *elements_of(masks), n, *elements_of(entries),
            )  # fmt: skip
        why, ring = "windows, compared and masked", _ENTRIES * TOGETHER
        (f,) = yield from open_masked(Opening(entries, why, ring=ring, xor=True))
        total = torch.empty_like(c)
        if not f.is_meta:
            e, factors = products.numpy().reshape(-1, products.shape[-1]), public_factors(c)
            value_loops.exp_values(
                *elements_of(f, c), _REST, COMPARED_BITS, e, *elements_of(*factors), n, *elements_of(total)
            )
        return total
