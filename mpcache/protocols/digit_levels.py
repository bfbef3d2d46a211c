"""How a mask's digits are compared: in how many digits and groups, what is dealt, and by what it is added up.

docs/protocols.md, section 6.2.

[c < r] is the chain sum_j l_j prod_(i<j) e_i over the digits' bits l_j = [v_j < d_j] and e_j = [v_j = d_j].
Each bit x = o xor a is opened as o under a mask a of its own. A product of bits, over a set T, is then

    in bits      xor over M in T of [o is 1 on T - M]                prod_M a
    in numbers   sum over M in T of [o is 1 on T - M] (-1)^|o on M|  prod_M a

of which the dealer shares the products of masks, and all else is public. Sets are written as integers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch

from mpcache.runtime import bit_loops
from mpcache.runtime.side import Side

BASES = range(3, 7)  # bits of a digit: its one-hot vector fills a byte at least, and a word at most
_DIGITS = 6  # that one level may open: its tables have an entry for all values of their bits
_GROUP = 5  # digits of a group, likewise
_WORD = 63  # bits of one comparison that the first of two levels adds up


def _chain(size: int, equal: int, first: int = 0) -> list[int]:
    """List the chain's products over `size` digits from `first` on: l_j at bit j, e_j at bit `equal` + j."""
    places = range(first, first + size)
    return [1 << j | sum(1 << (equal + i) for i in places if i < j) for j in places]


def _subsets(of: int) -> Iterator[int]:
    """Yield all subsets of a set, the set itself first and the empty one last."""
    subset = of
    while subset:
        yield subset
        subset = (subset - 1) & of
    yield 0


@dataclass(frozen=True)
class LastLevel:
    """The chain of so many digits, or of groups of them, in numbers."""

    digits: int

    @property
    def bits(self) -> int:
        """Bits that are opened: the last digit needs no equality."""
        return 2 * self.digits - 1

    @cached_property
    def products(self) -> tuple[int, ...]:
        """Sets of masks whose products are dealt: all but the empty one."""
        return tuple(sorted({m for t in _chain(self.digits, self.digits) for m in _subsets(t)} - {0}))

    @cached_property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the opened bits multiply, at each of their values: 1 (values,), and the dealt (values, 1 + n).

        The first dealt number is b = msb(r), the others are 1 - 2 b times the products; the sum is b xor t.
        """
        place = {one: i + 1 for i, one in enumerate(self.products)}
        public = np.zeros(1 << self.bits, np.int8)
        dealt = np.zeros((1 << self.bits, 1 + len(place)), np.int8)
        seen = np.arange(1 << self.bits)
        for product in _chain(self.digits, self.digits):
            for masks in _subsets(product):
                rest = product & ~masks
                signs = np.array([(-1) ** (v & masks).bit_count() for v in range(len(public))], np.int8)
                here = ((seen & rest) == rest) * signs
                if masks:
                    dealt[:, place[masks]] += here
                else:
                    public += here
        dealt[:, 0] = 1 - 2 * public
        return torch.from_numpy(public), torch.from_numpy(dealt)


@dataclass(frozen=True)
class FirstLevel:
    """The chains of groups of digits, one after another, and whether all of a group are equal, in bits."""

    groups: tuple[int, ...]

    @property
    def digits(self) -> int:
        return sum(self.groups)

    @property
    def bits(self) -> int:
        """Bits that are opened: the last digit needs no equality."""
        return 2 * self.digits - 1

    @cached_property
    def _outcomes(self) -> list[tuple[int, int, int, list[int]]]:
        """For each bit that comes out: its place, its group's first digit and size, and its products."""
        m, found, first = self.digits, list[tuple[int, int, int, list[int]]](), 0
        for g, size in enumerate(self.groups):
            found.append((g, first, size, _chain(size, m, first)))
            if g < len(self.groups) - 1:
                equal = ((1 << size) - 1) << (m + first)
                found.append((len(self.groups) + g, first, size, [equal]))
            first += size
        return found

    @cached_property
    def products(self) -> tuple[int, ...]:
        """Sets of masks whose products are dealt: those of two and more."""
        sets = {m for *_, products in self._outcomes for t in products for m in _subsets(t)}
        return tuple(sorted(m for m in sets if m.bit_count() > 1))

    @cached_property
    def _selectors(self) -> list[tuple[int, int, int, torch.Tensor]]:
        """For each outcome, what its group's opened bits choose of the word that `sums` adds up."""
        m = self.digits
        place = {0: 0} | {1 << i: 1 + i for i in range(self.bits)}
        place |= {one: 2 * m + i for i, one in enumerate(self.products)}
        return [
            (out, first, size, torch.tensor([_chosen(products, place, first, size, m, seen)
                                             for seen in range(1 << 2 * size)]))
            for out, first, size, products in self._outcomes
        ]  # fmt: skip

    def multiplied(self, masks: torch.Tensor) -> torch.Tensor:
        """Multiply masks (n,), at the dealer: `products` as bits (n,)."""
        out = np.empty(len(masks), np.int64)
        bit_loops.multiply_bits(masks.contiguous().numpy(), np.array(self.products, np.int64), out)
        return torch.from_numpy(out)

    def sums(self, side: Side, seen: torch.Tensor, masks: torch.Tensor, dealt: torch.Tensor) -> torch.Tensor:
        """XOR shares of the groups' bits (n,): t of group g at bit g, its equality at bit G + g.

        seen: what was opened.  masks, dealt: shares of the masks and of their products.
        """
        m = self.digits
        own = side.constant(1, seen) | ((masks & ((1 << self.bits) - 1)) << 1)
        word = (own | ((dealt & ((1 << len(self.products)) - 1)) << (2 * m))).numpy()
        out = np.zeros(len(word), np.int64)
        for bit, first, size, table in self._selectors:
            bit_loops.add_chosen(word, seen.numpy(), first, m + first, size, table.numpy(), bit, out)
        return torch.from_numpy(out)


_UNSIGNED = {torch.uint8: np.uint8, torch.int16: np.uint16, torch.int32: np.uint32, torch.int64: np.uint64}


def compared_digits(hot: torch.Tensor, digits: torch.Tensor) -> torch.Tensor:
    """XOR shares of the bits l and e (n,) of public digits (n, m), from those of one-hot vectors (n, m)."""
    out = np.empty(len(hot), np.int64)
    vectors = hot.contiguous().numpy().view(_UNSIGNED[hot.dtype])
    bit_loops.compare_digits(vectors, digits.contiguous().numpy(), out)
    return torch.from_numpy(out)


def _chosen(
    products: Sequence[int], place: dict[int, int], first: int, size: int, equal: int, seen: int
) -> int:
    """Return which bits of the word are added up for a group whose opened bits are `seen`, l's below e's."""
    low = seen & ((1 << size) - 1)
    opened, word = (low << first) | (seen >> size) << (equal + first), 0
    for product in products:
        for masks in _subsets(product):
            rest = product & ~masks
            if opened & rest == rest:
                word ^= 1 << place[masks]
    return word


@dataclass(frozen=True)
class DigitLayout:
    """base: bits of a digit.  first: of two levels, or None.  last: what gives numbers."""

    base: int
    first: FirstLevel | None
    last: LastLevel

    @property
    def digits(self) -> int:
        return self.last.digits if self.first is None else self.first.digits

    @property
    def levels(self) -> tuple[FirstLevel | LastLevel, ...]:
        return (self.last,) if self.first is None else (self.first, self.last)

    @property
    def summands(self) -> int:
        """Count the sums of chosen bits, and the products, of one comparison."""
        first = 0 if self.first is None else 2 * len(self.first.groups) - 1
        return 2 * self.digits - 1 + first + len(self.last.products)

    def nbytes(self, itemsize: int) -> int:
        """Count what the dealer sends for a comparison."""
        first = 0 if self.first is None else -(-len(self.first.products) // 8)
        return self.digits * (1 << self.base) // 8 + first + itemsize * (1 + len(self.last.products))


@cache
def cheapest_layout(depth: int, levels: int, itemsize: int) -> DigitLayout:
    """Choose the layout of fewest bytes for c and r of `depth` bits. Raises ValueError if there is none."""
    found = list(_layouts(depth, levels))
    if not found:
        raise ValueError(f"{depth} bits are too many to be compared by digits in {levels} level(s)")
    return min(found, key=lambda one: (one.nbytes(itemsize), one.digits))


def _layouts(depth: int, levels: int) -> Iterator[DigitLayout]:
    for base in BASES:
        digits = max(-(-depth // base), levels)
        if levels == 1 and digits <= _DIGITS:
            yield DigitLayout(base, None, LastLevel(digits))
        for groups in range(1, min(digits, _DIGITS + 1)) if levels == 2 else ():
            size, longer = divmod(digits, groups)
            if size + (longer > 0) > _GROUP:
                continue
            first = FirstLevel((size,) * (groups - longer) + (size + 1,) * longer)
            if 2 * digits + len(first.products) <= _WORD:
                yield DigitLayout(base, first, LastLevel(groups))
